"""The other end of `benchmarks.remote`: answers requests from standard input until it closes.

A request is (method of `Host`, arguments), pickled; an answer is (whether it worked, result or what went wrong). Both
ends are this project's own.
"""

import os
import pickle
import sys
import traceback
from typing import Any, BinaryIO

import jax

from benchmarks.host import Host


def serve(host: Any, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are no more.

    Args:
        host: whose methods are asked for.
        requests: where requests come from.
        answers: where answers go.
    """
    while True:
        try:
            name, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = True, getattr(host, name)(*arguments)
        except Exception:  # whatever a peer raises is the benchmark's to report
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    """Serves a host for the problem and the precision on the command line; what peers print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    problem, floats = sys.argv[1:]
    jax.config.update("jax_enable_x64", floats == "x64")
    serve(Host(problem), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
