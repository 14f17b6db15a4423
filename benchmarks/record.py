"""The JSON record of a run: what was measured, on which machine, with which versions, from which commit."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from benchmarks.settings import Settings
from benchmarks.suites import Results

SCHEMA = 1
REPOSITORY = Path(__file__).parents[1]
MEASURED_CODE = ("gn_linear", "benchmarks", "pyproject.toml")
CORE_PACKAGES = ("gn_linear", "jax", "jaxlib", "optax", "numpy", "scipy")
PEER_PACKAGES = ("jaxopt", "optimistix", "kfac-jax", "nlls-gram", "randngd", "mlxtend", "mnist1d", "scikit-learn")


def make(suite: str, settings: Settings, results: Results) -> dict[str, Any]:
    """Gathers everything that the record of a run holds.

    Args:
        suite: the suite's name.
        settings: what the command line asked for.
        results: the suite's tidy rows, made `plain`.

    Returns:
        The record.
    """
    return {
        "schema": SCHEMA,
        "suite": suite,
        "arguments": {"quick": settings.quick, "seeds": settings.seeds},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "results": results,
    }


def write(record: dict[str, Any], path: Path) -> None:
    """Writes a record as JSON.

    Args:
        record: a record of `make`.
        path: the file to write.
    """
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_columns(record: dict[str, Any], path: Path) -> None:
    """Writes a record as small JSON: of each table a list for each column, a line each, numbers to six digits.

    Args:
        record: a record of `make`.
        path: the file to write; its rows are `[dict(zip(table, row)) for row in zip(*table.values())]`.
    """
    tables = []
    for name, rows in record["results"].items():
        names = list(dict.fromkeys(column for row in rows for column in row))
        columns = {column: [_rounded(row.get(column)) for row in rows] for column in names}
        lines = [f"{json.dumps(key)}: {json.dumps(values, allow_nan=False)}" for key, values in columns.items()]
        tables.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    about = json.dumps({key: value for key, value in record.items() if key != "results"})
    path.write_text(f'{about[:-1]},\n"results": {{\n' + ",\n".join(tables) + "\n}}\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """A number as a short one."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """Returns the processor's model, usable cores, memory in GiB, platform, and what JAX computes on and in."""
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_model(),
        "cores": usable,
        "memory_gib": round(pages * page_size / 2**30, 1),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "x64": bool(jax.config.jax_enable_x64),
    }


def cpu_model() -> str:
    """Returns the processor's name as Linux reports it, or what Python knows elsewhere."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Returns the versions of Python, the core packages and the peers that are installed."""
    found = {"python": platform.python_version()}
    for package in CORE_PACKAGES + PEER_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """Returns the commit's hash and whether the measured code differs from it; both None outside git."""
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return {"hash": None, "dirty": None}
    return {"hash": revision, "dirty": bool(_git("status", "--porcelain", "--", *MEASURED_CODE))}


def plain(value: Any) -> Any:
    """Turns arrays, tuples and non-finite numbers into what strict JSON can hold.

    Args:
        value: dictionaries, lists, tuples, arrays, numbers, strings and None, nested in any way.

    Returns:
        The same with lists for tuples and arrays, Python's numbers for scalars, and None for what is not finite.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _git(*words: str) -> str | None:
    """Runs git in the repository; None where that fails."""
    try:
        answer = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
