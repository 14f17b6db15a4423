"""A loop of many small rounds: `lax.while_loop`, laid out so that neither its operations nor its stragglers cost more.

Alone, the time of a small fit is that of the many operations of its rounds, and XLA takes one or two of them for each
number that a loop carries. Carried in one array the numbers come from one operation together. Few operations in front
of the loop matter as much: eight and less XLA runs where it is called, more it hands over to another thread.

Of many at once, as `vmap` makes them, each would wait for the slowest. On a CPU, where lanes are not free, a few lanes
work through the queue instead: where enough of them have ended, they take up the next. What is at work fits into a
core's cache, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from gn_linear._typing import Count, Flag

IN_CACHE = 2**16
"""Numbers that a core's cache holds beside the rest."""

FEWEST = 8
"""So many are at work at once, however large."""

IDLE = 1 / 8
"""The part of the lanes that may have ended before they take up others."""


def repeat(going: Callable[[Any], Flag], round_of: Callable[[Any], Any], first: Any, *, entries: int) -> Any:
    """What ``jax.lax.while_loop(going, round_of, first)`` returns; to be batched, not to be differentiated.

    Args:
        going: whether there is another round.
        round_of: a state after another round.
        first: the first state, a pytree of arrays.
        entries: how many numbers a round works on, which says how many of a batch are at work at once.

    Returns:
        The last one.
    """
    lanes = max(FEWEST, IN_CACHE // max(entries, 1))
    traced, shapes = jax.make_jaxpr(round_of, return_shape=True)(first)
    structure = jax.tree.structure(shapes)

    def another(closed_over: list[Any], state: Any) -> Any:
        leaves = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, closed_over))(*jax.tree.leaves(state))
        return jax.tree.unflatten(structure, leaves)

    @jax.custom_batching.custom_vmap
    def run(closed_over: list[Any], first: Any) -> Any:
        packed, unpacked = _packing(first)
        end = jax.lax.while_loop(
            lambda p: going(unpacked(p)), lambda p: packed(another(closed_over, unpacked(p))), packed(first)
        )
        return unpacked(end)

    @run.def_vmap
    def run_many(count: int, batched: Any, closed_over: list[Any], first: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda along: 0 if along else None, batched[0])
        first = jax.tree.map(
            lambda x, along: x if along else jnp.broadcast_to(x, (count, *np.shape(x))), first, batched[1]
        )
        rounds = _Lanes(lanes, jax.vmap(going), jax.vmap(another, in_axes=(axes, 0)), batched[0])
        queued = jax.default_backend() == "cpu" and count > lanes and not _is_spread((closed_over, first))
        end = rounds.queued(closed_over, first) if queued else rounds.run(closed_over, first, 0)
        return end, jax.tree.map(lambda _: True, end)

    return run(traced.consts, first)


def one_of(index: Count, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """What ``jax.lax.switch(index, branches, *operands)`` returns; of many at once, the others cost if one wants them.

    Args:
        index: of the branch.
        branches: one or two functions of the operands alone.
        operands: pytrees of arrays.

    Returns:
        The result of one branch.
    """
    if len(branches) == 1:
        return branches[0](*operands)

    @jax.custom_batching.custom_vmap
    def chosen(index: Count, *operands: Any) -> Any:
        return jax.lax.switch(index, branches, *operands)

    @chosen.def_vmap
    def chosen_of_many(count: int, batched: Any, index: jax.Array, *operands: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda along: 0 if along else None, batched)
        of_many = [jax.vmap(branch, in_axes=axes[1:], axis_size=count) for branch in branches]
        if not batched[0]:
            result = jax.lax.switch(index, of_many, *operands)
        else:
            first = of_many[0](*operands)
            result = jax.lax.cond(
                jnp.all(index == 0), lambda *_: first, lambda *o: _where(index == 0, first, of_many[1](*o)), *operands
            )
        return result, jax.tree.map(lambda _: True, result)

    return chosen(index, *operands)


class _Lanes:
    """Rounds of several at once."""

    def __init__(
        self, lanes: int, going: Callable[[Any], Any], another: Callable[[Any, Any], Any], batched: list[bool]
    ) -> None:
        self.lanes = lanes
        self.going, self.another, self.batched = going, another, batched

    def run(self, closed_over: list[Any], state: Any, fewest: Any) -> Any:
        """Rounds until no more than so many are left."""

        def advanced(state: Any) -> Any:
            return _where(self.going(state), self.another(closed_over, state), state)

        return jax.lax.while_loop(lambda s: jnp.sum(self.going(s)) > fewest, advanced, state)

    def queued(self, closed_over: list[Any], first: Any) -> Any:
        """The ends of all, by lanes that take up the next where they have ended."""
        count = jax.tree.leaves(first)[0].shape[0]

        def of(index: jax.Array) -> tuple[list[Any], Any]:
            own = [x[index] if along else x for x, along in zip(closed_over, self.batched, strict=True)]
            return own, jax.tree.map(lambda x: x[index], first)

        def shift(carry: Any) -> Any:
            ends, state, whose, taken = carry
            state = self.run(of(whose)[0], state, jnp.where(taken < count, int(self.lanes * (1 - IDLE)), 0))
            ended = ~self.going(state)
            place = jnp.where(ended, whose, count)
            ends = jax.tree.map(lambda all_, lanes: all_.at[place].set(lanes, mode="drop"), ends, state)
            following = jnp.minimum(taken + jnp.cumsum(ended) - 1, count)
            fresh = ended & (following < count)
            state = _where(fresh, of(following)[1], state)
            return ends, state, jnp.where(ended, following, whose), jnp.minimum(taken + jnp.sum(ended), count)

        lanes = jnp.arange(self.lanes)
        start = (first, of(lanes)[1], lanes, jnp.asarray(self.lanes))
        return jax.lax.while_loop(lambda carry: jnp.any(carry[2] < count), shift, start)[0]


def _where(chosen: jax.Array, new: Any, old: Any) -> Any:
    """One tree or the other, lane by lane."""
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _is_spread(arrays: Any) -> bool:
    """Whether an array is known to lie on several devices, along some axis."""
    return any(any(axis is not None for axis in jax.typeof(x).sharding.spec) for x in jax.tree.leaves(arrays))


def _packing(example: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """How a tree is kept with all its numbers in one array."""
    leaves, structure = jax.tree.flatten(example)
    alone = [np.ndim(leaf) == 0 for leaf in leaves]
    dtype = jnp.result_type(*(leaf for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)))

    def packed(tree: Any) -> tuple[Any, list[Any]]:
        found = jax.tree.leaves(tree)
        numbers = [x for x, number in zip(found, alone, strict=True) if number]
        place = np.arange(len(numbers))
        # Not stacked, since XLA would compute each number of a concatenation by itself.
        together = jnp.zeros(len(numbers), dtype)
        for index, number in enumerate(numbers):
            together = jnp.where(place == index, jnp.asarray(number, dtype), together)
        return together, [x for x, number in zip(found, alone, strict=True) if not number]

    def unpacked(pack: tuple[Any, list[Any]]) -> Any:
        numbers, arrays = iter(pack[0]), iter(pack[1])
        found = [
            next(numbers).astype(jnp.result_type(leaf)) if number else next(arrays)
            for leaf, number in zip(leaves, alone, strict=True)
        ]
        return jax.tree.unflatten(structure, found)

    return packed, unpacked
