"""The solver of who asks for none."""

import dataclasses
import enum
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._kronecker import matrix_shape
from gn_linear._typing import Params, Scalar
from gn_linear.curvature import LinearisedProblem
from gn_linear.preconditioners import Kronecker, Subsample
from gn_linear.solvers._interface import Result, Solver
from gn_linear.solvers.cg import CG, CGState

SMALL = 100
"""Parameters up to which plain conjugate gradients get far in their 50 steps."""
STEPS, SUBSAMPLE_STEPS = 1, 2
"""Inner steps with each preconditioner: in the benchmarks more take fewer steps, but no fewer seconds."""
ROWS, ENTRIES = 256, 2**23
"""Rows of the Jacobian to take, and how many numbers they may have in all."""


class Choice(enum.IntEnum):
    """Who chose the inner solver, and what for.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.solvers.Choice(1).name
        'KRONECKER'
    """

    GIVEN = 0
    """By the caller."""
    KRONECKER = 1
    """By the package, since at least half of the parameters are weights of matrix products, as far as shapes tell."""
    PLAIN = 2
    """By the package, since there are few parameters or most are not in matrices."""
    SUBSAMPLE = 3
    """By the package, since weights are used several times for one output, as in physics-informed networks."""

    @property
    def words(self) -> str:
        """The choice and its reason."""
        return {
            Choice.GIVEN: "the solver that was given",
            Choice.KRONECKER: f"CG({STEPS}) with Kronecker factors, chosen since most parameters are in matrices",
            Choice.PLAIN: "CG(), chosen since there are few parameters or most are not in matrices",
            Choice.SUBSAMPLE: f"CG({SUBSAMPLE_STEPS}) with {ROWS} rows of the Jacobian, chosen since weights are used "
            "several times for one output",
        }[self]


def choose(params: Params) -> tuple[Solver, Choice]:
    """The solver that ``gauss_newton`` takes for these parameters if none is given.

    Where at least half of more than 100 parameters are in arrays of two axes or more, both sides wider than 1:
    ``ByStructure()``, which is KFAC with its exact learning rate and momentum for networks of layers, and takes a part
    of the batch for networks that are differentiated by their inputs. Otherwise ``CG()``. Only shapes are looked at;
    the model tells the rest at its first step. A weight that turns out not to be used in matrix products alone has its
    diagonal for a preconditioner.

    Args:
        params: the parameters that will be trained.

    Returns:
        The solver, and which case it is before the model is known.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> solver, choice = gnl.solvers.choose({"w": jnp.zeros((20, 10)), "b": jnp.zeros(10)})
        >>> print(choice.words)
        CG(1) with Kronecker factors, chosen since most parameters are in matrices
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    count = sum(map(math.prod, shapes))
    inside = sum(math.prod(shape) for shape in shapes if min(matrix_shape(shape) or (0,)) > 1)
    if count <= SMALL or 2 * inside < count:
        return CG(), Choice.PLAIN
    return ByStructure(), Choice.KRONECKER


class Both(NamedTuple):
    """The states of both preconditioners, of which a run changes one.

    Attributes:
        kronecker: of ``preconditioners.Kronecker``.
        subsample: of ``preconditioners.Subsample``.
    """

    kronecker: Any
    subsample: Any


class _Prepared(NamedTuple):
    choice: Choice
    prepared: Any
    both: Both


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByStructure(Solver):
    r"""Conjugate gradients on :math:`(G + \mu I) d = -b` with momentum, preconditioned as the model suggests.

    One step with ``preconditioners.Kronecker``; or two with 256 rows of ``preconditioners.Subsample``, where the trace
    of the model shows a weight that is used several times, every example has one output, and examples can be drawn. So
    it is for the equations of physics-informed networks, whose Kronecker factors are poor.

    Attributes:
        layered: the solver in the first case.
        drawn: the solver in the second case.

    Example:
        >>> import gn_linear as gnl
        >>> solver = gnl.solvers.ByStructure()

    References:
        Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature, section 7;
        Martens (2010), Deep learning via Hessian-free optimization, section 4.7.
    """

    layered: CG = CG(max_steps=STEPS, rtol=0.0, preconditioner=Kronecker(), momentum=True)
    drawn: CG = CG(max_steps=SUBSAMPLE_STEPS, rtol=0.0, preconditioner=Subsample(rows=ROWS), momentum=True)

    def choice(self, problem: LinearisedProblem) -> Choice:
        """Which of its two solvers a problem is for.

        Args:
            problem: the linearised problem; only its trace and shapes are looked at.

        Returns:
            ``Choice.KRONECKER`` or ``Choice.SUBSAMPLE``.
        """
        several = any(len(block.uses) > 1 for block in problem.layers.blocks)
        single = all(leaf.shape[:1] == (leaf.size,) for leaf in jax.tree.leaves(problem.linearisation.outputs))
        entries = ROWS * sum(leaf.size for leaf in jax.tree.leaves(problem.params))
        drawn = several and single and entries <= ENTRIES and Subsample(rows=ROWS).follows(problem)
        return Choice.SUBSAMPLE if drawn else Choice.KRONECKER

    def init(self, params: Params) -> CGState:
        """The previous solution, which both share, and the states of both preconditioners."""
        layered, drawn = self.layered.init(params), self.drawn.init(params)
        return CGState(layered.previous, Both(layered.preconditioner, drawn.preconditioner))

    def prepare(self, problem: LinearisedProblem, rhs: Params, state: CGState) -> _Prepared:
        """What the chosen solver prepares."""
        choice, both = self.choice(problem), state.preconditioner
        mine = both.kronecker if choice == Choice.KRONECKER else both.subsample
        return _Prepared(choice, self._solver(choice).prepare(problem, rhs, CGState(state.previous, mine)), both)

    def solve(self, prepared: _Prepared, damping: Scalar) -> Result:
        """The step of the chosen solver."""
        choice, both = prepared.choice, prepared.both
        result = self._solver(choice).solve(prepared.prepared, damping)
        name = "kronecker" if choice == Choice.KRONECKER else "subsample"
        learnt = both._replace(**{name: result.state.preconditioner})
        return result._replace(state=CGState(result.state.previous, learnt))

    def _solver(self, choice: Choice) -> CG:
        return self.layered if choice == Choice.KRONECKER else self.drawn
