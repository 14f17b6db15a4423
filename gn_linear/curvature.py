r"""The linearised problem: the damped Gauss-Newton operator and the quadratic model of one batch.

With the Jacobian :math:`J` at the parameters :math:`\theta`, the Hessian :math:`H` of the loss in output space and the
penalty :math:`\frac12 \lambda \|\theta\|^2`, the generalised Gauss-Newton matrix is
:math:`G = J^T H J + \lambda I`. No product forms it: one costs one Jacobian-vector and one vector-Jacobian
product. This is the only module that knows both :math:`J` and :math:`H`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gn_linear import _jacobian, _kronecker, _tree
from gn_linear._linearise import Linearisation, linearise
from gn_linear._typing import Inputs, Params, Predict, Scalar, Targets, check_number
from gn_linear.losses import Loss, OutputHessian


class Reductions(NamedTuple):
    r"""What a step changes, by the quadratic model and beside it.

    Attributes:
        predicted: :math:`-(\langle b, d \rangle + \frac12 d^T G d)`, with G undamped.
        rest: :math:`\langle b - \nabla F, d \rangle`, the part of the slope that is not this batch's gradient.
    """

    predicted: Scalar
    rest: Scalar


@dataclasses.dataclass(frozen=True)
class LinearisedProblem:
    """A batch's objective, linearised inside the loss, as the inner solvers see it.

    Attributes:
        params: where it is linearised.
        linearisation: outputs and Jacobian products there.
        hessian: of the loss in output space.
        output_gradient: of the loss, like the outputs.
        objective: loss plus penalty, a scalar.
        l2: coefficient of the penalty, a scalar or a pytree like the parameters.
        predict: the model.
        loss: the loss.
        inputs: the batch.
        targets: its targets.
        matrix: the Jacobian, if it is in memory already; ``linearisation`` multiplies by it.
    """

    params: Params
    linearisation: Linearisation
    hessian: OutputHessian
    output_gradient: Any
    objective: Scalar
    l2: Any
    predict: Predict
    loss: Loss
    inputs: Inputs
    targets: Targets
    matrix: jax.Array | None = None

    def product(self, vector: Params) -> Params:
        """``G v``, undamped, in the dtypes of the solve."""
        return self.pulled(vector, self.image(vector))

    def quadratic(self, vector: Params) -> Scalar:
        """``v^T G v`` by one Jacobian-vector product; never negative for a convex loss."""
        image = self.image(vector)
        return self.inner(vector, image, vector, image)

    def image(self, vector: Params) -> Any:
        """``J v``, like the outputs: half of a product, from which ``pulled`` makes the other half."""
        return self.linearisation.jvp(_tree.cast_like(vector, self.params))

    def pulled(self, vector: Params, image: Any) -> Params:
        """``G v`` from v and its image."""
        curved = _tree.to_solve(self.linearisation.vjp(self.hessian.product(image)))
        return curved if _no_penalty(self.l2) else _tree.add(curved, l2_times(self.l2, vector))

    def inner(self, vector: Params, image: Any, other: Params, other_image: Any) -> Scalar:
        """``v^T G w`` from two vectors and their images, at no product."""
        curved = _tree.dot(image, self.hessian.product(other_image))
        return curved if _no_penalty(self.l2) else _tree.total(curved, _tree.dot(vector, l2_times(self.l2, other)))

    def reductions(self, rhs: Params, step: Params, image: Any = None) -> Reductions:
        """Predicted reduction of the objective along a step, for any right-hand side.

        Args:
            rhs: the gradient b that the step was solved for, in the dtypes of the solve.
            step: the step d, likewise.
            image: what the Jacobian makes of it, if that is known already; otherwise it costs one product.

        Returns:
            The predicted reduction, and the slope of what b holds besides this batch's own gradient.
        """
        tangent = self.image(step) if image is None else image
        slope, own = _tree.dot(rhs, step), _tree.dot(self.output_gradient, tangent)
        if not _no_penalty(self.l2):
            own = _tree.total(own, _tree.dot(_tree.to_solve(self.params), l2_times(self.l2, step)))
        curvature = self.inner(step, tangent, step, tangent)
        return Reductions(predicted=-_tree.total(slope, 0.5 * curvature), rest=_tree.total(slope, -own))

    def diagonal(self) -> Params:
        """The exact diagonal of ``G``, by as many products as there are parameters or outputs, whichever is fewer."""
        flat, unravel = _raveled(_tree.solve_zeros(self.params))
        if flat.size <= self.output_size:
            columns = jax.lax.map(lambda unit: self.quadratic(unravel(unit)), jnp.eye(flat.size, dtype=flat.dtype))
            return unravel(columns.astype(flat.dtype))
        outputs, unravel_outputs = _raveled(self.linearisation.outputs)
        squares = jax.lax.map(
            lambda unit: self._squared_pullback(unravel_outputs(unit)), jnp.eye(outputs.size, dtype=outputs.dtype)
        )
        return self._with_penalty(jax.tree.map(lambda x: jnp.sum(x, axis=0), squares))

    def sampled_diagonal(self, key: jax.Array, samples: int) -> Params:
        r"""An unbiased estimate of the diagonal of ``G``.

        .. math:: \mathrm{diag}(J^T B B^T J) = \mathrm{E}[(J^T B z)^2], \quad z_i = \pm 1

        Args:
            key: a random key.
            samples: how many sign vectors to average over; one vector-Jacobian product each.

        Returns:
            The estimate, never negative.
        """
        leaves, structure = jax.tree.flatten(self.linearisation.outputs)

        def one(sample_key: jax.Array) -> Params:
            keys = jax.random.split(sample_key, len(leaves))
            signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
            return self._squared_pullback(jax.tree.unflatten(structure, signs))

        squares = jax.lax.map(one, jax.random.split(key, samples))
        return self._with_penalty(jax.tree.map(lambda x: jnp.mean(x, axis=0), squares))

    def jacobian(self) -> jax.Array:
        r"""The Jacobian of all outputs by all parameters as a matrix, in the widest dtype of the solve.

        Where every leading axis of the inputs is one of the outputs and the other way round, it counts examples, and
        each example's rows are pulled back through that example alone, which takes the examples to be independent.
        Otherwise each row is a pullback through the whole batch, which is always right and costs a factor of the
        number of examples.

        Returns:
            Shape (outputs, parameters), rows and columns in the order of ``jax.tree.leaves``, raveled.
        """
        if self.matrix is not None:
            return self.matrix
        return _jacobian.jacobian(self.predict, self.params, self.inputs, self.linearisation)

    def gram(self) -> jax.Array:
        r"""The Gram matrix :math:`J J^T` of the Jacobian's rows, the empirical neural tangent kernel as a matrix.

        Where all leaves of inputs and outputs have one leading axis, that of the examples, it comes from the factors
        of each layer and no Jacobian is formed; otherwise from ``jacobian``.

        Returns:
            Shape (outputs, outputs), in the order of ``jax.tree.leaves``, raveled.
        """
        if self.matrix is not None:
            return jnp.matmul(self.matrix, self.matrix.T, precision="highest")
        return _jacobian.gram(self.predict, self.params, self.inputs, self.linearisation)

    @functools.cached_property
    def layers(self) -> _kronecker.Layers:
        """The weights that have Kronecker factors, from a trace of the batch."""
        return _kronecker.layers(self.predict, self.params, self.inputs)

    def moments(
        self, seed: jax.Array, samples: int, form: _kronecker.Form
    ) -> tuple[dict[int, _kronecker.Moments], list[jax.Array]]:
        r"""Kronecker factors of the undamped matrix without the penalty, from random signs.

        .. math:: \mathrm{E}[(B z) (B z)^\top] = H, \quad z_i = \pm 1

        Args:
            seed: an unsigned integer that no other step has.
            samples: how many sign vectors to average over; one backward pass each.
            form: of the factors.

        Returns:
            Factors by the number of their weight, and the diagonal of what has none, as ``_kronecker.moments`` does.
        """
        structure = jax.tree.structure(self.linearisation.outputs)

        def vectors(leaves: list[jax.Array]) -> list[jax.Array]:
            signs = [
                _tree.sharded_like(_kronecker.signs((samples, *x.shape), seed + jnp.uint32(k)).astype(x.dtype), x)
                for k, x in enumerate(leaves)
            ]
            roots = jax.vmap(self.hessian.root)(jax.tree.unflatten(structure, signs))
            return [x / math.sqrt(samples) for x in jax.tree.leaves(roots)]

        return _kronecker.moments(self.layers, self.params, self.inputs, vectors, form)

    @property
    def sensitivity(self) -> Scalar:
        """How much the objective changes by relative changes of the outputs, at most; its rounding, in units of eps."""
        size = jax.tree.map(lambda g, f: jnp.abs(g * f), self.output_gradient, self.linearisation.outputs)
        return _tree.map_scalars(jnp.sum, _tree.to_solve(size))

    @property
    def output_size(self) -> int:
        """How many outputs the batch has in all."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.linearisation.outputs))

    def _squared_pullback(self, vector: Any) -> Params:
        pulled = self.linearisation.vjp(self.hessian.root(vector))
        return jax.tree.map(jnp.square, _tree.to_solve(pulled))

    def _with_penalty(self, diagonal: Params) -> Params:
        ones = jax.tree.map(jnp.ones_like, diagonal)
        return _tree.add(diagonal, l2_times(self.l2, ones))


