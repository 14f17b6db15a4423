"""What ``gauss_newton`` does when something breaks: one table, which the tests check and the documentation shows.

A training run is data: arrays with one entry for each step, which a single compiled scan plays. Injecting a fault
means writing into these arrays, so that hundreds of broken runs share a few compilations. Importing this module
computes nothing on a device and changes no setting of JAX.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gn_linear as gnl
from gn_linear import _tree
from gn_linear._loss import Loss
from gn_linear._refusal import ADVICE

STEPS = 6
FIRST, INNER, LAST = 0, 2, STEPS - 1
EVERYWHERE = (FIRST, INNER, LAST)
EXAMPLES = 8
LONG = 60  # steps in which a run that starts anew under a fault has to get somewhere
HELD = 12  # bad steps in a row that take the damping from its start to its cap
NAN, INF = np.nan, np.inf
TEACHER = {"hidden": np.array([[1.0, 0.5], [-0.5, 1.0]]), "out": np.array([[1.0, -0.5], [0.5, 1.0]])}
SHORT = 0.5
"""The learning rate: half a step, so that there is still something to gain at the last one."""


# ---- the solvers and policies that the table is checked for; new ones join here

SOLVERS: dict[str, gnl.solvers.Solver] = {
    "CG": gnl.solvers.CG(),
    "CG, warm start": gnl.solvers.CG(warm_start=0.95),
    "CG, Jacobi": gnl.solvers.CG(preconditioner=gnl.preconditioners.Jacobi()),
    "CG, Kronecker": gnl.solvers.CG(preconditioner=gnl.preconditioners.Kronecker(), momentum=True),
    "Lanczos": gnl.solvers.Lanczos(20),
    "FirstOrder": gnl.solvers.FirstOrder(optax.sgd(0.5), 10),
    "Cholesky": gnl.solvers.Cholesky(),
    "QR": gnl.solvers.QR(),
}

POLICIES: dict[str, Callable[["Run"], gnl.damping.Policy]] = {
    "Constant": lambda run: gnl.damping.Constant(0.05),
    "Schedule": lambda run: gnl.damping.Schedule(lambda count: jnp.asarray(run.multiple)[count]),
    "LevenbergMarquardt": lambda run: gnl.damping.LevenbergMarquardt(*run.bounds),
    "Path": lambda run: gnl.damping.Path((0.1, 1.0, 10.0), *run.bounds),
}


# ---- a training run


class Inputs(NamedTuple):
    """One batch as the model sees it; only ``x`` is data, the others are where faults go in."""

    x: Any
    link: Any  # what is applied to the outputs: 0 nothing, 1 log(1 + z / 10), 2 exp(z)
    gate: Any  # factor of the outputs
    slope: Any  # factor of the derivative by each leaf of the parameters, 1 where it is right


class Run(NamedTuple):
    """A training run: parameters to start from, bounds of the damping, and one entry a step of all the rest."""

    params: Any
    bounds: Any  # initial, minimum and maximum of Levenberg-Marquardt
    inputs: Inputs
    targets: Any
    loss: Any  # 0 squared error, 1 Huber, 2 softmax; None is the squared error of the package
    curvature: Any  # inputs and targets of a curvature batch, or None
    fit: Any  # whether the outputs themselves are the targets
    sign: Any  # factor of the incoming gradient
    extra: Any  # added to it
    zero_nans: Any  # whether NaN in it becomes 0 on its way to the transform
    rate: Any  # learning rate
    multiple: Any  # what a damping schedule returns
    foreign: Any  # whether the state claims to belong to another model
    hold: Any  # how often the first step is repeated
    length: Any  # how many steps in all; the last one is repeated


class Played(NamedTuple):
    """What happened: parameters before and after every step and the state after it, and of all steps the rest."""

    before: Any
    after: Any
    state: Any
    refusals: Any  # how many steps had each code
    lowest: Any  # multiple of the damping
    highest: Any


LOSSES = (gnl.losses.squared_error, gnl.losses.huber(1.0), gnl.losses.softmax_cross_entropy)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Switched(Loss):
    """One of ``LOSSES``, chosen by a traced number; targets have the shape of the outputs."""

    kind: Any

    def _select(self, choices):
        return jnp.select([self.kind == i for i in range(len(LOSSES))], choices)

    def _values(self, outputs, targets):
        return self._select([loss._values(outputs, targets).reshape(len(outputs), -1).sum(1) for loss in LOSSES])

    def _gradients(self, outputs, targets):
        return self._select([loss._gradients(outputs, targets) for loss in LOSSES])

    def _hessian(self, outputs, targets):
        triples = zip(*(loss._hessian(outputs, targets) for loss in LOSSES), strict=True)
        return tuple(lambda v, triple=triple: self._select([product(v) for product in triple]) for triple in triples)


# ---- the model and how it is trained


@jax.custom_jvp
def _with_slope(leaf, slope):
    """The leaf itself, with a derivative that is wrong by the factor ``slope``."""
    del slope
    return leaf


@_with_slope.defjvp
def _with_slope_jvp(primals, tangents):
    return primals[0], primals[1] * tangents[0]


def _network(params, x):
    library = np if isinstance(x, np.ndarray) else jnp
    return library.tanh(x @ params["hidden"]) @ params["out"]


def predict(params, inputs):
    """A small tanh network; ``idle`` does nothing."""
    leaves = {name: _with_slope(params[name], inputs.slope[name]) for name in params}
    z = _network(leaves, inputs.x)
    # What is not selected is computed at 0, so that its derivative stays finite.
    logarithm = jnp.log1p(jnp.where(inputs.link == 1, z, jnp.zeros_like(z)) / 10)
    exponential = jnp.exp(jnp.where(inputs.link == 2, z, jnp.zeros_like(z)))
    return inputs.gate * jnp.select([inputs.link == 1, inputs.link == 2], [logarithm, exponential], z)


def make_run(dtype: Any = np.float64) -> Run:
    """A run in which nothing is broken: every step sees the same batch."""
    rng = np.random.default_rng(2)

    def each(value: Any) -> Any:
        return np.repeat(np.asarray(value)[None], STEPS, axis=0)

    x = rng.normal(size=(EXAMPLES, 2))
    targets = _network(TEACHER, x) + 0.1 * rng.normal(size=(EXAMPLES, 2))
    params = {name: leaf + 0.7 * rng.normal(size=leaf.shape) for name, leaf in TEACHER.items()}
    params["idle"] = np.array([-0.0, 0.0])
    run = Run(
        params=params,
        bounds=np.array([1e-2, 1e-8, 1e8]),
        inputs=Inputs(each(x), np.zeros(STEPS, int), np.ones(STEPS), {name: np.ones(STEPS) for name in params}),
        targets=each(targets),
        loss=None,
        curvature=None,
        fit=np.zeros(STEPS, bool),
        sign=np.ones(STEPS),
        extra={name: np.zeros((STEPS, *leaf.shape)) for name, leaf in params.items()},
        zero_nans=np.zeros(STEPS, bool),
        rate=np.full(STEPS, SHORT),
        multiple=np.full(STEPS, 0.02),
        foreign=np.zeros(STEPS, bool),
        hold=np.int32(0),
        length=np.int32(STEPS),
    )
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == np.float64 else leaf, run)


def _incoming(loss, now, params):
    """The gradient and the batch of one step."""
    outputs = predict(params, now.inputs)
    targets = now.targets
    if outputs.shape == targets.shape:
        targets = jnp.where(now.fit, outputs, targets)
    grads = jax.grad(lambda p: loss(predict(p, now.inputs), targets))(params)
    grads = jax.tree.map(lambda g, e: now.sign * g + e, grads, now.extra)
    grads = jax.tree.map(lambda g: jnp.where(now.zero_nans & jnp.isnan(g), jnp.zeros_like(g), g), grads)
    batch = {"inputs": now.inputs, "targets": targets}
    if now.curvature is not None:
        batch |= {"curvature_inputs": now.curvature[0], "curvature_targets": now.curvature[1]}
    return grads, batch


# Compiling takes most of the time of the tests, so the code is not optimised further than it has to be.
@functools.partial(
    jax.jit,
    static_argnames=("solver", "policy"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def play(run: Run, *, solver: str, policy: str) -> Played:
    """Train: one loop over the steps of a run, compiled once for each solver and policy."""

    def optimiser(loss):
        return gnl.gauss_newton(
            predict,
            loss,
            solver=SOLVERS[solver],
            damping=POLICIES[policy](run),
            learning_rate=lambda count: jnp.asarray(run.rate)[jnp.clip(count - run.hold, 0, STEPS - 1)],
        )

    per_step = run._replace(params=None, bounds=None, hold=None, length=None)

    def step(t, carry):
        params, state, played = carry
        row = jnp.clip(t - run.hold, 0, STEPS - 1)
        now = jax.tree.map(lambda leaf: jnp.asarray(leaf)[row], per_step)
        loss = gnl.losses.squared_error if now.loss is None else Switched(now.loss)
        grads, batch = _incoming(loss, now, params)
        mark = now.foreign.astype(state.model.dtype)
        updates, after = optimiser(loss).update(grads, state._replace(model=state.model + mark), params, **batch)
        after = after._replace(model=after.model - mark)
        moved = optax.apply_updates(params, updates)
        record = [played.before, played.after, played.state]
        before, after_, states = jax.tree.map(lambda to, x: to.at[row].set(x), record, [params, moved, after])
        multiple = after.damping.multiple
        refusals = played.refusals.at[after.info.refusal].add(1)
        extremes = jnp.minimum(played.lowest, multiple), jnp.maximum(played.highest, multiple)
        return moved, after, Played(before, after_, states, refusals, *extremes)

    params = jax.tree.map(jnp.asarray, run.params)
    state = optimiser(gnl.losses.squared_error).init(params)
    room = jax.tree.map(lambda leaf: jnp.zeros((STEPS, *leaf.shape), leaf.dtype), [params, params, state])
    multiple = state.damping.multiple
    nothing = Played(*room, jnp.zeros(len(gnl.Refusal), jnp.int32), multiple, multiple)
    return jax.lax.fori_loop(0, run.length, step, (params, state, nothing))[2]


# ---- the faults


class Outcome(enum.Enum):
    """What a step with a fault does."""

    REFUSED = "refused"
    """The parameters stay as they are to the bit, and ``gnl.info`` says why."""
    CONTINUED = "continued"
    """The step is taken; under an adaptive policy it may instead be refused with the code of the row, if it has one."""
    ERROR = "error"
    """Python raises when the update is traced."""


class Fault(NamedTuple):
    """A row of the table.

    Attributes:
        name: what breaks.
        inject: of a run and the step at which it breaks.
        adaptive: the outcome under a policy that learns from the gain ratio.
        otherwise: the outcome under the others; None in either where the fault does not arise.
        code: of the refusal.
        sentence: what happens, for the reader.
        steps: at which steps of a run it is injected.
        lasts: for how many steps.
        policies: which policies it concerns, all if None.
        dtype: of the run.
        alone: whether it has a test of its own, since it does not fit into a run.
        diverging: whether gradient steps of a fixed rate, the solver FirstOrder, diverge here: their block is refused.
    """

    name: str
    inject: Callable[[Run, int], Run]
    adaptive: Outcome | None
    otherwise: Outcome | None
    code: gnl.Refusal
    sentence: str
    steps: tuple[int, ...] = EVERYWHERE
    lasts: int = 1
    policies: tuple[str, ...] | None = None
    dtype: Any = np.float64
    alone: bool = False
    diverging: bool = False


def _write(array, steps, value):
    array = array.copy()
    array[steps] = value
    return array


def _write_entry(array, step, value):
    array = array.copy()
    array[step].flat[1] = value
    return array


def _with_inputs(run, **fields):
    return run._replace(inputs=run.inputs._replace(**fields))


def general(run: Run) -> Run:
    """The same run with a loss that may change from step to step, and with a curvature batch."""
    return run._replace(loss=np.zeros(STEPS, int), curvature=(run.inputs, run.targets))


def _in_inputs(value):
    return lambda run, step: _with_inputs(run, x=_write_entry(run.inputs.x, step, value))


def _in_targets(value):
    return lambda run, step: run._replace(targets=_write_entry(run.targets, step, value))


def _in_gradient(value):
    return lambda run, step: run._replace(extra=run.extra | {"out": _write_entry(run.extra["out"], step, value)})


def _in_slope(value, *names):
    def inject(run, step):
        return _with_inputs(run, slope=run.inputs.slope | {n: _write(run.inputs.slope[n], step, value) for n in names})

    return inject


def _in_field(name, value):
    return lambda run, step: run._replace(**{name: _write(getattr(run, name), step, value)})


def _in_curvature(inject_in_batch):
    def inject(run, step):
        bad = inject_in_batch(run, step)
        return general(run)._replace(curvature=(bad.inputs, run.targets))

    return inject


def _one_after_the_other(*injections):
    return lambda run, step: functools.reduce(lambda now, inject: inject(now, step), injections, run)


def _for_several_steps(inject, count):
    return lambda run, step: functools.reduce(inject, range(step, step + count), run)


def _through_link(link, target):
    """Outputs that leave the range of log or exp on the way to a far target."""

    def inject(run, step):
        run = _with_inputs(run, link=_write(run.inputs.link, step, link))
        return run._replace(targets=_write(run.targets, step, target))

    return inject


def _second_column(factor):
    def inject(run, step):
        x = run.inputs.x.copy()
        x[step, :, 1] = factor * x[step, :, 0]
        return _with_inputs(run, x=x)

    return inject


def _outputs_times(factor):
    return lambda run, step: _with_inputs(run, gate=_write(run.inputs.gate, step, factor))


def _residuals_times(factor):
    return lambda run, step: run._replace(targets=_write(run.targets, step, factor * run.targets[step]))


def _vanishing_residuals(run, step):
    del step
    return run._replace(params=run.params | {"out": 0 * run.params["out"]}, targets=1e-200 * run.targets)


def _outliers_from_here(run, step):
    targets = _write(run.targets, slice(step, None), run.targets[step] + 1e3)
    run = general(run._replace(targets=targets, length=np.int32(LONG)))
    return run._replace(loss=_write(run.loss, slice(step, None), 1))


def _confident_mistakes_from_here(run, step):
    hot = np.eye(2)[np.argmin(run.targets[step], axis=1)]
    run = _outputs_times(200.0)(run, slice(step, None))
    run = general(run._replace(targets=_write(run.targets, slice(step, None), hot), length=np.int32(LONG)))
    return run._replace(loss=_write(run.loss, slice(step, None), 2))


def _in_the_first_for_long(inject):
    def held(run, step):
        return inject(run, step)._replace(hold=np.int32(HELD - 1), length=np.int32(HELD + LONG))

    return held


def _optimum(x, y):
    """The parameters of least squares, by Gauss-Newton with the Jacobian in closed form."""
    x, y, (hidden, out) = x.astype(np.float64), y.astype(np.float64), TEACHER.values()
    for _ in range(200):
        inner = np.tanh(x @ hidden)
        by_hidden = np.einsum("ni,nj,jk->nkij", x, 1 - inner**2, out).reshape(y.size, -1)
        by_out = np.einsum("nj,kl->nkjl", inner, np.eye(2)).reshape(y.size, -1)
        step = np.linalg.lstsq(np.hstack([by_hidden, by_out]), (y - inner @ out).ravel(), rcond=None)[0]
        hidden, out = hidden + step[:4].reshape(2, 2), out + step[4:].reshape(2, 2)
    return {"hidden": hidden, "out": out}


def _from_the_optimum(exact):
    """Ten thousand steps from where the objective is least, at a residual or (``exact``) at none."""

    def inject(run, step):
        del step
        dtype = run.rate.dtype
        start = run.params if exact else _optimum(run.inputs.x[0], run.targets[0])
        params = {name: start[name].astype(dtype) for name in ("hidden", "out")}
        targets = run.targets
        if exact:
            targets = np.repeat(_network(params, run.inputs.x[0])[None], STEPS, axis=0)
        return run._replace(
            params=run.params | params, targets=targets, rate=np.ones_like(run.rate), length=np.int32(10_000)
        )

    return inject


def _wrong_shape(run, step):
    del step
    return run._replace(targets=run.targets[..., :1])


def _half_batch(run, step):
    del step
    return _with_inputs(run, x=run.inputs.x[:, ::2])._replace(targets=run.targets[:, ::2])


_REFUSED, _CONTINUED, _ERROR = Outcome.REFUSED, Outcome.CONTINUED, Outcome.ERROR
_CODE = gnl.Refusal


def _refused(name, inject, code, sentence, **rest):
    """A row for what every policy refuses."""
    return Fault(name, inject, _REFUSED, _REFUSED, code, sentence, **rest)


def _continued(name, inject, sentence, code=_CODE.NONE, **rest):
    """A row for what no policy has to refuse."""
    return Fault(name, inject, _CONTINUED, _CONTINUED, code, sentence, **rest)


def _scheduled(name, value, outcome, code, sentence):
    """A row for what only a damping schedule can return."""
    return Fault(name, _in_field("multiple", value), None, outcome, code, sentence, policies=("Schedule",))


def _adaptive(name, inject, outcome, code, sentence, **rest):
    """A row for an adaptive policy alone."""
    return Fault(name, inject, outcome, None, code, sentence, policies=("LevenbergMarquardt", "Path"), **rest)


_LOSS = "The loss on the batch is not finite."
_INFINITY = (
    "tanh maps infinity to 1, so the loss of the network here is finite and its derivative NaN. A model that hands "
    "infinity on is refused with OBJECTIVE."
)
_FRONT = "One entry is enough, wherever it comes from: the derivative of the model, or what stands in front."
_OPTIMUM = (
    "The parameters stay within rounding and the damping within its bounds. Where the loss cannot tell a gain from "
    "its own rounding, an adaptive policy refuses and learns nothing."
)

FAULTS: tuple[Fault, ...] = (
    # data
    _refused("NaN in the inputs", _in_inputs(NAN), _CODE.OBJECTIVE, _LOSS),
    _refused("infinity in the inputs", _in_inputs(INF), _CODE.GRADIENT, _INFINITY),
    _refused("minus infinity in the inputs", _in_inputs(-INF), _CODE.GRADIENT, _INFINITY),
    _refused("NaN in the targets", _in_targets(NAN), _CODE.OBJECTIVE, _LOSS),
    _refused("infinity in the targets", _in_targets(INF), _CODE.OBJECTIVE, _LOSS),
    _refused("minus infinity in the targets", _in_targets(-INF), _CODE.OBJECTIVE, _LOSS),
    _refused(
        "residuals of 1e200",
        _residuals_times(1e200),
        _CODE.OBJECTIVE,
        "Their squares overflow double precision.",
    ),
    _refused(
        "residuals of 1e30 in float32",
        _residuals_times(1e30),
        _CODE.OBJECTIVE,
        "Their squares overflow single precision.",
        dtype=np.float32,
    ),
    _continued(
        "residuals of 1e-200",
        _vanishing_residuals,
        "The loss underflows to zero; the step is still right, since the solver scales the gradient first.",
        steps=(FIRST,),
    ),
    _continued(
        "outputs in the wrong units, 1e10 times too large",
        _outputs_times(1e10),
        "The loss is finite, so the step is taken. An adaptive policy finds back once the units are right. Gradient "
        "steps of a fixed rate (`FirstOrder`) diverge, so their block is refused.",
        code=_CODE.ROUNDING,
        steps=(FIRST, INNER),
        diverging=True,
    ),
    # the gradient and the derivative
    _refused("NaN in the incoming gradient", _in_gradient(NAN), _CODE.GRADIENT, _FRONT),
    _refused("infinity in the incoming gradient", _in_gradient(INF), _CODE.GRADIENT, _FRONT),
    _refused("minus infinity in the incoming gradient", _in_gradient(-INF), _CODE.GRADIENT, _FRONT),
    _refused(
        "NaN in the derivative by one leaf",
        _in_slope(NAN, "out"),
        _CODE.GRADIENT,
        "The loss is finite; the gradient that the loop computes is not.",
    ),
    _refused(
        "the same, with NaN zeroed in the gradient",
        _one_after_the_other(_in_slope(NAN, "out"), _in_field("zero_nans", True)),
        _CODE.SOLVER,
        "The gradient looks sound, but products with the Jacobian are NaN, so there is no step. Zeroing NaN in front "
        "hides the cause.",
    ),
    Fault(
        "a derivative of the wrong sign",
        _in_slope(-1.0, "hidden", "out", "idle"),
        _REFUSED,
        _CONTINUED,
        _CODE.INCREASE,
        "The step goes uphill. An adaptive policy tries it and refuses; the others take it, and the loss rises.",
    ),
    _continued(
        "an incoming gradient of the wrong sign",
        _in_field("sign", -1.0),
        "It goes unnoticed under every policy, and the loss rises: the incoming gradient is what the step is asked to "
        "follow, so what it holds besides the gradient of the batch counts as part of the objective.",
    ),
    # the trial point
    _refused(
        "the logarithm of a negative number at the trial point",
        _through_link(1, -1e8),
        _CODE.TRIAL,
        "The loss is finite at the parameters and NaN after the step. An adaptive policy halves the step first.",
    ),
    _refused(
        "overflow of exp at the trial point",
        _through_link(2, 1e8),
        _CODE.TRIAL,
        "The loss is finite at the parameters and infinite after the step. An adaptive policy halves the step first.",
    ),
    # the curvature batch
    _refused(
        "NaN in the curvature batch",
        _in_curvature(_in_inputs(NAN)),
        _CODE.SOLVER,
        "The first product of the solver is NaN; the gradient and the loss are sound.",
    ),
    _refused(
        "infinity in the curvature batch",
        _in_curvature(_in_inputs(INF)),
        _CODE.SOLVER,
        "The first product of the solver is NaN; the gradient and the loss are sound.",
    ),
    _refused(
        "NaN in the derivative on the curvature batch",
        _in_curvature(_in_slope(NAN, "out")),
        _CODE.SOLVER,
        "The first product of the solver is NaN; the gradient and the loss are sound.",
    ),
    # missing curvature and missing slope
    _continued(
        "a duplicated column of the inputs",
        _second_column(1.0),
        "The Jacobian loses rank. Damping fills the gap, and conjugate gradients do not leave its range.",
    ),
    _continued(
        "a dead column of the inputs",
        _second_column(0.0),
        "The parameters behind it have no gradient and stay, but for what a warm start brings along.",
    ),
    _continued(
        "outputs that do not depend on the parameters",
        _outputs_times(0.0),
        "Jacobian and gradient vanish, and the step is zero.",
    ),
    _continued(
        "the same, with a gradient from elsewhere",
        _one_after_the_other(_outputs_times(0.0), _in_gradient(0.1)),
        "Weight decay in front is such a gradient. Damping alone sets the length of the step.",
    ),
    _continued(
        "an exact fit",
        _in_field("fit", True),
        "The gradient vanishes, and the step is zero.",
    ),
    _continued(
        "Huber's loss with outliers alone, from here on",
        _outliers_from_here,
        "No curvature is left, so the step is the gradient over the damping. An adaptive policy halves it or refuses "
        "it until it fits, and the loss falls.",
        code=_CODE.INCREASE,
    ),
    _continued(
        "a saturated softmax with confident mistakes, from here on",
        _confident_mistakes_from_here,
        "The curvature has all but vanished where the gradient is largest. An adaptive policy halves the step or "
        "refuses it until it fits, and the loss falls; not with gradient steps of a rate that does not fit.",
        code=_CODE.INCREASE,
        diverging=True,
    ),
    # settings
    _refused("a learning rate of NaN", _in_field("rate", NAN), _CODE.STEP, "The solve is sound, the step is not."),
    _refused("an infinite learning rate", _in_field("rate", INF), _CODE.STEP, "The solve is sound, the step is not."),
    _scheduled("a damping schedule that returns 0", 0.0, _CONTINUED, _CODE.NONE, "That is plain Gauss-Newton."),
    _scheduled(
        "a damping schedule that returns NaN", NAN, _REFUSED, _CODE.SOLVER, "The first product of the solver is NaN."
    ),
    _scheduled(
        "a damping schedule that returns infinity", INF, _REFUSED, _CODE.SOLVER, "The first product is not finite."
    ),
    _scheduled(
        "a damping schedule that returns a large negative number",
        -1e6,
        _REFUSED,
        _CODE.SOLVER,
        "The damped matrix is negative, and the solver stops before its first step.",
    ),
    _scheduled(
        "a damping schedule that returns a small negative number",
        -1e-3,
        _CONTINUED,
        _CODE.NONE,
        "It goes unnoticed where the damped matrix stays positive along the directions of the solver.",
    ),
    _adaptive(
        "damping at its floor",
        lambda run, step: run._replace(bounds=run.bounds[[1, 1, 2]]),
        _CONTINUED,
        _CODE.INCREASE,
        "It stays there while steps succeed.",
        steps=(FIRST,),
    ),
    _adaptive(
        "damping at its cap",
        lambda run, step: _for_several_steps(_in_inputs(NAN), 3)(run, step)._replace(bounds=run.bounds[[0, 1, 0]]),
        _REFUSED,
        _CODE.OBJECTIVE,
        "It stays there while steps are refused.",
        steps=(FIRST, INNER),
        lasts=3,
    ),
    # many steps
    _refused(
        "three bad batches in a row",
        _for_several_steps(_in_inputs(NAN), 3),
        _CODE.OBJECTIVE,
        "`refused_in_a_row` counts to 3, `message` says so, and the next good batch is trained on.",
        steps=(FIRST, INNER),
        lasts=3,
    ),
    *(
        _refused(
            f"{HELD} bad batches in a row in {np.dtype(dtype).name}",
            _in_the_first_for_long(_in_inputs(NAN)),
            _CODE.OBJECTIVE,
            "An adaptive damping is at its cap by then, and comes down again on good batches.",
            steps=(FIRST,),
            dtype=dtype,
        )
        for dtype in (np.float64, np.float32)
    ),
    *(
        _continued(
            f"10,000 steps from {place} in {np.dtype(dtype).name}",
            _from_the_optimum(exact),
            _OPTIMUM,
            code=_CODE.ROUNDING,
            steps=(FIRST,),
            dtype=dtype,
        )
        for exact, place in ((False, "a converged point"), (True, "an exact fit"))
        for dtype in (np.float64, np.float32)
    ),
    _continued(
        "batches of two shapes in turn",
        _half_batch,
        "JAX compiles the step once for each shape, and not again.",
        alone=True,
    ),
    # mistakes in the program
    _refused(
        "the state of another model, under `jit`",
        _in_field("foreign", True),
        _CODE.STATE,
        "Where the shapes of the state give it away, an error says so when the update is traced; this is the rest.",
    ),
    Fault(
        "the state of another model, outside `jit`",
        _in_field("foreign", True),
        _ERROR,
        _ERROR,
        _CODE.NONE,
        "A `ValueError` says that the state belongs to other parameters.",
        alone=True,
    ),
    Fault(
        "targets of the wrong shape",
        _wrong_shape,
        _ERROR,
        _ERROR,
        _CODE.NONE,
        "A `ValueError` gives both shapes when the update is traced. All errors of this kind come before the first "
        "step runs.",
        steps=(FIRST,),
    ),
    # the other transform
    _continued(
        "`iterative_linearisation`: NaN in the inputs",
        _in_inputs(NAN),
        "NaN passes through into the updates: this transform refuses nothing.",
        alone=True,
    ),
    _refused(
        "`iterative_linearisation`: the same inside `optax.apply_if_finite`",
        _in_inputs(NAN),
        _CODE.NONE,
        "optax skips the step, if the incoming gradient is the true one; the parameters and all states stay.",
        alone=True,
    ),
)


def markdown(faults: tuple[Fault, ...] = FAULTS) -> str:
    """The table as the documentation shows it."""
    lines = ["| What breaks | Adaptive policy | Other policies | Code | What happens |", "|---|---|---|---|---|"]
    for fault in faults:
        outcomes = ["-" if outcome is None else outcome.value for outcome in (fault.adaptive, fault.otherwise)]
        code = "" if fault.code == gnl.Refusal.NONE else f"`{fault.code.name}`"
        if _REFUSED not in (fault.adaptive, fault.otherwise) and code:
            outcomes = [f"{outcomes[0]}, or refused", outcomes[1]]
        lines.append(f"| {fault.name} | {' | '.join(outcomes)} | {code} | {fault.sentence} |")
    return "\n".join(lines)


def codes() -> str:
    """The codes of ``gnl.Refusal`` and what to do about each, as the documentation shows them."""
    lines = ["| Code | Number | The last step was refused because |", "|---|---|---|"]
    lines += [f"| `{code.name}` | {code.value} | {ADVICE[code]} |" for code in gnl.Refusal if code != gnl.Refusal.NONE]
    return "\n".join(lines)
