"""Which parameters the empirical neural tangent kernel takes apart into factors, and why it does not for others."""

import functools
from typing import NamedTuple

import jax

from gn_linear._capture import BY_GRADIENTS, Leaf, check_independent, factors, route, trace_structure
from gn_linear._typing import Inputs, Params, Predict, shown


class StructureReport(NamedTuple):
    """What is captured of a network; printed as a table.

    Attributes:
        leaves: for each leaf of the parameters its ``path``, its ``kind`` and the ``reason`` if it falls back. Kinds
            are ``"product"``, a weight of matrix products or convolutions, ``"bias"``, ``"gradient"``, which is
            differentiated example by example, and ``"none"``, without influence.
        routes: for each leaf how inner products of its gradients are computed on such a batch, by the count of
            multiplications: from the ``"factors"`` alone, from the factors at all ``"pairs of positions"``, or from
            the ``"gradients"`` of each example, as all leaves but products are.
    """

    leaves: tuple[Leaf, ...]
    routes: tuple[str, ...]

    @property
    def structured(self) -> bool:
        """Whether no leaf falls back."""
        return all(leaf.kind != "gradient" for leaf in self.leaves)

    def __str__(self) -> str:
        rows = [
            (leaf.path or "params", leaf.kind, route, leaf.reason)
            for leaf, route in zip(self.leaves, self.routes, strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def structure_report(predict: Predict, params: Params, inputs: Inputs) -> StructureReport:
    r"""Which leaves of the parameters are captured, and why the others are differentiated example by example.

    A weight in a matrix product has the gradient :math:`\sum_t a_t b_t^T` with activations and output cotangents, from
    which :func:`empirical_ntk` is computed without a Jacobian. Where a leaf is used in any other way, its own
    per-example gradient is taken: the same numbers, in more time and memory.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        params: its parameters.
        inputs: a batch, whose leading axis is the example.

    Returns:
        A ``StructureReport``; print it.

    Raises:
        TypeError: ``predict`` is not a function, or a leaf is not a float array.
        ValueError: the leading axis of an input or output is not the example, or ``predict`` mixes examples.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> params = {"b": jnp.ones(2), "gain": jnp.ones(3), "w": jnp.ones((3, 2))}
        >>> predict = lambda p, x: jnp.tanh(x * p["gain"]) @ p["w"] + p["b"]
        >>> print(gnl.diagnostics.structure_report(predict, params, jnp.ones((4, 3))))
        ['b']     bias      gradients
        ['gain']  gradient  gradients  mul
        ['w']     product   factors
    """
    if not callable(predict):
        raise TypeError(f"predict must be a function predict(params, inputs), but is {shown(predict)}.")
    structure = trace_structure(predict, params, inputs)
    check_independent(predict, params, inputs)
    found = jax.eval_shape(functools.partial(factors, structure), params, inputs)
    routes = tuple(
        BY_GRADIENTS if a is None else route(a.shape, b.shape, a.shape)
        for a, b in zip(found.activations, found.cotangents, strict=True)
    )
    return StructureReport(structure.leaves, routes)
