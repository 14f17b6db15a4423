"""Plain perceptrons and convolutional networks: parameters are a list of {"w": ..., "b": ...}, one for each layer."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Params = list[dict[str, jax.Array]]

HE, LECUN = 2.0, 1.0
"""Gains for relu (He et al., 2015) and for tanh (LeCun et al., 1998)."""


def init_mlp(key: jax.Array, widths: Sequence[int], gain: float) -> Params:
    """Draws the parameters: weights normal with variance gain / fan-in, biases zero.

    Args:
        key: a random key.
        widths: widths from the input to the output, such as (784, 128, 64, 10).
        gain: `HE` for relu, `LECUN` for tanh.

    Returns:
        The parameters in JAX's default float type.
    """
    return init_layers(key, list(itertools.pairwise(widths)), gain)


def init_layers(key: jax.Array, shapes: Sequence[tuple[int, ...]], gain: float) -> Params:
    """Draws the parameters of any layers: weights normal with variance gain / fan-in, biases zero.

    Args:
        key: a random key.
        shapes: of the weights; all axes but the last are the fan-in, such as (5, 5, 1, 6) of a convolution.
        gain: `HE` for relu, `LECUN` for tanh.

    Returns:
        The parameters in JAX's default float type.
    """
    layers = []
    for layer_key, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True):
        weights = jax.random.normal(layer_key, shape) * jnp.sqrt(gain / math.prod(shape[:-1]))
        layers.append({"w": weights, "b": jnp.zeros(shape[-1])})
    return layers


def mlp(activation: Callable[[jax.Array], jax.Array]) -> Callable[[Params, jax.Array], jax.Array]:
    """Makes the perceptron's predict function; the last layer is linear.

    Args:
        activation: the function between layers, such as `jax.nn.relu` or `jnp.tanh`.

    Returns:
        predict(params, inputs), from inputs (n, widths[0]) to outputs (n, widths[-1]).
    """

    def predict(params: Params, inputs: jax.Array) -> jax.Array:
        hidden = inputs
        for layer in params[:-1]:
            hidden = activation(hidden @ layer["w"] + layer["b"])
        return hidden @ params[-1]["w"] + params[-1]["b"]

    return predict


def convolutional(activation: Callable[[jax.Array], jax.Array]) -> Callable[[Params, jax.Array], jax.Array]:
    """Makes the predict function of convolutions with stride 2 and a dense last layer, in one dimension or two.

    Args:
        activation: the function behind each convolution, such as `jax.nn.relu`.

    Returns:
        predict(params, inputs), from inputs (n, length, channels) or (n, height, width, channels) to outputs (n, c).
        All layers but the last are convolutions, with the padding "SAME" and weights (length, channels, new channels)
        or (height, width, channels, new channels); the last takes all positions side by side.
    """

    def predict(params: Params, inputs: jax.Array) -> jax.Array:
        hidden = inputs
        for layer in params[:-1]:
            *window, _, channels = layer["w"].shape
            hidden = activation(windows(hidden, window) @ layer["w"].reshape(-1, channels) + layer["b"])
        return hidden.reshape(len(hidden), -1) @ params[-1]["w"] + params[-1]["b"]

    return predict


def windows(inputs: jax.Array, shape: Sequence[int], stride: int = 2) -> jax.Array:
    """Lays the windows of a convolution side by side, so that it becomes one matrix product.

    Inside a loop XLA's CPU compiler runs such a product many times faster than its own convolution.

    Args:
        inputs: (n, length, channels) or (n, height, width, channels); the stride divides all lengths.
        shape: of a window, at least the stride along each axis.
        stride: between windows.

    Returns:
        Like the inputs with their lengths divided by the stride, and all entries of a window as channels.
    """
    lengths = inputs.shape[1:-1]
    spare = [size - stride for size in shape]
    padded = jnp.pad(inputs, [(0, 0), *((total // 2, total - total // 2) for total in spare), (0, 0)])
    parts = []
    for offsets in itertools.product(*map(range, shape)):
        steps = (slice(offset, offset + length, stride) for offset, length in zip(offsets, lengths, strict=True))
        parts.append(padded[:, *steps])
    return jnp.concatenate(parts, axis=-1)
