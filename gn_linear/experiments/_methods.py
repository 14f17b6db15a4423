"""What a run consists of: steps of one method, all seeds side by side, up to a measured re-linearisation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gn_linear import _tree
from gn_linear._gauss_newton import gauss_newton
from gn_linear._iterative_linearisation import IterativeLinearisationState, LinearisationInfo, iterative_linearisation
from gn_linear._typing import Count, Flag, Number, Params
from gn_linear.experiments.problem import Data, Problem
from gn_linear.periods import Context, Rule, ask, at, early_then_sparse, every, stop_after
from gn_linear.solvers import CG, FirstOrder, Solver

INNER_STEPS, INNER_RTOL = 1000, 1e-6
"""Of the solve of a Gauss-Newton step; at mu = 1/(eta K) and stable eta the condition number is at most 1 + 2 K."""


class Carry(NamedTuple):
    """Where the seeds are.

    Attributes:
        params: the parameters, a leading axis of seeds on each leaf.
        anchor: where the last steps were linearised.
        state: of the optimiser.
        step: steps taken; one number if all seeds re-linearise at the same steps, else one for each.
        updates: re-linearisations so far, likewise.
    """

    params: Params
    anchor: Params
    state: Any
    step: Any
    updates: Any


Step = Callable[[Data, Any, Carry, Any], Carry]


@dataclasses.dataclass(eq=False)
class Method:
    """A way to train, compiled once for all its cells.

    Attributes:
        name: what the records call it.
        step: ``step(data, key, carry, knob) -> carry``, one step of one seed; the knob is the traced period or damping.
        init: the state of the optimiser, of one seed.
        axes: which leaves of the state differ between seeds, an ``in_axes`` of ``vmap``.
        together: whether all seeds re-linearise at the same steps.
    """

    name: str
    step: Step
    init: Callable[[Params], Any]
    axes: Any = 0
    together: bool = True

    def start(self, params: Params) -> Carry:
        """All seeds before the first step."""
        seeds = len(jax.tree.leaves(params)[0])
        states = _tree.strongly_typed(jax.vmap(self.init)(params))
        zero = jnp.zeros([] if self.together else [seeds], jnp.int32)
        carry = Carry(params, params, states, zero, zero)
        if self.axes != 0:
            first = states[0]
            info = first.info._replace(feature_updates=zero, age=zero)
            carry = carry._replace(state=(first._replace(count=zero, info=info), *states[1:]))
        return carry

    @functools.cached_property
    def advance(self) -> Callable[[Data, Any, Carry, Any, Any, Any], Carry]:
        """``advance(data, keys, carry, until, steps, knob)``, to step ``until`` if all seeds go together.

        If they do not, each that is not there yet goes to its first re-linearisation from there on, or to the end.
        """
        return jax.jit(self._together if self.together else self._apart)

    def _together(self, data: Data, keys: Any, carry: Carry, until: Count, _: Count, knob: Any) -> Carry:
        axes = Carry(0, 0, self.axes, None, None)
        one = jax.vmap(self.step, (None, 0, axes, None), axes)
        return jax.lax.fori_loop(carry.step, until, lambda _, c: one(data, keys, c, knob), carry)

    def _apart(self, data: Data, keys: Any, carry: Carry, until: Count, steps: Count, knob: Any) -> Carry:
        def run(key: Any, start: Carry) -> Carry:
            def going(loop: tuple[Carry, Flag]) -> Flag:
                return (start.step < until) & (loop[0].step < steps) & ~loop[1]

            def step(loop: tuple[Carry, Flag]) -> tuple[Carry, Flag]:
                before = loop[0]
                after = self.step(data, key, before, knob)
                # Known only when the step is done: it is taken back, to be measured before the anchor moves.
                due = (after.updates > before.updates) & (before.step >= until)
                return _tree.where(due, before, after), due

            return jax.lax.while_loop(going, step, (start, jnp.zeros([], bool)))[0]

        return jax.vmap(run)(keys, carry)


def iterative(problem: Problem, optimiser: optax.GradientTransformation, rule: Rule | None = None) -> Method:
    """Iterative linearisation in front of an optimiser.

    Args:
        problem: the model and the data.
        optimiser: any optax transform.
        rule: when to linearise, closed over; None takes it as the knob, for rules that ``is_planned`` knows.

    Returns:
        The method.
    """

    def chain(knob: Any) -> optax.GradientTransformationExtraArgs:
        period = knob if rule is None else rule
        return optax.chain(iterative_linearisation(problem.predict, problem.loss, period=period), optimiser)

    def step(data: Data, key: Any, carry: Carry, knob: Any) -> Carry:
        inputs, targets = batch(problem, data, key, carry.step)
        unread = jax.tree.map(jnp.zeros_like, carry.params)
        updates, state = chain(knob).update(unread, carry.state, carry.params, inputs=inputs, targets=targets)
        first = cast(tuple[Any, ...], state)[0]
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, first.anchor, state, carry.step + 1, first.info.feature_updates)

    # What all seeds share is not mapped over: the transform's branches would run both sides otherwise.
    kind, info = cast(Any, IterativeLinearisationState), cast(Any, LinearisationInfo)
    shared = kind(None, 0, info(None, None, 0))
    axes = (shared, 0) if rule is None else 0
    return Method("iterative linearisation", step, chain(every(1)).init, axes, together=rule is None)


def gradient_descent(problem: Problem, optimiser: optax.GradientTransformation) -> Method:
    """The optimiser itself, whose every step is linearised anew.

    Args:
        problem: the model and the data.
        optimiser: any optax transform.

    Returns:
        The method.
    """

    def update(grads: Params, state: Any, params: Params, batch: Any, _: Any) -> tuple[Params, Any]:
        return optax.with_extra_args_support(optimiser).update(grads, state, params)

    return _by_gradient("gradient descent", problem, update, optimiser.init)


def blocks(problem: Problem, solver: Solver | None = None) -> Method:
    """Damped Gauss-Newton whose knob is the damping, or a solver's own blocks without damping.

    Args:
        problem: the model and the data.
        solver: None solves to many digits by conjugate gradients.

    Returns:
        The method.
    """
    exact = CG(max_steps=INNER_STEPS, rtol=INNER_RTOL, progress=0.0)

    def transform(damping: Any) -> optax.GradientTransformationExtraArgs:
        used = solver or exact
        return gauss_newton(problem.predict, problem.loss, solver=used, damping=0.0 if solver else damping)

    def update(grads: Params, state: Any, params: Params, batch: Any, knob: Any) -> tuple[Params, Any]:
        return transform(knob).update(grads, state, params, inputs=batch[0], targets=batch[1])

    name = "prox-linear" if isinstance(solver, FirstOrder) else "gauss-newton"
    return _by_gradient(name, problem, update, lambda params: transform(1.0).init(params))


def _by_gradient(name: str, problem: Problem, update: Callable[..., Any], init: Callable[[Params], Any]) -> Method:
    """A method that is handed the gradient of the loss, and linearises at the parameters of each step."""
    from_outputs = problem.objective

    def step(data: Data, key: Any, carry: Carry, knob: Any) -> Carry:
        inputs, targets = batch(problem, data, key, carry.step)
        grads = jax.grad(lambda p: from_outputs(problem.predict(p, inputs), targets))(carry.params)
        updates, state = update(grads, carry.state, carry.params, (inputs, targets), knob)
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, carry.params, state, carry.step + 1, carry.updates + 1)

    return Method(name, step, init)


def batch(problem: Problem, data: Data, key: Any, step: Count) -> Any:
    """The inputs and targets of one step."""
    if problem.batch_size is None:
        return data.train
    chosen = jax.random.randint(jax.random.fold_in(key, step), (problem.batch_size,), 0, problem.examples)
    return jax.tree.map(lambda x: x[chosen], data.train)


def batch_keys(seeds: tuple[int, ...]) -> jax.Array:
    """The keys of the seeds' minibatches, apart from those that ``init`` may make."""
    return jnp.stack([jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1)) for seed in seeds])


