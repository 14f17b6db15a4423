"""Run cells of an experiment: host loops over measured re-linearisations, compiled runs between them."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _tree
from gn_linear._capture import check_independent
from gn_linear._linearise import linearised
from gn_linear._typing import Params
from gn_linear.diagnostics import (
    cka,
    empirical_ntk,
    kernel_distance,
    linearisation_error,
    parameter_motion,
    target_alignment,
)
from gn_linear.experiments._methods import Carry, Method, batch_keys, number, thinned
from gn_linear.experiments.problem import Data, Problem, starts
from gn_linear.experiments.records import LOSSES, MEASUREMENTS, OUTCOMES, RUNS, Records, Row, joined

PIECES = 32
"""A run is reported on at least so many times, if it has as many steps."""


class Cell(NamedTuple):
    """One entry of an experiment, run for all seeds.

    Attributes:
        method: how it is trained.
        knob: the traced period or damping, or None.
        labels: what tells the cell in the records.
        lengths: the lengths of the runs to report, in steps of the method, ascending; each begins all longer ones.
        stops: the measured re-linearisations before the end of a run of some length, or None if only the runs tell.
        stride: steps of iterative linearisation that one step of the method stands for.
    """

    method: Method
    knob: Any
    labels: Row
    lengths: tuple[int, ...]
    stops: Callable[[int], list[int]] | None
    stride: int = 1


class _Snapshot(NamedTuple):
    """All seeds at one place: their steps and re-linearisations, and what was measured, arrays of shape (seeds,).

    They stay on the device until the run is over: the next steps need not wait for them.
    """

    step: Any
    updates: Any
    values: dict[str, Any]
    kernel: jax.Array


@dataclasses.dataclass(eq=False)
class Engine:
    """What all cells of an experiment share.

    Attributes:
        problem: the model and the data.
        seeds: the seeds, side by side in every cell.
        measurements: how many re-linearisations of a run are measured at most.
        bar: told how many steps were taken.
    """

    problem: Problem
    seeds: tuple[int, ...]
    measurements: int
    bar: Callable[[int], Any] = lambda steps: None

    def __post_init__(self) -> None:
        self.data = self.problem.arrays()
        self.keys = batch_keys(self.seeds)
        self.params = starts(self.problem, self.seeds)
        first = jax.tree.map(lambda x: x[0], self.params)
        check_independent(self.problem.predict, first, jax.tree.map(lambda x: x[:16], self.data.probe))
        self.fraction = self.problem.fraction(first)
        # One call for all that is measured at a place: several would cost more than they compute.
        self._measure, self._final = jax.jit(jax.vmap(self._measured, (None, 0, 0, 0, 0))), jax.jit(self._evaluated)
        self._turn = jax.jit(jax.vmap(kernel_distance))

    @functools.cached_property
    def origin(self) -> jax.Array:
        """The kernels at the start."""
        found = jax.eval_shape(jax.vmap(self._kernel, (None, 0)), self.data, self.params)
        return self._measure(self.data, self.params, jnp.zeros(found.shape, found.dtype), self.params, self.params)[0]

    @functools.cached_property
    def beginning(self) -> _Snapshot:
        """What is measured at the start, for all cells."""
        zero = jnp.zeros(len(self.seeds), jnp.int32)
        return self._snapshot(Carry(self.params, self.params, None, zero, zero))

    def run(self, cell: Cell) -> Records:
        """The records of a cell, all seeds and all lengths."""
        self._warm_up(cell)
        began = time.perf_counter()
        lengths, carry = cell.lengths, cell.method.start(self.params)
        stops = {length: self._stops(cell, length) for length in lengths}
        snapshots: dict[int, _Snapshot] = {}
        ends: dict[int, tuple[Row, float]] = {}
        for mark in sorted(set().union(*stops.values())):
            carry = self._advance(cell, carry, mark)
            snapshots[mark] = self._snapshot(carry) if mark else self.beginning
            if mark in lengths:
                jax.block_until_ready(snapshots[mark].values)
                ends[mark] = self._ends(carry), (time.perf_counter() - began) / len(self.seeds)
        parts = []
        for length in lengths:
            path = [self._landed(snapshots[stop]) for stop in stops[length]]
            parts.append(self._records(cell, length, path, *ends[length]))
        return joined(parts)

    def _stops(self, cell: Cell, length: int) -> list[int]:
        """Where to halt: measured re-linearisations, or the steps from which the next one is measured; and the end."""
        places = list(range(length)) if cell.stops is None else [p for p in cell.stops(length) if p < length]
        return thinned([*places, length], self.measurements)

    def _warm_up(self, cell: Cell) -> None:
        """Compile all that the cell needs, by a run without steps."""
        carry = cell.method.start(self.params)
        still = jnp.zeros([], jnp.int32)
        cell.method.advance(self.data, self.keys, carry, still, still, cell.knob)
        self._final(self.data, carry.params, carry.anchor)
        jax.block_until_ready((self.beginning, self._turn(self.origin, self.origin)))

    def _advance(self, cell: Cell, carry: Carry, mark: int) -> Carry:
        """On to a mark, in pieces that are reported."""
        length = cell.lengths[-1]
        piece = max(1, length // PIECES) if cell.method.together else length
        while (done := int(np.min(carry.step))) < mark:
            until = jnp.asarray(min(done + piece, mark), jnp.int32)
            end = jnp.asarray(length, jnp.int32)
            carry = jax.block_until_ready(cell.method.advance(self.data, self.keys, carry, until, end, cell.knob))
            self.bar((int(np.min(carry.step)) - done) * cell.stride)
        return carry

    def _snapshot(self, carry: Carry) -> _Snapshot:
        kernel, values = self._measure(self.data, self.params, self.origin, carry.params, carry.anchor)
        return _Snapshot(carry.step, carry.updates, values, kernel)

    def _landed(self, snapshot: _Snapshot) -> _Snapshot:
        """A snapshot as numpy arrays, but for the kernel."""
        step, updates = (np.broadcast_to(x, [len(self.seeds)]) for x in (snapshot.step, snapshot.updates))
        values = {name: np.asarray(value) for name, value in snapshot.values.items()}
        return _Snapshot(step, updates, values, snapshot.kernel)

    def _ends(self, carry: Carry) -> dict[str, np.ndarray]:
        return {name: np.asarray(x) for name, x in self._final(self.data, carry.params, carry.anchor).items()}

    def _kernel(self, data: Data, params: Params) -> jax.Array:
        return empirical_ntk(self.problem.predict, params, data.probe, trace=True)

    def _measured(
        self, data: Data, start: Params, origin: jax.Array, params: Params, anchor: Params
    ) -> tuple[jax.Array, Row]:
        """The kernel of one seed, how it compares, the training losses, and how far f and f_lin are apart."""
        kernel = self._kernel(data, params)
        found = self._losses(params, anchor, "train", data.train)
        found |= {"kernel_distance": kernel_distance(origin, kernel), "cka": cka(origin, kernel)}
        if data.columns is not None:
            found["target_alignment"] = target_alignment(kernel, data.columns)
        found["parameter_motion"] = parameter_motion(start, params).total
        found["linearisation_error"] = linearisation_error(self.problem.predict, anchor, params, data.probe)
        found["finite"] = _tree.all_finite((params, anchor))
        return kernel, found

    def _evaluated(self, data: Data, params: Params, anchor: Params) -> Row:
        """What is known of a run at its end, for all seeds."""
        sets = {"train": data.train, "test": data.test}

        def one(params: Params, anchor: Params) -> Row:
            found = {}
            for kind, batch in sets.items():
                if batch is not None:
                    found |= self._losses(params, anchor, kind, batch, accuracies=self.fraction is not None)
            return found

        return jax.vmap(one)(params, anchor)

    def _losses(self, params: Params, anchor: Params, kind: str, batch: Any, accuracies: bool = False) -> Row:
        found, (inputs, targets) = {}, batch
        models = {"f": self.problem.predict, "f_lin": linearised(self.problem.predict, anchor)}
        for name, model in models.items():
            outputs = model(params, inputs)
            found[f"{kind}_loss_{name}"] = self.problem.objective(outputs, targets)
            if accuracies and self.fraction is not None:
                found[f"{kind}_accuracy_{name}"] = 100 * jnp.asarray(self.fraction(outputs, targets), float)
        return found

    def _records(self, cell: Cell, length: int, path: list[_Snapshot], end: Row, seconds: float) -> Records:
        """The rows of the runs of one length."""
        turns = [np.asarray(self._turn(a.kernel, b.kernel)) for a, b in itertools.pairwise(path)]
        runs, rows = [], []
        for i, seed in enumerate(self.seeds):
            about = {**cell.labels, "steps": length * cell.stride, "seed": seed}
            measured = [
                self._measurement(cell, about, path, turns, n, i)
                for n in range(len(path))
                if n == 0 or path[n].step[i] > path[n - 1].step[i]
            ]
            last = path[-1]
            known = {name: number(values[i]) for name, values in {**end, **last.values}.items()}
            finite = bool(last.values["finite"][i]) and all(known.get(n, 0.0) is not None for n in LOSSES)
            known["target_alignment_start"] = number(path[0].values.get("target_alignment", np.full(i + 1, np.nan))[i])
            jumps = [row["jump"] for row in measured]
            known["largest_jump"] = None if None in jumps else max(jumps)
            updates = {"feature_updates": int(last.updates[i])}
            values = {name: known.get(name) if finite else None for name in OUTCOMES}
            row = {**about, **updates, **values, "seconds": seconds, "finite": finite}
            runs.append({name: row[name] for name in RUNS})
            rows += measured
        return Records(runs, rows)

    def _measurement(
        self, cell: Cell, about: Row, path: list[_Snapshot], turns: list[np.ndarray], n: int, i: int
    ) -> Row:
        """The row of seed number i at place number n."""
        here, stride = path[n], cell.stride
        values = {name: number(found[i]) for name, found in here.values.items()}
        step = int(here.step[i]) * stride
        f, f_lin = values["train_loss_f"], values["train_loss_f_lin"]
        values["jump"] = None if f is None or f_lin is None else f - f_lin
        values["kernel_velocity"] = None
        if n > 0:
            values["kernel_velocity"] = number(turns[n - 1][i] / (step - int(path[n - 1].step[i]) * stride))
        updates = int(here.updates[i]) + (step < about["steps"])
        known = {**values, **about, "step": step, "feature_updates": updates}
        return {name: known.get(name) for name in MEASUREMENTS}
