"""What the command line tells a suite."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a suite is to run.

    Attributes:
        quick: whether to cut the steps to a smoke test.
        seeds: number of seeds; a suite uses the seeds 0 .. seeds - 1.
        out: folder for what the suite writes.
        data: folder of data sets that no package ships, or None; most suites need none.
    """

    quick: bool
    seeds: int
    out: Path
    data: Path | None = None