def is_planned(rule: Any) -> bool:
    """Whether a rule looks at nothing but the number of the step, so that all seeds re-linearise together."""
    if isinstance(rule, stop_after):
        return is_planned(rule.rule)
    return isinstance(rule, every | at | early_then_sparse)


def planned_steps(rule: Rule, steps: int) -> list[int]:
    """The steps at which a planned rule linearises anew.

    Args:
        rule: one that ``is_planned``.
        steps: how many steps the run has.

    Returns:
        Their numbers, in ascending order; the first is 0.
    """

    def step(age: Count, count: Count) -> tuple[Count, Flag]:
        age = age + 1
        due = (count == 0) | ask(rule, Context(count, age, None, None, None, lambda p, x: x))
        return jnp.where(due, jnp.zeros_like(age), age), due

    _, due = jax.lax.scan(step, jnp.zeros([], jnp.int32), jnp.arange(steps, dtype=jnp.int32))
    return np.flatnonzero(np.asarray(due)).tolist()


def thinned(places: list[int], most: int) -> list[int]:
    """At most so many of the places, the first and the last among them, with numbers spread evenly in logarithms.

    Args:
        places: in ascending order.
        most: at least 2.

    Returns:
        Those that are kept, in order.
    """
    last = len(places) - 1
    spread = np.geomspace(1, last, most - 1) if last > 1 and most > 2 else [last]
    return [places[number] for number in sorted({0, last, *(round(float(x)) for x in spread)})]


def number(value: Any) -> Number | None:
    """A float as records hold it: None if it is not finite."""
    return float(value) if np.isfinite(value) else None
