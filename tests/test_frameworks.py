"""The transforms in the loops of other frameworks and hosts, each step against the dense step in NumPy.

A framework's run gives the parameters before and after every step; the oracle takes the step from the former with the
Jacobian of the plain network, so errors of different steps do not add up.
"""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import optimistix
import pytest
from flax import nnx
from flax.training import train_state
from jax.flatten_util import ravel_pytree

import gn_linear as gnl
from tests.support import affine, assert_close, condition, damped_step, flat, unflatten_like

DAMPING = 0.3
RATE = 0.2
PERIOD = 2
SQUARED = gnl.losses.squared_error
EXACT = gnl.solvers.CG(max_steps=60, rtol=float(jnp.finfo(jnp.float64).eps), progress=0.0)
rng = np.random.default_rng(11)
SHAPES = {"hidden": {"w": (2, 3), "b": (3,)}, "out": {"w": (3, 2), "b": (2,)}}
START = jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape)), SHAPES, is_leaf=lambda s: isinstance(s, tuple))
BATCHES = [(jnp.asarray(rng.normal(size=(6, 2))), jnp.asarray(rng.normal(size=(6, 2)))) for _ in range(4)]
X, Y = BATCHES[0]


def network(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


# --- the oracle ------------------------------------------------------------------------------------------------------

_unravel = ravel_pytree(START)[1]
_jacobian = jax.jit(jax.jacfwd(lambda vector, x: network(_unravel(vector), x).ravel()))
_outputs = jax.jit(network)


def jacobian(params, x):
    return np.asarray(_jacobian(ravel_pytree(params)[0], x))


def gradient(params, batch):
    """Of half the mean squared error."""
    x, y = batch
    return jacobian(params, x).T @ flat(_outputs(params, x) - y) / len(x)


def ggn(params, batch):
    dense = jacobian(params, batch[0])
    return dense.T @ dense / len(batch[0])


def linearised_gradient(anchor, params, batch):
    x, y = batch
    dense = jacobian(anchor, x)
    residual = flat(_outputs(anchor, x) - y) + dense @ (flat(params) - flat(anchor))
    return dense.T @ residual / len(x)


def assert_gauss_newton(before, after, batch, rhs=None):
    """``after`` is ``before`` plus the dense damped step."""
    curvature = ggn(before, batch)
    step = damped_step(curvature, gradient(before, batch) if rhs is None else rhs, DAMPING)
    assert_close(after, flat(before) + step, condition=condition(curvature, DAMPING))


# --- the frameworks: each runs one optimiser over the batches --------------------------------------------------------


class Run(NamedTuple):
    history: list[Any]  # the parameters as plain trees, one more than there are batches
    state: Any
    traces: int


def plain(make):
    optimiser, traces = make(network), []

    @jax.jit
    def step(params, state, x, y):
        traces.append(None)
        grads = jax.grad(lambda p: SQUARED(network(p, x), y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        return optax.apply_updates(params, updates), state

    history, state = [START], optimiser.init(START)
    for batch in BATCHES:
        params, state = step(history[-1], state, *batch)
        history.append(params)
    return Run(history, state, len(traces))


class Linen(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(3, name="hidden")(x))
        return nn.Dense(2, name="out")(nn.Dropout(self.dropout, deterministic=False)(hidden))


def to_linen(params):
    return {name: {"kernel": layer["w"], "bias": layer["b"]} for name, layer in params.items()}


def from_linen(params):
    return {name: {"w": layer["kernel"], "b": layer["bias"]} for name, layer in params.items()}


class TrainState(train_state.TrainState):
    def apply_gradients(self, *, grads, **extra):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


def predict_linen(params, x):
    return Linen().apply({"params": params}, x)


def linen(make):
    traces = []

    @jax.jit
    def step(state, x, y):
        traces.append(None)
        grads = jax.grad(lambda p: SQUARED(predict_linen(p, x), y))(state.params)
        return state.apply_gradients(grads=grads, inputs=x, targets=y)

    state = TrainState.create(apply_fn=Linen().apply, params=to_linen(START), tx=make(predict_linen))
    history = [START]
    for batch in BATCHES:
        state = step(state, *batch)
        history.append(from_linen(state.params))
    return Run(history, state, len(traces))


class NNX(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(2, 3, param_dtype=jnp.float64, rngs=rngs)
        self.out = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=rngs)
        for layer, values in ((self.hidden, params["hidden"]), (self.out, params["out"])):
            layer.kernel[...], layer.bias[...] = values["w"], values["b"]

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))

    def plain(self):
        layers = {"hidden": self.hidden, "out": self.out}
        return {name: {"w": layer.kernel[...], "b": layer.bias[...]} for name, layer in layers.items()}


def flax_nnx(make, trained=nnx.Param):
    model, traces = NNX(START), []
    graph, _, rest = nnx.split(model, trained, ...)
    optimiser = nnx.Optimizer(model, make(lambda params, x: nnx.merge(graph, params, rest)(x)), wrt=trained)

    @nnx.jit
    def step(model, optimiser, x, y):
        traces.append(None)
        grads = nnx.grad(lambda m: SQUARED(m(x), y), argnums=nnx.DiffState(0, trained))(model)
        optimiser.update(model, grads, inputs=x, targets=y)

    history = [START]
    for batch in BATCHES:
        step(model, optimiser, *batch)
        history.append(model.plain())
    return Run(history, nnx.as_pure(optimiser.opt_state), len(traces))


def equinox(make):
    def leaves(m):
        return [leaf for layer in m.layers for leaf in (layer.weight, layer.bias)]

    model = eqx.nn.MLP(2, 2, width_size=3, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    values = [value for layer in START.values() for value in (layer["w"].T, layer["b"])]
    model = eqx.tree_at(leaves, model, values)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    optimiser, traces = make(lambda params, x: jax.vmap(eqx.combine(params, rest))(x)), []

    @eqx.filter_jit
    def step(model, state, x, y):
        traces.append(None)
        grads = eqx.filter_grad(lambda m: SQUARED(jax.vmap(m)(x), y))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        return eqx.apply_updates(model, updates), state

    history, state = [START], optimiser.init(params)
    for batch in BATCHES:
        model, state = step(model, state, *batch)
        pairs = zip(START, model.layers, strict=True)
        history.append({name: {"w": layer.weight.T, "b": layer.bias} for name, layer in pairs})
    return Run(history, state, len(traces))


FRAMEWORKS = [plain, linen, flax_nnx, equinox]


def make_gauss_newton(predict):
    return gnl.gauss_newton(predict, SQUARED, solver=EXACT, damping=DAMPING)


def make_adaptive(predict):
    return gnl.gauss_newton(predict, SQUARED, solver=gnl.solvers.CG(warm_start=0.5))


def make_linearising(predict):
    return optax.chain(gnl.iterative_linearisation(predict, SQUARED, period=PERIOD), optax.sgd(RATE))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_gauss_newton_takes_the_dense_steps(framework):
    run = framework(make_gauss_newton)
    for before, after, batch in zip(run.history[:-1], run.history[1:], BATCHES, strict=True):
        assert_gauss_newton(before, after, batch)
    assert gnl.info(run.state).skipped == 0
    residual = _outputs(run.history[-2], BATCHES[-1][0]) - BATCHES[-1][1]
    assert_close(gnl.info(run.state).loss, np.sum(flat(residual) ** 2) / 2 / len(residual), size=residual.size)
    assert run.traces == 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_iterative_linearisation_takes_the_dense_steps(framework):
    run = framework(make_linearising)
    for i, batch in enumerate(BATCHES):
        anchor, before = run.history[i - i % PERIOD], run.history[i]
        desired = flat(before) - RATE * linearised_gradient(anchor, before, batch)
        assert_close(run.history[i + 1], desired, size=X.size * flat(START).size)
    # The anchor has the framework's layout, so norms are compared.
    anchored, last = flat(gnl.anchor(run.state)), flat(run.history[len(BATCHES) - PERIOD])
    assert_close(np.linalg.norm(anchored), np.linalg.norm(last), size=last.size)
    assert gnl.info(run.state).feature_updates == len(BATCHES) // PERIOD
    assert run.traces == 1


@pytest.mark.parametrize("framework", [flax_nnx, equinox])  # those that take parameters or states apart
def test_adaptive_damping_and_warm_start_keep_their_types(framework):
    run = framework(make_adaptive)
    assert run.traces == 1
    assert gnl.info(run.state).skipped == 0
    assert np.all(np.isfinite(flat(run.history[-1])))


def test_train_state_of_flax_drops_the_batch():
    state = train_state.TrainState.create(
        apply_fn=None, params=to_linen(START), tx=gnl.gauss_newton(predict_linen, SQUARED)
    )
    with pytest.raises(TypeError, match="inputs is missing"):
        state.apply_gradients(grads=state.params, inputs=X, targets=Y)


def test_key_of_dropout_in_inputs_draws_one_mask_for_a_step():
    model = Linen(dropout=0.5)

    def predict(params, inputs):
        x, key = inputs
        return model.apply({"params": params}, x, rngs={"dropout": key})

    params, inputs = to_linen(START), (X, jax.random.key(3))
    vector, unravel = ravel_pytree(params)
    dense = np.asarray(jax.jit(jax.jacfwd(lambda v: predict(unravel(v), inputs).ravel()))(vector))
    residual = flat(predict(params, inputs) - Y)
    optimiser = make_gauss_newton(predict)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: SQUARED(predict(p, inputs), Y))(params)
        return optimiser.update(grads, state, params, inputs=inputs, targets=Y)

    updates, _ = step(params, optimiser.init(params))
    curvature = dense.T @ dense / len(X)
    desired = damped_step(curvature, dense.T @ residual / len(X), DAMPING)
    assert_close(updates, desired, condition=condition(curvature, DAMPING))


@pytest.mark.parametrize("make", [make_gauss_newton, make_linearising])
def test_nnx_filter_trains_a_part(make):
    run = flax_nnx(make, nnx.All(nnx.Param, nnx.PathContains("out")))
    before, after = run.history[:2]
    assert_close(after["hidden"], START["hidden"], size=0)
    out = flat(unflatten_like(np.arange(flat(START).size), START)["out"]).astype(int)
    if make is make_gauss_newton:
        curvature = ggn(before, BATCHES[0])[np.ix_(out, out)]
        step, conditioning = damped_step(curvature, gradient(before, BATCHES[0])[out], DAMPING), condition(curvature)
    else:
        step, conditioning = -RATE * gradient(before, BATCHES[0])[out], 1.0
    assert_close(after["out"], flat(before["out"]) + step, size=flat(START).size * X.size, condition=conditioning)
    assert run.traces == 1


# --- hosts that pass no keywords -------------------------------------------------------------------------------------

INPUTS, TARGETS = jnp.asarray(rng.normal(size=(12, 3))), jnp.asarray(rng.normal(size=(12, 2)))
ZERO = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
_design = np.hstack([INPUTS, np.ones((12, 1))])
_solution = np.linalg.lstsq(_design, TARGETS)[0]
MINIMUM = {"w": _solution[:-1], "b": _solution[-1]}
EIGENVALUES = np.linalg.eigvalsh(_design.T @ _design / 12)
LARGEST, SMALLEST = EIGENVALUES[-1], EIGENVALUES[0]
STOP = 1e-8  # where the hosts stop


def least_squares(params, args=None):
    return SQUARED(affine(params, INPUTS), TARGETS)


TRANSFORMS = {
    "gauss_newton": gnl.gauss_newton(affine, SQUARED, solver=EXACT),
    "iterative_linearisation": optax.chain(
        gnl.iterative_linearisation(affine, SQUARED, period=3), optax.sgd(1 / LARGEST)
    ),
}


def with_batch(transform):
    return gnl.wrappers.with_batch(transform, inputs=INPUTS, targets=TARGETS)


def minimise(optimiser):
    minimiser = optimistix.OptaxMinimiser(optimiser, rtol=0.0, atol=STOP)
    return optimistix.minimise(least_squares, minimiser, ZERO, max_steps=500)


def distance_to_minimum(params):
    return np.linalg.norm(flat(params) - flat(MINIMUM))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_optimistix_reaches_the_minimum(name):
    solution = minimise(with_batch(TRANSFORMS[name]))
    # The last step d solves a damped system or is a multiple of the gradient: the gradient is at most (L + mu) |d|.
    mu = float(gnl.info(solution.state).damping) if name == "gauss_newton" else 0.0
    bound = (LARGEST + mu) / SMALLEST * STOP * np.sqrt(flat(ZERO).size)
    assert distance_to_minimum(solution.value) <= bound


@pytest.mark.parametrize("name", TRANSFORMS)
def test_jaxopt_reaches_the_minimum(name):
    solver = jaxopt.OptaxSolver(least_squares, with_batch(TRANSFORMS[name]), maxiter=500, tol=STOP)
    params, state = solver.run(ZERO)
    assert state.error <= STOP
    assert distance_to_minimum(params) <= STOP / SMALLEST  # of a quadratic, by the norm of its gradient
    assert gnl.info(state)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_hosts_say_what_is_missing_without_with_batch(name):
    with pytest.raises(TypeError, match=f"inputs is missing: {name}"):
        minimise(TRANSFORMS[name])
    with pytest.raises(TypeError, match=f"inputs is missing: {name}"):
        jaxopt.OptaxSolver(least_squares, TRANSFORMS[name]).run(ZERO)


# --- optax's wrappers without keywords -------------------------------------------------------------------------------

GN = make_gauss_newton(network)


def test_lookahead_takes_the_dense_steps():
    traces = []

    def lookahead(x, y):
        fast = gnl.wrappers.with_batch(GN, inputs=x, targets=y)
        return optax.lookahead(fast, sync_period=2, slow_step_size=0.5)

    @jax.jit
    def step(params, state, x, y):
        traces.append(None)
        grads = jax.grad(lambda p: SQUARED(network(p, x), y))(params.fast)
        updates, state = lookahead(x, y).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = optax.LookaheadParams.init_synced(START)
    state = lookahead(X, Y).init(params)
    for i, batch in enumerate(BATCHES):
        before = params
        params, state = step(before, state, *batch)
        if i % 2 == 0:
            assert_gauss_newton(before.fast, params.fast, batch)
            assert_close(params.slow, before.slow, size=0)
        else:
            # Undone, the synchronisation gives the fast step, with an error twice as large.
            fast = unflatten_like(2 * flat(params.slow) - flat(before.slow), START)
            assert_gauss_newton(before.fast, fast, batch)
            assert_close(params.fast, params.slow)
    assert gnl.info(state).skipped == 0
    assert len(traces) == 1


def sam(transform, **settings):
    bound = gnl.wrappers.with_batch(transform, inputs=X, targets=Y)
    return optax.contrib.sam(bound, optax.sgd(0.1), **settings)


@jax.jit
def sam_gradient(params, step=0):
    return jax.grad(lambda p: SQUARED(network(p, X), Y))(params)


def second_update(optimiser, params):
    """The shapes of two updates; enough for errors that come while tracing, and cheaper than the numbers."""
    state = jax.eval_shape(optimiser.init, params)
    for _ in range(2):
        _, state = jax.eval_shape(optimiser.update, START, state, params)


def test_opaque_sam_takes_the_dense_step_for_the_perturbed_gradient():
    optimiser = sam(GN, opaque_mode=True)
    update = jax.jit(lambda params, state: optimiser.update(sam_gradient(params), state, params, grad_fn=sam_gradient))
    updates, _ = update(START, optimiser.init(START))
    perturbed = unflatten_like(flat(START) + 0.1 * gradient(START, (X, Y)), START)
    assert_gauss_newton(START, optax.apply_updates(START, updates), (X, Y), gradient(perturbed, (X, Y)))


def test_sam_leaves_iterative_linearisation_as_it_is():
    transform = make_linearising(network)
    optimiser = sam(transform, opaque_mode=True)
    grads = sam_gradient(START)
    wrapped, _ = jax.jit(lambda s: optimiser.update(grads, s, START, grad_fn=sam_gradient))(optimiser.init(START))
    alone, _ = jax.jit(lambda s: transform.update(grads, s, START, inputs=X, targets=Y))(transform.init(START))
    assert_close(wrapped, alone)


def test_transparent_sam_mixes_states_by_arithmetic_which_is_rejected():
    with pytest.raises(ValueError, match=r"state\.info\.accepted is a int"):
        second_update(sam(GN), START)


def test_lookahead_that_resets_mixes_states_by_arithmetic_which_is_rejected():
    bound = gnl.wrappers.with_batch(GN, inputs=X, targets=Y)
    lookahead = optax.lookahead(bound, sync_period=2, slow_step_size=0.5, reset_state=True)
    with pytest.raises(ValueError, match=r"state\.info\.accepted is a int"):
        second_update(lookahead, optax.LookaheadParams.init_synced(START))


# --- transforms that raise on keywords -------------------------------------------------------------------------------

SEARCHES = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)),
}


