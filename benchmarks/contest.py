"""One protocol for all contests: every method is tuned over as many settings on other seeds, then races on the clock.

Methods take slices of time in turn (`timing.race`), each behind a warm lap (`benchmarks.host`). A run ends when it
reached its last target, when it is not finite, or when its steps or seconds are used up: there is a limit for all, and
one of `SLACK` times the seconds in which the first of the race got to the end. Targets are looked for at each turn,
outside all clocks. Seconds are of the processor, of the whole process, unless they are called wall seconds.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import reach, remote, timing
from benchmarks.host import Entry, Host, Instance
from benchmarks.remote import Skipped
from benchmarks.settings import Settings
from benchmarks.suites import Results
from benchmarks.tables import Row

TUNING_SEEDS = (100, 101)
HOPELESS = 2.0
"""A run of the tuning ends at so many times the seconds in which another setting of its method got to the end."""
SLACK, LEAST_SECONDS = 4.0, 0.6
"""Every run has so many times the seconds in which the first of its race got to the end, and at least so many."""
QUICK_SECONDS = 0.5
SLICE = 0.25
"""Wall seconds after which it is the next one's turn."""
BATCHES = 2000
"""Minibatches of an instance, after which they come again."""
THINNING = 1.1
"""Of each slice those turns are kept whose numbers are so many times that of the one kept before."""


@dataclasses.dataclass(frozen=True)
class Contest:
    """A problem with its targets, and the methods that race to them.

    Attributes:
        name: its name in the tables.
        problem: a name of `benchmarks.problems.PROBLEMS`.
        instance: from a seed to the first parameters and the data.
        measure: measure(params, held) -> what falls to the targets, shape (); compiled here.
        held: from a seed to the arrays that it needs.
        targets: in falling order.
        entries: the methods.
        x64: whether parameters and data are in double precision.
        seconds: processor seconds of a run.
        steps: most steps of a run.
        tuning: on how many of the seeds for it methods are tuned.
    """

    name: str
    problem: str
    instance: Callable[[int], Instance]
    measure: Callable[[Any, Any], jax.Array]
    held: Callable[[int], Any]
    targets: tuple[float, ...]
    entries: tuple[Entry, ...]
    x64: bool = False
    seconds: float = 4.0
    steps: int = 4000
    tuning: int = len(TUNING_SEEDS)


