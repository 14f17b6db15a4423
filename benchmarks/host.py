"""Runs methods on the clock, in this process or, behind `benchmarks.remote`, in one of another environment."""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.problems import PROBLEMS, Problem

GRADIENTS = 30  # timed for the price of one
WARM_LAP = 0.1
"""Wall seconds off the clock before a slice: the first steps behind another program's heavy work are up to ten times
slower, whatever they compute."""


class Method(NamedTuple):
    """A method at one setting.

    Attributes:
        init: init(params, batch) -> carry, all that a step changes.
        step: step(carry, batch) -> carry.
        params: params(carry) -> params.
    """

    init: Callable[[Any, Any], Any]
    step: Callable[[Any, Any], Any]
    params: Callable[[Any], Any] = lambda carry: carry[0]


class Entry(NamedTuple):
    """A method that takes part in contests, with the settings it is tuned over.

    Attributes:
        name: its name in the tables; those of this package begin with "gn_linear".
        make: make(problem, setting) -> Method. To be sent to another process it must be a module's function.
        settings: what is tuned; as many for every method.
        steps: steps in one turn.
        compiled: "traced": one compilation for all settings, which are numbers; "static": one for each setting;
            "itself": the method compiles what it needs.
        place: the environment that it runs in, see `benchmarks.remote`.
        warm_up: turns that compile everything.
    """

    name: str
    make: Callable[[Problem, Any], Method]
    settings: tuple[Any, ...]
    steps: int = 1
    compiled: Literal["traced", "static", "itself"] = "traced"
    place: str = "here"
    warm_up: int = 3


class Instance(NamedTuple):
    """What a seed gives to all methods alike, as numpy arrays.

    Attributes:
        params: the first parameters.
        batch: (inputs, targets), all training data.
        order: examples of each minibatch, (batches, examples), used over and over; None for the full batch.
    """

    params: Any
    batch: Any
    order: np.ndarray | None = None


class Taken(NamedTuple):
    """A turn that was taken.

    Attributes:
        seconds: wall seconds.
        cpu_seconds: processor seconds of the whole process.
        params: parameters behind it, as numpy arrays.
    """

    seconds: float
    cpu_seconds: float
    params: Any


