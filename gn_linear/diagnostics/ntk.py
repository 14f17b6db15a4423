r"""The empirical neural tangent kernel :math:`\Theta(x, x') = J(x) J(x')^T`, and its products with vectors."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _tree
from gn_linear._capture import (
    Factors,
    check_batch,
    check_independent,
    factors,
    folded,
    gram,
    gram_by_leaf,
    numbers_computed,
    trace_structure,
)
from gn_linear._linearise import linearise
from gn_linear._typing import Inputs, Outputs, Params, Predict, check_count, shown

LARGEST = 2**25
"""Entries of the factors of one block of examples, unless its size is given: 128 MiB in float32."""

PROBED = 16
"""How many examples are evaluated one by one, to see whether ``predict`` mixes them."""

_Capture = Callable[[Inputs], Factors]
_Contraction = Callable[[Factors, Factors], list[jax.Array]]


def empirical_ntk(
    predict: Predict,
    params: Params,
    inputs: Inputs,
    other_inputs: Inputs | None = None,
    *,
    trace: bool = False,
    output: int | None = None,
    mask: Any = None,
    block_size: int | None = None,
) -> jax.Array:
    r"""The empirical neural tangent kernel, from the factors of each layer and without a Jacobian.

    .. math:: \Theta_{ij,kl} = \langle \partial_\theta f_k(x_i), \partial_\theta f_l(x'_j) \rangle

    Weights of matrix products and convolutions, and biases, are never differentiated example by example; other leaves
    are, and :func:`structure_report` says which. The answer is the same. Examples go block by block; of the kernel of a
    batch with itself, the blocks above the diagonal are computed and mirrored.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``; it treats every example by itself.
        params: where the model is linearised.
        inputs: n examples, a pytree of arrays whose leading axis is the example.
        other_inputs: m examples; None means the same ones.
        trace: whether to average over the outputs, :math:`\frac1c \sum_k \Theta_{ij,kk}`.
        output: the number of the one output to take, in the order of ``ravel``; None takes all.
        mask: the leaves that count: a pytree of booleans with the structure of ``params`` or a prefix of it, or a
            function from ``params`` to one, as in ``optax.masked``; None means all.
        block_size: how many examples are taken at once; by default as many as keep the factors below 2**25 numbers.

    Returns:
        The kernel, shape (n, m, c, c) with c outputs of an example (all leaves together), or (n, m) with ``trace`` or
        ``output``; at least float32.

    Raises:
        TypeError: ``predict`` is not a function, a leaf is not a float array, ``block_size`` is not an int.
        ValueError: ``predict`` mixes the examples of a batch (seen where values are known, so not inside ``jit``), the
            leading axis of an input or output is not the example, ``output`` is out of range, ``mask`` has another
            structure or leaves nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> predict = lambda p, x: x @ p["w"] + p["b"]
        >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
        >>> print(gnl.diagnostics.empirical_ntk(predict, params, x, trace=True))
        [[2. 1. 2.]
         [1. 5. 3.]
         [2. 3. 3.]]

    References:
        Jacot, Gabriel and Hongler (2018), Neural tangent kernel; Novak, Sohl-Dickstein and Schoenholz (2022), Fast
        finite width neural tangent kernel.
    """
    _check(predict, params, (inputs, other_inputs), block_size)
    model, chosen = _masked(predict, params, mask)
    if output is not None:
        model = _one_output(model, chosen, inputs, output)
    blocks = _Blocks(model, chosen, inputs, trace or output is not None, block_size)
    (kernel,) = blocks.contracted(lambda ours, theirs: [gram(ours, theirs)], inputs, other_inputs)
    return kernel


def ntk_by_leaf(
    predict: Predict,
    params: Params,
    inputs: Inputs,
    other_inputs: Inputs | None = None,
    *,
    trace: bool = False,
    block_size: int | None = None,
) -> Params:
    r"""The share of each leaf of the parameters in the empirical neural tangent kernel.

    .. math::
        \Theta = \sum_{\mathrm{leaves}} \Theta^{(l)}, \qquad
        \Theta^{(l)}_{ij,kl} = \langle \partial_{\theta_l} f_k(x_i), \partial_{\theta_l} f_l(x'_j) \rangle

    All come from one pass, at the cost of :func:`empirical_ntk` and the memory of a kernel for each leaf.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``; it treats every example by itself.
        params: where the model is linearised.
        inputs: n examples, a pytree of arrays whose leading axis is the example.
        other_inputs: m examples; None means the same ones.
        trace: whether to average over the outputs.
        block_size: how many examples are taken at once; by default as many as keep the factors below 2**25 numbers.

    Returns:
        A pytree like ``params`` of kernels, each as :func:`empirical_ntk` returns it.

    Raises:
        TypeError: ``predict`` is not a function, a leaf is not a float array, ``block_size`` is not an int.
        ValueError: ``predict`` mixes the examples of a batch (seen where values are known, so not inside ``jit``), or
            the leading axis of an input or output is not the example.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> predict = lambda p, x: x @ p["w"] + p["b"]
        >>> shares = gnl.diagnostics.ntk_by_leaf(predict, {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, x, trace=True)
        >>> print(shares["w"])
        [[1. 0.]
         [0. 4.]]

    References:
        Jacot, Gabriel and Hongler (2018), Neural tangent kernel, section 4, where the limit is taken layer by layer.
    """
    _check(predict, params, (inputs, other_inputs), block_size)
    blocks = _Blocks(predict, params, inputs, trace, block_size)
    kernels = blocks.contracted(gram_by_leaf, inputs, other_inputs)
    return jax.tree.unflatten(jax.tree.structure(params), kernels)


def ntk_diagonal(
    predict: Predict, params: Params, inputs: Inputs, *, trace: bool = False, block_size: int | None = None
) -> jax.Array:
    r"""The diagonal blocks of the empirical neural tangent kernel, each of one example with itself.

    .. math:: \Theta_{ii,kl} = \langle \partial_\theta f_k(x_i), \partial_\theta f_l(x_i) \rangle

    Time and memory grow with the number of examples, not with its square.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``; it treats every example by itself.
        params: where the model is linearised.
        inputs: n examples, a pytree of arrays whose leading axis is the example.
        trace: whether to average over the outputs; then the entries are the mean squared norms of the gradients.
        block_size: how many examples are taken at once; by default as many as keep the factors below 2**25 numbers.

    Returns:
        The blocks, shape (n, c, c) with c outputs of an example, or (n,) with ``trace``; at least float32.

    Raises:
        TypeError: ``predict`` is not a function, a leaf is not a float array, ``block_size`` is not an int.
        ValueError: ``predict`` mixes the examples of a batch (seen where values are known, so not inside ``jit``), or
            the leading axis of an input or output is not the example.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(gnl.diagnostics.ntk_diagonal(lambda p, x: x @ p, jnp.ones((2, 3)), x, trace=True))
        [1. 4.]

    References:
        Jacot, Gabriel and Hongler (2018), Neural tangent kernel.
    """
    _check(predict, params, (inputs,), block_size)
    blocks = _Blocks(predict, params, inputs, trace, block_size)
    return blocks.diagonal(inputs)


def ntk_vector_product(
    predict: Predict,
    params: Params,
    inputs: Inputs,
    vector: Outputs,
    other_inputs: Inputs | None = None,
    *,
    block_size: int | None = None,
) -> Outputs:
    r"""The product of the empirical neural tangent kernel with a vector, without the kernel.

    .. math:: J(x) \, J(x')^T v

    It costs one vector-Jacobian product on ``other_inputs`` and one Jacobian-vector product on ``inputs``. Large
    batches go block by block, in the memory of one block, and only then must examples be independent of each other.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        params: where the model is linearised.
        inputs: n examples.
        vector: like the outputs of ``other_inputs``.
        other_inputs: m examples; None means the same ones.
        block_size: how many examples are taken at once; by default as many as keep what one evaluation computes below
            2**25 numbers.

    Returns:
        The product, like the outputs of ``inputs``.

    Raises:
        TypeError: ``predict`` is not a function, a leaf is not a float array, ``block_size`` is not an int.
        ValueError: ``vector`` differs from the outputs in structure or shape, or blocks are needed and ``predict``
            mixes the examples of a batch. This is seen where values are known, so not inside ``jit``: there the
            product with a batch that is cut is that of its blocks.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([1.0, 2.0])
        >>> print(gnl.diagnostics.ntk_vector_product(lambda p, x: p * x, jnp.array(3.0), x, jnp.array([1.0, 1.0])))
        [3. 6.]

    References:
        Novak, Sohl-Dickstein and Schoenholz (2022), Fast finite width neural tangent kernel, section 3.
    """
    _check(predict, params, (), block_size)
    others = inputs if other_inputs is None else other_inputs
    outputs = jax.eval_shape(lambda p, x: linearise(predict, p, x).outputs, params, others)
    _tree.check_same_shapes(vector, outputs, "vector", "the outputs of predict")
    cotangent = _tree.cast_like(jax.tree.map(jnp.asarray, vector), outputs)
    primal = jax.tree.map(jnp.asarray, params)
    tangent = _pulled_back(predict, primal, others, cotangent, _size_of_blocks(predict, params, others, block_size))
    return _pushed_forward(predict, primal, inputs, tangent, _size_of_blocks(predict, params, inputs, block_size))


def _size_of_blocks(predict: Predict, params: Params, inputs: Inputs, block_size: int | None) -> int | None:
    """How many examples of a batch to take at once; None means that all are, so that none need be told apart."""
    numbers = LARGEST if block_size else numbers_computed(predict, params, inputs)
    if block_size is None and numbers <= LARGEST:
        return None
    _check_some(predict, params, inputs)
    count = _examples(inputs)
    size = block_size or max(1, count * LARGEST // numbers)
    return size if size < count else None


def _pulled_back(predict: Predict, params: Params, inputs: Inputs, cotangent: Outputs, size: int | None) -> Params:
    """``J^T v``, block by block."""
    if size is None:
        return linearise(predict, params, inputs).vjp(cotangent)
    rows = jax.tree.map(lambda v: jnp.pad(v, [(0, -len(v) % size), *[(0, 0)] * (v.ndim - 1)]), cotangent)
    blocks = _blocks(inputs, size)[0], jax.tree.map(lambda v: v.reshape(-1, size, *v.shape[1:]), rows)

    def add(total: Params, block: tuple[Inputs, Outputs]) -> tuple[Params, None]:
        x, v = block
        return _tree.add(total, _tree.to_solve(linearise(predict, params, x).vjp(v))), None

    return _tree.cast_like(jax.lax.scan(add, _tree.solve_zeros(params), blocks)[0], params)


def _pushed_forward(predict: Predict, params: Params, inputs: Inputs, tangent: Params, size: int | None) -> Outputs:
    """``J d``, block by block."""

    def block(x: Inputs) -> Outputs:
        return jax.jvp(lambda p: predict(p, x), (params,), (tangent,))[1]

    if size is None:
        return block(inputs)
    found = jax.lax.map(block, _blocks(inputs, size)[0])
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[: _examples(inputs)], found)


class _Blocks:
    """The factors of a model, some examples at a time, and what is contracted from them."""

    def __init__(self, predict: Predict, params: Params, inputs: Inputs, summed: bool, block_size: int | None) -> None:
        """Traces the model; ``summed`` takes all outputs as one, the mean of theirs."""
        structure = trace_structure(predict, params, inputs)

        def of(x: Inputs) -> Factors:
            found = factors(structure, params, x)
            return folded(found) if summed else found

        self.of = of
        self.size = block_size or _block_size(of, inputs)
        self.outputs = _outputs(predict, params, inputs) if summed else None

    def contracted(self, contract: _Contraction, inputs: Inputs, others: Inputs | None) -> list[jax.Array]:
        """Kernels (n, m, c, c), or (n, m) of the summed outputs."""
        if others is None:
            kernels = _symmetric(self.of, contract, inputs, self.size)
        else:
            kernels = _rectangular(self.of, contract, inputs, others, self.size)
        if self.outputs is None:
            return [jnp.swapaxes(kernel, 1, 2) for kernel in kernels]
        return [kernel[:, 0, :, 0] / self.outputs for kernel in kernels]

    def diagonal(self, inputs: Inputs) -> jax.Array:
        """The blocks (n, c, c) of each example with itself, or (n,) of the summed outputs."""

        def one(x: Inputs) -> jax.Array:
            return gram(self.of(jax.tree.map(lambda leaf: leaf[None], x)))[0, :, 0]

        if _examples(inputs) <= self.size:
            found = jax.vmap(one)(inputs)
        else:
            found = jax.lax.map(one, jax.tree.map(_tree.whole, inputs), batch_size=self.size)
        return found if self.outputs is None else found[:, 0, 0] / self.outputs


def _symmetric(of: _Capture, contract: _Contraction, inputs: Inputs, size: int) -> list[jax.Array]:
    """Kernels of a batch with itself, (n, c, n, c), from the blocks on and above the diagonal."""
    n = _examples(inputs)
    if n <= size:
        ours = of(inputs)
        return contract(ours, ours)
    blocks, count = _blocks(inputs, size)
    shapes = jax.eval_shape(lambda x: contract(of(x), of(x)), _at(blocks, 0))

    def row(i: Any, kernels: list[jax.Array]) -> list[jax.Array]:
        ours = of(_at(blocks, i))

        def column(j: Any, kernels: list[jax.Array]) -> list[jax.Array]:
            return [
                _mirrored(kernel, block, i * size, j * size)
                for kernel, block in zip(kernels, contract(ours, of(_at(blocks, j))), strict=True)
            ]

        return jax.lax.fori_loop(i, count, column, kernels)

    whole = [jnp.zeros((count * size, s.shape[1], count * size, s.shape[1]), s.dtype) for s in shapes]
    return [kernel[:n, :, :n] for kernel in jax.lax.fori_loop(0, count, row, whole)]


def _mirrored(kernel: jax.Array, block: jax.Array, row: Any, column: Any) -> jax.Array:
    kernel = jax.lax.dynamic_update_slice(kernel, block, (row, 0, column, 0))
    return jax.lax.dynamic_update_slice(kernel, block.transpose(2, 3, 0, 1), (column, 0, row, 0))


def _rectangular(of: _Capture, contract: _Contraction, inputs: Inputs, others: Inputs, size: int) -> list[jax.Array]:
    """Kernels of two batches, (n, c, m, c), block by block."""
    n, m = _examples(inputs), _examples(others)
    if n <= size and m <= size:
        return contract(of(inputs), of(others))
    (rows, _), (columns, _) = _blocks(inputs, min(size, n)), _blocks(others, min(size, m))

    def row(x: Inputs) -> list[jax.Array]:
        ours = of(x)
        return jax.lax.map(lambda other: contract(ours, of(other)), columns)

    def joined(kernel: jax.Array) -> jax.Array:
        kernel = kernel.transpose(0, 2, 3, 1, 4, 5)  # (blocks, size, c, blocks, size, c)
        c = kernel.shape[2]
        return kernel.reshape(-1, c, kernel.shape[3] * kernel.shape[4], c)[:n, :, :m]

    return list(map(joined, jax.lax.map(row, rows)))


def _blocks(inputs: Inputs, size: int) -> tuple[Inputs, int]:
    """The batch as blocks of one size, the last one filled up with its last example."""
    n = _examples(inputs)
    count = math.ceil(n / size)

    def cut(x: Any) -> jax.Array:
        x = jnp.asarray(_tree.whole(x))
        filled = jnp.take(x, jnp.minimum(jnp.arange(count * size), n - 1), axis=0)
        return filled.reshape(count, size, *x.shape[1:])

    return jax.tree.map(cut, inputs), count


def _block_size(of: _Capture, inputs: Inputs) -> int:
    """As many examples as keep their factors below ``LARGEST`` numbers."""
    one = jax.eval_shape(
        of, jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), jnp.result_type(x)), inputs)
    )
    entries = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(one))
    return max(1, min(_examples(inputs), LARGEST // max(entries, 1)))


def _at(blocks: Inputs, index: Any) -> Inputs:
    return jax.tree.map(lambda x: x[index], blocks)


def _examples(inputs: Inputs) -> int:
    return np.shape(jax.tree.leaves(inputs)[0])[0]


def _outputs(predict: Predict, params: Params, inputs: Inputs) -> int:
    shapes = jax.eval_shape(predict, params, inputs)
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(shapes))


def _one_output(predict: Predict, params: Params, inputs: Inputs, output: int) -> Predict:
    count = _outputs(predict, params, inputs)
    if not isinstance(output, int) or isinstance(output, bool) or not 0 <= output < count:
        raise ValueError(
            f"output must be a number from 0 to {count - 1}, one of the {count} outputs, but is {output!r}."
        )

    def model(params: Params, inputs: Inputs) -> jax.Array:
        rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(predict(params, inputs))]
        ends = np.cumsum([row.shape[1] for row in rows])
        place = int(np.searchsorted(ends, output, side="right"))
        return rows[place][:, output - ends[place]]

    return model


def _check(predict: Predict, params: Params, batches: tuple[Inputs, ...], block_size: int | None) -> None:
    if not callable(predict):
        raise TypeError(f"predict must be a function predict(params, inputs), but is {shown(predict)}.")
    if block_size is not None:
        check_count(block_size, "block_size")
    _tree.check_float_leaves(params, "params")
    for batch in batches:
        if batch is not None:
            _check_some(predict, params, batch)


def _check_some(predict: Predict, params: Params, inputs: Inputs) -> None:
    check_batch(inputs)
    check_independent(predict, params, jax.tree.map(lambda x: x[:PROBED], inputs))


def _masked(predict: Predict, params: Params, mask: Any) -> tuple[Predict, Params]:
    """The model as a function of the leaves that count, and these leaves, by path."""
    if mask is None:
        return predict, params
    flags = mask(params) if callable(mask) else mask
    try:
        spread = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: bool(flag), part), flags, params)
    except ValueError as error:
        differs = _tree.difference(flags, params, "mask", "params")
        raise ValueError(f"mask must have the structure of params or a prefix of it, but {differs}.") from error
    paths = jax.tree_util.tree_leaves_with_path(params)
    keep = jax.tree.leaves(spread)
    chosen = {jax.tree_util.keystr(path): leaf for (path, leaf), kept in zip(paths, keep, strict=True) if kept}
    if not chosen:
        raise ValueError("mask leaves no parameter; at least one leaf must be True.")
    structure = jax.tree.structure(params)

    def model(chosen: Params, inputs: Inputs) -> Outputs:
        whole = [chosen.get(jax.tree_util.keystr(path), leaf) for path, leaf in paths]
        return predict(jax.tree.unflatten(structure, whole), inputs)

    return model, chosen
