"""The user's model, loss and data, checked once, as every experiment takes them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _tree
from gn_linear._typing import Inputs, Params, Predict, Targets, check_count, shown
from gn_linear.losses import Huber, Loss, SquaredError, from_convex

PROBED = 200
"""The training inputs on which the kernel is measured, unless others are given."""


class Data(NamedTuple):
    """What compiled functions read: arguments, since constants would be folded.

    Attributes:
        train: inputs and targets.
        test: inputs and targets, or None.
        probe: inputs on which kernels are measured.
        columns: the targets of these as floats, shape (n,) or (n, c), or None.
    """

    train: tuple[Inputs, Targets]
    test: tuple[Inputs, Targets] | None
    probe: Inputs
    columns: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model, a loss and data, on which experiments run.

    Every leaf of inputs and targets has the example as its leading axis. The run of a seed starts at
    ``init(jax.random.key(seed))``. Minibatches are drawn with replacement, those of a step from the seed and the number
    of the step alone, so that they are the same for every period.

    Attributes:
        predict: the model, ``predict(params, inputs) -> outputs``.
        init: ``init(key) -> params``, from a key of ``jax.random.key``.
        loss: a loss of ``gn_linear.losses``, or any convex ``loss(outputs, targets)``.
        inputs: n training examples.
        targets: their targets; None as far as the loss takes it.
        test_inputs: other examples, which are only evaluated; None leaves the columns of the test empty.
        test_targets: their targets.
        accuracy: ``accuracy(outputs, targets) -> fraction`` of the examples, or None. By default the largest output is
            compared with integer labels or one-hot rows, and for a single output and two values of the targets (-1 and
            1, or 0 and 1) the side of zero; of one half where 0 and 1 are fitted by ``squared_error`` or ``huber``.
            With other targets there is none.
        batch_size: examples in a minibatch; None takes all of them at every step.
        probe_inputs: where kernels and linearisation errors are measured, by default on the first 200 training inputs.
            ``predict`` must treat these examples by themselves.
        probe_targets: their targets, for the alignment with the kernel.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: leading axes differ, or one of a pair of inputs and targets is missing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(-1.0, 1.0, 16)[:, None]
        >>> problem = gnl.experiments.Problem(
        ...     predict=lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"],
        ...     init=lambda key: {"in": jax.random.normal(key, (1, 4)), "out": jnp.ones((4, 1))},
        ...     loss=gnl.losses.squared_error,
        ...     inputs=x,
        ...     targets=x**2,
        ... )
    """

    predict: Predict
    init: Callable[[Any], Params]
    loss: Loss | Callable[..., Any]
    inputs: Inputs
    targets: Targets
    _: dataclasses.KW_ONLY
    test_inputs: Inputs = None
    test_targets: Targets = None
    accuracy: Callable[[Any, Any], Any] | None = None
    batch_size: int | None = None
    probe_inputs: Inputs = None
    probe_targets: Targets = None

    def __post_init__(self) -> None:
        for name in ("predict", "init", "accuracy"):
            value = getattr(self, name)
            if not callable(value) and not (name == "accuracy" and value is None):
                raise TypeError(f"{name} must be a function, but is {shown(value)}.")
        from_convex(self.loss)
        size = _check_examples(self.inputs, "inputs", None)
        _check_examples(self.targets, "targets", size)
        for kind in ("test", "probe"):
            inputs, targets = getattr(self, f"{kind}_inputs"), getattr(self, f"{kind}_targets")
            known = None if inputs is None else _check_examples(inputs, f"{kind}_inputs", None)
            if (inputs is None) != (targets is None) and (inputs is None or self.targets is not None):
                given, missing = ("targets", "inputs") if inputs is None else ("inputs", "targets")
                raise ValueError(
                    f"{kind}_{given} are given, but {kind}_{missing} is None; pass both or neither of them."
                )
            if targets is not None:
                _check_examples(targets, f"{kind}_targets", known)
        if self.batch_size is not None:
            check_count(self.batch_size, "batch_size")
            if self.batch_size > size:
                raise ValueError(
                    f"batch_size must be at most the {size} training examples, but is {self.batch_size}; None takes "
                    "all of them."
                )

    @property
    def objective(self) -> Loss:
        """The loss as an object of the package."""
        return from_convex(self.loss)

    @property
    def examples(self) -> int:
        """How many training examples there are."""
        return np.shape(jax.tree.leaves(self.inputs)[0])[0]

    def arrays(self) -> Data:
        """The data as compiled functions take them."""
        train = jax.tree.map(jnp.asarray, (self.inputs, self.targets))
        test = None if self.test_inputs is None else jax.tree.map(jnp.asarray, (self.test_inputs, self.test_targets))
        probe, targets = self.probe_inputs, self.probe_targets
        if probe is None:
            probe, targets = jax.tree.map(lambda x: x[:PROBED], train)
        return Data(train, test, jax.tree.map(jnp.asarray, probe), _columns(targets))

    def fraction(self, params: Params) -> Callable[[Any, Any], Any] | None:
        """The function that counts correct examples, or None where nothing can be counted.

        Args:
            params: any parameters, for the shape of the outputs.

        Returns:
            The user's function, or the one that fits outputs and targets.
        """
        if self.accuracy is not None:
            return self.accuracy
        outputs = jax.eval_shape(self.predict, params, jax.tree.map(jnp.asarray, self.inputs))
        if not isinstance(self.targets, (jax.Array, np.ndarray)) or not hasattr(outputs, "shape"):
            return None
        targets, shape = np.asarray(self.targets), outputs.shape
        integers = not np.issubdtype(targets.dtype, np.floating)
        if integers and len(shape) > 1 and shape[-1] > 1 and targets.shape == shape[:-1]:
            return lambda f, y: jnp.mean(jnp.argmax(f, -1) == y, dtype=float)
        if targets.shape != shape:
            return None
        values = set(np.unique(targets).tolist())
        if len(shape) > 1 and shape[-1] > 1:
            hot = values <= {0, 1} and np.all(targets.sum(-1) == 1)
            return (lambda f, y: jnp.mean(jnp.argmax(f, -1) == jnp.argmax(y, -1), dtype=float)) if hot else None
        if not (values <= {-1, 1} or values <= {0, 1}):
            return None
        middle = 0.5 if isinstance(self.loss, (SquaredError, Huber)) and values <= {0, 1} else 0.0
        return lambda f, y: jnp.mean((f > middle) == (y > 0), dtype=float)


