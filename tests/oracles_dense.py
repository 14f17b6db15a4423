"""What the tests of the dense solvers share: steps in 50 digits, how far rounding moves them, and compiled solves.

At small damping a dense solve in float64 is not better than what it is to judge, so the oracle solves in decimals.
"""

import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gn_linear as gnl
from gn_linear.curvature import linearised_problem
from gn_linear.solvers import Status
from tests.support import (
    PROBLEMS,
    assert_bit_equal,
    assert_close,
    condition,
    dense,
    l2_diagonal,
    unflatten_like,
)

RELATIVE_DAMPINGS = (1e-10, 1e-3, 1.0, 1e10)
TREE = {"in": {"w": 0.1, "b": 0.0}, "out": 1.0, "absent": None}


def exact(array):
    """An array of decimals."""
    return np.vectorize(decimal.Decimal, otypes=[object])(np.asarray(array, object))


def without_row_sums(hessian):
    """The Hessian of a softmax, in decimals, with the null vectors that it has before it is rounded.

    Without them the rounding of its entries would count as curvature where there is none.
    """
    h = exact(hessian)
    return h - np.diag(h.sum(axis=1))


def exact_solve(matrix, rhs):
    """Gaussian elimination with partial pivoting, in decimals."""
    matrix, x = matrix.copy(), rhs.copy()
    n = len(x)
    for k in range(n):
        pivot = k + int(np.argmax(np.abs(matrix[k:, k])))
        matrix[[k, pivot]], x[[k, pivot]] = matrix[[pivot, k]], x[[pivot, k]]
        factors = matrix[k + 1 :, k] / matrix[k, k]
        matrix[k + 1 :, k:] -= factors[:, None] * matrix[k, k:]
        x[k + 1 :] -= factors * x[k]
    for k in reversed(range(n)):
        x[k] = (x[k] - (matrix[k, k + 1 :] @ x[k + 1 :] if k < n - 1 else 0)) / matrix[k, k]
    return x


def exact_ggn(jacobian, hessian):
    """J^T H J in 50 digits."""
    with decimal.localcontext(decimal.Context(prec=50)):
        j = exact(jacobian)
        return j.T @ (exact(hessian) @ j)


def exact_step(ggn, jacobian, output_gradient, rest, weights):
    """The solution of (G + weights) d = -(J^T u + rest), to 50 digits before it is rounded."""
    with decimal.localcontext(decimal.Context(prec=50)):
        gradient = exact(jacobian).T @ exact(output_gradient) + exact(rest)
        return -exact_solve(ggn + np.diag(exact(weights)), gradient).astype(np.float64)


def sensitivity(jacobian, hessian, output_gradient, rest, weights, step):
    """How far the step moves, relative to its size and to first order, by relative changes of all that it depends on.

    The condition number of the damped least-squares problem: of the order of the root of that of G + mu I, and of
    that itself only in proportion to what stays of the gradient in output space.
    """
    values, vectors = np.linalg.eigh(hessian)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    image = root.T @ jacobian
    inverse = np.linalg.inv(image.T @ image + np.diag(weights))

    def size(x):
        return float(np.linalg.norm(x, 2))

    left = output_gradient + hessian @ (jacobian @ step)
    moved = size(inverse @ jacobian.T) * (size(output_gradient) + size(root) * size(image @ step))
    moved += size(inverse @ image.T) * size(root) * (size(jacobian @ step) + size(jacobian) * size(step))
    moved += size(inverse) * (size(jacobian) * size(left) + size(rest))
    return 1.0 + moved / size(step)


@functools.cache
def compiled(name, solver):
    """A compiled solve for any right-hand side, damping and penalty."""
    problem = PROBLEMS[name]

    @jax.jit
    def solve(rhs, damping, l2):
        linear = linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets, l2=l2
        )
        return solver.solve(solver.prepare(linear, rhs, solver.init(problem.params)), damping)

    return solve


