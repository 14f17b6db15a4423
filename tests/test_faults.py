"""Every row of the fault table, with every solver and damping policy, does what the table says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl
from gn_linear._refusal import ADVICE
from tests.faults import (
    FAULTS,
    FIRST,
    HELD,
    INNER,
    LAST,
    LOSSES,
    POLICIES,
    SOLVERS,
    STEPS,
    Outcome,
    codes,
    general,
    make_run,
    markdown,
    play,
    predict,
)
from tests.support import assert_bit_equal, flat, tolerance

ROWS = {fault.name: fault for fault in FAULTS}
SQUARED = gnl.losses.squared_error
# What they do next depends on this batch alone, so that a refused step leaves no trace in them.
FORGETFUL_SOLVERS = {"CG", "CG, Jacobi", "FirstOrder", "Cholesky", "QR"}
FORGETFUL_POLICIES = {"Constant", "Schedule"}


# Every solver with a constant and with an adaptive damping; a schedule and a path with those that differ by it.
PAIRS = [(solver, policy) for solver in SOLVERS for policy in ("Constant", "LevenbergMarquardt")]
PAIRS += [(solver, policy) for solver in ("CG", "Lanczos", "FirstOrder") for policy in ("Schedule", "Path")]


def applies(fault, policy):
    """A schedule differs from a constant in one product, so it is not compiled for a single row."""
    if fault.alone or (fault.policies is not None and policy not in fault.policies):
        return False
    own_compilation = fault.dtype != np.float64 or fault.inject(make_run(), FIRST).loss is not None
    return policy != "Schedule" or not own_compilation


CASES = [(fault.name, *pair) for fault in FAULTS for pair in PAIRS if applies(fault, pair[1])]


def is_adaptive(policy):
    return POLICIES[policy](make_run()).adaptive


def played(run, solver, policy):
    return jax.device_get(play(run, solver=solver, policy=policy))


@functools.cache
def clean(solver, policy, dtype, is_general, bounds):
    """A run without a fault."""
    run = make_run(dtype)._replace(bounds=np.array(bounds, dtype))
    return played(general(run) if is_general else run, solver, policy)


def clean_like(run, solver, policy, dtype):
    return clean(solver, policy, dtype, run.loss is not None, tuple(run.bounds.tolist()))


def at(tree, step):
    return jax.tree.map(lambda leaf: leaf[step], tree)


def finite(tree):
    return bool(np.all(np.isfinite(flat(tree))))


def loss_of(run, params, step):
    """The objective of one batch, outside of the transform."""
    inputs, targets = jax.tree.map(jnp.asarray, (at(run.inputs, step), run.targets[step]))
    outputs = predict(jax.tree.map(jnp.asarray, params), inputs)
    if run.loss is None:
        return float(SQUARED(outputs, targets))
    return float(LOSSES[run.loss[step]](outputs, targets))


@pytest.mark.parametrize(("name", "solver", "policy"), CASES)
def test_fault_has_the_stated_outcome(name, solver, policy):
    fault = ROWS[name]
    outcome = fault.adaptive if is_adaptive(policy) else fault.otherwise
    for step in fault.steps:
        run = fault.inject(make_run(fault.dtype), step)
        if outcome == Outcome.ERROR:
            with pytest.raises(ValueError, match=ERRORS[name]):
                play.trace(run, solver=solver, policy=policy)
            continue
        result = played(run, solver, policy)
        check_state(run, result, policy)
        if fault.diverging and solver == "FirstOrder":
            check_divergence(result, policy)
            continue
        if outcome == Outcome.REFUSED:
            check_refusals(fault, run, result, step, policy)
            check_recovery(fault, run, result, step, solver, policy)
        else:
            check_continued(fault, result, step, policy)
        if name in CHECKS:
            CHECKS[name](run, result, step, policy)


ERRORS = {"targets of the wrong shape": r"targets: .* has shape \(8, 1\).*shape \(8, 2\)"}


def check_state(run, result, policy):
    """The state is finite but for its report, parameters are finite, and the damping keeps to its bounds."""
    assert finite(result.state._replace(info=()))
    assert finite((result.before, result.after))
    if is_adaptive(policy):
        assert run.bounds[1] <= result.lowest
        assert result.highest <= run.bounds[2]
    assert finite((result.lowest, result.highest))


def check_refusals(fault, run, result, step, policy):
    """Refused for the stated reason, with the parameters as they were to the bit; no other step is refused."""
    bad = range(step, min(step + fault.lasts, STEPS))
    adaptive = is_adaptive(policy)
    before = POLICIES[policy](run).init(run.rate.dtype)
    for row in range(STEPS):
        info, damping = at(result.state.info, row), at(result.state.damping, row)
        if row not in bad:
            # From its cap the damping makes steps at first that are too short to be told from rounding.
            assert info.refusal == gnl.Refusal.NONE or (run.hold and info.refusal == gnl.Refusal.ROUNDING)
            assert info.accepted == (info.refusal == gnl.Refusal.NONE)
            assert info.accepted == (info.refused_in_a_row == 0)
        else:
            assert info.refusal == fault.code
            assert not info.accepted
            assert_bit_equal(at(result.after, row), at(result.before, row))
            in_a_row = row - step + 1 + int(run.hold)
            assert info.refused_in_a_row == info.skipped == in_a_row
            assert f"refused in a row: {in_a_row}, so far: {in_a_row}," in info.message
            assert ADVICE[fault.code] in info.message
            if adaptive:
                assert damping.multiple > before.multiple or damping.multiple == run.bounds[2]
            else:
                assert_bit_equal(damping, jax.device_get(before))
        before = damping
    assert result.refusals[fault.code] == len(bad) + run.hold + (run.length - STEPS - run.hold if LAST in bad else 0)


def check_recovery(fault, run, result, step, solver, policy):
    """Nothing before the fault is touched, and training goes on where it stood as soon as the fault is gone."""
    whole = clean_like(run, solver, policy, fault.dtype)
    for row in range(step):
        assert_bit_equal(at(result.after, row), at(whole.after, row))
    gone = step + fault.lasts
    # The curvature scale is that of the first gradient with a positive one, perhaps that of the faulty batch.
    same_scale = step > 0 or policy == "Constant" or result.state.scale[step] == 0
    for row in range(gone, STEPS):
        assert result.state.info.actual_reduction[row] > 0 or run.hold or not same_scale
    if solver in FORGETFUL_SOLVERS and policy in FORGETFUL_POLICIES and same_scale:
        for row in range(gone, LAST if run.length > run.hold + STEPS else STEPS):
            assert_bit_equal(at(result.after, row), at(whole.after, row - fault.lasts))


def check_continued(fault, result, step, policy):
    """The step is taken, or under an adaptive policy at most refused for the stated reason."""
    allowed = {gnl.Refusal.NONE}
    if is_adaptive(policy) and fault.code:
        allowed |= {fault.code, gnl.Refusal.ROUNDING}
    assert {gnl.Refusal(code) for code in np.flatnonzero(result.refusals)} <= allowed
    if not is_adaptive(policy) or not fault.code:
        assert result.state.info.accepted[step]


def check_divergence(result, policy):
    """Steps that make it worse are refused, by an adaptive policy all of them, and leave the parameters alone."""
    codes = {gnl.Refusal(code) for code in np.flatnonzero(result.refusals)}
    assert codes <= {gnl.Refusal.NONE, gnl.Refusal.TRIAL, gnl.Refusal.INCREASE, gnl.Refusal.ROUNDING}
    for row in range(STEPS):
        info = at(result.state.info, row)
        if not info.accepted:
            assert_bit_equal(at(result.after, row), at(result.before, row))
        elif is_adaptive(policy):
            assert info.actual_reduction >= 0


# ---- what single rows promise beyond that


def stays(run, result, step, policy):
    before, after = at(result.before, step), at(result.after, step)
    assert np.array_equal(flat(before), flat(after))
    assert result.state.info.step_norm[step] == 0


def moves(run, result, step, policy):
    assert result.state.info.step_norm[step] > 0


def rises(run, result, step, policy):
    if result.state.info.accepted[step]:
        assert loss_of(run, at(result.after, step), step) > loss_of(run, at(result.before, step), step)


def falls(run, result, step, policy):
    if is_adaptive(policy):
        start = run.params if step == 0 else at(result.after, step - 1)
        assert loss_of(run, at(result.after, LAST), LAST) < loss_of(run, start, LAST)


def learns(run, result, step, policy):
    """The mistakes are not stuck: nearly all of their loss goes."""
    if is_adaptive(policy):
        start = run.params if step == 0 else at(result.after, step - 1)
        assert loss_of(run, at(result.after, LAST), LAST) < loss_of(run, start, LAST) / 10


def finds_back(run, result, step, policy):
    """From where the fault has left the parameters, most of the loss goes in the good steps that are left."""
    if is_adaptive(policy):
        whole = make_run()
        assert loss_of(whole, at(result.after, LAST), LAST) < loss_of(whole, at(result.after, step), LAST) / 2


def comes_down(run, result, step, policy):
    if is_adaptive(policy):
        assert result.highest == run.bounds[2]
        assert result.state.damping.multiple[LAST] < 1
    assert loss_of(run, at(result.after, LAST), LAST) < loss_of(run, run.params, LAST) / 2


def keeps_to_the_floor(run, result, step, policy):
    assert result.lowest == run.bounds[1]


def keeps_to_the_cap(run, result, step, policy):
    assert result.state.damping.multiple[min(step + 2, LAST)] == result.highest == run.bounds[2]


def tiny_residuals_vanish(run, result, step, policy):
    """The step is that of the same problem in ordinary units, scaled down."""
    outputs = predict(jax.tree.map(jnp.asarray, at(result.after, LAST)), at(run.inputs, LAST))
    start = np.linalg.norm(run.targets[LAST] / 1e-200)
    assert np.linalg.norm((np.asarray(outputs) - run.targets[LAST]) / 1e-200) < start
    assert np.any(flat(result.after["out"]) != 0)


def dead_parameters_stay(run, result, step, policy):
    before, after = at(result.before, step), at(result.after, step)
    assert not np.array_equal(before["hidden"][0], after["hidden"][0])
    if getattr(result.state.solver, "previous", None) is None:
        assert np.array_equal(before["hidden"][1], after["hidden"][1])


def stays_within_rounding(run, result, step, policy):
    start, end = run.params, at(result.after, LAST)
    inputs = jax.tree.map(jnp.asarray, at(run.inputs, 0))
    names = ["hidden", "out"]  # idle has no curvature
    wide = {name: jnp.asarray(leaf, jnp.float64) for name, leaf in start.items()}
    jacobian = jax.jacobian(lambda p: predict(wide | p, inputs))({name: wide[name] for name in names})
    matrix = np.concatenate([np.asarray(jacobian[name]).reshape(run.targets[0].size, -1) for name in names], axis=1)
    condition = np.linalg.cond(matrix.T @ matrix)
    scale = np.max(np.abs(flat(start)))
    bound = scale * tolerance(run.rate.dtype, run.targets[0].size, condition)
    assert bound < 0.1 * scale  # or it would say nothing
    assert np.max(np.abs(flat(end) - flat(start))) <= bound
    assert result.refusals.sum() == run.length


CHECKS = {
    "residuals of 1e-200": tiny_residuals_vanish,
    "outputs in the wrong units, 1e10 times too large": finds_back,
    "a derivative of the wrong sign": rises,
    "an incoming gradient of the wrong sign": rises,
    "a duplicated column of the inputs": moves,
    "a dead column of the inputs": dead_parameters_stay,
    "outputs that do not depend on the parameters": stays,
    "the same, with a gradient from elsewhere": moves,
    "an exact fit": stays,
    "Huber's loss with outliers alone, from here on": falls,
    "a saturated softmax with confident mistakes, from here on": learns,
    "a damping schedule that returns 0": moves,
    "damping at its floor": keeps_to_the_floor,
    "damping at its cap": keeps_to_the_cap,
    **{name: comes_down for name in ROWS if name.startswith(f"{HELD} bad batches")},
    **{name: stays_within_rounding for name in ROWS if name.startswith("10,000 steps")},
}


# ---- the rows that do not fit into a run


def one_step(optimiser):
    @jax.jit
    def step(params, state, inputs, targets):
        grads = jax.grad(lambda p: SQUARED(predict(p, inputs), targets))(params)
        updates, state = optimiser.update(grads, state, params, inputs=inputs, targets=targets)
        return optax.apply_updates(params, updates), state, updates

    return step


def first_batch(run):
    return at(run.inputs, 0), run.targets[0]


def started():
    return jax.tree.map(jnp.asarray, make_run().params)


@pytest.mark.parametrize(("solver", "policy"), PAIRS)
def test_state_of_another_model_outside_jit(solver, policy):
    run = make_run()
    params = started()
    optimiser = gnl.gauss_newton(predict, SQUARED, solver=SOLVERS[solver], damping=POLICIES[policy](run))
    others = {"renamed": {**params, "other": params["out"]}, "reshaped": {**params, "out": jnp.ones((5, 2))}}
    for other in others.values():
        state = optimiser.init(other)
        with pytest.raises(ValueError, match=r"^state.*(belongs to|state of another model)"):
            optimiser.update(params, state, params, inputs=first_batch(run)[0], targets=first_batch(run)[1])


@pytest.mark.parametrize(("solver", "policy"), PAIRS)
def test_batches_of_two_shapes_in_turn(solver, policy):
    """The state has the same types after either, so that neither shape is traced again; one pair runs it."""
    whole = make_run()
    half = ROWS["batches of two shapes in turn"].inject(whole, FIRST)
    optimiser = gnl.gauss_newton(predict, SQUARED, solver=SOLVERS[solver], damping=POLICIES[policy](whole))
    step, params = one_step(optimiser), started()
    state = optimiser.init(params)
    kinds = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), jax.eval_shape(step, params, state, *batch))
        for batch in (first_batch(whole), first_batch(half))
    ]
    assert kinds[0] == kinds[1]
    assert kinds[0][:2] == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), (params, state))
    if (solver, policy) != ("CG", "LevenbergMarquardt"):
        return
    start = [loss_of(run, params, 0) for run in (whole, half)]
    for t in range(8):
        params, state, _ = step(params, state, *first_batch((whole, half)[t % 2]))
        assert state.info.accepted
    assert step._cache_size() == 2
    assert [loss_of(run, params, 0) for run in (whole, half)] < start


def linearising(period=2):
    return optax.chain(gnl.iterative_linearisation(predict, SQUARED, period=period), optax.sgd(0.1))


@pytest.mark.parametrize("step", [FIRST, INNER, LAST])
def test_iterative_linearisation_lets_nan_pass(step):
    run = ROWS["`iterative_linearisation`: NaN in the inputs"].inject(make_run(), step)
    optimiser = linearising()
    update, params, state = one_step(optimiser), started(), None
    state = optimiser.init(params)
    for t in range(step + 1):
        assert finite(params)
        params, state, updates = update(params, state, at(run.inputs, t), run.targets[t])
        assert finite(updates) == (t < step)
    assert not finite(params)


@pytest.mark.parametrize("step", [FIRST, INNER, LAST])
def test_iterative_linearisation_inside_apply_if_finite_skips(step):
    fault = ROWS["`iterative_linearisation`: the same inside `optax.apply_if_finite`"]
    run = fault.inject(make_run(), step)
    optimiser = optax.apply_if_finite(linearising(), max_consecutive_errors=5)
    update, params = one_step(optimiser), started()
    state = optimiser.init(params)
    for t in range(STEPS):
        moved, after, _ = update(params, state, at(run.inputs, t), run.targets[t])
        if t == step:
            assert np.array_equal(flat(moved), flat(params))
            assert_bit_equal(after.inner_state, state.inner_state)
            assert after.total_notfinite == 1
        else:
            assert not np.array_equal(flat(moved), flat(params))
        params, state = moved, after
    assert finite((params, state.inner_state[0].anchor))
    assert state.total_notfinite == 1


ALONE = {
    "batches of two shapes in turn": test_batches_of_two_shapes_in_turn,
    "the state of another model, outside `jit`": test_state_of_another_model_outside_jit,
    "`iterative_linearisation`: NaN in the inputs": test_iterative_linearisation_lets_nan_pass,
    "`iterative_linearisation`: the same inside `optax.apply_if_finite`": (
        test_iterative_linearisation_inside_apply_if_finite_skips
    ),
}


# ---- the table itself


def test_names_are_unique_and_every_check_has_a_row():
    assert len(ROWS) == len(FAULTS)
    assert set(CHECKS) | set(ERRORS) <= {fault.name for fault in FAULTS if not fault.alone}
    assert set(ALONE) == {fault.name for fault in FAULTS if fault.alone}


def test_every_code_is_reached():
    reached = {fault.code for fault in FAULTS}
    assert reached == set(gnl.Refusal)


def test_pages_have_a_line_for_every_row():
    for text, rows in ((markdown(), len(FAULTS)), (codes(), len(gnl.Refusal) - 1)):
        lines = text.splitlines()
        assert len(lines) == rows + 2
        assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(("solver", "policy"), PAIRS)
def test_clean_run_is_taken_whole(solver, policy):
    """Without this, a row that says 'continued' could hide that nothing works."""
    result = clean_like(make_run(), solver, policy, np.float64)
    assert result.state.info.accepted.all()
    assert np.all(np.diff(result.state.info.loss) < 0)
    assert result.state.info.loss[LAST] < result.state.info.loss[FIRST] / 2
    assert result.state.info.actual_reduction[LAST] > 0
