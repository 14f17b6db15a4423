"""The protocol of the contests: tuning, racing, hosts in other processes, and the tables."""

import dataclasses
import io
import json
import math
import pickle
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks import contest, methods, networks, record, remote, standings, suites, worker
from benchmarks.contest import Contest
from benchmarks.host import Entry, Host, Instance, Method
from benchmarks.problems import PROBLEMS
from benchmarks.settings import Settings
from benchmarks.standings import Goal
from tests.support import assert_close

WIDTHS = (2, 3, 1)


def instance(seed, order=None):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(6, 2))
    params = networks.init_mlp(jax.random.key(seed), WIDTHS, networks.LECUN)
    return Instance(params, (inputs, np.sin(inputs[:, :1])), order)


def shrinking(problem, rate):
    """Multiplies all parameters by a rate, which makes it plain when a target is reached."""
    return Method(lambda params, batch: (params,), lambda carry, batch: (jax.tree.map(lambda p: p * rate, carry[0]),))


def size(params, held):
    return jnp.linalg.norm(params[0]["w"]) / held


def contest_of(*entries, **options):
    def held(seed):
        return jnp.linalg.norm(instance(seed).params[0]["w"])

    return Contest("shrink", "regression", instance, size, held, (0.3, 0.1), entries, **options)


def tuned(method, setting, seconds, lowest=1.0):
    """Rows of the tuning of one seed, with the seconds to the targets 0.3 and 0.1."""
    row = {"method": method, "setting": str(setting), "lowest": lowest}
    return [row | {"target": target, "cpu_seconds": value} for target, value in zip((0.3, 0.1), seconds, strict=True)]


def test_tuning_takes_the_setting_that_is_first_at_the_last_target_on_all_seeds():
    entry = Entry("any", shrinking, (1, 2, 3))
    both = [*tuned("any", 1, (1, 9)), *tuned("any", 2, (3, 5)), *tuned("any", 3, (1, 2))]
    once = [*tuned("any", 1, (1, 9)), *tuned("any", 2, (3, 5)), *tuned("any", 3, (1, None))]
    assert contest.choose(both + once, entry, (0.3, 0.1)) == 2
    missed = [*tuned("any", 1, (4, None)), *tuned("any", 2, (3, None)), *tuned("any", 3, (None, None), 0.2)]
    assert contest.choose(missed, entry, (0.3, 0.1)) == 2
    none = [row for setting, low in ((1, 0.8), (2, None), (3, 0.5)) for row in tuned("any", setting, (None, None), low)]
    assert contest.choose(none + tuned("other", 1, (1, 1)), entry, (0.3, 0.1)) == 3


def test_contest_tunes_races_and_ends_runs():
    quick, slow = Entry("gn_linear, quick", shrinking, (0.9, 0.5)), Entry("slow", shrinking, (0.99, 0.9), steps=2)
    bad = Entry("bad", shrinking, (math.inf, math.nan))
    results = record.plain(
        contest.run([contest_of(quick, slow, bad, steps=20)], Settings(quick=False, seeds=2, out=Path()))
    )
    assert {row["seed"] for row in results["tuning"]} == set(contest.TUNING_SEEDS)
    runs = {(row["method"], row["seed"], row["target"]): row for row in results["runs"]}
    assert len(runs) == 3 * 2 * 2
    for seed in range(2):
        assert runs["gn_linear, quick", seed, 0.3]["setting"] == "0.5"
        assert [runs["gn_linear, quick", seed, target]["step"] for target in (0.3, 0.1)] == [2, 4]
        assert [runs["slow", seed, target]["step"] for target in (0.3, 0.1)] == [12, None]  # 0.9^22 < 0.1, past the end
        assert runs["bad", seed, 0.3]["cpu_seconds"] is None
    assert max(row["step"] for row in results["curve"] if row["method"] == "bad") == 1


