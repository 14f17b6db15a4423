"""The benchmarks' frame, and one suite from the command line to its record."""

import json
import math
import pickle
import random
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks import (
    data,
    feature_tables,
    figures,
    networks,
    pickles,
    reach,
    record,
    schedules,
    suites,
    tables,
    timing,
)
from benchmarks.settings import Settings
from gn_linear.experiments._methods import planned_steps
from tests.support import assert_close


def test_list_names_each_suite_with_its_line(capsys):
    assert command_line.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == suites.names()
    assert {"demo", "regression"} <= set(suites.names())
    assert all(len(line.split()) > 3 for line in lines)


def test_unknown_suite_is_an_error_that_names_the_suites(capsys, tmp_path):
    assert command_line.main(["run", "demmo", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "'demmo'" in message
    assert all(name in message for name in suites.names())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", ["0", "-1", "two"])
def test_seeds_must_be_a_positive_number(seeds, capsys):
    with pytest.raises(SystemExit):
        command_line.parse(["run", "demo", "--seeds", seeds])
    assert "at least 1" in capsys.readouterr().err


def test_data_must_be_a_folder_and_reaches_the_settings(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        command_line.parse(["run", "demo", "--data", str(tmp_path / "none")])
    assert f"no folder '{tmp_path / 'none'}'" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(command_line, "run_suite", lambda name, settings: seen.append(settings))
    assert command_line.main(["run", "demo", "--data", str(tmp_path)]) == 0
    assert seen[0].data == tmp_path


@pytest.mark.parametrize("name", suites.names())
def test_each_suite_has_the_interface(name):
    suite = suites.load(name)
    assert isinstance(suite.X64, bool)
    assert all(callable(getattr(suite, function)) for function in ("run", "table", "figure"))


def test_quick_demo_writes_record_table_and_figure(capsys, tmp_path):
    assert command_line.main(["run", "demo", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Gauss-Newton" in printed
    assert "f_lin" in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["machine"]["x64"] is False
    assert written["arguments"] == {"quick": True, "seeds": 1}
    runs = written["results"]["runs"]
    assert {(row["method"].split()[0], row["evaluator"]) for row in runs} == {
        ("Gauss-Newton", "f"),
        ("Adam", "f"),
        ("linearised", "f"),
        ("linearised", "f_lin"),
    }
    starts = {row["train_loss"] for row in written["results"]["curve"] if row["step"] == 0 and row["evaluator"] == "f"}
    assert len(starts) == 1  # every method starts from the same parameters
    assert all(row["train_loss"] < min(starts) and row["seconds"] > 0 for row in runs)


def test_record_has_all_parts_and_is_strict_json(tmp_path):
    rows = record.plain({"runs": [{"loss": float("nan"), "steps": np.int64(3), "curve": np.array([1.0, math.inf])}]})
    made = record.make("demo", Settings(quick=False, seeds=2, out=tmp_path), rows)
    record.write(made, tmp_path / "demo.json")
    read = json.loads((tmp_path / "demo.json").read_text(), parse_constant=pytest.fail)
    assert read == made
    assert set(read) == {"schema", "suite", "arguments", "date", "machine", "versions", "commit", "results"}
    assert {"cpu", "cores", "memory_gib", "platform", "device", "x64"} == set(read["machine"])
    assert {"python", "jax", "jaxlib", "optax", "numpy"} <= set(read["versions"])
    assert set(read["commit"]) == {"hash", "dirty"}
    assert read["results"]["runs"] == [{"loss": None, "steps": 3, "curve": [1.0, None]}]


def test_mnist_split_is_deterministic_disjoint_and_scaled():
    split, again = data.mnist(), data.mnist()
    assert all(np.array_equal(first, second) for first, second in zip(split, again, strict=True))
    assert split.train_inputs.shape == (4000, 784)
    assert split.test_inputs.shape == (1000, 784)
    assert split.train_inputs.dtype == np.float32
    assert split.train_inputs.min() == 0
    assert split.train_inputs.max() == 1
    assert set(split.train_targets) == set(split.test_targets) == set(range(10))
    train, test = ({row.tobytes() for row in part} for part in (split.train_inputs, split.test_inputs))
    assert not train & test


def test_digits_split_is_deterministic_disjoint_and_scaled():
    split, again = data.digits(500), data.digits(500)
    assert all(np.array_equal(first, second) for first, second in zip(split, again, strict=True))
    assert split.train_inputs.shape == (500, 64)
    assert split.test_inputs.shape == (1297, 64)
    assert split.train_inputs.dtype == np.float32
    assert split.train_inputs.min() == 0
    assert split.train_inputs.max() == 1
    assert set(split.train_targets) == set(range(10))


def test_xor_is_fresh_for_each_seed_and_labelled_by_the_first_two_signs():
    split, again, other = data.xor(0, 40, 60), data.xor(0, 40, 60), data.xor(1, 40, 60)
    assert all(np.array_equal(first, second) for first, second in zip(split, again, strict=True))
    assert not np.array_equal(split.train_inputs, other.train_inputs)
    assert split.train_inputs.shape == (40, 30)
    assert split.test_inputs.shape == (60, 30)
    assert split.train_inputs.dtype == np.float32
    for inputs, labels in (split[:2], split[2:]):
        assert set(inputs.ravel()) == {-1, 1}
        assert np.array_equal(labels, inputs[:, 0] * inputs[:, 1] < 0)
    train, test = ({row.tobytes() for row in part} for part in (split.train_inputs, split.test_inputs))
    assert len(train) == 40
    assert not train & test


def test_mnist1d_is_that_of_its_seed_and_leaves_the_global_generators_alone():
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    split = data.mnist1d(3000)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    assert split.train_inputs.shape == (3000, 40)
    assert split.test_inputs.shape == (1000, 40)
    assert split.train_inputs.dtype == np.float32
    assert split.train_targets[:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    assert set(split.train_targets) == set(split.test_targets) == set(range(10))
    assert 0.9 < split.train_inputs.std() < 1.1


def python2_batch(pixels, labels):
    """The bytes that Python 2 wrote: opcodes of protocol 2, numpy under its old name, text as bytes."""

    def text(value):
        return b"T" + struct.pack("<I", len(value)) + value

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff"
    shape = b"".join(b"M" + struct.pack("<H", size) for size in pixels.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"K\x00tb\x89" + text(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def python3_batch(pixels, labels):
    return pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"a batch"}, protocol=4)


@pytest.fixture
def cifar(tmp_path):
    """A folder of the format with four images a file, and its images and labels in order."""
    generator = np.random.default_rng(0)
    folder = tmp_path / data.CIFAR_FOLDER
    folder.mkdir()
    pixels = generator.integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    labels = generator.integers(0, 10, (6, 4))
    for number, name in enumerate((*data.CIFAR_BATCHES, data.CIFAR_TEST)):
        write = python2_batch if number % 2 else python3_batch
        (folder / name).write_bytes(write(pixels[number], labels[number].tolist()))
    return folder, pixels, labels


def test_cifar_is_read_as_numpy_reads_it(cifar):
    folder, pixels, labels = cifar
    for number, name in enumerate(data.CIFAR_BATCHES):
        theirs = pickle.loads((folder / name).read_bytes(), encoding="bytes")
        ours = pickles.load(folder / name)
        assert ours.keys() == theirs.keys()
        assert np.array_equal(ours[b"data"], theirs[b"data"])
        assert np.array_equal(ours[b"data"], pixels[number])
        assert ours[b"labels"] == theirs[b"labels"] == labels[number].tolist()


def test_cifar_split_keeps_images_and_labels_together_and_standardises_channels(cifar):
    folder, pixels, labels = cifar
    split, nested = data.cifar10(folder, train=16, test=3), data.cifar10(folder.parent, train=16, test=3)
    assert all(np.array_equal(first, second) for first, second in zip(split, nested, strict=True))
    assert split.train_inputs.shape == (16, 32, 32, 3)
    assert split.test_inputs.shape == (3, 32, 32, 3)
    assert split.train_inputs.dtype == split.test_inputs.dtype == np.float32
    assert_close(split.train_inputs.mean((0, 1, 2)), np.zeros(3), scale=1.0)
    assert_close(split.train_inputs.std((0, 1, 2)), np.ones(3))
    # Standardising a channel keeps the order of its values, by which an image is found again.
    known = {np.argsort(image[:1024], kind="stable").tobytes(): label for image, label in images_of(pixels, labels)}
    found = [known[np.argsort(image[..., 0].ravel(), kind="stable").tobytes()] for image in split.train_inputs]
    assert found == split.train_targets.tolist()
    assert len({image.tobytes() for image in split.train_inputs}) == 16


def images_of(pixels, labels):
    return zip(pixels.reshape(-1, 3072), labels.ravel().tolist(), strict=True)


def broken_batch(change):
    pixels, labels = np.zeros((2, 3072), np.uint8), [0, 1]
    return pickle.dumps(change({b"data": pixels, b"labels": labels}), protocol=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken_batch(lambda batch: {b"data": batch[b"data"]}), r"must hold \[b'labels'\], but holds \[b'data'\]"),
        (broken_batch(lambda batch: batch | {b"data": np.zeros((2, 9), np.uint8)}), r"uint8 of shape \(2, 9\)"),
        (broken_batch(lambda batch: batch | {b"data": np.zeros((2, 3072))}), r"float64 of shape \(2, 3072\)"),
        (broken_batch(lambda batch: batch | {b"labels": [0]}), "2 labels, but is a list of 1"),
        (broken_batch(lambda batch: batch | {b"labels": [0, 10]}), "one is 10"),
        (broken_batch(lambda batch: [batch]), "holds a list"),
        (broken_batch(lambda batch: batch | {b"data": np.array([{}, {}])}), "dtype 'O8' is not that of numbers"),
        (broken_batch(lambda batch: batch)[:-40], "not a pickle of plain"),
        (b"", "not a pickle of plain"),
    ],
)
def test_cifar_says_what_is_wrong_with_a_file(cifar, content, message):
    folder, _, _ = cifar
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3.*{message}"):
        data.cifar10(folder)


def test_cifar_names_the_files_that_are_missing(cifar):
    folder, _, _ = cifar
    (folder / "data_batch_2").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match="has no data_batch_2, test_batch; give the unpacked folder"):
        data.cifar10(folder)


class Touches:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_run_nothing(tmp_path):
    file, touched = tmp_path / "hostile", tmp_path / "touched"
    hostile = pickle.dumps({b"data": Touches(touched)}, protocol=4)
    pickle.loads(hostile)[b"data"].close()
    assert touched.exists()  # so the file is what it should be
    touched.unlink()
    file.write_bytes(hostile)
    with pytest.raises(ValueError, match=r"it asks for (_?io|builtins)\.open"):
        pickles.load(file)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [((2, 8, 3), ((5, 3, 4), (16, 2))), ((2, 4, 6, 3), ((2, 3, 3, 4), (24, 2)))],
    ids=["1-d", "2-d"],
)
def test_convolutional_network_is_that_of_xla(inputs, shapes):
    params = networks.init_layers(jax.random.key(0), shapes, networks.HE)
    params[0]["b"] += 0.1
    x = jax.random.normal(jax.random.key(1), inputs)
    axes = "HW"[: x.ndim - 2]
    layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    product = jax.lax.conv_general_dilated(x, params[0]["w"], (2,) * len(axes), "SAME", dimension_numbers=layout)
    hidden = np.maximum(product + params[0]["b"], 0).reshape(2, -1)
    wanted = hidden @ params[1]["w"] + params[1]["b"]
    assert_close(networks.convolutional(jax.nn.relu)(params, x), wanted, size=shapes[1][0])


def test_weights_have_the_variance_of_their_fan_in():
    layer = networks.init_layers(jax.random.key(0), ((5, 8, 500),), networks.HE)[0]
    assert abs(jnp.std(layer["w"]) * math.sqrt(40 / 2) - 1) < 0.02  # six times what 20,000 draws leave open
    assert layer["b"].shape == (500,)


def test_batch_order_is_seeded_and_uses_each_example_once_per_epoch():
    order = data.batch_order(examples=10, batch_size=3, steps=7, seed=0)
    assert order.shape == (7, 3)
    assert np.array_equal(order, data.batch_order(10, 3, 7, 0))
    assert not np.array_equal(order, data.batch_order(10, 3, 7, 1))
    for epoch in (order[:3], order[3:6]):
        assert len(set(epoch.ravel())) == 9


def test_race_interleaves_runners_and_rotates_who_begins():
    taken = []

    def step(state, index):
        taken.append((state, index))
        return state, index

    runners = [timing.Runner(name, step, name) for name in "abc"]
    progress = []
    visits = [
        (runner.name, steps) for runner, steps in timing.race(runners, steps=5, chunk=2, progress=progress.append)
    ]
    assert visits == [(n, 0) for n in "abc"] + [(n, 2) for n in "abc"] + [(n, 4) for n in "bca"] + [
        (n, 5) for n in "cab"
    ]
    assert taken[:4] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert sum(progress) == 15
    assert all(runner.measured == [0, 1, 2, 3, 4] and runner.seconds > 0 for runner in runners)


def test_clock_stands_still_between_turns():
    runner = timing.Runner("only", lambda state, index: (state, None), 0)
    readings = []
    for _ in timing.race([runner], steps=2, chunk=1):
        before = runner.seconds
        sum(range(100_000))
        readings.append(runner.seconds - before)
    assert readings == [0, 0, 0]


def test_race_passes_over_runners_that_are_finished():
    runners = [timing.Runner(name, lambda state, index: (state, index), 0) for name in "ab"]
    visits = []
    for runner, steps in timing.race(runners, steps=10, chunk=1):
        visits.append((runner.name, steps))
        runner.finished = (runner.name, steps) in {("a", 1), ("b", 3)}
    assert visits == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3)]
    assert [runner.measured for runner in runners] == [[0], [0, 1, 2]]


