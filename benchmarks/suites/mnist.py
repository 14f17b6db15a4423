"""MNIST in minibatches: seconds to a training loss, next to optax and kfac-jax.

5,000 images, minibatches of 500, a perceptron 784-256-256-10 with relu, 269,322 parameters, single precision. The loss
is the mean cross-entropy of softmax over all images.
"""

import functools

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import contest, data, foreign, methods, networks, standings
from benchmarks.contest import Contest
from benchmarks.host import Entry, Instance
from benchmarks.problems import PROBLEMS
from benchmarks.settings import Settings
from benchmarks.standings import Goal
from benchmarks.suites import Results

X64 = False
SEEDS, QUICK_SEEDS = 5, 2

WIDTHS, IMAGES, BATCH = (784, 256, 256, 10), 5000, 500
NAME = "mnist, minibatches"
METRICS = {NAME: "training loss"}
GOALS = tuple(Goal(NAME, target, 0.8, fewest_steps=True) for target in (1e-2, 1e-3))
KFAC = foreign.KFAC._replace(settings=(1e-2, 1e-1, 1.0, 10.0))
OURS: tuple[Entry, ...] = (methods.DEFAULTS, *methods.KRONECKER)
PEERS: tuple[Entry, ...] = (methods.ADAM_SHORT, methods.SGD_SHORT, KFAC)


@functools.cache
def images() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and their labels, loaded once."""
    split = data.mnist(IMAGES)
    return split.train_inputs, split.train_targets


def instance(seed: int) -> Instance:
    """Draws the first parameters and the order of the images.

    Args:
        seed: of both.

    Returns:
        The instance.
    """
    params = jax.tree.map(np.asarray, networks.init_mlp(jax.random.key(seed), WIDTHS, networks.HE))
    return Instance(params, images(), data.batch_order(IMAGES, BATCH, contest.BATCHES, seed))


def contests() -> list[Contest]:
    """Returns the contest, as a list."""
    problem = PROBLEMS["classes"]
    return [
        Contest(
            NAME,
            "classes",
            instance,
            measure=lambda params, held: problem.value(params, *held),
            held=lambda seed: images(),
            targets=(1e-2, 1e-3),
            entries=(*OURS, *PEERS),
            seconds=5.0,
            steps=1000,
        )
    ]


def run(settings: Settings) -> Results:
    """Tunes the methods and lets them race.

    Args:
        settings: what the command line asked for.

    Returns:
        See `benchmarks.contest.run`.
    """
    return contest.run(contests(), settings)


def table(results: Results) -> str:
    """Writes the standings and the goals.

    Args:
        results: what `run` returned.

    Returns:
        The tables.
    """
    return standings.table(results, GOALS, METRICS)


def figure(results: Results) -> Figure:
    """Draws the loss against seconds.

    Args:
        results: what `run` returned.

    Returns:
        The figure.
    """
    return standings.figure(results, "5,000 images of MNIST, minibatches of 500, perceptron 784-256-256-10", METRICS)