def searching(transform):
    return optax.chain(gnl.iterative_linearisation(affine, SQUARED, period=4), transform)


@pytest.mark.parametrize("name", SEARCHES)
def test_line_search_rejects_the_batch_without_without_batch(name):
    bare = searching(SEARCHES[name])

    def update(params, inputs, targets):
        extra = {"value": 0.0, "grad": params, "value_fn": least_squares}
        return bare.update(params, bare.init(params), params, inputs=inputs, targets=targets, **extra)

    with pytest.raises(TypeError, match=r"Unexpected keyword arguments.*'inputs', 'targets'"):
        jax.eval_shape(update, ZERO, INPUTS, TARGETS)


def test_line_search_behind_iterative_linearisation():
    """The model is its own linearisation, so the search alone, on the true gradient, takes the same step."""
    alone = SEARCHES["backtracking"]
    shielded = searching(gnl.wrappers.without_batch(alone))

    @jax.jit
    def both(params):
        value, grads = jax.value_and_grad(least_squares)(params)
        extra = {"value": value, "grad": grads, "value_fn": least_squares}
        got, _ = shielded.update(grads, shielded.init(params), params, inputs=INPUTS, targets=TARGETS, **extra)
        desired, _ = alone.update(grads, alone.init(params), params, **extra)
        return got, desired

    updates, desired = both(ZERO)
    assert np.any(flat(desired))
    assert_close(updates, desired, size=INPUTS.size)


def test_both_helpers_give_optimistix_lbfgs_on_the_linearised_model():
    solution = minimise(with_batch(searching(gnl.wrappers.without_batch(optax.lbfgs()))))
    # The last step may be short for other reasons than a small gradient, so the gradient is measured.
    rest = _design.T @ (_design @ np.vstack([solution.value["w"], solution.value["b"]]) - TARGETS) / len(_design)
    assert np.linalg.norm(rest) <= LARGEST * STOP * np.sqrt(rest.size)
    assert distance_to_minimum(solution.value) <= LARGEST / SMALLEST * STOP * np.sqrt(rest.size)
    assert gnl.info(solution.state).feature_updates >= 1