class HostedRunner(timing.Runner):
    """A run at a host, whose clock counts; a step of the race is one slice of turns."""

    def __init__(
        self, host: Host | remote.RemoteHost, entry: Entry, setting: Any, instance: Instance, steps: int
    ) -> None:
        """Puts the method at its start.

        Args:
            host: where it runs.
            entry: the method.
            setting: one of its settings.
            instance: parameters and data.
            steps: most steps.
        """
        super().__init__(entry.name, lambda state, index: (state, None), None)
        self.host, self.entry, self.setting = host, entry, setting
        self.reached: dict[float, Row] = {}
        self.lowest = math.inf
        self.turns, self.most = 0, math.ceil(steps / entry.steps)
        self.slice: list[tuple[Row, Any]] = [(self.at(0), instance.params)]
        self.key = (entry.name, setting)
        host.open(self.key, entry, setting, instance)

    def advance(self, indices: range) -> None:
        """Takes slices.

        Args:
            indices: the numbers of the slices.
        """
        self.slice = []
        for _ in indices:
            for taken in self.host.advance(self.key, self.turns, self.most - self.turns, SLICE):
                self.turns += 1
                self.seconds += taken.seconds
                self.cpu_seconds += taken.cpu_seconds
                self.slice.append((self.at(self.turns), taken.params))

    def at(self, turn: int) -> Row:
        """Says where it is, after so many turns."""
        taken = {"method": self.name, "step": turn * self.entry.steps}
        return taken | {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def close(self) -> None:
        """Frees its state at the host."""
        self.host.close(self.key)


def run(contests: Sequence[Contest], settings: Settings) -> Results:
    """Tunes all methods and lets them race.

    Args:
        contests: the contests.
        settings: what the command line asked for; a quick run tunes two settings on one seed.

    Returns:
        "tuning": a row for each run of the tuning; "curve": rows of the reported runs, thinned; "runs": a row for each
        of them and each target; "skipped": which methods did not take part, and why; "environments": of each process
        the versions of the packages and the seconds of a gradient.
    """
    results: Results = {"tuning": [], "curve": [], "runs": [], "skipped": [], "environments": []}
    for contest in contests:
        with jax.enable_x64(contest.x64):
            field = Field(contest, settings.quick)
            try:
                for name, rows in field.results(range(settings.seeds)).items():
                    results[name] += rows
            finally:
                field.stop()
    return results


class Field:
    """The methods of a contest at their hosts."""

    def __init__(self, contest: Contest, quick: bool = False) -> None:
        """Starts the hosts.

        Args:
            contest: the contest.
            quick: whether to tune two settings on one seed, and to run for less than a second.
        """
        self.contest = contest
        self.seeds = TUNING_SEEDS[: 1 if quick else contest.tuning]
        self.settings = slice(1, 3) if quick else slice(None)
        self.seconds = min(contest.seconds, QUICK_SECONDS) if quick else contest.seconds
        self.hosts: dict[str, Host | remote.RemoteHost] = {}
        self.compile_seconds: dict[tuple[str, Any], float] = {}
        self.gradients: dict[str, tuple[float, float]] = {}
        self.skipped: list[Row] = []
        self.entries = list(contest.entries)
        self.measure = jax.jit(contest.measure)

    def results(self, seeds: Sequence[int]) -> Results:
        """Tunes and races.

        Args:
            seeds: the seeds to report.

        Returns:
            See `run`, with the contest's name in each row.
        """
        settings = {entry.name: entry.settings[self.settings] for entry in self.entries}
        self._compile(settings)
        tried = [self._race(seed, settings, tuning=True) for seed in self.seeds]
        tuning = [row for rows, _ in tried for row in rows]
        chosen = {entry.name: choose(tuning, entry, self.contest.targets) for entry in self.entries}
        raced = [self._race(seed, {name: (setting,) for name, setting in chosen.items()}) for seed in seeds]
        found = {
            "tuning": tuning,
            "runs": [row for rows, _ in raced for row in rows],
            "curve": [row for _, rows in raced for row in rows],
            "skipped": self.skipped,
            "environments": [
                {"place": place, "gradient_seconds": cpu, "versions": self.hosts[place].versions()}
                for place, (_, cpu) in self.gradients.items()
            ],
        }
        return {name: [{"contest": self.contest.name} | row for row in rows] for name, rows in found.items()}

    def stop(self) -> None:
        """Ends the processes."""
        for host in self.hosts.values():
            if isinstance(host, remote.RemoteHost):
                host.stop()

    def _compile(self, settings: Mapping[str, Sequence[Any]]) -> None:
        """Compiles every method at every setting, and drops those that cannot run."""
        instance = self.contest.instance(self.seeds[0])
        for entry in tqdm(list(self.entries), desc=f"{self.contest.name}: compiling", leave=False):
            try:
                host = self._host(entry.place)
                for setting in settings[entry.name]:
                    first = settings[entry.name][0] if entry.compiled != "static" else setting
                    if first is setting:
                        self.compile_seconds[entry.name, setting] = host.warm_up(entry, setting, instance)
                    self.compile_seconds[entry.name, setting] = self.compile_seconds[entry.name, first]
            except (Skipped, ImportError) as error:
                self.entries.remove(entry)
                self.skipped.append({"method": entry.name, "why": str(error)})
        places = {entry.place for entry in self.entries}
        self.gradients = {place: self.hosts[place].gradient(instance) for place in sorted(places)}

    def _host(self, place: str) -> Host | remote.RemoteHost:
        if place not in self.hosts:
            problem = self.contest.problem
            self.hosts[place] = (
                Host(problem) if place == "here" else remote.RemoteHost(problem, place, self.contest.x64)
            )
        return self.hosts[place]

    def _race(
        self, seed: int, settings: Mapping[str, Sequence[Any]], tuning: bool = False
    ) -> tuple[list[Row], list[Row]]:
        """Lets all methods race on a seed; returns a row for each run and target, and the thinned curves."""
        contest = self.contest
        instance, held = contest.instance(seed), contest.held(seed)
        runners = [
            HostedRunner(self.hosts[entry.place], entry, setting, instance, contest.steps)
            for entry in self.entries
            for setting in settings[entry.name]
        ]
        curve: list[Row] = []
        with tqdm(
            desc=f"{contest.name}: {'tuning on' if tuning else ''} seed {seed}", unit="slice", leave=False
        ) as bar:
            for runner, _ in timing.race(runners, contest.steps, 1, bar.update):
                for row, params in runner.slice:
                    row |= {"seed": seed, "value": float(self.measure(params, held))}
                    self._judge(runner, row)
                    if runner.finished:
                        break
                curve += thinned([row for row, _ in runner.slice if "value" in row])
                self._give_up(runner, runners, tuning)
        rows = [row | {"seed": seed} for runner in runners for row in self._rows(runner)]
        for runner in runners:
            runner.close()
        return rows, curve

    def _judge(self, runner: HostedRunner, row: Row) -> None:
        """Notes which targets a run has reached, and ends it at the last or if it is not finite."""
        runner.lowest = min(runner.lowest, row["value"])
        for target in self.contest.targets:
            if row["value"] <= target and target not in runner.reached:
                runner.reached[target] = row
        at_end = self.contest.targets[-1] in runner.reached or row["step"] >= self.contest.steps
        runner.finished = at_end or not math.isfinite(row["value"])

    def _give_up(self, runner: HostedRunner, runners: Sequence[HostedRunner], tuning: bool) -> None:
        """Ends a run that has used up its seconds, or lags too far behind the first of all or of its method."""
        last = self.contest.targets[-1]
        ends = {other.key: other.reached[last]["cpu_seconds"] for other in runners if last in other.reached}
        limit = min(self.seconds, max(LEAST_SECONDS, SLACK * min(ends.values(), default=math.inf)))
        if tuning:
            siblings = [seconds for (name, _), seconds in ends.items() if name == runner.name]
            limit = min(limit, HOPELESS * min(siblings, default=math.inf))
        runner.finished = runner.finished or runner.cpu_seconds > limit

    def _rows(self, runner: HostedRunner) -> Iterator[Row]:
        """A row for each target."""
        for target in self.contest.targets:
            reached = runner.reached.get(target)
            price = self.gradients[runner.entry.place][1]
            yield {
                "method": runner.name,
                "setting": str(runner.setting),
                "target": target,
                "cpu_seconds": reached and reached["cpu_seconds"],
                "seconds": reached and reached["seconds"],
                "step": reached and reached["step"],
                "gradients": reached and reached["cpu_seconds"] / price,
                "lowest": runner.lowest,
                "spent": runner.cpu_seconds,
                "compile_seconds": self.compile_seconds[runner.key],
            }


def thinned(rows: Sequence[Row]) -> list[Row]:
    """Keeps the first of the rows, and of the later ones those whose steps are `THINNING` times those of the last kept.

    Args:
        rows: rows of a run, in order.

    Returns:
        What is kept, at most.
    """
    kept: list[Row] = []
    for row in rows:
        if not kept or row["step"] >= THINNING * kept[-1]["step"]:
            kept.append(row)
    return kept


def choose(rows: Sequence[Row], entry: Entry, targets: Sequence[float]) -> Any:
    """Picks a method's setting: the least mean seconds to the last target, where all seeds reach it.

    If none does on all seeds, or several are equal, the target before decides, and so on; at last the mean of the
    lowest values seen.

    Args:
        rows: the rows of the tuning.
        entry: the method.
        targets: in falling order.

    Returns:
        The setting.
    """

    def rank(setting: Any) -> tuple[float, ...]:
        mine = [row for row in rows if (row["method"], row["setting"]) == (entry.name, str(setting))]
        seconds = [
            statistics.fmean(reach.or_infinity(row["cpu_seconds"]) for row in mine if row["target"] == target)
            for target in reversed(targets)
        ]
        return (*seconds, statistics.fmean(reach.or_infinity(row["lowest"]) for row in mine))

    tried = {row["setting"] for row in rows if row["method"] == entry.name}
    return min((setting for setting in entry.settings if str(setting) in tried), key=rank)