def test_means_medians_and_what_was_not_reached():
    assert tables.mean_spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert tables.median_range([3.0, 1.0, 2.0], ".0f") == "2 (1 to 3)"
    assert tables.mean_spread([1.0, None], ".1f") == "not finite"
    assert reach.first([{"loss": 2.0}, {"loss": math.nan}, {"loss": 0.5}], "loss", 1.0) == {"loss": 0.5}
    assert reach.describe([None, None]) == "not reached"
    assert reach.describe([1.0, None]) == "1.000, 1 of 2 seeds"
    assert reach.median_ratio([2.0, None, 9.0], [1.0, 1.0, None]) == 2.0
    assert reach.median_ratio([None], [1.0]) is None


def test_curves_leave_out_what_is_not_finite():
    rows = [
        {"method": "a", "seed": seed, "step": step, "loss": None if step == 2 else 1.0}
        for seed in range(2)
        for step in range(3)
    ]
    drawing, (panel,) = figures.panels(1, "title")
    figures.draw_curves(panel, rows, "step", "loss")
    figures.shared_legend(drawing, panel)
    assert [len(line.get_xdata()) for line in panel.get_lines()] == [2, 2, 2]


def test_exact_steps_of_periods_are_those_of_the_loop():
    suite = suites.load("periods")
    values, rate = np.array([0.0, 1e-3, 0.5, 1.99]), 0.5
    for period in (1, 7, 100):
        looped = np.zeros(4)
        for _ in range(period):
            looped += rate * (1.0 - values * looped)
        np.testing.assert_allclose(suite.gradient_descent(values, rate, period), looped, rtol=1e-12)