@functools.cache
def cases(name, l2=0.0):
    """The batch's own gradient, and one that is not, with every damping: right-hand side, damping, step and condition.

    The condition is that of the step.
    """
    oracle, params, found = dense(name), PROBLEMS[name].params, []
    weights = l2_diagonal(TREE if l2 == "tree" else l2, params)
    hessian = without_row_sums(oracle.hessian) if "softmax" in name else oracle.hessian
    ggn = exact_ggn(oracle.jacobian, hessian)
    scale = float(np.linalg.norm(oracle.ggn, 2))
    rng = np.random.default_rng(7)
    for rest in (np.zeros_like(oracle.params), rng.normal(size=oracle.params.size)):
        for relative in RELATIVE_DAMPINGS:
            others = (oracle.output_gradient, rest, weights + relative * scale)
            step = exact_step(ggn, oracle.jacobian, *others)
            rhs = unflatten_like(oracle.gradient + rest, params)
            number = sensitivity(oracle.jacobian, oracle.hessian, *others, step)
            found.append((rhs, jnp.float64(relative * scale), step, number))
    return found


def check_steps(solver, name, l2=0.0):
    """Every step is as near to the exact one as rounding of its data lets it be."""
    solve, penalty = compiled(name, solver), TREE if l2 == "tree" else jnp.float64(l2)
    for rhs, damping, step, number in cases(name, l2):
        result = solve(rhs, damping, penalty)
        assert_close(result.step, step, size=1, condition=number)
        assert jax.tree.structure(result.step) == jax.tree.structure(PROBLEMS[name].params)
        assert (int(result.status), int(result.solver_steps)) == (Status.CONVERGED, 1)


# ---- problems with one output for each example, linear in the parameters, at zero: J is the inputs


def affine_problem(x, y, loss=gnl.losses.squared_error):
    def predict(params, inputs):
        return inputs @ params

    return linearised_problem(predict, loss, jnp.zeros(x.shape[1], x.dtype), x, targets=y)


@jax.jit
def affine_solve(solver, x, y, damping, rhs=None, loss=gnl.losses.squared_error, state=()):
    """A solve, for the problem's own gradient if no right-hand side is given; compiled once for each shape."""
    problem = affine_problem(jnp.asarray(x), y, loss)
    own = problem.linearisation.vjp(problem.output_gradient)
    return solver.solve(solver.prepare(problem, own if rhs is None else rhs, state), damping)


def draw(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape[0])


def least_squares(x, y, damping):
    """The exact step of one of these problems with the squared error, and its condition."""
    n, others = len(x), (np.zeros(x.shape[1]), np.full(x.shape[1], damping))
    hessian = np.eye(n) / n
    step = exact_step(exact_ggn(x, hessian), x, -y / n, *others)
    return step, sensitivity(x, hessian, -y / n, *others, step)


def check_scale(solver):
    """By powers of two, to the bit: residuals of 1e-200 and of 1e200."""
    x, y = draw(5, 4, 6)
    steps = [affine_solve(solver, x, y * f, np.float64(0.1)).step / f for f in (1.0, 2.0**-665, 2.0**665)]
    assert_bit_equal(steps[1], steps[0])
    assert_bit_equal(steps[2], steps[0])
    expected, number = least_squares(x, y, 0.1)
    assert_close(steps[0], expected, condition=number)


def check_what_is_not_finite(solver):
    """NaN and infinity anywhere give no step; so does a damping that leaves no positive curvature."""
    x, y = draw(6, 4, 6)
    good = (x, y, np.float64(0.1), np.ones(6))
    assert int(affine_solve(solver, *good).status) == Status.CONVERGED
    broken = [(place, bad, Status.NON_FINITE) for place in range(4) for bad in (np.nan, np.inf, -np.inf)]
    for place, bad, status in [*broken, (2, -1e6, Status.NON_POSITIVE_CURVATURE)]:
        arguments = [np.array(a) for a in good]
        arguments[place].flat[0] = bad
        result = affine_solve(solver, *arguments)
        assert (int(result.status), int(result.solver_steps)) == (status, 0)
        assert_bit_equal(result.step, np.zeros(6))