def test_tuning_gives_up_settings_that_have_long_lost():
    steady = Entry("steady", shrinking, (0.5, 0.999999))
    field = contest.Field(contest_of(steady, seconds=20.0, steps=10**6))
    tried = field.results(range(0))["tuning"]
    spent = {row["setting"]: row["spent"] for row in tried}
    assert all(row["cpu_seconds"] is None for row in tried if row["setting"] == "0.999999")
    assert spent["0.999999"] < 10


@pytest.mark.parametrize(
    "entry", [methods.ADAM, methods.LBFGS, methods.JAXOPT, methods.NLLS_GRAM, methods.NLLS_GRAM_CG, methods.CHOLESKY]
)
def test_methods_lower_the_loss_by_as_many_steps_as_they_say(entry):
    host, start = Host("regression"), instance(0)
    host.open("run", entry, entry.settings[1], start)
    (taken,) = host.advance("run", 0, 1, 1.0)
    assert min(taken.seconds, taken.cpu_seconds) > 0
    value = PROBLEMS["regression"].value
    assert value(taken.params, *start.batch) < value(start.params, *start.batch)


def test_minibatches_follow_their_order_and_begin_again():
    seen = Method(
        lambda params, batch: jnp.zeros(()), lambda carry, batch: 10 * carry + batch[0][0], lambda carry: carry
    )
    order = np.array([[1, 0], [2, 1], [3, 2]])
    for compiled in ("traced", "itself"):
        host = Host("regression")
        entry = Entry("seen", lambda problem, setting: seen, (1.0,), steps=2, compiled=compiled)
        host.open("run", entry, 1.0, Instance(jnp.zeros(()), (np.arange(4.0), np.arange(4)), order))
        assert [taken.params for taken in host.advance("run", 0, 2, 1.0)] == [12, 1231]
        assert host.runs["run"].carry == 1231


def test_residuals_and_loss_agree_and_the_laplacian_is_that_of_the_network():
    problem, (_, (inputs, targets), _) = PROBLEMS["regression"], instance(1)
    params = instance(1).params
    outputs = np.asarray(networks.mlp(jnp.tanh)(params, inputs))
    assert_close(problem.value(params, inputs, targets), np.mean((outputs - targets) ** 2) / 2, size=6)
    logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    classes = PROBLEMS["classes"]
    wanted = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, (2, 0), strict=True)])
    assert_close(classes.value([{"w": np.eye(3), "b": np.zeros(3)}], logits, np.array([2, 0])), wanted, size=3)
    # tanh(a + 2 b): the Laplacian is 5 tanh''.
    layers = [{"w": np.array([[1.0], [2.0]]), "b": np.zeros(1)}, {"w": np.ones((1, 1)), "b": np.zeros(1)}]
    outputs = PROBLEMS["poisson"].predict(layers, {"interior": inputs, "boundary": inputs})
    value = np.tanh(inputs @ [[1.0], [2.0]])
    assert_close(outputs["interior"], 10 * value * (1 - value**2), size=10)
    assert_close(outputs["boundary"], value, size=2)


class Dead:
    """A process that has answered this much."""

    def __init__(self, answers):
        self.stdin, self.stdout = io.BytesIO(), io.BytesIO(answers)


def test_worker_answers_and_reports_what_went_wrong(monkeypatch):
    requests, answers = io.BytesIO(), io.BytesIO()
    for request in (("close", ("run",)), ("advance", ("missing", 0, 1, 1.0))):
        pickle.dump(request, requests)
    requests.seek(0)
    worker.serve(Host("regression"), requests, answers)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: Dead(answers.getvalue()))
    host = remote.RemoteHost("regression", "double", False)
    assert host.close("run") is None
    with pytest.raises(remote.Skipped, match="KeyError: 'missing'"):
        host.advance("missing", 0, 1, 1.0)
    with pytest.raises(remote.Skipped, match="its process ended"):
        host.advance("missing", 0, 1, 1.0)


