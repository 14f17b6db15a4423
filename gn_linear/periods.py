r"""Rules for ``period``: when iterative linearisation moves its anchor.

At each step a rule is handed a ``Context`` and answers yes or no. ``iterative_linearisation`` moves the anchor where it
says yes, and at step 0 whatever it says. With step :math:`t`, parameters :math:`\theta_t`, anchor :math:`\theta_s` and
the step :math:`s` at which it was set:

============================  ==========================================================================
rule                          yes, if
============================  ==========================================================================
``every``                     :math:`t - s \ge k`; a plain integer as ``period`` means this
``at``                        :math:`t` is one of the steps
``early_then_sparse``         :math:`t - s` reaches one period early in the run, another one later
``stop_after``                another rule says so, up to some step
``when_linearisation_error``  the linearised model misses too large a share of the outputs' motion
``when_kernel_drifts``        the neural tangent kernel on a probe batch has turned away from the anchor's
============================  ==========================================================================

Any function from a ``Context`` to a boolean array of shape () is a rule as well, such as
``lambda context: first(context) | second(context)``. Rules are frozen dataclasses registered as pytrees; their
numbers are traced leaves, so they pass through ``jit`` and ``vmap``. ``optax.inject_hyperparams`` takes whatever can be
called for a schedule unless ``static_args`` names ``period``. To inject the number of a rule, inject into a function
that makes the rule, and the transform, from that number.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _tree
from gn_linear._linearise import linearise, missed_share
from gn_linear._typing import Count, Flag, Inputs, Number, Params, Predict, Scalar, check_count, check_number, shown

__all__ = [
    "Context",
    "Rule",
    "at",
    "early_then_sparse",
    "every",
    "stop_after",
    "when_kernel_drifts",
    "when_linearisation_error",
]

LONGEST_PERIOD = 2**31 - 1
"""The range of the step counter; such a period means that the anchor never moves."""

_NO_SCHEDULE = "For a schedule of integers wrap the transform in optax.inject_hyperparams."


class Context(NamedTuple):
    """What a rule may look at before a step.

    Attributes:
        count: steps so far, shape (); 0 at the first step.
        age: steps since the last re-linearisation, shape (): 1 right behind it, so that a period of k ends at k.
        params: the parameters, where the anchor moves if the rule says yes.
        anchor: where the model is linearised so far, like the parameters.
        inputs: this step's batch.
        predict: the model on these parameters; what ``optax.masked`` or ``optax.partition`` took out is filled in.
    """

    count: Count
    age: Count
    params: Params
    anchor: Params
    inputs: Inputs
    predict: Predict


class Rule:
    """When to linearise anew, called with a ``Context``; subclass it, or pass a plain function of one."""

    def __call__(self, context: Context) -> Flag:
        """Whether the anchor moves to the parameters of this step.

        Args:
            context: what may be looked at.

        Returns:
            A boolean array of shape (); at step 0 it does not count.
        """
        raise NotImplementedError


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class every(Rule):
    r"""Every k steps, what a plain integer as ``period`` means.

    .. math:: \theta_s \leftarrow \theta_t \text{ if } t - s \ge k

    Attributes:
        k: inner steps per linearisation, at least 1; an int or an integer array, which may be traced.

    Raises:
        TypeError: ``k`` is not an integer.
        ValueError: ``k`` is below 1 or above 2147483647.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.periods.every(10)
        every(k=10)

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation.
    """

    k: int | Count

    def __post_init__(self) -> None:
        check_steps(self.k, "k")

    def __call__(self, context: Context) -> Flag:
        """By the age."""
        return jnp.asarray(context.age >= self.k)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class at(Rule):
    r"""At the steps of a list, and at step 0.

    .. math:: \theta_s \leftarrow \theta_t \text{ if } t \in \text{steps}

    Attributes:
        steps: step numbers, the first step being 0, in any order; a sequence of integers, or an integer array of shape
            (n,); they may be traced. With none the model stays linearised where it started.

    Raises:
        TypeError: ``steps`` is no sequence of integers.
        ValueError: one of them is negative or above 2147483647.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.periods.at([100, 200, 400])
        at(steps=(100, 200, 400))

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation.
    """

    steps: Sequence[int | Count] | jax.Array

    def __post_init__(self) -> None:
        steps: Any = self.steps
        if isinstance(steps, (jax.Array, np.ndarray)) and steps.ndim == 1 and jnp.issubdtype(steps.dtype, jnp.integer):
            for extreme in (steps.min(), steps.max()) if steps.size else ():
                check_steps(extreme, "steps", minimum=0)
        elif isinstance(steps, Sequence) and not isinstance(steps, str):
            for i, step in enumerate(steps):
                check_steps(step, f"steps[{i}]", minimum=0)
            object.__setattr__(self, "steps", tuple(steps))
        else:
            raise TypeError(
                f"steps must be a sequence of ints or an integer array of shape (n,), but is {shown(steps)}."
            )

    def __call__(self, context: Context) -> Flag:
        """By the step count."""
        return jnp.any(context.count == jnp.asarray(self.steps, context.count.dtype))


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class early_then_sparse(Rule):
    r"""Often early in the run, where features change fast, and seldom after.

    .. math::
        \theta_s \leftarrow \theta_t \text{ if } t - s \ge
        \begin{cases} \text{dense} & t < \text{until} \\ \text{sparse} & t \ge \text{until} \end{cases}

    All three are ints or integer arrays, which may be traced.

    Attributes:
        dense: the period before step ``until``, at least 1.
        until: the first step of the sparse part, at least 0.
        sparse: the period from there on, at least 1, counted from the last re-linearisation before.

    Raises:
        TypeError: one of them is not an integer.
        ValueError: one of them is out of range.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.periods.early_then_sparse(1, 100, 50)  # steps 0, 1, ..., 99, 149, 199, ...
        early_then_sparse(dense=1, until=100, sparse=50)

    References:
        Fort et al. (2020), Deep learning versus kernel learning: an empirical study of loss landscape geometry and the
        time evolution of the neural tangent kernel, where the kernel moves most in the first epochs.
    """

    dense: int | Count
    until: int | Count
    sparse: int | Count

    def __post_init__(self) -> None:
        check_steps(self.dense, "dense")
        check_steps(self.until, "until", minimum=0)
        check_steps(self.sparse, "sparse")

    def __call__(self, context: Context) -> Flag:
        """By the age, against the period of this step."""
        return jnp.where(context.count < self.until, context.age >= self.dense, context.age >= self.sparse)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class stop_after(Rule):
    r"""Another rule up to step t, and never after: the features are learnt in t steps, the rest is linear.

    .. math:: \theta_s \leftarrow \theta_t \text{ if the rule says so and the step is at most } t

    With ``every(1)`` the network is trained for t steps and then linearised at the parameters that these reached. The
    rule is evaluated, and paid for, at every step all the same.

    Attributes:
        t: the last step at which the anchor may move, at least 0; an int or an integer array, which may be traced.
        rule: a rule, or a function of its context.

    Raises:
        TypeError: ``t`` is not an integer, or ``rule`` no rule.
        ValueError: ``t`` is out of range.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.periods.stop_after(500, gnl.periods.every(10))
        stop_after(t=500, rule=every(k=10))

    References:
        Fort et al. (2020), Deep learning versus kernel learning: an empirical study of loss landscape geometry and the
        time evolution of the neural tangent kernel, whose networks are linearised after some epochs of training.
    """

    t: int | Count
    rule: Rule | Callable[[Context], Any]

    def __post_init__(self) -> None:
        check_steps(self.t, "t", minimum=0)
        object.__setattr__(self, "rule", as_rule(self.rule, "rule"))

    def __call__(self, context: Context) -> Flag:
        """The rule's answer, and no after the last step."""
        return ask(cast(Rule, self.rule), context) & (context.count <= self.t)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class when_linearisation_error(Rule):
    r"""When the linearised model misses more than some share of the outputs' motion on this step's batch.

    .. math::
        \theta_s \leftarrow \theta_t \text{ if }
        \frac{\|f(\theta_t) - f_\mathrm{lin}(\theta_t)\|}{\|f(\theta_t) - f(\theta_s)\|} > \text{bound}, \qquad
        f_\mathrm{lin}(\theta_t) = f(\theta_s) + J(\theta_s) (\theta_t - \theta_s)

    It costs a forward pass and a Jacobian-vector product more at every step. The error is that of
    ``gn_linear.diagnostics.linearisation_error``: 0 where nothing moved, and NaN where the outputs are not finite; the
    anchor stays then.

    Attributes:
        bound: of the error, not negative, may be traced; 1 is what a model that does
            not move misses.

    Raises:
        TypeError: ``bound`` is not a number.
        ValueError: ``bound`` is negative or not finite.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.periods.when_linearisation_error(0.1)
        when_linearisation_error(bound=0.1)

    References:
        Lee et al. (2019), Wide neural networks of any depth evolve as linear models, for the comparison of the two;
        re-linearising by its size is this package's own rule.
    """

    bound: Number

    def __post_init__(self) -> None:
        check_number(self.bound, "bound")

    def __call__(self, context: Context) -> Flag:
        """By the error at this step."""
        error = missed_share(context.predict, context.anchor, context.params, context.inputs)
        return error > jnp.asarray(self.bound, error.dtype)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class when_kernel_drifts(Rule):
    r"""When the empirical neural tangent kernel on a probe batch is too far from the one at the anchor.

    .. math::
        \theta_s \leftarrow \theta_t \text{ if }
        S = 1 - \frac{\langle K_s, K_t \rangle_F}{\|K_s\|_F \|K_t\|_F} > \text{bound}, \qquad K = J J^T

    The kernels have a row for each output entry of the probe batch and are never formed. With random signs
    :math:`z_1, \dots, z_p`, the same for both kernels and at every step,

    .. math::
        \langle A, B \rangle_F = \mathrm{E} \, (A z)^T (B z) \approx \frac1p \sum_{i=1}^p (A z_i)^T (B z_i)

    stands for the three products of the fraction, so equal kernels are at distance 0, but for rounding, whatever the
    signs. If the
    probe batch has at most ``probes`` output entries, unit vectors take the place of the signs and S is exact.

    Every step costs, on the probe batch, two linearisations, and with each vector a vector-Jacobian and a
    Jacobian-vector product at both places; memory is that of one such product. Where a kernel is 0 or not finite, S is
    NaN and the anchor stays.

    Attributes:
        bound: of the distance S, which lies between 0 and 1; not negative, may be traced.
        probe_inputs: a small batch for ``predict``, the same at every step.
        probes: p, how many vectors, at least 1; errors of the estimate shrink like its inverse square root.

    Raises:
        TypeError: ``bound`` is not a number, or ``probes`` no int.
        ValueError: ``bound`` is negative or not finite, ``probes`` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> rule = gnl.periods.when_kernel_drifts(0.05, jnp.linspace(-1.0, 1.0, 8)[:, None], probes=8)

    References:
        Fort et al. (2020), Deep learning versus kernel learning: an empirical study of loss landscape geometry and the
        time evolution of the neural tangent kernel, for the kernel distance; Hutchinson (1990), A stochastic estimator
        of the trace.
    """

    bound: Number
    probe_inputs: Inputs
    probes: int = dataclasses.field(default=16, metadata={"static": True})

    def __post_init__(self) -> None:
        check_number(self.bound, "bound")
        check_count(self.probes, "probes")

    def __call__(self, context: Context) -> Flag:
        """By the distance at this step."""
        drift = kernel_distance(context.predict, context.params, context.anchor, self.probe_inputs, self.probes)
        return drift > jnp.asarray(self.bound, drift.dtype)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Function(Rule):
    """A plain function as a rule."""

    function: Callable[[Context], Any] = dataclasses.field(metadata={"static": True})

    def __call__(self, context: Context) -> Any:
        try:
            return self.function(context)
        except Exception as error:
            error.add_note(
                f"period was called as a rule: {shown(self.function)} must take a gn_linear.periods.Context. "
                f"{_NO_SCHEDULE}"
            )
            raise