def test_periods_measures_one_small_problem(monkeypatch):
    suite = suites.load("periods")
    monkeypatch.setattr(suite, "QUICK_IMAGES", 10)
    monkeypatch.setattr(suite, "LARGEST_RANK", 8)
    monkeypatch.setattr(suite, "PERIODS", (1, 10))
    monkeypatch.setattr(suite, "BASES", (suite.Basis("float32", 8, 10, 2.0, 0.5), suite.Basis("float64", 8, 10)))
    found = suite.measure(suite.problems(0, quick=True)[0], quick=True)
    rows = record.plain({name: [{"seed": 0} | row for row in rows] for name, rows in found.items()})
    errors = {(row["method"], row["period"]): row["error"] for row in rows["errors"]}
    assert errors["loop, float32", 10] < 1e-5
    assert errors["loop, float64", 10] < 1e-12
    assert errors["basis, float32, rank 8, to 10", 1] < 1e-5
    assert errors["basis, float64, rank 8, to 10", 10] < 1e-2
    assert {row["period"]: row["products"] for row in rows["growth"]}[1] == 1
    printed = suite.table(rows)
    assert "by the basis, float32, rank 8, to 10" in printed
    assert "float64, rank 8" in printed
    assert suite.figure(rows).axes


def test_ntk_methods_agree_and_goals_are_named(monkeypatch):
    suite = suites.load("ntk")
    monkeypatch.setattr(suite, "SHALLOW", (2, 4, 3))
    small, _, _, convolutional = suite.cases(quick=True)
    small, convolutional = (case._replace(inputs=case.inputs[:4]) for case in (small, convolutional))
    measured = [suite.measure(case, seed) for case, seed in ((small, 0), (small, 1), (convolutional, 0))]
    results = record.plain({name: [row for found in measured for row in found[name]] for name in measured[0]})
    kernels = results["kernels"]
    assert all(row["difference"] < 1e-5 for row in kernels)
    exact = [row["structured_error"] for row in kernels] + [row["jacobian_error"] for row in kernels]
    assert [error < 1e-6 for error in exact if error is not None] == [True] * 8
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in results["runs"])
    for row in kernels:
        row["speedup"], row["memory_ratio"] = (9.0, 1.5) if row["network"] == small.name else (2.0, 0.5)
    printed = suite.table(results)
    assert "9.0 times faster (goal 10: MISSED), memory 1.5 of the Jacobian's (goal below 1: MISSED)" in printed
    assert "2.0 times faster, memory 0.5 of the Jacobian's (goal below 1: reached)" in printed
    assert suite.figure(results).axes


