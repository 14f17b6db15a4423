"""A short run of both transforms; as a script, one of two processes that hold half of the batch each.

``python -m tests.distributed_run ADDRESS PROCESS`` prints the losses and the parameters as JSON.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import gn_linear as gnl

STEPS = 4


def predict(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def run(mesh):
    """Losses and final parameters of Gauss-Newton and of iterative linearisation, the batch split over the mesh."""

    def place(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    loss = gnl.losses.squared_error
    optimisers = {
        "gauss_newton": gnl.gauss_newton(predict, loss, solver=gnl.solvers.CG(rtol=1e-12), damping=0.1),
        "iterative_linearisation": optax.chain(
            gnl.iterative_linearisation(predict, loss, period=2), optax.sgd(0.3, momentum=0.9)
        ),
    }
    inputs = np.linspace(-1, 1, 24).reshape(8, 3)
    targets = np.sin(inputs @ np.arange(1.0, 7.0).reshape(3, 2))
    x, y = place(inputs, PartitionSpec("batch")), place(targets, PartitionSpec("batch"))
    found = {}
    for name, optimiser in optimisers.items():

        @jax.jit
        def step(params, state, x, y, optimiser=optimiser):
            value, grads = jax.value_and_grad(lambda p: loss(predict(p, x), y))(params)
            updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
            return optax.apply_updates(params, updates), state, value

        params = {"w": place(np.full((3, 2), 0.1), PartitionSpec()), "b": place(np.zeros(2), PartitionSpec())}
        state, values = jax.jit(optimiser.init)(params), []
        for _ in range(STEPS):
            params, state, value = step(params, state, x, y)
            values.append(float(value))
        found[name] = {"losses": values, "w": np.asarray(params["w"]).tolist(), "b": np.asarray(params["b"]).tolist()}
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    assert (jax.device_count(), jax.local_device_count()) == (2, 1)
    print(json.dumps(run(jax.make_mesh((2,), ("batch",)))))