def linearised_problem(
    predict: Predict, loss: Loss, params: Params, inputs: Inputs, *, targets: Targets = None, l2: Any = 0.0
) -> LinearisedProblem:
    r"""Linearise the model on one batch and expand the loss around its outputs.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        loss: a loss of ``gn_linear.losses``.
        params: where to linearise.
        inputs: one batch.
        targets: its targets.
        l2: coefficient of the penalty :math:`\frac12 \lambda \|\theta\|^2`, a scalar or a pytree like ``params``.

    Returns:
        The problem, with everything that its products share computed once.
    """
    linearisation = linearise(predict, params, inputs)
    return LinearisedProblem(
        params=params,
        linearisation=linearisation,
        hessian=loss.hessian(linearisation.outputs, targets),
        output_gradient=loss.gradient(linearisation.outputs, targets),
        objective=_tree.total(loss(linearisation.outputs, targets), penalty(l2, params)),
        l2=l2,
        predict=predict,
        loss=loss,
        inputs=inputs,
        targets=targets,
    )


def output_roots(
    problem: LinearisedProblem, dtype: jax.typing.DTypeLike
) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    r"""Products with a square root :math:`B B^T = H` on raveled outputs, and with its transpose.

    Args:
        problem: the linearised problem.
        dtype: of the products.

    Returns:
        ``v -> B v`` and ``v -> B^T v``; negative curvature of a plain callable counts as none.
    """
    outputs, hessian = problem.linearisation.outputs, problem.hessian
    like = _tree.to_solve(outputs)

    def raveled(product: Callable[[Params], Params], like: Params) -> Callable[[jax.Array], jax.Array]:
        return lambda vector: _tree.flatten(product(_tree.unflatten(vector, like)), dtype)

    if hessian.closed_form or isinstance(outputs, jax.Array):
        return raveled(hessian.root, like), raveled(hessian.root_transpose, like)
    units = jnp.eye(problem.output_size, dtype=dtype)
    values, vectors = jnp.linalg.eigh(jax.vmap(raveled(hessian.product, outputs))(units))
    matrix = vectors * jnp.sqrt(jnp.maximum(values, jnp.zeros_like(values)))
    return (
        lambda vector: jnp.matmul(matrix, vector, precision="highest"),
        lambda vector: jnp.matmul(matrix.T, vector, precision="highest"),
    )