def test_ntk_methods_take_turns_and_slow_ones_fewer():
    suite = suites.load("ntk")
    taken = []

    def recording(key):
        return suite.Compiled(lambda: taken.append(key), 0.0, 0)

    keys = [(outputs, method) for outputs in ("each", "averaged") for method in suite.METHODS]
    case = suite.Case("any", None, None, None, {"structured": 4, "Jacobian": 1})
    seconds, _ = suite.take_turns(case, {key: recording(key) for key in keys})
    assert [len(seconds[key]) for key in keys] == [4, 1, 4, 1]
    warm, first, second, third = taken[:2], taken[2:4], taken[4:6], taken[6:10]
    assert warm == first == [keys[0], keys[2]]
    assert second == [keys[2], keys[0]]
    assert third == [keys[2], keys[3], keys[0], keys[1]]


def test_feature_learning_runs_judges_and_goes_on(monkeypatch, tmp_path):
    suite = suites.load("feature-learning")
    tiny = suite.Case(
        "XOR",
        lambda seed: data.xor(seed, 20, 20),
        True,
        networks.mlp(jax.nn.relu),
        suite.perceptron(30, 3, 2),
        100,
        (0.1,),
        suite.Plan((10,), (2,), (0.5,), (), fewest=True),
    )
    monkeypatch.setattr(suite, "cases", lambda settings: [tiny])
    settings = Settings(quick=True, seeds=1, out=tmp_path)
    results = record.plain(suite.run(settings))
    sweep = feature_tables.of(results["runs"], "period_sweep")
    assert [row["feature_updates"] for row in sweep] == [100, 10, 1]
    assert {row["seed"] for row in results["runs"]} == {suite.FIRST_SEED}
    assert [(row["claim"], row["passed"] is None) for row in results["claims"]] == [
        ("i", False),
        ("ii", False),
        ("iii", False),
        ("iv", True),
    ]
    printed = suite.table(results)
    assert "(iv) damping controls feature learning and generalisation | not decided" in printed
    assert "CIFAR-10: skipped" in printed
    assert len(suite.figure(results).axes) == 4
    assert json.loads(json.dumps(results)) == results
    rules = {row["rule"]: row["updates"] for row in results["schedules"]}
    assert {name: rules[name] for name in ("uniform", "early-dense", "logarithmic")} == {
        "uniform": 10,
        "early-dense": 10,
        "logarithmic": 10,
    }
    assert {row["period"] for row in results["histories"]} == {1, 10, None}
    # Killed within the schedules: what is left of the cell is done again, with the same outcome.
    kept = tmp_path / "xor" / f"seed-{suite.FIRST_SEED}" / "schedules" / "runs.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:-1]) + lines[-1][:9])
    again = record.plain(suite.run(settings))
    assert suite.keep(again) == suite.keep(results)
    assert record.plain(suite.run(settings)) == again  # seconds, too: nothing was run again


