"""Tidy records of experiments, and the folder in which they are kept while an experiment runs."""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]

CELL = ("experiment", "method", "rule", "period", "damping", "learning_rate")
"""The columns that tell the cells of one experiment apart."""

LOSSES = ("train_loss_f", "train_loss_f_lin", "test_loss_f", "test_loss_f_lin")
ACCURACIES = ("train_accuracy_f", "train_accuracy_f_lin", "test_accuracy_f", "test_accuracy_f_lin")

OUTCOMES = (
    *LOSSES,
    *ACCURACIES,
    *("kernel_distance", "cka", "target_alignment_start", "target_alignment", "parameter_motion", "largest_jump"),
)

RUNS = (
    *("experiment", "method", "rule", "period", "steps", "feature_updates", "damping", "learning_rate", "seed"),
    *OUTCOMES,
    *("seconds", "finite"),
)

MEASUREMENTS = (
    *("experiment", "method", "rule", "period", "steps", "damping", "learning_rate", "seed", "step", "feature_updates"),
    *("train_loss_f", "train_loss_f_lin", "jump", "kernel_distance", "kernel_velocity", "cka", "target_alignment"),
    *("parameter_motion", "linearisation_error"),
)


class Records(NamedTuple):
    """What experiments return: two tidy tables, each a list of flat dicts, which ``pandas.DataFrame`` takes as it is.

    Values are str, int, float, bool, or None for what was not measured or is not finite. f is the network, f_lin the
    network linearised at its last anchor. Losses are means over examples, accuracies are in per cent, distances of
    kernels are those to the start, of ``gn_linear.diagnostics``.

    Attributes:
        runs: a row for each run, that is for each seed of each cell: ``experiment``, ``method``, ``rule``, ``period``
            (None where it is no plain period), ``steps``, ``feature_updates`` (re-linearisations, counting the first),
            ``damping`` and ``learning_rate`` (where they are known), ``seed``; then losses and accuracies of f and
            f_lin on the training and the test set, measures of the kernel on the probe batch at the end,
            ``parameter_motion`` since the start, ``largest_jump`` (the largest rise of the training loss from f_lin to
            f at a measured re-linearisation), ``seconds`` (of the cell over its seeds, without compiling), ``finite``.
        measurements: a row for each measured re-linearisation, right before the anchor moves, and for the end of each
            run: what tells the run, ``step``, ``feature_updates`` (including the one at this step), losses, ``jump``
            (training loss of f less that of f_lin), measures of the kernel, ``kernel_velocity`` (per step, since the
            row before), ``parameter_motion`` since the start, ``linearisation_error`` on the probe batch.
    """

    runs: list[Row]
    measurements: list[Row]


class Store:
    """The folder of an experiment, or no folder: finished cells are appended, and found again.

    The lines of measurements are written before those of runs, so a cell whose runs are all there is whole.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Row, rows: int) -> None:
        self.folder = None if folder is None else Path(folder)
        self._found: dict[tuple[Any, ...], Records] = {}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _check_settings(self.folder, settings)
        tables = [_read(self.folder / f"{name}.jsonl") for name in Records._fields]
        for which, table in enumerate(tables):
            for row in table:
                self._found.setdefault(cell_of(row), Records([], []))[which].append(row)
        # What a killed run left of a cell is done again.
        self._found = {cell: records for cell, records in self._found.items() if len(records.runs) == rows}
        for which, name in enumerate(Records._fields):
            kept = [row for records in self._found.values() for row in records[which]]
            _replace(self.folder / f"{name}.jsonl", _lines(kept))

    def found(self, cell: tuple[Any, ...]) -> Records | None:
        """The records of a cell that is finished."""
        return self._found.get(cell)

    def add(self, records: Records) -> None:
        """Append the records of one cell."""
        if self.folder is not None:
            for name in ("measurements", "runs"):
                with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(_lines(getattr(records, name)))
                    file.flush()
                    os.fsync(file.fileno())

    def finish(self, records: Records) -> None:
        """Write the tables as comma-separated values."""
        if self.folder is not None:
            for name, columns in (("runs", RUNS), ("measurements", MEASUREMENTS)):
                with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, columns)
                    writer.writeheader()
                    writer.writerows(getattr(records, name))


def joined(parts: Iterable[Records]) -> Records:
    """The records of several cells in one."""
    parts = list(parts)
    return Records([row for part in parts for row in part.runs], [row for part in parts for row in part.measurements])


def cell_of(row: Row) -> tuple[Any, ...]:
    """What tells the cell of a row."""
    return tuple(row[name] for name in CELL)


def _lines(rows: Iterable[Row]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _replace(file: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    draft = file.with_name(f"{file.name}.new")
    with draft.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    draft.replace(file)


def _read(file: Path) -> list[Row]:
    """The rows of a file; a last line without its end was torn and is left out."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"folder: line {number} of {file} is no JSON; repair or remove that line, or pass another folder."
            ) from error
    return rows


def _check_settings(folder: Path, settings: Row) -> None:
    """Raise unless the folder is new or holds records of the same settings, which are written there."""
    file = folder / "settings.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if kept is None and (folder / "runs.jsonl").exists():
        raise ValueError(f"folder holds runs.jsonl but no settings.json: {folder}; pass an empty or a new folder.")
    known: Row = kept or {}
    rules = {**known.get("rules", {}), **settings.get("rules", {})}
    for name, value in settings.items() if known else ():
        before: Any = known.get(name)
        if name == "rules":
            before, value = ({rule: rules_[rule] for rule in value if rule in before} for rules_ in (before, value))
        if not _same(before, value):
            raise ValueError(
                f"folder holds records of other settings: {name} is {before} in {file}, but {value} now. Pass "
                "another folder, or the settings of that one."
            )
    _replace(file, json.dumps({**settings, "rules": rules}, indent=1))


def _same(before: Any, now: Any) -> bool:
    """Whether two settings agree; floats to three digits, since compilers round in their own ways."""
    floats = isinstance(now, Sequence) and not isinstance(now, str) and any(isinstance(x, float) for x in now)
    if floats and isinstance(before, Sequence) and len(before) == len(now):
        return bool(np.allclose(before, now, rtol=1e-3, atol=0.0, equal_nan=True))
    return before == now