def curvature_scale(problem: LinearisedProblem, rhs: Params) -> Scalar:
    """The Rayleigh quotient of the curvature along a gradient, bounded below by what the objective suggests.

    Where a loss is saturated the quotient says nothing, and its cap on the damping would hold the run there for ever.
    The bound never exceeds the quotient of the squared error.

    Args:
        problem: the linearised problem.
        rhs: the gradient, in the dtypes of the solve.

    Returns:
        The scale; 0 where there is no curvature along the gradient.
    """
    size = _tree.norm(rhs)
    unit = _tree.divide(rhs, jnp.where(size > 0, size, jnp.ones_like(size)))
    quotient = problem.quadratic(unit).astype(size.dtype)
    sound = jnp.isfinite(quotient) & (quotient > 0)
    suggested = 0.5 * size * (size / problem.objective.astype(size.dtype))
    bounded = jnp.where(jnp.isfinite(suggested), jnp.maximum(quotient, suggested), quotient)
    return jnp.where(sound, bounded, jnp.zeros_like(quotient))


def damping_unit(problem: LinearisedProblem, rhs: Params, scale: Scalar) -> Scalar:
    """The curvature scale, or while there is none (Huber with outliers alone) what the objective itself suggests.

    Args:
        problem: the linearised problem.
        rhs: the gradient, in the dtypes of the solve.
        scale: the curvature scale, 0 if there is none.

    Returns:
        What a multiple of damping is a multiple of.
    """
    size = _tree.norm(rhs)
    guess = size * (size / problem.objective.astype(size.dtype))
    return jnp.where((scale > 0) | ~jnp.isfinite(guess), scale, jnp.maximum(guess, jnp.zeros_like(guess)))