def scheduled(rule, updates, accuracies, experiment="schedules"):
    return [
        {"experiment": experiment, "rule": rule, "feature_updates": updates, "seed": seed, "learning_rate": 0.1}
        | {"test_accuracy_f": accuracy, "test_accuracy_f_lin": accuracy}
        for seed, accuracy in enumerate(accuracies)
    ]


def test_schedules_are_compared_seed_by_seed_with_the_nearest_number_of_updates():
    sweep = scheduled("every 10", 10, [90.0, 80.0], "period_sweep") + scheduled(
        "every 2", 50, [95.0, 85.0], "period_sweep"
    )
    runs = [*sweep, *scheduled("early", 10, [91.0, 83.0]), *scheduled("late", 23, [95.0, None])]
    uniform, early, late = schedules.compared(runs, 10)
    assert (uniform["rule"], uniform["test_accuracy_f"], uniform["gain"]) == ("uniform", 85.0, 0.0)
    assert (early["nearest"], early["gain"], early["error"]) == (10, 2.0, 1.0)
    assert (late["nearest"], late["gain"], late["test_accuracy_f"]) == (50, None, None)


@pytest.mark.parametrize("steps", [1000, 2000, 4000])
def test_planned_schedules_spend_equal_budgets(steps):
    for name, rule in schedules.planned(steps, 10).items():
        places = planned_steps(rule, steps)
        assert len(places) == 10, name
        assert places[4] <= steps / 8, name  # half of them early