def test_environment_that_cannot_be_made_skips_its_methods_and_says_why(monkeypatch, tmp_path):
    def fail(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr="looking\nno such package\n")

    monkeypatch.setattr(remote, "KFAC_FOLDER", tmp_path / "environment")
    monkeypatch.setattr(subprocess, "run", fail)
    entries = Entry("kfac-jax", shrinking, (0.5, 0.4), place="kfac"), Entry("here", shrinking, (0.5, 0.4))
    results = contest.run([contest_of(*entries)], Settings(quick=True, seeds=1, out=tmp_path))
    assert {row["method"] for row in results["runs"]} == {"here"}
    printed = standings.table(results, (), {"shrink": "size"})
    assert "Skipped: kfac-jax, its environment cannot be made: no such package." in printed


def run_row(method, seed, seconds, step):
    return {"contest": "any", "target": 0.1, "method": method, "seed": seed, "cpu_seconds": seconds, "step": step}


def test_goals_compare_medians_and_say_what_is_missed():
    times = {
        "gn_linear, a": (1.0, 2.0, 3.0),
        "gn_linear, b": (1.0, None, None),
        "adam": (4.0, 3.0, 2.5),
        "sgd": (9, 9, 9),
    }
    runs = [run_row(name, seed, value, value and 10) for name, row in times.items() for seed, value in enumerate(row)]
    ours, other = standings.goal_rows(runs, [Goal("any", 0.1, 1.4, fewest_steps=True)])
    assert (ours["best peer"], ours["ratio"], ours["over seeds"], ours[""]) == (
        "adam",
        "1.50",
        "0.83 to 4.00",
        "reached",
    )
    assert (other["our s"], other["ratio"], other[""]) == ("-", "-", "MISSED")
    assert standings.goal_rows(runs, [Goal("any", 0.1, 1.6)])[0][""] == "MISSED"
    more = [row | {"step": 11} if row["method"] == "gn_linear, a" else row for row in runs]
    assert standings.goal_rows(more, [Goal("any", 0.1, 1.4, fewest_steps=True)])[0][""] == "MISSED"
    alone = [row for row in runs if row["method"] == "gn_linear, a"]
    assert standings.goal_rows(alone, [Goal("any", 0.1, None)])[0][""] == "reached"


@pytest.mark.parametrize("name", ["regression", "digits", "mnist", "pinn"])
def test_contests_fit_together(name):
    suite = suites.load(name)
    contests = suite.contests()
    assert [each.name for each in contests] == list(suite.METRICS)
    assert {(goal.contest, goal.target) for goal in suite.GOALS} <= {
        (each.name, target) for each in contests for target in each.targets
    }
    for each in contests:
        assert each.targets == tuple(sorted(each.targets, reverse=True))
        assert {len(entry.settings) for entry in each.entries} == {4}
        assert len({entry.name for entry in each.entries}) == len(each.entries)
        with jax.enable_x64(each.x64):
            made, held = each.instance(3), each.held(3)
        assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {np.dtype("f8" if each.x64 else "f4")}
        value = PROBLEMS[each.problem].value
        assert jax.eval_shape(value, made.params, *made.batch).shape == ()
        assert jax.eval_shape(each.measure, made.params, held).shape == ()


def test_quick_contest_writes_its_record_and_table_again_from_it(monkeypatch, capsys, tmp_path):
    suite = suites.load("regression")
    for name, value in {"OURS": (), "PEERS": (methods.ADAM,), "POINTS": 8, "WIDTHS": (2, 2, 1)}.items():
        monkeypatch.setattr(suite, name, value)
    made = [dataclasses.replace(suite.contests()[0], seconds=0.01)]
    monkeypatch.setattr(suite, "contests", lambda: made)
    assert command_line.main(["run", "regression", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| optax adam" in printed
    results = json.loads((tmp_path / "regression.json").read_text())["results"]
    assert {row["seed"] for row in results["runs"]} == {0, 1}
    assert command_line.main(["table", str(tmp_path / "regression.json")]) == 0
    assert capsys.readouterr().out.strip() in printed
