"""What comes before and around the cells of an experiment: checks, the bar, the folder's settings."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gn_linear import _tree
from gn_linear._typing import check_count, shown
from gn_linear.experiments._engine import Cell, Engine
from gn_linear.experiments.problem import Problem
from gn_linear.experiments.records import Records, Row, Store, cell_of, joined

Progress: TypeAlias = bool | Callable[[int, int], Any]
"""Whether to show a bar, or a function of the steps that are done and of all steps."""


def run_cells(engine: Engine, cells: Sequence[Cell], store: Store, progress: "Bar") -> Records:
    """Run the cells that the folder does not hold.

    Args:
        engine: what they share.
        cells: the cells, in the order of the records.
        store: the folder.
        progress: the bar.

    Returns:
        The records of all cells.
    """
    parts = []
    for cell in cells:
        found = store.found(cell_of(cell.labels))
        if found is None:
            found = engine.run(cell)
            store.add(found)
        else:
            progress(cell.lengths[-1] * cell.stride)
        parts.append(found)
    return joined(parts)


class Bar:
    """A progress bar by tqdm where that is installed, or the user's function, or nothing."""

    def __init__(self, progress: Progress, total: int, label: str) -> None:
        self._done, self._total, self._tell, self._bar = 0, total, None, None
        if callable(progress):
            self._tell = progress
        elif progress:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=label, unit="step", mininterval=0.5)

    def __call__(self, steps: int) -> None:
        """More steps are done."""
        self._done += steps
        if self._tell is not None:
            self._tell(self._done, self._total)
        if self._bar is not None:
            self._bar.update(steps)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def make_engine(problem: Problem, optimiser: Any, seeds: Any, measurements: int, steps: Iterable[int]) -> Engine:
    """Check what all experiments take, and make what their cells share.

    Args:
        problem: the model and the data.
        optimiser: an optax transform.
        seeds: how many, or which.
        measurements: how many re-linearisations of a run are measured at most.
        steps: the lengths of the runs.

    Returns:
        The engine.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, a seed comes twice, or there is none.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a gn_linear.experiments.Problem, but is {shown(problem)}.")
    if not isinstance(optimiser, optax.GradientTransformation):
        raise TypeError(f"optimiser must be an optax transform, such as optax.sgd(0.1), but is {shown(optimiser)}.")
    for count in steps:
        check_count(count, "steps")
    check_count(measurements, "measurements", minimum=2)
    if isinstance(seeds, int):
        check_count(seeds, "seeds")
        seeds = range(seeds)
    given, seeds = seeds, tuple(seeds) if isinstance(seeds, Sequence | np.ndarray) else ()
    for seed in seeds:
        check_count(seed, "seeds", minimum=0)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be a number of seeds or different ints, at least one, but is {shown(given)}.")
    return Engine(problem, tuple(int(seed) for seed in seeds), measurements)


def settings(engine: Engine, optimiser: optax.GradientTransformation, experiment: str, steps: Sequence[int]) -> Row:
    """What must agree for records to be found again in a folder.

    Args:
        engine: the problem and the seeds.
        optimiser: its state's structure counts, and what it makes of some gradients.
        experiment: its name.
        steps: the lengths of the runs.

    Returns:
        A row that JSON keeps.
    """
    first = jax.tree.map(lambda x: x[0], engine.params)
    state = optimiser.init(first)
    shapes = [f"{jnp.result_type(x)}{list(np.shape(x))}" for x in jax.tree.leaves(state)]
    sizes = []
    for scale in (1.0, 2.0, 3.0):
        gradient = jax.tree.map(lambda x, scale=scale: x * scale, first)
        updates, state = optimiser.update(gradient, state, first)
        sizes.append(float(_tree.norm(updates)))
    outputs = engine.problem.predict(first, engine.data.train[0])
    problem = engine.problem
    return {
        "experiment": experiment,
        "steps": [int(count) for count in steps],
        "seeds": list(engine.seeds),
        "measurements": engine.measurements,
        "batch_size": problem.batch_size,
        "shapes": [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves((engine.data, first))],
        "optimiser's state": shapes,
        "optimiser's first steps": sizes,
        "loss at the start": [float(problem.objective(outputs, engine.data.train[1]))],
        "accuracy": None if engine.fraction is None else getattr(engine.fraction, "__qualname__", ""),
        "data": fingerprint(engine.data),
        "initial parameters": fingerprint(engine.params),
    }


def fingerprint(tree: Any) -> str:
    """A text that two trees share if their leaves agree to the bit, and hardly ever else."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if key else leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