def test_columns_hold_what_the_rows_do(tmp_path):
    rows = [{"a": 1, "b": "x", "c": 1 / 3}, {"a": None, "b": "y", "d": True}]
    made = record.make("demo", Settings(quick=True, seeds=1, out=tmp_path), {"rows": rows, "none": []})
    record.write_columns(made, tmp_path / "columns.json")
    read = json.loads((tmp_path / "columns.json").read_text())
    assert read["results"] == {
        "rows": {"a": [1, None], "b": ["x", "y"], "c": [0.333333, None], "d": [None, True]},
        "none": {},
    }
    assert read["versions"] == made["versions"]


def test_feature_learning_has_cifar_only_where_it_is_given(cifar):
    suite = suites.load("feature-learning")
    without, given = (
        suite.cases(Settings(quick=False, seeds=1, out=cifar[0], data=folder)) for folder in (None, cifar[0])
    )
    assert [case.name for case in given] == [*(case.name for case in without), "CIFAR-10"]
    for case in given:
        assert all(case.steps % updates == 0 for updates in (*case.plan.swept, *case.plan.damped))
    for case, classes in ((given[0], 2), (given[-2], 10), (given[-1], 10)):
        inputs, labels, _, _ = case.split(0)
        outputs = jax.eval_shape(lambda key, x, case=case: case.predict(case.init(key), x), jax.random.key(0), inputs)
        assert outputs.shape == (len(labels), classes)
