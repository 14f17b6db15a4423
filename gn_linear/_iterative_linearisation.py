"""Iterative linearisation as an optax transform: the gradient of the model linearised at an anchor.

With the period K the anchor moves to the parameters every K steps. K = 1 is ordinary training, K at least the number
of steps is training of the model linearised at its initialisation; in between, features change every K steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gn_linear import _tree
from gn_linear._batch import MISSING, check_keywords, check_state, checked_params, whole_model
from gn_linear._linearise import displacement, linearise, missed_share
from gn_linear._typing import Count, Flag, Params, Predict, Scalar, shown
from gn_linear.curvature import check_l2, fit_l2, l2_times
from gn_linear.losses import Loss, from_convex
from gn_linear.periods import Context, Rule, as_rule, ask, check_steps, every


class LinearisationInfo(NamedTuple):
    r"""What ``iterative_linearisation`` did so far; every field has shape ().

    Attributes:
        feature_updates: re-linearisations so far, the first step included.
        age: steps since the last one; 0 right after it.
        linearisation_error: at the end of the last block of two steps or more, on the batch that followed it,
            :math:`\|f(\theta) - f_\mathrm{lin}(\theta)\| / \|f(\theta) - f(\theta_s)\|`, as
            ``gn_linear.diagnostics.linearisation_error`` defines it; NaN before there is one.
    """

    feature_updates: Count
    age: Count
    linearisation_error: Scalar


class IterativeLinearisationState(NamedTuple):
    """The state of ``iterative_linearisation``; read it through ``gn_linear.info`` and ``gn_linear.anchor``.

    Attributes:
        count: updates so far, shape ().
        anchor: where the model is linearised, like the parameters.
        info: what was done so far.
    """

    count: Count
    anchor: Params
    info: LinearisationInfo


def iterative_linearisation(
    predict: Predict,
    loss: Loss | Callable[..., Any],
    *,
    period: int | np.integer | jax.Array | Rule | Callable[[Context], Any],
    l2: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the gradient by that of the model linearised at an anchor, which moves every ``period`` steps.

    .. math::
        g_t = J(\theta_s)^T \, \nabla \ell\bigl(f(\theta_s) + J(\theta_s)(\theta_t - \theta_s)\bigr)
              + \lambda \theta_t, \qquad \theta_s \leftarrow \theta_t \text{ if } t \bmod K = 0.

    It stands first in a chain, in front of any optimiser: the incoming gradient is replaced, and so is all that stood
    in front of it. Put clipping behind it, and a penalty into ``l2``. The optimiser's own state is kept when the anchor
    moves. With ``period=1`` every step is the one that the optimiser takes on the true gradient, at the cost of a plain
    gradient (one forward-mode pass more if the period is traced). Nothing is refused here; ``optax.apply_if_finite``
    around the chain skips steps whose incoming gradient is not finite, so hand it the true gradient then.

    ``update(updates, state, params, *, inputs, targets=None, full_params=None)`` takes this step's batch; the batch may
    change at every step. Reported predictions differ between ``predict(params, x)`` and
    ``gn_linear.linearised(predict, gn_linear.anchor(state))(params, x)``: say which one you mean.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``; deterministic given its inputs (pass the random
            key of a stochastic layer in ``inputs``).
        loss: a loss of ``gn_linear.losses``, or any convex ``loss(outputs, targets)`` that returns a scalar or one
            value per example.
        period: K, inner steps per linearisation, at least 1; an int or an integer array, which may be traced. Or a rule
            of ``gn_linear.periods``, or a function from its ``Context`` to a boolean array of shape (): the anchor
            moves at step 0 and where the rule says so.
        l2: coefficient :math:`\lambda` of the penalty :math:`\frac12 \lambda \|\theta\|^2`, a number or a pytree like
            the parameters.

    Returns:
        An optax transform whose updates are gradients, for the optimiser behind it.

    Raises:
        TypeError: an argument has the wrong type; in ``update``, ``inputs`` is missing, a leaf is not a float array, or
            a rule returns something else than a boolean array of shape ().
        ValueError: ``period`` is below 1 or above 2147483647, ``l2`` is out of range; in ``update``, ``params`` is
            missing or shapes do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x, y = jnp.linspace(-1.0, 1.0, 16), jnp.linspace(0.0, 1.0, 16) ** 2
        >>> predict = lambda p, x: jnp.tanh(p["w"] * x + p["b"])
        >>> optimiser = optax.chain(
        ...     gnl.iterative_linearisation(predict, gnl.losses.squared_error, period=10), optax.adam(1e-2)
        ... )
        >>> params = {"w": jnp.array(1.0), "b": jnp.array(0.0)}
        >>> state = optimiser.init(params)
        >>> for _ in range(25):
        ...     grads = jax.grad(lambda p: gnl.losses.squared_error(predict(p, x), y))(params)  # not read
        ...     updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        ...     params = optax.apply_updates(params, updates)
        >>> print(gnl.info(state).feature_updates, gnl.info(state).age)
        3 4

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation.
    """
    objective = from_convex(loss)
    if not callable(predict):
        raise TypeError(f"predict must be a function predict(params, inputs), but is {shown(predict)}.")
    rule = _as_rule(period)
    check_l2(l2)
    transform = _IterativeLinearisation(predict, objective, rule, l2)
    return optax.GradientTransformationExtraArgs(transform.init, transform.update)


