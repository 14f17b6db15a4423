"""Hosts in processes of their own, for peers that need another JAX or another global setting.

`python -m benchmarks.remote` makes the environment of kfac-jax, once; a run that needs it does so, too.
"""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.host import Entry, Instance, Taken

REPOSITORY = Path(__file__).parents[1]
KFAC_FOLDER = REPOSITORY / ".venv-kfac"
KFAC_PACKAGES = ("kfac-jax==0.0.8", "jax==0.9.0.1", "jaxlib==0.9.0.1")
"""The release of kfac-jax, and the last JAX that it runs on."""
LAST_WORDS = 300


class Skipped(Exception):
    """A method cannot take part; the message says why."""


class RemoteHost:
    """A `benchmarks.host.Host` in another process: the same methods, and the clock is over there."""

    def __init__(self, problem: str, place: str, x64: bool) -> None:
        """Starts the process.

        Args:
            problem: a name of `benchmarks.problems.PROBLEMS`.
            place: "kfac", the environment of kfac-jax, or "double", this one with 64-bit floats.
            x64: whether it computes with 64-bit floats; "double" always does.

        Raises:
            Skipped: if the environment cannot be made.
        """
        python = kfac_python() if place == "kfac" else Path(sys.executable)
        floats = "x64" if x64 or place == "double" else "x32"
        command = [str(python), "-W", "ignore", "-m", "benchmarks.worker", problem, floats]
        self._process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._requests: Any = self._process.stdin
        self._answers: Any = self._process.stdout

    def open(self, key: Any, entry: Entry, setting: Any, instance: Instance) -> None:
        """See `Host.open`."""
        self._ask("open", key, entry, setting, _arrays(instance))

    def advance(self, key: Any, turn: int, most: int, seconds: float) -> list[Taken]:
        """See `Host.advance`."""
        return self._ask("advance", key, turn, most, seconds)

    def close(self, key: Any) -> None:
        """See `Host.close`."""
        self._ask("close", key)

    def warm_up(self, entry: Entry, setting: Any, instance: Instance) -> float:
        """See `Host.warm_up`."""
        return self._ask("warm_up", entry, setting, _arrays(instance))

    def gradient(self, instance: Instance) -> tuple[float, float]:
        """See `Host.gradient`."""
        return self._ask("gradient", _arrays(instance))

    def versions(self) -> dict[str, str]:
        """See `Host.versions`."""
        return self._ask("versions")

    def stop(self) -> None:
        """Ends the process."""
        self._requests.close()
        self._answers.close()
        self._process.wait()

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Sends a request and waits for its answer."""
        try:
            pickle.dump((name, arguments), self._requests)
            self._requests.flush()
            worked, answer = pickle.load(self._answers)
        except (EOFError, OSError) as error:
            raise Skipped("its process ended") from error
        if not worked:
            raise Skipped(answer.strip().splitlines()[-1][:LAST_WORDS])
        return answer


def kfac_python() -> Path:
    """Makes the environment of kfac-jax unless it is there.

    Returns:
        Its interpreter.

    Raises:
        Skipped: if it cannot be made.
    """
    python, made = KFAC_FOLDER / "bin" / "python", KFAC_FOLDER / ".made"
    if made.exists() and made.read_text(encoding="utf-8") == " ".join(KFAC_PACKAGES):
        return python
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(KFAC_FOLDER)],
        [str(python), "-m", "pip", "install", "--quiet", *KFAC_PACKAGES],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            words = getattr(error, "stderr", None) or str(error)
            raise Skipped(f"its environment cannot be made: {words.strip().splitlines()[-1][:LAST_WORDS]}") from error
    made.write_text(" ".join(KFAC_PACKAGES), encoding="utf-8")
    return python


def _arrays(instance: Instance) -> Instance:
    """The same as numpy arrays, which any version of JAX reads."""
    return jax.tree.map(np.asarray, instance)


if __name__ == "__main__":
    print(kfac_python())