def as_rule(rule: Any, argument: str) -> Rule:
    """A rule from a rule or a plain function.

    Args:
        rule: what a user gave.
        argument: its name, for the message.

    Returns:
        The rule.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(rule, Rule):
        return rule
    if not callable(rule) or isinstance(rule, type):
        raise TypeError(
            f"{argument} must be a rule of gn_linear.periods or a function of its context, but is {shown(rule)}."
        )
    return _Function(rule)


def ask(rule: Rule, context: Context) -> Flag:
    """A rule's answer, checked.

    Args:
        rule: the rule.
        context: what it may look at.

    Returns:
        The answer.

    Raises:
        TypeError: it is not a boolean array of shape ().
    """
    due = rule(context)
    array = isinstance(due, (bool, np.bool_, np.ndarray, jax.Array))
    if not array or np.shape(due) != () or jnp.result_type(due) != jnp.bool_:
        asked, hint = (rule.function, f" {_NO_SCHEDULE}") if isinstance(rule, _Function) else (rule, "")
        raise TypeError(
            f"period must be a rule that returns a boolean array of shape (), but {shown(asked)} returned "
            f"{shown(due)}.{hint}"
        )
    return jnp.asarray(due)


def check_steps(value: Any, argument: str, *, minimum: int = 1, also: str = "", hint: str = "") -> None:
    """Raise unless a value is an integer of shape () in range; a traced one passes if its dtype is right.

    Args:
        value: a step or a number of steps.
        argument: its name, for the message.
        minimum: the smallest one allowed.
        also: what else the argument may be, for the message.
        hint: what a message about the type adds at its end.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range.
    """
    array = isinstance(value, (np.ndarray, jax.Array)) and value.shape == ()
    if isinstance(value, bool) or not (array or isinstance(value, (int, np.integer))) or not _is_integral(value):
        raise TypeError(
            f"{argument} must be an int or an integer array of shape (){also}, but is {shown(value)}.{hint}"
        )
    try:
        steps = int(value)
    except jax.errors.ConcretizationTypeError:
        return
    if steps < minimum:
        note = " (1 is ordinary training)" if minimum == 1 else ""
        raise ValueError(f"{argument} must be at least {minimum}{note}, but is {steps}.")
    if steps > LONGEST_PERIOD:
        raise ValueError(f"{argument} must be at most {LONGEST_PERIOD}, which no run outlasts, but is {steps}.")


def _is_integral(value: Any) -> bool:
    return isinstance(value, int) or jnp.issubdtype(value.dtype, jnp.integer)


def kernel_distance(model: Predict, params: Params, anchor: Params, inputs: Inputs, probes: int) -> Scalar:
    """The distance of the neural tangent kernels at two places, in the norm that ``when_kernel_drifts`` describes.

    Args:
        model: ``model(params, inputs) -> outputs``.
        params: the one place.
        anchor: the other one.
        inputs: the probe batch.
        probes: how many random signs, unless the outputs are no more.

    Returns:
        The distance, shape (); NaN if a kernel is 0.
    """
    here, there = linearise(model, params, inputs), linearise(model, anchor, inputs)
    size, dtype = sum(leaf.size for leaf in jax.tree.leaves(here.outputs)), _tree.scalar_dtype(here.outputs)
    if size <= probes:
        vectors = jnp.eye(size, dtype=dtype)
    else:
        vectors = jax.random.rademacher(jax.random.key(0), (probes, size), dtype)

    def directions(vector: jax.Array) -> tuple[Any, Any]:
        cotangent = _tree.unflatten(vector, here.outputs)
        return _tree.to_solve(here.jvp(here.vjp(cotangent))), _tree.to_solve(there.jvp(there.vjp(cotangent)))

    now, then = (_tree.divide(kernel, _tree.norm(kernel)) for kernel in jax.lax.map(directions, vectors))
    # Half the squared chord is 1 - cosine, without its cancellation where the kernels are close.
    chord = _tree.subtract(now, then)
    return 0.5 * _tree.dot(chord, chord)
