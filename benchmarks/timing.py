"""Fair clocks: runners take turns, so that a drift of the machine hits all of them alike."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

Step = Callable[[Any, int], tuple[Any, Any]]
"""step(state, index) -> (state, measured): one optimiser step; `measured` is kept for each step."""


@dataclasses.dataclass(eq=False)
class Runner:
    """One method on one seed in a race.

    Attributes:
        name: the method's name.
        step: its step, compiled before the race (see `warm_up`).
        state: all that a step changes.
        seconds: wall seconds of its own steps so far.
        cpu_seconds: processor seconds of the whole process during its own steps so far.
        measured: what each step so far gave besides the state.
        finished: whether a race passes it over; set by whoever reads the race.
    """

    name: str
    step: Step
    state: Any
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    measured: list[Any] = dataclasses.field(default_factory=list)
    finished: bool = False

    def advance(self, indices: range) -> None:
        """Takes the steps of these indices on the clock and waits until their results are there.

        Args:
            indices: the numbers of the steps, counted from 0.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        for index in indices:
            self.state, measured = self.step(self.state, index)
            self.measured.append(measured)
        jax.block_until_ready(self.state)
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu


AnyRunner = TypeVar("AnyRunner", bound=Runner)


def race(
    runners: Sequence[AnyRunner], steps: int, chunk: int, progress: Callable[[int], object] = lambda taken: None
) -> Iterator[tuple[AnyRunner, int]]:
    """Lets the runners take turns of a chunk of steps; the one that begins a round changes from round to round.

    What the caller does between two turns is outside every clock. A runner that it calls `finished` has no more turns.

    Args:
        runners: the runners, all at step 0.
        steps: steps that each takes.
        chunk: steps in one turn; the last may be shorter.
        progress: told after each turn how many steps it took, such as the `update` of a progress bar.

    Yields:
        A runner and the number of steps it has taken: each at 0, then each after each of its turns.
    """
    yield from ((runner, 0) for runner in runners)
    for turn, start in enumerate(range(0, steps, chunk)):
        stop = min(start + chunk, steps)
        first = turn % len(runners)
        if all(runner.finished for runner in runners):
            return
        for runner in [*runners[first:], *runners[:first]]:
            if runner.finished:
                continue
            runner.advance(range(start, stop))
            progress(stop - start)
            yield runner, stop


def warm_up(step: Step, state: Any) -> float:
    """Compiles a jitted step by three calls on a throwaway state.

    The second call takes the state of the first, so a step that compiles twice pays for both.

    Args:
        step: the step.
        state: a state like those of the race; it is not changed.

    Returns:
        Seconds to trace and compile: the first two calls less twice the third.
    """
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, 0))
        durations.append(time.perf_counter() - start)
    first, second, steady = durations
    return max(0.0, first + second - 2 * steady)