@dataclasses.dataclass(frozen=True)
class _IterativeLinearisation:
    """The two functions of the transform, and what they share."""

    predict: Predict
    loss: Loss
    rule: Rule
    l2: Any

    def init(self, params: Params) -> IterativeLinearisationState:
        _tree.check_float_leaves(params, "params")
        zero = jnp.zeros([], jnp.int32)
        error = jnp.full([], jnp.nan, _tree.scalar_dtype(params))
        anchor = _tree.strongly_typed(params)
        state = IterativeLinearisationState(zero, anchor, LinearisationInfo(zero, zero, error))
        return _tree.copied(state)

    def update(
        self,
        updates: Params,
        state: Any,
        params: Any = None,
        *,
        inputs: Any = MISSING,
        targets: Any = None,
        full_params: Params | None = None,
        **ignored: Any,
    ) -> tuple[Params, IterativeLinearisationState]:
        check_keywords("iterative_linearisation", ignored)
        params = checked_params("iterative_linearisation", updates, params, inputs)
        check_state("iterative_linearisation", state, IterativeLinearisationState, self.init, params)
        model = whole_model(self.predict, params, full_params)

        def measured() -> Scalar:
            error = missed_share(model, state.anchor, params, inputs)
            return error.astype(state.info.linearisation_error.dtype)

        info = state.info
        started = state.count > 0
        age = info.age + started.astype(info.age.dtype)
        relinearise = ~started | ask(self.rule, Context(state.count, age, params, state.anchor, inputs, model))
        # A cost-only distinction: with a period known to be 1 the parameters are always at the anchor. A branch at run
        # time would not do: both sides run under vmap.
        if isinstance(self.rule, every) and isinstance(self.rule.k, int) and self.rule.k == 1:
            anchor, error = params, info.linearisation_error
            linear = linearise(model, anchor, inputs)
            outputs = linear.outputs
        else:
            anchor = _tree.where(relinearise, params, state.anchor)
            error = jax.lax.cond(relinearise & (info.age > 0), measured, lambda: info.linearisation_error)
            linear = linearise(model, anchor, inputs)
            outputs = jax.tree.map(jnp.add, linear.outputs, linear.jvp(displacement(anchor, params)))
        gradient = linear.vjp(self.loss.gradient(outputs, targets))
        return _with_penalty(gradient, fit_l2(self.l2, params), params), IterativeLinearisationState(
            jnp.asarray(optax.safe_increment(state.count)), anchor, _progress(info, relinearise, error)
        )


def _as_rule(period: Any) -> Rule:
    if isinstance(period, Rule) or callable(period):
        return as_rule(period, "period")
    hint = " A schedule must return integers." if isinstance(period, jax.Array) and period.shape == () else ""
    check_steps(period, "period", also=", or a rule of gn_linear.periods", hint=hint)
    return every(period)


def _with_penalty(gradient: Params, l2: Any, params: Params) -> Params:
    if isinstance(l2, (int, float)) and l2 == 0:
        return gradient
    return _tree.add(gradient, _tree.cast_like(l2_times(l2, _tree.to_solve(params)), gradient))


def _progress(info: LinearisationInfo, relinearise: Flag, error: Scalar) -> LinearisationInfo:
    happened = relinearise.astype(info.age.dtype)
    return LinearisationInfo(info.feature_updates + happened, (info.age + 1) * (1 - happened), error)
