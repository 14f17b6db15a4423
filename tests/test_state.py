"""States survive storage: a run that is stored half-way and resumed elsewhere equals the unbroken run to the bit.

Every field of a state is an array (or None), and nothing that a step depends on lives in the optimiser object, so a
fresh object continues where the old one stopped, in another process too.
"""

import functools
import pickle
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import gn_linear as gnl
from tests.support import assert_bit_equal

SQUARED = gnl.losses.squared_error
WARM = gnl.solvers.CG(warm_start=0.95)
AVERAGED = gnl.solvers.CG(warm_start=0.95, preconditioner=gnl.preconditioners.Jacobi(samples=2, exact_up_to=0))
KRONECKER = gnl.solvers.CG(max_steps=2, preconditioner=gnl.preconditioners.Kronecker(every=2), momentum=True)
STEPS, STOP = 6, 3
TRACES: list[str] = []


def predict(params, x):
    TRACES.append("once")
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["shift"]


def newton(**options):
    return gnl.gauss_newton(predict, SQUARED, **options)


def linearising(**options):
    return gnl.iterative_linearisation(predict, SQUARED, **options)


# Each builds a fresh optimiser; the run is stored in the middle of a block of the last two, of two steps.
OPTIMISERS = {
    "default": newton,
    "jacobi, warm start": lambda: newton(solver=AVERAGED, l2=0.01),
    "Kronecker, momentum": lambda: newton(solver=KRONECKER, l2=0.01),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), newton(solver=WARM), optax.trace(0.5)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(lambda learning_rate: newton(learning_rate=learning_rate))(
        learning_rate=optax.linear_schedule(0.5, 1.0, STEPS)
    ),
    "MultiSteps": lambda: optax.MultiSteps(newton(), 2).gradient_transformation(),
    "Lanczos": lambda: newton(solver=gnl.solvers.Lanczos(8), l2=0.01),
    "Path": lambda: newton(solver=gnl.solvers.Lanczos(8), damping=gnl.damping.Path()),
    "Cholesky": lambda: newton(solver=gnl.solvers.Cholesky(momentum=0.9), learning_rate=0.5),
    "FirstOrder": lambda: newton(solver=gnl.solvers.FirstOrder(optax.adam(0.05), 3, warm_start=0.5), damping=0.0),
    "linearisation, adam": lambda: optax.chain(linearising(period=2), optax.adam(0.05)),
}
CASES = [(name, "float64") for name in OPTIMISERS]
CASES += [(name, "bfloat16") for name in ("jacobi, warm start", "linearisation, adam")]
IDS = [f"{name}, {dtype}" for name, dtype in CASES]
OTHER_PROCESS = [("jacobi, warm start", "bfloat16"), ("linearisation, adam", "float64")]


def start(dtype):
    rng = np.random.default_rng(5)
    shapes = {"w": (2, 3), "b": (3,), "v": (3, 1), "shift": ()}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()} | {"absent": None}


@functools.cache
def batch(step, dtype):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(5, 2))
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(x[:, :1] + 2 * x[:, 1:]), dtype)


def compiled(name):
    """A fresh optimiser, and its step."""
    optimiser = OPTIMISERS[name]()

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda p: SQUARED(predict(p, x), y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        return optax.apply_updates(params, updates), state

    return optimiser, step


def advance(step, params, state, dtype, begin, end):
    for i in range(begin, end):
        params, state = step(params, state, *batch(i, dtype))
    return params, state


@functools.cache
def unbroken(name, dtype):
    """Parameters and state half-way and at the end of a run that nothing interrupts."""
    optimiser, step = compiled(name)
    params = start(dtype)
    half = advance(step, params, optimiser.init(params), dtype, 0, STOP)
    return half, advance(step, *half, dtype, STOP, STEPS)


@functools.cache
def resumed(name, dtype):
    """Another optimiser object for the second half, with its step compiled for values that are not the run's."""
    optimiser, step = compiled(name)
    params = start(dtype)
    step(params, optimiser.init(params), *batch(0, dtype))
    return optimiser, step


# ---- ways of storing: each takes what is to be stored, an equal structure to restore into, and a folder


def by_pickle(tree, like, folder):
    return pickle.loads(pickle.dumps(tree))


def by_numpy(tree, like, folder):
    """An archive of leaves named by their paths. NumPy stores bfloat16 as bytes of unknown type."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    np.savez(folder / "state.npz", **leaves)
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    with np.load(folder / "state.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == sorted(jax.tree_util.keystr(path) for path, _ in paths)
        arrays = [archive[jax.tree_util.keystr(path)] for path, _ in paths]
    typed = [a.view(leaf.dtype) if a.dtype.kind == "V" else a for a, (_, leaf) in zip(arrays, paths, strict=True)]
    return structure.unflatten(typed)


def by_orbax(tree, like, folder):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", like)


def by_orbax_from_shapes(tree, like, folder):
    return by_orbax(tree, jax.eval_shape(lambda: like), folder)


def by_flax(tree, like, folder):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(tree))


STORES = {
    "pickle": by_pickle,
    "numpy": by_numpy,
    "orbax": by_orbax,
    "orbax, from shapes": by_orbax_from_shapes,
    "flax": by_flax,
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=IDS)
def test_interrupted_run_is_the_unbroken_run(name, dtype, store, tmp_path):
    half, end = unbroken(name, dtype)
    optimiser, step = resumed(name, dtype)
    params = start(dtype)
    restored = STORES[store](half, (params, optimiser.init(params)), tmp_path)
    assert_bit_equal(restored, half)
    before = len(TRACES)
    assert_bit_equal(advance(step, *restored, dtype, STOP, STEPS), end)
    assert len(TRACES) == before  # what was restored has the types of what init returns


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=IDS)
def test_the_state_matters(name, dtype):
    """The tests above could not fail if the second half did not depend on the state."""
    half, end = unbroken(name, dtype)
    optimiser, step = resumed(name, dtype)
    params, _ = advance(step, half[0], optimiser.init(half[0]), dtype, STOP, STEPS)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(end[0]), strict=True)
    assert any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=IDS)
def test_state_holds_arrays_alone(name, dtype):
    """No Python number, string, function or typed random key: some formats refuse them or restore something else."""
    for state in (compiled(name)[0].init(start(dtype)), unbroken(name, dtype)[1][1]):
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            assert isinstance(leaf, jax.Array), jax.tree_util.keystr(path)
            assert not jnp.issubdtype(leaf.dtype, jax.dtypes.extended), jax.tree_util.keystr(path)


def test_another_process_continues(tmp_path):
    (tmp_path / "half.pickle").write_bytes(pickle.dumps({case: unbroken(*case)[0] for case in OTHER_PROCESS}))
    code = (
        "import sys, jax; jax.config.update('jax_enable_x64', True)\n"
        "from tests.test_state import continue_all; continue_all(sys.argv[1])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = pickle.loads((tmp_path / "end.pickle").read_bytes())
    for case in OTHER_PROCESS:
        assert_bit_equal(ends[case], unbroken(*case)[1])


def continue_all(folder):
    """The second halves of the runs stored in this folder; runs in another process."""
    halves = pickle.loads((Path(folder) / "half.pickle").read_bytes())
    ends = {(n, d): advance(compiled(n)[1], *half, d, STOP, STEPS) for (n, d), half in halves.items()}
    (Path(folder) / "end.pickle").write_bytes(pickle.dumps(ends))