def starts(problem: Problem, seeds: tuple[int, ...]) -> Params:
    """The initial parameters of all seeds.

    Args:
        problem: whose they are.
        seeds: the seeds.

    Returns:
        A pytree like the parameters with a leading axis of the seeds.
    """
    each = [problem.init(jax.random.key(seed)) for seed in seeds]
    for params in each:
        _tree.check_float_leaves(params, "the params of init")
        _tree.check_same_shapes(params, each[0], "the params of init", "those of the first seed")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(_tree.strongly_typed, each))


def _columns(targets: Targets) -> Any:
    """Targets as what a kernel is aligned with, or None if they are no array of labels or numbers."""
    if not isinstance(targets, (jax.Array, np.ndarray)):
        return None
    if not jnp.issubdtype(targets.dtype, jnp.floating) and targets.ndim == 1:
        classes, labels = np.unique(np.asarray(targets), return_inverse=True)
        return jnp.asarray(np.eye(len(classes))[labels])
    return jnp.asarray(targets, jnp.result_type(targets, jnp.float32)).reshape(len(targets), -1)


def _check_examples(tree: Any, argument: str, size: int | None) -> int:
    """The number of examples, once it is sure that every leaf has as many (None is a tree without leaves)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        label = _tree.leaf_label(path, "it")
        if not hasattr(leaf, "shape") or not leaf.shape:
            raise TypeError(
                f"{argument}: {label} is {shown(leaf)}; every leaf must be an array whose leading axis is the example."
            )
        size = leaf.shape[0] if size is None else size
        if leaf.shape[0] != size or not size:
            label = _tree.leaf_label(path)
            raise ValueError(
                f"{argument}: {label} has shape {leaf.shape}, but every leaf needs a leading axis of as many examples "
                f"as the others have, at least 1, here {size}."
            )
    if size is None and argument.endswith("inputs"):
        raise TypeError(f"{argument} must hold at least one array of examples, but is {shown(tree)}.")
    return size or 0