def check_zero(solver):
    """No gradient, no step: also where the output gradient is not zero, but nothing of it reaches the parameters."""
    for x, y in (draw(6, 4, 6), (np.ones((4, 6)), np.asarray([1.0, -1.0, 2.0, -2.0]))):
        result = affine_solve(solver, x, y, np.float64(1e-6), np.zeros(6))
        assert_bit_equal(np.abs(np.asarray(result.step)), np.zeros(6))
        assert int(result.status) == Status.CONVERGED


def check_outliers_alone(solver):
    """Huber's loss without curvature: the gradient over the damping, and no step without damping."""
    x, _ = draw(2, 3, 5)
    loss, y = gnl.losses.huber(1.0), 100 * np.ones(3)
    rhs = -x.T @ np.ones(3) / 3
    assert_close(affine_solve(solver, x, y, np.float64(0.25), loss=loss).step, -rhs / 0.25, size=15)
    without = affine_solve(solver, x, y, np.float64(0.0), loss=loss)
    assert (int(without.status), int(without.solver_steps)) == (Status.NON_POSITIVE_CURVATURE, 0)
    assert not np.any(without.step)


def check_saturated_softmax(solver):
    """Logits 80 apart in float32, some right and some wrong: H is all but zero, and nothing divides by it."""
    x = jnp.asarray([[1.0], [1.0], [-1.0]], jnp.float32)

    def predict(params, x):
        return jnp.concatenate([x * params["w"], jnp.zeros_like(x)], axis=1)

    params, y, loss = {"w": jnp.float32(80.0)}, jnp.array([0, 1, 1]), gnl.losses.softmax_cross_entropy

    @jax.jit
    def solve(damping):
        problem = linearised_problem(predict, loss, params, x, targets=y)
        rhs = jax.grad(lambda p: loss(predict(p, x), y))(params)
        return rhs, solver.solve(solver.prepare(problem, rhs, ()), damping)

    rhs, result = solve(jnp.float32(0.5))
    assert_close(result.step["w"], -rhs["w"] / 0.5)  # G vanishes, so damping alone is left
    assert result.step["w"].dtype == jnp.float32
    assert int(result.status) == Status.CONVERGED


def check_conflicting_examples(solver, dtype):
    """The same example thrice with different targets: no step fits them, and J loses rank in both spaces."""
    x, _ = draw(3, 2, 8)
    x, y = x.astype(dtype)[[0, 0, 0, 1]], np.asarray([1.0, -2.0, 3.0, 1.0], dtype)
    mu = dtype(100 * float(jnp.finfo(dtype).eps) ** 0.75)
    step, number = least_squares(x.astype(np.float64), y.astype(np.float64), float(mu))
    result = affine_solve(solver, x, y, mu)
    assert result.step.dtype == dtype
    assert_close(result.step, step, condition=number)


def check_idle_parameters(solver):
    """Columns of zeros, as behind dead units: without damping, and under a negative one where it leaves a minimum."""
    x, y = draw(4, 9, 5)
    x[:, 3:] = 0.0
    for mu in (0.0, -0.01):
        result = affine_solve(solver, x, y, np.float64(mu))
        step, number = least_squares(x[:, :3], y, mu)
        assert_close(result.step[:3], step, condition=number)
        assert not np.any(result.step[3:])
        assert int(result.status) == Status.CONVERGED


def check_nothing_to_solve(solver):
    """No examples, and no parameters."""
    result = affine_solve(solver, np.zeros((0, 2)), np.zeros(0), np.float64(0.1), np.zeros(2))
    assert not np.any(result.step)

    @jax.jit
    def solve(damping):
        x = jnp.ones((3, 2))
        problem = linearised_problem(lambda p, x: x, gnl.losses.squared_error, {}, x, targets=x)
        return solver.solve(solver.prepare(problem, {}, ()), damping)

    empty = solve(jnp.float32(0.1))
    assert empty.step == {}
    assert int(empty.status) == int(result.status) == Status.CONVERGED


