"""Two processes of ``jax.distributed``, each with half of the batch, make the run that one process makes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from tests import distributed_run
from tests.support import assert_close

ROOT = Path(__file__).parent.parent


def test_two_processes_make_the_run_of_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_run", address, str(number)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    alone = distributed_run.run(jax.make_mesh((1,), ("batch",), devices=jax.devices()[:1]))
    # Each step is a solve of condition below 100 whose sums come in another order.
    size = 8 * distributed_run.STEPS
    for name, found in alone.items():
        assert found["losses"][-1] < found["losses"][0]
        for key, values in found.items():
            assert_close(np.asarray(first[name][key]), np.asarray(values), size=size, condition=100)
