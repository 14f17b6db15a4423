"""Experiments against a literal loop, against each other, and after being stopped."""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gn_linear as gnl
from gn_linear.experiments import _methods, _setup
from gn_linear.experiments import problem as problem_module
from gn_linear.experiments import records as records_module
from tests.support import assert_close, flat

XP = gnl.experiments
STEPS, SEEDS, BATCH = 7, (0, 5), 3
RNG = np.random.default_rng(11)
X, X_TEST = RNG.normal(size=(8, 2)), RNG.normal(size=(5, 2))
LABELS, LABELS_TEST = RNG.integers(0, 3, 8), RNG.integers(0, 3, 5)
OPTIMISER = optax.sgd(0.3, momentum=0.5)


def network(p, x):
    return jnp.tanh(x @ p["in"]) @ p["out"] + p["b"]


def init(key):
    one, two = jax.random.split(key)
    return {"in": jax.random.normal(one, (2, 3)), "out": jax.random.normal(two, (3, 3)), "b": jnp.zeros(3)}


def classification(**options):
    options = {"test_inputs": X_TEST, "test_targets": LABELS_TEST, **options}
    return XP.Problem(network, init, gnl.losses.softmax_cross_entropy, X, LABELS, **options)


def quiet(records):
    """The tables without what differs from call to call."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "experiment")} for row in itertools.chain(*records)]


def pick(rows, **columns):
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


# --- the oracle: a literal loop that shares no code with the package ------------------------------------------------


def cross_entropy(f, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(f), y[:, None], axis=1))


def taylor(p, anchor, x):
    change = jax.tree.map(jnp.subtract, p, anchor)
    f, df = jax.jvp(lambda q: network(q, x), (anchor,), (change,))
    return f + df


@jax.jit
def gradient(p, anchor, x, y):
    return jax.grad(lambda q: cross_entropy(taylor(q, anchor, x), y))(p)


@jax.jit
def both(p, anchor, x):
    return network(p, x), taylor(p, anchor, x), network(anchor, x)


@jax.jit
def kernel(p):
    vector, unravel = ravel_pytree(p)
    jacobian = jax.jacrev(lambda v: network(unravel(v), X))(vector)
    return jnp.einsum("icp,jcp->ij", jacobian, jacobian) / jacobian.shape[1]


def centred_cosine(a, b):
    c = np.eye(len(a)) - 1 / len(a)
    a, b = c @ a @ c, c @ b @ c
    return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)


def missed(p, anchor):
    f, f_lin, start = (np.asarray(v) for v in both(p, anchor, X))
    return np.linalg.norm(f - f_lin) / max(np.linalg.norm(f - start), 1e-300)


def indices(seed, t, batch_size):
    if batch_size is None:
        return np.arange(len(X))
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))
    return np.asarray(jax.random.randint(jax.random.fold_in(key, t), (batch_size,), 0, len(X)))


def literal_run(seed, due, batch_size, steps=STEPS):
    """The run of one seed, and a row for each re-linearisation and for the end."""
    p = start = init(jax.random.key(seed))
    state, anchor, age, updates, rows = OPTIMISER.init(p), p, 0, 0, []

    def measure(t):
        k0, k = np.asarray(kernel(start)), np.asarray(kernel(p))
        one_hot = np.eye(3)[LABELS]
        values = {"step": t, "feature_updates": updates + (t < steps)}
        for name, x, y in (("train", X, LABELS), ("test", X_TEST, LABELS_TEST)):
            for model, f in zip(("f", "f_lin"), both(p, anchor, x), strict=False):
                values[f"{name}_loss_{model}"] = float(cross_entropy(f, y))
                values[f"{name}_accuracy_{model}"] = 100 * float(np.mean(np.argmax(np.asarray(f), 1) == y))
        values["kernel_distance"] = 1 - np.sum(k0 * k) / np.linalg.norm(k0) / np.linalg.norm(k)
        values["cka"], values["target_alignment"] = centred_cosine(k0, k), centred_cosine(k, one_hot @ one_hot.T)
        values["parameter_motion"] = np.linalg.norm(flat(p) - flat(start)) / np.linalg.norm(flat(start))
        values["jump"] = values["train_loss_f"] - values["train_loss_f_lin"]
        values["linearisation_error"] = missed(p, anchor)
        return values

    for t in range(steps):
        if t == 0 or due(t, age, p, anchor):
            rows.append(measure(t))
            anchor, age, updates = p, 0, updates + 1
        i = indices(seed, t, batch_size)
        moved, state = OPTIMISER.update(gradient(p, anchor, X[i], LABELS[i]), state, p)
        p, age = optax.apply_updates(p, moved), age + 1
    rows.append(measure(steps))
    return rows


COMMON = ("step", "feature_updates", "train_loss_f", "train_loss_f_lin", "jump", "kernel_distance", "cka")
COMMON += ("target_alignment", "parameter_motion", "linearisation_error")
LAST = (*records_module.LOSSES, *records_module.ACCURACIES, "feature_updates", "kernel_distance", "cka")
LAST += ("target_alignment", "parameter_motion")


def assert_is_literal(records, rule, due, batch_size):
    """The rows of one rule against the loop; errors of a kernel and of f grow with the steps."""
    amplified = {"condition": 100.0 * STEPS}
    for seed in SEEDS:
        want = literal_run(seed, due, batch_size)
        got = pick(records.measurements, rule=rule, seed=seed)
        assert [row["step"] for row in got] == [row["step"] for row in want]
        for a, b in zip(got, want, strict=True):
            assert_close([a[name] for name in COMMON], [b[name] for name in COMMON], scale=1.0, **amplified)
        (run,) = pick(records.runs, rule=rule, seed=seed)
        assert_close([run[name] for name in LAST], [want[-1][name] for name in LAST], scale=100.0, **amplified)
        assert_close(run["target_alignment_start"], want[0]["target_alignment"], **amplified)
        assert_close(run["largest_jump"], max(row["jump"] for row in want), scale=1.0, **amplified)
        assert run["finite"] is True
        assert [run[name] for name in ("train_loss_f", "cka")] == [got[-1][name] for name in ("train_loss_f", "cka")]
        distances = [row["kernel_distance"] for row in got]
        assert got[0]["kernel_velocity"] is None
        assert len(got) < 2 or abs(got[1]["kernel_velocity"] * got[1]["step"] - distances[1]) <= 1e-9


@pytest.mark.parametrize("batch_size", [None, BATCH])
def test_sweep_is_the_literal_loop(batch_size):
    records = XP.period_sweep(
        classification(batch_size=batch_size), OPTIMISER, [1, 3, None], steps=STEPS, seeds=SEEDS, progress=False
    )
    assert [(row["rule"], row["period"]) for row in records.runs[:: len(SEEDS)]] == [
        ("every 1", 1),
        ("every 3", 3),
        ("never", None),
    ]
    for rule, k in (("every 1", 1), ("every 3", 3), ("never", 99)):
        assert_is_literal(records, rule, lambda t, age, p, a, k=k: t % k == 0, batch_size)
    assert list(records.runs[0]) == list(records_module.RUNS)
    assert list(records.measurements[0]) == list(records_module.MEASUREMENTS)


BOUND = 0.1


def test_schedules_are_the_literal_loop_and_seeds_go_their_own_ways():
    rules = {
        "early": gnl.periods.early_then_sparse(1, 3, 100),
        "stop": gnl.periods.stop_after(4, gnl.periods.every(2)),
        "at": gnl.periods.at([2, 5]),
        "error": gnl.periods.when_linearisation_error(BOUND),
        "function": lambda context: context.age >= 3,
    }
    records = XP.schedules(classification(batch_size=BATCH), OPTIMISER, rules, steps=STEPS, seeds=SEEDS, progress=False)
    triggers = {
        "early": lambda t, age, p, a: t < 3,
        "stop": lambda t, age, p, a: t in (2, 4),
        "at": lambda t, age, p, a: t in (2, 5),
        "function": lambda t, age, p, a: t % 3 == 0,
    }
    for name, due in triggers.items():
        assert_is_literal(records, name, due, BATCH)
    assert_is_literal_by_error(records)
    updates = [row["feature_updates"] for row in pick(records.runs, rule="error")]
    assert len(set(updates)) == len(SEEDS), "the seeds should differ, or the test shows nothing"


def assert_is_literal_by_error(records):
    """The error that triggers is that on the minibatch of the step."""
    for seed in SEEDS:

        def due(t, age, p, anchor, seed=seed):
            i = indices(seed, t, BATCH)
            f, f_lin, start = (np.asarray(v)[i] for v in both(p, anchor, X))
            return np.linalg.norm(f - f_lin) > BOUND * np.linalg.norm(f - start)

        want = literal_run(seed, due, BATCH)
        (run,) = pick(records.runs, rule="error", seed=seed)
        assert_close([run[name] for name in LAST], [want[-1][name] for name in LAST], scale=100.0, condition=700.0)
        got = [row["step"] for row in pick(records.measurements, rule="error", seed=seed)]
        assert got == [row["step"] for row in want]


def test_where_a_seed_is_measured_is_its_own_affair():
    rules = {"error": gnl.periods.when_linearisation_error(BOUND)}
    options = {"steps": 12, "measurements": 4, "progress": False}
    problem = classification()
    together = XP.schedules(problem, OPTIMISER, rules, seeds=SEEDS, **options)
    steps = {}
    for seed in SEEDS:
        alone = XP.schedules(problem, OPTIMISER, rules, seeds=[seed], **options)
        steps[seed] = [row["step"] for row in alone.measurements]
        assert [row["step"] for row in pick(together.measurements, seed=seed)] == steps[seed]
        assert len(steps[seed]) <= 4
        assert steps[seed][-1] == 12
    assert len(set(map(tuple, steps.values()))) == len(SEEDS)


# --- one compilation, prefixes, identities ----------------------------------------------------------------------------


def test_one_compilation_serves_all_periods():
    calls = []

    def predict(p, x):
        calls.append(1)
        return network(p, x)

    def traced(periods, steps):
        calls.clear()
        problem = XP.Problem(predict, init, gnl.losses.softmax_cross_entropy, X, LABELS)
        XP.period_sweep(problem, optax.sgd(0.1), periods, steps=steps, seeds=1, progress=False)
        return len(calls)

    traced([2], 4)  # JAX remembers the shapes of a function that it has seen
    assert traced([1, 3, 5, None], 9) == traced([2], 4)


def test_phase_diagram_is_that_of_separate_sweeps():
    problem, lengths, periods = classification(batch_size=BATCH), [4, 9, 6], [1, 4, None]
    diagram = XP.phase_diagram(
        problem, OPTIMISER, steps=lengths, periods=periods, seeds=SEEDS, measurements=4, progress=False
    )
    for length in lengths:
        sweep = XP.period_sweep(problem, OPTIMISER, periods, steps=length, seeds=SEEDS, measurements=4, progress=False)
        part = XP.Records(*(pick(table, steps=length) for table in diagram))
        assert quiet(part) == quiet(sweep)
    assert {row["experiment"] for row in itertools.chain(*diagram)} == {"phase_diagram"}


def line(p, x):
    return x @ p["w"] + p["b"]


def line_init(key):
    return {"w": jax.random.normal(key, (2, 2)), "b": jnp.zeros(2)}


TARGETS = RNG.normal(size=(8, 2))


def test_affine_model_has_the_same_run_for_every_period():
    problem = XP.Problem(line, line_init, gnl.losses.squared_error, X, TARGETS)
    records = XP.period_sweep(problem, optax.adam(0.1), [1, 2, None], steps=6, seeds=1, progress=False)
    first, *others = records.runs
    for row in others:
        names = ("train_loss_f", "train_loss_f_lin", "parameter_motion")
        assert_close([row[name] for name in names], [first["train_loss_f"], *(first[n] for n in names[1:])], size=50)
        assert row["train_accuracy_f"] is None, "real targets have no accuracy"
        assert row["test_loss_f"] is None


def test_methods_side_by_side_on_a_quadratic():
    """Closed forms of each method; prox-linear and iterative linearisation are the same run."""
    rate, steps, period = 0.2, 6, 3
    problem = XP.Problem(line, line_init, gnl.losses.squared_error, X, TARGETS)
    records = XP.side_by_side(problem, learning_rate=rate, periods=[1, period], steps=steps, seeds=[3], progress=False)
    start = line_init(jax.random.key(3))
    theta0 = np.concatenate([np.asarray(start["b"])[None], np.asarray(start["w"])])
    design = np.concatenate([np.ones((8, 1)), X], axis=1)
    gram, cross = design.T @ design / 8, design.T @ TARGETS / 8

    def loss(theta):
        return np.sum((design @ theta - TARGETS) ** 2) / 16

    descended = theta0.copy()
    for _ in range(steps):
        descended -= rate * (gram @ descended - cross)
    for row in records.runs:
        k = row["period"]
        assert (row["feature_updates"], row["steps"]) == (steps // k, steps)
        assert_close([row["damping"], row["learning_rate"]], [1 / (rate * k), rate])
        want = descended
        if row["method"] == "gauss-newton":
            want = theta0.copy()
            for _ in range(steps // k):
                want = want - np.linalg.solve(gram + np.eye(3) / (rate * k), gram @ want - cross)
        solved = 1e-6 if row["method"] == "gauss-newton" else 0.0  # the tolerance of conjugate gradients
        for column in ("train_loss_f", "train_loss_f_lin"):
            assert abs(row[column] - loss(want)) <= (solved + 1e-12) * loss(theta0), row["method"]
    methods = [(row["method"], row["period"]) for row in records.runs]
    assert methods[0] == ("gradient descent", 1)
    assert methods[1:] == [
        (method, k) for k in (1, period) for method in ("gauss-newton", "prox-linear", "iterative linearisation")
    ]
    ends = pick(records.measurements, step=steps)
    assert {row["feature_updates"] for row in ends if row["period"] == period} == {steps // period}


def test_period_one_is_the_plain_optimiser_on_minibatches():
    records = XP.side_by_side(
        classification(batch_size=BATCH), learning_rate=0.3, periods=[1], steps=5, seeds=SEEDS, progress=False
    )
    plain, lin = (pick(records.runs, method=m) for m in ("gradient descent", "iterative linearisation"))
    for a, b in zip(plain, lin, strict=True):
        assert_close([a[n] for n in LAST], [b[n] for n in LAST], scale=100.0)
        assert a["train_loss_f"] != a["train_loss_f_lin"], "the anchor is that of the last step"


# --- divergence -------------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_leaves_the_others_alone():
    def wild(key):
        scale = jnp.where(jax.random.key_data(key)[-1] == 1, 1e200, 1.0)
        return jax.tree.map(lambda leaf: leaf * scale, line_init(key))

    problem = XP.Problem(line, wild, gnl.losses.squared_error, X, TARGETS)
    options = {"steps": 4, "progress": False, "measurements": 3}
    together = XP.period_sweep(problem, optax.sgd(0.1), [2], seeds=[0, 1, 2], **options)
    alone = XP.period_sweep(problem, optax.sgd(0.1), [2], seeds=[0, 2], **options)
    bad = together.runs[1]
    assert (bad["seed"], bad["finite"]) == (1, False)
    assert all(bad[name] is None for name in records_module.OUTCOMES)
    assert bad["feature_updates"] == 2
    assert pick(together.measurements, seed=1)[-1]["train_loss_f"] is None
    json.dumps(together, allow_nan=False)
    for a, b in zip([together.runs[0], together.runs[2]], alone.runs, strict=True):
        assert a["finite"]
        assert_close([a["train_loss_f"], a["cka"]], [b["train_loss_f"], b["cka"]], size=50)


# --- fewest updates ---------------------------------------------------------------------------------------------------


def test_fewest_updates_is_that_of_all_periods():
    problem, steps = classification(), 12
    choices = {-(-steps // k): k for k in range(steps, 0, -1)}
    options = {"steps": steps, "seeds": SEEDS, "progress": False}
    sweep = XP.period_sweep(problem, OPTIMISER, list(choices.values()), measurements=2, **options)
    means = {u: np.mean([row["train_loss_f"] for row in pick(sweep.runs, period=k)]) for u, k in choices.items()}
    ordered = [means[u] for u in sorted(means)]
    assert ordered == sorted(ordered, reverse=True), "this problem is monotone, so that bisection is exact"
    for target in (1, 4):
        tolerance = float(means[target] - means[steps]) * (1 + 1e-9)
        found = XP.fewest_updates(problem, OPTIMISER, tolerance=tolerance, metric="train_loss_f", **options)
        assert (found.updates, found.period) == (target, choices[target])
        assert_close([found.value, found.reference], [means[target], means[steps]])
        assert found.monotone
        assert [u for u, _, _ in found.probed] == sorted({row["feature_updates"] for row in found.records.runs})
        assert len(found.probed) <= 2 + len(choices).bit_length()


def test_search_says_when_more_updates_did_worse():
    from gn_linear.experiments.fewest import _Search

    choices = [(1, 8), (2, 4), (4, 2), (8, 1)]
    search = _Search(None, None, None, "test_accuracy_f", 1.0, choices)
    none = XP.Records([], [])
    values = {0: 50.0, 1: 99.5, 2: 90.0, 3: 100.0}
    found = search.result({i: (v, none) for i, v in values.items()}, none)
    assert (found.updates, found.value, found.monotone) == (2, 99.5, False)
    values[2], values[0] = 99.0, None
    assert search.result({i: (v, none) for i, v in values.items()}, none).monotone


# --- folders ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path):
    problem, periods = classification(batch_size=BATCH), [2, 3, None]
    options = {"steps": STEPS, "seeds": SEEDS, "measurements": 3}
    whole = XP.period_sweep(problem, OPTIMISER, periods, folder=tmp_path / "whole", progress=False, **options)

    def stop(done, total):
        assert total == STEPS * len(periods)
        if done > STEPS + 2:
            raise Stopped

    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        XP.period_sweep(problem, OPTIMISER, periods, folder=folder, progress=stop, **options)
    kept = (folder / "runs.jsonl").read_text()
    assert {json.loads(row)["period"] for row in kept.splitlines()} == {2}
    with (folder / "runs.jsonl").open("a") as file:
        file.write(kept.replace('"period": 2', '"period": 3')[: len(kept) * 3 // 4])  # torn in its second line
    seen = []
    again = XP.period_sweep(
        problem, OPTIMISER, periods, folder=folder, progress=lambda done, total: seen.append(done), **options
    )
    assert quiet(again) == quiet(whole)
    assert seen[0] == STEPS
    assert seen[-1] == STEPS * len(periods)
    seen.clear()
    third = XP.period_sweep(
        problem, OPTIMISER, periods, folder=folder, progress=lambda done, total: seen.append(done), **options
    )
    assert seen == [STEPS, 2 * STEPS, 3 * STEPS], "nothing is run again"
    assert third == again
    for name in ("runs", "measurements"):
        assert len((folder / f"{name}.csv").read_text().splitlines()) == 1 + len(getattr(again, name))
    for other in (
        {"problem": classification(batch_size=BATCH, test_inputs=X_TEST + 1)},
        {"optimiser": optax.sgd(0.2, momentum=0.5)},
        {"optimiser": optax.adam(0.3)},
        {"steps": STEPS + 1},
    ):
        call = {"problem": problem, "optimiser": OPTIMISER, "periods": periods, "folder": folder, **options, **other}
        with pytest.raises(ValueError, match="folder holds records of other settings"):
            XP.period_sweep(**call)


def rows_of(period):
    about = dict.fromkeys(records_module.CELL) | {"period": period}
    return XP.Records([{**about, "seed": s} for s in (0, 1)], [{**about, "seed": s} for s in (0, 0, 1)])


def test_only_whole_cells_survive_a_file_cut_anywhere(tmp_path):
    def opened():
        return records_module.Store(tmp_path, {"steps": 1, "size": [1.0]}, 2)

    store = opened()
    for period in (1, 2):
        store.add(rows_of(period))
    runs, measured = ((tmp_path / f"{name}.jsonl").read_bytes() for name in ("runs", "measurements"))
    cells = [records_module.cell_of(rows_of(period).runs[0]) for period in (1, 2)]
    half = len(runs) // 2
    for cut in sorted({*range(0, len(runs), 17), half - 1, half, half + 1, len(runs) - 1, len(runs)}):
        (tmp_path / "runs.jsonl").write_bytes(runs[:cut])
        (tmp_path / "measurements.jsonl").write_bytes(measured)
        store = opened()
        whole = [cut >= half, cut == len(runs)]
        assert [store.found(cell) for cell in cells] == [
            rows_of(p) if there else None for p, there in zip((1, 2), whole, strict=True)
        ]
        assert (tmp_path / "runs.jsonl").read_bytes() == runs[: half * sum(whole)]
    store = opened()
    store.add(rows_of(3))
    assert opened().found(records_module.cell_of(rows_of(3).runs[0])) == rows_of(3)


def test_settings_of_a_folder_agree_up_to_rounding_and_its_rules_by_name(tmp_path):
    def opened(size, **rules):
        records_module.Store(tmp_path, {"size": [size], "rules": rules}, 1)

    opened(1.0, often="every(1)")
    opened(1.0 + 1e-6, seldom="every(9)")
    for size, rule in ((1.1, "every(1)"), (1.0, "every(2)")):
        with pytest.raises(ValueError, match="folder holds records of other settings"):
            opened(size, often=rule)
    opened(1.0, often="every(1)", seldom="every(9)")


def test_inputs_may_hold_random_keys(tmp_path):
    """Such as those of dropout, one for each example."""

    def noisy(p, x):
        return x["x"] @ p["w"] + 0.1 * jax.vmap(lambda key: jax.random.normal(key, (2,)))(x["key"])

    inputs = {"x": X, "key": jax.random.split(jax.random.key(0), len(X))}
    problem = XP.Problem(
        noisy, lambda key: {"w": jnp.ones((2, 2))}, gnl.losses.squared_error, inputs, TARGETS, batch_size=3
    )
    records = XP.period_sweep(problem, optax.sgd(0.1), [2], steps=3, seeds=1, folder=tmp_path, progress=False)
    assert records.runs[0]["finite"]


# --- small parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "want"),
    [
        ("softmax_cross_entropy", [[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]], [1, 1, 1], 2 / 3),
        ("squared_error", [[1.0, 2.0], [3.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]], 1 / 2),
        ("squared_error", [[1.0, 2.0], [3.0, 1.0]], [[0.5, 1.0], [0.0, 1.0]], None),
        ("squared_error", [0.4, -2.0, 0.1], [1.0, -1.0, -1.0], 2 / 3),
        ("squared_error", [0.4, 0.6, 0.1], [1, 1, 0], 2 / 3),
        ("sigmoid_binary_cross_entropy", [[0.4], [-0.6], [0.1]], [[1], [1], [0]], 1 / 3),
        ("squared_error", [0.4, -2.0, 0.1], [0.3, -1.0, -1.0], None),
    ],
)
def test_accuracy_is_that_which_fits(loss, outputs, targets, want):
    outputs, targets = np.asarray(outputs), np.asarray(targets)
    problem = XP.Problem(lambda p, x: x, lambda key: {}, getattr(gnl.losses, loss), outputs, targets)
    fraction = problem.fraction({})
    assert (None if fraction is None else float(fraction(outputs, targets))) == pytest.approx(want)
    mine = XP.Problem(lambda p, x: x, lambda key: {}, getattr(gnl.losses, loss), outputs, targets, accuracy=max)
    assert mine.fraction({}) is max


@pytest.mark.parametrize("most", [2, 3, 5, 16])
@pytest.mark.parametrize("count", [2, 3, 4, 17, 1001])
def test_measured_places_are_spread_from_first_to_last(count, most):
    places = list(range(0, 3 * count, 3))
    kept = _methods.thinned(places, most)
    assert (kept[0], kept[-1]) == (places[0], places[-1])
    assert kept == sorted(set(kept))
    assert set(kept) <= set(places)
    assert len(kept) <= most
    if count <= most:
        assert set(kept) >= {places[0], places[1], places[-1]}


def test_bar_does_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with _setup.Bar(True, 10, "run") as bar:
        bar(5)


def test_probe_is_the_first_inputs_unless_given():
    x, y = np.zeros((300, 2)), np.arange(300) % 3
    problem = XP.Problem(network, init, gnl.losses.softmax_cross_entropy, x, y)
    data = problem.arrays()
    assert data.probe.shape == (problem_module.PROBED, 2)
    np.testing.assert_array_equal(data.columns, np.eye(3)[y[:200]])
    other = XP.Problem(
        network, init, gnl.losses.softmax_cross_entropy, x, y, probe_inputs=x[:4], probe_targets=np.ones((4, 1))
    ).arrays()
    assert (other.probe.shape, other.columns.shape) == ((4, 2), (4, 1))