class Host:
    """The runs of one process on one problem."""

    def __init__(self, problem: str) -> None:
        """Opens a host.

        Args:
            problem: a name of `benchmarks.problems.PROBLEMS`.
        """
        self.problem = PROBLEMS[problem]
        self.runs: dict[Any, _Run] = {}
        self.compiled: dict[Any, tuple[Callable[..., Any], Callable[..., Any], Callable[[Any], Any]]] = {}

    def open(self, key: Any, entry: Entry, setting: Any, instance: Instance) -> None:
        """Puts a method at its start.

        Args:
            key: how the run is called from now on.
            entry: the method.
            setting: one of its settings.
            instance: parameters and data.
        """
        cached = entry.name if entry.compiled == "traced" else (entry.name, setting)
        if cached not in self.compiled:
            self.compiled[cached] = self._compile(entry, setting)
        init, turn, params = self.compiled[cached]
        moved = jax.tree.map(jnp.asarray, instance)
        first = moved.batch if moved.order is None else _rows(moved.batch, moved.order[0])
        value = jnp.asarray(setting, jax.dtypes.canonicalize_dtype(float)) if entry.compiled == "traced" else setting
        carry = jax.block_until_ready(init(value, moved.params, first))
        self.runs[key] = _Run(carry, turn, params, value, moved, entry)

    def advance(self, key: Any, turn: int, most: int, seconds: float) -> list[Taken]:
        """Takes turns one after the other, each on the clock, behind a warm lap on a copy that is thrown away.

        Args:
            key: the run.
            turn: number of the first turn, counted from 0.
            most: most turns.
            seconds: the slice ends with the turn that brings its wall seconds to so many.

        Returns:
            The turns.
        """
        run = self.runs[key]
        copy, start = run.copy(), time.perf_counter()
        while time.perf_counter() - start < WARM_LAP:
            copy = copy.after(turn)[0]
        taken: list[Taken] = []
        while len(taken) < most and sum(one.seconds for one in taken) < seconds:
            run, wall, cpu = run.after(turn + len(taken))
            taken.append(Taken(wall, cpu, jax.tree.map(np.asarray, run.params(run.carry))))
        self.runs[key] = run
        return taken

    def close(self, key: Any) -> None:
        """Forgets a run."""
        self.runs.pop(key, None)

    def warm_up(self, entry: Entry, setting: Any, instance: Instance) -> float:
        """Compiles a method on a throwaway run.

        Args:
            entry: the method.
            setting: one of its settings.
            instance: parameters and data of the shapes of the contest.

        Returns:
            Seconds to trace and compile: those of opening and of the first turns less those of as many later turns.
        """
        start = time.perf_counter()
        self.open("warm-up", entry, setting, instance)
        run = self.runs.pop("warm-up")
        for turn in range(entry.warm_up - 1):
            run, *_ = run.after(turn)
        compiling = time.perf_counter() - start
        _, steady, _ = run.after(entry.warm_up - 1)
        return max(0.0, compiling - (entry.warm_up - 1) * steady)

    def gradient(self, instance: Instance) -> tuple[float, float]:
        """Times one gradient of the batch that a step sees.

        Args:
            instance: parameters and data.

        Returns:
            Wall and processor seconds of one, the mean over many after a warm-up.
        """
        moved = jax.tree.map(jnp.asarray, instance)
        batch = moved.batch if moved.order is None else _rows(moved.batch, moved.order[0])
        gradient = jax.jit(jax.value_and_grad(self.problem.value))
        jax.block_until_ready(gradient(moved.params, *batch))
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(GRADIENTS):
            jax.block_until_ready(gradient(moved.params, *batch))
        return (time.perf_counter() - wall) / GRADIENTS, (time.process_time() - cpu) / GRADIENTS

    def versions(self) -> dict[str, str]:
        """Returns the versions of the packages of this process."""
        return record.versions()

    def _compile(self, entry: Entry, setting: Any) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
        """The functions that start a run, take a turn, and give its parameters."""
        if entry.compiled == "itself":
            method = entry.make(self.problem, setting)

            def steps(value: Any, carry: Any, *batches: Any) -> Any:
                del value
                for batch in batches:
                    carry = method.step(carry, batch)
                return carry

            return lambda value, params, batch: method.init(params, batch), steps, method.params

        def made(value: Any) -> Method:
            return entry.make(self.problem, value if entry.compiled == "traced" else setting)

        def turn(value: Any, carry: Any, batch: Any, rows: Any) -> Any:
            method = made(value)

            def one(carry: Any, rows: Any) -> tuple[Any, None]:
                return method.step(carry, batch if rows is None else _rows(batch, rows)), None

            if entry.steps == 1:
                return one(carry, None if rows is None else rows[0])[0]
            return jax.lax.scan(one, carry, rows, length=entry.steps)[0]

        traced = entry.compiled == "traced"
        start = jax.jit(
            lambda value, params, batch: made(value).init(params, batch), static_argnums=() if traced else 0
        )
        params = made(entry.settings[0]).params
        return start, jax.jit(turn, static_argnums=() if traced else 0), params


class _Run(NamedTuple):
    """A run: its state, the functions that change it, and its data."""

    carry: Any
    turn: Callable[..., Any]
    params: Callable[[Any], Any]
    setting: Any
    instance: Instance
    entry: Entry

    def copy(self) -> "_Run":
        """The same with arrays of its own, since some methods overwrite what they are given."""
        return self._replace(
            carry=jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, self.carry)
        )

    def after(self, turn: int) -> tuple["_Run", float, float]:
        """The run behind a turn, and its wall and processor seconds."""
        batches = self.batches(turn)
        wall, cpu = time.perf_counter(), time.process_time()
        carry = jax.block_until_ready(self.turn(self.setting, self.carry, *batches))
        return self._replace(carry=carry), time.perf_counter() - wall, time.process_time() - cpu

    def batches(self, turn: int) -> tuple[Any, ...]:
        """What the turn takes besides the state; a method that compiles itself gets its minibatches ready made."""
        steps, order = self.entry.steps, self.instance.order
        rows = None if order is None else order[np.arange(turn * steps, (turn + 1) * steps) % len(order)]
        if self.entry.compiled != "itself":
            return self.instance.batch, rows
        if rows is None:
            return (self.instance.batch,) * steps
        return tuple(jax.block_until_ready(_rows(self.instance.batch, row)) for row in rows)


@jax.jit
def _rows(batch: Any, rows: jax.Array) -> Any:
    """The examples of a minibatch."""
    return jax.tree.map(lambda leaf: leaf[rows], batch)