def check_narrow_parameters(solver, dtype):
    """Solved in float32."""
    x, y = (jnp.asarray(a, dtype) for a in draw(8, 5, 3))
    rhs = np.asarray([1.0, -2.0, 0.5], np.float32)
    result = affine_solve(solver, x, y, np.float32(0.1), rhs)
    wide = np.asarray(x, np.float64)
    expected = -np.linalg.solve(wide.T @ wide / 5 + 0.1 * np.eye(3), rhs)
    assert result.step.dtype == jnp.float32
    assert_close(result.step, expected, size=15, condition=condition(wide.T @ wide / 5, 0.1), dtype=dtype)


def check_several_dtypes(solver):
    """Under strict promotion, leaf by leaf in the dtypes of the solve."""
    params = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones((), jnp.bfloat16), "c": jnp.ones(2, jnp.float64)}

    def predict(p, x):
        return jnp.tanh(x @ p["a"] + p["b"].astype(x.dtype)) * p["c"][0].astype(x.dtype)

    x = jnp.asarray(draw(10, 4, 3)[0], jnp.float32)
    rhs = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones((), jnp.float32), "c": jnp.ones(2, jnp.float64)}

    @jax.jit
    def solve(rhs, damping):
        problem = linearised_problem(predict, gnl.losses.squared_error, params, x, l2=0.1)
        return solver.solve(solver.prepare(problem, rhs, ()), damping)

    with jax.numpy_dtype_promotion("strict"):
        result = solve(rhs, jnp.float64(0.5))
    assert [leaf.dtype for leaf in jax.tree.leaves(result.step)] == [leaf.dtype for leaf in jax.tree.leaves(rhs)]
    assert int(result.status) == Status.CONVERGED


# ---- inside the transform

X = jnp.linspace(-1.0, 1.0, 12)[:, None]
Y = jnp.sin(3.0 * X)


def wave(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def start():
    keys = jax.random.split(jax.random.key(2), 3)
    return {"w": 3 * jax.random.normal(keys[0], (1, 5)), "b": jax.random.normal(keys[1], (5,)), "v": jnp.ones((5, 1))}


def run(steps, **options):
    """Training steps on a curve: parameters and state at the end, loss and info of each step."""
    optimiser = gnl.gauss_newton(wave, gnl.losses.squared_error, **options)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: gnl.losses.squared_error(wave(p, X), Y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=X, targets=Y)
        return (optax.apply_updates(params, updates), state), (value, state.info)

    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((start(), optimiser.init(start())))


def check_fit(solver, policy):
    _, (values, info) = run(20, solver=solver, damping=policy)
    assert values[-1] < 1e-4 * values[0]
    assert np.all(np.diff(values) <= 0)  # a refused step leaves the loss as it is
    assert np.all(info.solver_status == Status.CONVERGED)


def check_retries(solver):
    """A refused step is solved again with more damping, from the same Jacobian."""
    _, (values, info) = run(6, solver=solver, damping=gnl.damping.LevenbergMarquardt(initial=1e-6))
    assert np.asarray(info.damping)[0] > 2e-6  # the first damping was too small, and was raised within the step
    assert np.all(info.accepted)
    assert np.all(np.diff(values) < 0)


def check_another_damping_needs_no_jacobian(solver):
    calls, shapes = [], jax.ShapeDtypeStruct((6,), np.float64)

    def predict(params, inputs):
        calls.append(None)
        return inputs @ params

    x, y = draw(1, 4, 6)

    def solve(rhs, damping):
        problem = linearised_problem(predict, gnl.losses.squared_error, jnp.zeros(6), jnp.asarray(x), targets=y)
        prepared, before = solver.prepare(problem, rhs, ()), len(calls)
        step = solver.solve(prepared, damping).step
        assert len(calls) == before > 0
        return step

    jax.eval_shape(solve, shapes, jax.ShapeDtypeStruct((), np.float64))
