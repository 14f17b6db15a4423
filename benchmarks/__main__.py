"""Command line of the benchmarks: `python -m benchmarks list | run NAME | table RECORD`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import record, suites
from benchmarks.settings import Settings

DEFAULT_SEEDS = 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: the words after `python -m benchmarks`; None reads them from the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of gn_linear.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the suites")
    run = commands.add_parser("run", help="run one suite")
    run.add_argument("name", metavar="NAME", help="a suite that `list` names")
    run.add_argument("--quick", action="store_true", help="few steps and seeds: a smoke test, not a measurement")
    run.add_argument("--seeds", type=positive, metavar="N", help="number of seeds (default: the suite's)")
    run.add_argument("--out", type=Path, metavar="DIR", help="folder of the record and figure (default results/NAME)")
    run.add_argument("--data", type=folder, metavar="FOLDER", help="folder of data sets that no package ships")
    written = commands.add_parser("table", help="write the table of a record again, in Markdown")
    written.add_argument("record", type=Path, metavar="RECORD", help="a file such as results/NAME/NAME.json")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """Reads a whole number of at least 1.

    Args:
        text: the word on the command line.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: if the text is anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def folder(text: str) -> Path:
    """Reads the path of a folder that is there.

    Args:
        text: the word on the command line.

    Returns:
        The path.

    Raises:
        argparse.ArgumentTypeError: if there is no such folder.
    """
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return Path(text)


def list_suites() -> None:
    """Prints one line for each suite: its name and what it measures."""
    width = max(map(len, suites.names()))
    for name in suites.names():
        print(f"{name:<{width}}  {suites.description(name)}")


def default_seeds(name: str, quick: bool) -> int:
    """Looks up how many seeds a suite runs where the command line does not say.

    Args:
        name: the suite's name.
        quick: whether the run is a smoke test.

    Returns:
        The number: the suite's own, or else 3, and 1 of a smoke test.

    Raises:
        KeyError: if there is no such suite.
    """
    suite = suites.load(name)
    return getattr(suite, "QUICK_SEEDS", 1) if quick else getattr(suite, "SEEDS", DEFAULT_SEEDS)


def run_suite(name: str, settings: Settings) -> None:
    """Runs a suite, prints its table and writes its record and figure.

    Args:
        name: the suite's name.
        settings: how long to run, on how many seeds, and where to write.

    Raises:
        KeyError: if there is no such suite.
    """
    suite = suites.load(name)
    settings.out.mkdir(parents=True, exist_ok=True)
    record_path = settings.out / f"{name}.json"
    figure_path = settings.out / f"{name}.png"
    with jax.enable_x64(suite.X64):
        results = record.plain(suite.run(settings))
        record.write(record.make(name, settings, results), record_path)
        if hasattr(suite, "keep"):
            record.write_columns(
                record.make(name, settings, suite.keep(results)), settings.out / f"{name}.columns.json"
            )
    suite.figure(results).savefig(figure_path, dpi=150)
    print(suite.table(results))
    print(f"\nRecord: {record_path}\nFigure: {figure_path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after `python -m benchmarks`; None reads them from the process.

    Returns:
        The exit status: 0, or 2 for a suite that does not exist.
    """
    parsed = parse(arguments)
    if parsed.command == "list":
        list_suites()
        return 0
    if parsed.command == "table":
        kept = json.loads(parsed.record.read_text(encoding="utf-8"))
        print(suites.load(kept["suite"]).table(kept["results"]))
        return 0
    out = parsed.out or Path("results") / parsed.name
    try:
        suites.check(parsed.name)
    except KeyError as error:
        print(f"python -m benchmarks: {error.args[0]}", file=sys.stderr)
        return 2
    seeds = parsed.seeds or default_seeds(parsed.name, parsed.quick)
    run_suite(parsed.name, Settings(quick=parsed.quick, seeds=seeds, out=out, data=parsed.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
