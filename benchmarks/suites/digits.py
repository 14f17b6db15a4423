"""Digits of 8 x 8 pixels: seconds to a training loss, full batch, and to a test accuracy, minibatches.

1,500 images of scikit-learn for training and 297 for the test, a perceptron 64-128-128-10 with relu, 26,122 parameters,
single precision. Minibatches have 256 images. The loss is the mean cross-entropy of softmax.
"""

import functools

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import contest, data, foreign, methods, networks, standings
from benchmarks.contest import Contest
from benchmarks.host import Entry, Instance
from benchmarks.problems import PROBLEMS, error_rate
from benchmarks.settings import Settings
from benchmarks.standings import Goal
from benchmarks.suites import Results

X64 = False
SEEDS, QUICK_SEEDS = 5, 2

WIDTHS, BATCH = (64, 128, 128, 10), 256
FULL, MINI = "digits, full batch", "digits, minibatches"
METRICS = {FULL: "training loss", MINI: "test error, 1 less the accuracy"}
GOALS = (Goal(FULL, 1e-4, 1), Goal(MINI, 0.025, 0.8, fewest_steps=True))
KFAC = foreign.KFAC._replace(settings=(1e-2, 1e-1, 1.0, 10.0))
OURS: tuple[Entry, ...] = (methods.DEFAULTS, *methods.KRONECKER)
STOCHASTIC_OURS: tuple[Entry, ...] = (methods.DEFAULTS, *methods.KRONECKER)
PEERS: tuple[Entry, ...] = (methods.ADAM, methods.SGD, methods.LBFGS, KFAC)
STOCHASTIC_PEERS: tuple[Entry, ...] = (methods.ADAM, methods.SGD, KFAC)


@functools.cache
def split() -> data.Split:
    """Returns the images, loaded once."""
    return data.digits()


def instance(seed: int, batch_size: int | None) -> Instance:
    """Draws the first parameters and the order of the images.

    Args:
        seed: of both.
        batch_size: images in a minibatch, or None for the full batch.

    Returns:
        The instance.
    """
    batch = split().train_inputs, split().train_targets
    params = jax.tree.map(np.asarray, networks.init_mlp(jax.random.key(seed), WIDTHS, networks.HE))
    order = None if batch_size is None else data.batch_order(len(batch[1]), batch_size, contest.BATCHES, seed)
    return Instance(params, batch, order)


def contests() -> list[Contest]:
    """Returns the two contests."""
    problem = PROBLEMS["classes"]
    test = split().test_inputs, split().test_targets
    full = Contest(
        FULL,
        "classes",
        functools.partial(instance, batch_size=None),
        measure=lambda params, held: problem.value(params, *held),
        held=lambda seed: instance(seed, None).batch,
        targets=(1e-2, 1e-4),
        entries=(*OURS, *PEERS),
    )
    mini = Contest(
        MINI,
        "classes",
        functools.partial(instance, batch_size=BATCH),
        measure=lambda params, held: error_rate(problem, params, *held),
        held=lambda seed: test,
        targets=(0.05, 0.025),
        entries=(*STOCHASTIC_OURS, *STOCHASTIC_PEERS),
        seconds=2.0,
    )
    return [full, mini]


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
    """Draws loss and test error against seconds.

    Args:
        results: what `run` returned.

    Returns:
        The figure.
    """
    return standings.figure(results, "Digits of 8 x 8 pixels, perceptron 64-128-128-10", METRICS)
