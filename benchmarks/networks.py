"""Plain multilayer perceptrons: parameters are a list of {"w": ..., "b": ...}, one dictionary a layer."""

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
    layers = []
    for layer_key, fan_in, fan_out in zip(jax.random.split(key, len(widths) - 1), widths[:-1], widths[1:], strict=True):
        weights = jax.random.normal(layer_key, (fan_in, fan_out)) * jnp.sqrt(gain / fan_in)
        layers.append({"w": weights, "b": jnp.zeros(fan_out)})
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