def _raveled(tree: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """``ravel_pytree``, which promotes leaves of different dtypes to the widest, under strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return ravel_pytree(tree)


def penalty(l2: Any, params: Params) -> Scalar:
    """The penalty ``1/2 l2 ||params||^2``, a scalar."""
    if _no_penalty(l2):
        return jnp.zeros([], _tree.scalar_dtype(params))
    wide = _tree.to_solve(params)
    return 0.5 * _tree.dot(wide, l2_times(l2, wide))


def _no_penalty(l2: Any) -> bool:
    """Whether there is none, as far as can be told before anything runs; then its sums are not computed."""
    return isinstance(l2, float | int) and l2 == 0


def l2_times(l2: Any, vector: Params) -> Params:
    """The product of the penalty's coefficient, a scalar or a pytree, with a vector."""
    if jax.tree.structure(l2) == jax.tree.structure(0.0):
        return jax.tree.map(lambda v: jnp.asarray(l2, v.dtype) * v, vector)
    return jax.tree.map(lambda w, v: jnp.asarray(w, v.dtype) * v, l2, vector)


def check_l2(l2: Any) -> None:
    """Raise unless every coefficient of the penalty is a finite number that is not negative."""
    if l2 is None:
        raise TypeError("l2 must be a number or a pytree of numbers, but is None; 0.0 means no penalty.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(l2):
        check_number(leaf, f"l2{jax.tree_util.keystr(path)}")


def fit_l2(l2: Any, params: Params) -> Any:
    """The penalty's coefficients for these parameters: holes cut out as theirs are, the structure checked."""
    if jax.tree.structure(l2) == jax.tree.structure(0.0):
        return l2
    cut = _tree.cut_holes(l2, params)
    if jax.tree.structure(cut) != jax.tree.structure(params):
        raise ValueError(
            "l2 must be a number or a pytree of numbers with the structure of params, but "
            f"{_tree.difference(cut, params, 'l2', 'params')}."
        )
    return cut
