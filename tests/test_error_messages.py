"""Every error message of the package, kept in ``golden/errors.txt`` for reading, and the law that all of them obey.

A message names the argument or the leaf's path, shows what came, and says what to do. The messages are made in a
process of their own, without the type checks of ``conftest.py``: they are what a user meets. After a change of a
message, ``python -m tests.test_error_messages`` rewrites the file.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl
from gn_linear import _capture

ROOT = Path(gnl.__file__).parent
GOLDEN = Path(__file__).parent / "golden" / "errors.txt"
RULE = "-" * 120
REWRITE = "To rewrite it: python -m tests.test_error_messages"


@dataclasses.dataclass(frozen=True)
class Case:
    """One way into one error.

    Attributes:
        trigger: raises it.
        names: what its message must name, the argument or the leaf's path.
        came: what its message must show of what came.
    """

    trigger: Callable[[], Any]
    names: str
    came: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(name: str, names: str, *came: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enter a function into the table."""

    def enter(trigger: Callable[[], Any]) -> Callable[[], Any]:
        assert name not in CASES, f"{name} is in the table twice"
        CASES[name] = Case(trigger, names, came)
        return trigger

    return enter


def call(name: str, names: str, *came: str, of: Callable[..., Any]) -> None:
    """Enter a call without arguments into the table."""
    case(name, names, *came)(of)


# --- the material -----------------------------------------------------------------------------------------------------

SQUARED = gnl.losses.squared_error
SUBSAMPLED = gnl.solvers.CG(preconditioner=gnl.preconditioners.Subsample())
CROSS_ENTROPY = gnl.losses.softmax_cross_entropy


def floats(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def integers(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.int32)


X, Y, COLUMN = floats(4, 3), floats(4), floats(4, 1)


def params() -> dict[str, jax.Array]:
    return {"w": floats(3), "b": floats()}


def linear(p, x):
    return x @ p["w"] + p["b"]


def linear_of_a_dictionary(p, x):
    if not isinstance(p, dict):
        raise TypeError("the model's own error.")
    return linear(p, x)


def sum_of_outputs(p, x):
    return jnp.sum(linear(p, x))


def labels(p, x):
    return (linear(p, x) > 0).astype(jnp.int32)


def waves(p, x):
    return jax.lax.complex(linear(p, x), linear(p, x))


def two_heads(p, x):
    return {"mean": linear(p, x), "scale": linear(p, x)}


def heads_with_a_scalar(p, x):
    return {"mean": linear(p, x), "scale": p["b"]}


def pairwise_loss(outputs, targets):
    return (outputs[:, None] - targets[None, :]) ** 2


def count_of_errors(outputs, targets):
    return jnp.sum(outputs > targets, dtype=jnp.int32)


def sum_of_heads(outputs, targets):
    return jnp.sum(outputs["mean"] ** 2 + outputs["scale"] ** 2)


def schedule(count):
    return 0.1


def halving(count):
    return 8 // 2 ** (count // 10)


def by_age(context):
    return context.age


def relu(x):
    return x


def gauss_newton(**options):
    return gnl.gauss_newton(linear, SQUARED, **options)


def iterative(**options):
    return gnl.iterative_linearisation(linear, SQUARED, **{"period": 2, **options})


def first_order(**options):
    return gnl.solvers.FirstOrder(optax.sgd(0.1), 2, **options)


def filtered(filters, predict=linear):
    return gnl.filtered_steps(predict, params(), X, Y, filters, rank=2)


def step(optimiser=None, updates=None, p=None, state=None, **batch):
    """One update, all of whose arguments have defaults that fit."""
    optimiser = gauss_newton() if optimiser is None else optimiser
    p = params() if p is None else p
    state = optimiser.init(p) if state is None else state
    return optimiser.update(p if updates is None else updates, state, p, **{"inputs": X, "targets": Y, **batch})


def traced(function: Callable[[Any], Any], value: Any) -> Callable[[], Any]:
    """``function`` of a traced value."""
    return lambda: jax.jit(function)(value)


# --- numbers, by the argument that is wrong ---------------------------------------------------------------------------

call("damping/negative", "damping", "-1.0", of=lambda: gauss_newton(damping=-1.0))
call("damping/nan", "damping", "nan", of=lambda: gauss_newton(damping=float("nan")))
call("damping/negative array", "damping", "-2.0", "float32", of=lambda: gauss_newton(damping=-2 * floats()))
call("damping/array of a shape", "damping", "float32", "(3,)", of=lambda: gauss_newton(damping=floats(3)))
call("damping/none", "damping", "None", of=lambda: gauss_newton(damping=None))
call("damping/string", "damping", "'lm'", of=lambda: gauss_newton(damping="lm"))
call(
    "damping/policy not made",
    "damping",
    "LevenbergMarquardt",
    "call it first",
    of=lambda: gauss_newton(damping=gnl.damping.LevenbergMarquardt),
)
call("damping/bare schedule", "damping", "the function schedule", of=lambda: gauss_newton(damping=schedule))
call(
    "damping/dictionary",
    "damping",
    "{'mu': 0.1}",
    "dict",
    of=lambda: gauss_newton(damping={"mu": 0.1}),
)
call("damping/traced array", "damping", "float32", "(3,)", of=traced(gnl.damping.Constant, floats(3)))
call("learning_rate/negative", "learning_rate", "-0.1", of=lambda: gauss_newton(learning_rate=-0.1))
call("learning_rate/none", "learning_rate", "None", of=lambda: gauss_newton(learning_rate=None))
call("l2/none", "l2", "None", of=lambda: gauss_newton(l2=None))
call("l2/negative", "l2", "-1.0", of=lambda: gauss_newton(l2=-1.0))
call("l2/leaf", "l2['w']", "inf", of=lambda: iterative(l2={"w": float("inf"), "b": 0.0}))
call("l2/leaf of a shape", "l2['w']", "float32", "(3,)", of=lambda: iterative(l2={"w": floats(3), "b": 0.0}))
call("l2/key missing", "l2", "['b']", "float32", of=lambda: step(gauss_newton(l2={"w": 0.1})))
call("l2/key unknown", "l2", "['bias']", "0.1", of=lambda: step(iterative(l2={"w": 0.1, "b": 0.1, "bias": 0.1})))
call("l2/list for a dictionary", "l2", "a list of 2", "'b', 'w'", of=lambda: step(gauss_newton(l2=[0.1, 0.2])))
call("rtol/negative", "rtol", "-0.1", of=lambda: gnl.solvers.CG(rtol=-0.1))
call("rtol/one", "rtol", "1.0", of=lambda: gnl.solvers.CG(rtol=1.0))
call("warm_start/infinite", "warm_start", "inf", of=lambda: gnl.solvers.CG(warm_start=float("inf")))
call("progress/bool", "progress", "True", of=lambda: gnl.solvers.CG(progress=True))
call("max_steps/float", "max_steps", "2.5", of=lambda: gnl.solvers.CG(max_steps=2.5))
call("max_steps/zero", "max_steps", "0", of=lambda: gnl.solvers.CG(max_steps=0))
call(
    "max_steps/traced",
    "max_steps",
    "a traced int32 array",
    of=traced(lambda n: gnl.solvers.CG(max_steps=n).rtol, integers()),
)
call("samples/array", "samples", "1", "int32", of=lambda: gnl.preconditioners.Jacobi(samples=integers()))
call("exact_up_to/negative", "exact_up_to", "-1", of=lambda: gnl.preconditioners.Jacobi(exact_up_to=-1))
call("decay/one", "decay", "1.0", of=lambda: gnl.preconditioners.Jacobi(decay=1.0))
call("decay/negative", "decay", "-0.5", of=lambda: gnl.preconditioners.Jacobi(decay=-0.5))
call("every/zero", "every", "0", of=lambda: gnl.preconditioners.Kronecker(every=0))
call("memory/negative", "memory", "-1.0", of=lambda: gnl.preconditioners.Kronecker(memory=-1.0))
call("widest/negative", "widest", "-1", of=lambda: gnl.preconditioners.Kronecker(widest=-1))
call("rank/of factors", "rank", "0", of=lambda: gnl.preconditioners.Kronecker(rank=0))
call("rows/zero", "rows", "0", of=lambda: gnl.preconditioners.Subsample(rows=0))
call("seed/of a part", "seed", "-1", of=lambda: gnl.preconditioners.Subsample(seed=-1))
call(
    "inputs/no examples",
    "inputs",
    "leading axes",
    of=lambda: step(gnl.gauss_newton(lambda p, x: linear(p, X), SQUARED, solver=SUBSAMPLED), inputs=floats(2)),
)
call("momentum/number", "momentum", "0.9", of=lambda: gnl.solvers.CG(momentum=0.9))
call("momentum/warm start", "warm_start", "0.95", of=lambda: gnl.solvers.CG(momentum=True, warm_start=0.95))
call("fresh/above one", "fresh", "1.5", of=lambda: gnl.damping.LevenbergMarquardt(fresh=1.5))
call("minimum/zero", "minimum", "0.0", of=lambda: gnl.damping.LevenbergMarquardt(minimum=0.0))
call("maximum/too large", "maximum", "1e+39", of=lambda: gnl.damping.LevenbergMarquardt(maximum=1e39))
call("initial/not in between", "initial", "10.0", "1.0", of=lambda: gnl.damping.LevenbergMarquardt(10.0, maximum=1.0))
call("factors/list", "factors", "[0.1, 1.0] (a list)", of=lambda: gnl.damping.Path(factors=[0.1, 1.0]))
call("factors/empty", "factors", "()", of=lambda: gnl.damping.Path(factors=()))
call("factors/entry", "factors[1]", "-1.0", of=lambda: gnl.damping.Path(factors=(0.1, -1.0)))
call("momentum/greater than one", "momentum", "1.5", of=lambda: gnl.solvers.Cholesky(momentum=1.5))
call("momentum/string", "momentum", "'much'", of=lambda: gnl.solvers.Cholesky(momentum="much"))
call("in_outputs/string", "in_outputs", "'outputs'", of=lambda: gnl.solvers.QR("outputs"))
call("rank/zero", "rank", "0", of=lambda: gnl.solvers.Lanczos(rank=0))
call("proximal/negative", "proximal", "-0.1", of=lambda: first_order(proximal=-0.1))
call("inner steps/float", "steps", "2.5", of=lambda: gnl.solvers.FirstOrder(optax.sgd(0.1), 2.5))
call("delta/zero", "delta", "0.0", of=lambda: gnl.losses.huber(0.0))
call("delta/string", "delta", "'small'", of=lambda: gnl.losses.huber("small"))
call("period/float", "period", "2.5", of=lambda: iterative(period=2.5))
call("period/float array", "period", "2.0", "float32", of=lambda: iterative(period=2 * floats()))
call("period/pair", "period", "(1, 2)", "tuple", of=lambda: iterative(period=(1, 2)))
call("period/bare schedule", "period", "the function schedule", "0.1", of=lambda: step(iterative(period=schedule)))
call("period/bare schedule that fails", "period", "the function halving", of=lambda: step(iterative(period=halving)))
call(
    "period/rule of integers",
    "period",
    "the function by_age",
    "int32",
    of=lambda: step(iterative(period=gnl.periods.stop_after(3, by_age))),
)
call("period/class", "period", "the class every", "call it first", of=lambda: iterative(period=gnl.periods.every))
call("rule/number", "rule", "10", of=lambda: gnl.periods.stop_after(3, 10))
call("k/zero", "k", "0", of=lambda: gnl.periods.every(0))
call("steps/set", "steps", "{1, 2}", "set", of=lambda: gnl.periods.at({1, 2}))
call("steps/entry", "steps[1]", "-2", of=lambda: gnl.periods.at([1, -2]))
call("until/float", "until", "2.5", of=lambda: gnl.periods.early_then_sparse(1, 2.5, 10))
call("bound/negative", "bound", "-0.1", of=lambda: gnl.periods.when_linearisation_error(-0.1))
call("probes/zero", "probes", "0", of=lambda: gnl.periods.when_kernel_drifts(0.1, X, probes=0))
call("period/zero", "period", "0", of=lambda: iterative(period=0))
call("period/too large", "period", "2147483648", of=lambda: iterative(period=2**31))

call("steps/not whole", "steps", "2.5", of=lambda: gnl.filters.GradientDescent(0.1, 2.5))
call("steps/negative", "steps", "-1", of=lambda: gnl.filters.GradientDescent(0.1, -1))
call("step_size/zero", "step_size", "0.0", of=lambda: gnl.filters.Proximal(0.0, 3))
call("time/infinite", "time", "inf", of=lambda: gnl.filters.GradientFlow(float("inf")))

# --- objects ----------------------------------------------------------------------------------------------------------

call("predict/none", "predict", "None", of=lambda: gnl.gauss_newton(None, SQUARED))
call("predict/string", "predict", "'mlp'", of=lambda: gnl.iterative_linearisation("mlp", SQUARED, period=2))
call("loss/string", "loss", "'mse'", of=lambda: gnl.gauss_newton(linear, "mse"))
call("loss/class", "loss", "SquaredError", of=lambda: gnl.gauss_newton(linear, gnl.losses.SquaredError))
call("loss/maker", "loss", "huber", of=lambda: gnl.losses.from_convex(gnl.losses.huber))
call("solver/string", "solver", "'cg'", of=lambda: gauss_newton(solver="cg"))
call("solver/class", "solver", "the class CG", of=lambda: gauss_newton(solver=gnl.solvers.CG))
call("preconditioner/string", "preconditioner", "'jacobi'", of=lambda: gnl.solvers.CG(preconditioner="jacobi"))
call(
    "solver/without damping",
    "damping must be 0.0",
    "MinimumNorm",
    "LevenbergMarquardt",
    of=lambda: gauss_newton(solver=gnl.solvers.Lanczos(filter=gnl.filters.MinimumNorm())),
)
call("filter/string", "filter", "'tikhonov'", of=lambda: gnl.solvers.Lanczos(filter="tikhonov"))
call("filter/class", "filter", "the class Tikhonov", of=lambda: gnl.solvers.Lanczos(filter=gnl.filters.Tikhonov))
call("optimiser/not called", "optimiser", "the function adam", of=lambda: gnl.solvers.FirstOrder(optax.adam, 5))
call("optimiser/string", "optimiser", "'sgd'", of=lambda: gnl.solvers.FirstOrder("sgd", 5))
call("schedule/number", "schedule", "0.1", of=lambda: gnl.damping.Schedule(0.1))
call(
    "transform/not called",
    "transform",
    "the function adam",
    of=lambda: gnl.wrappers.with_batch(optax.adam, inputs=X),
)
call("filter/without damping", "filter", "MinimumNorm", of=lambda: gnl.filters.MinimumNorm().at_damping(floats()))
call("transform/none", "transform", "None", of=lambda: gnl.wrappers.without_batch(None))
call("filters/one filter", "filters", "Tikhonov(", of=lambda: filtered(gnl.filters.Tikhonov(1.0)))
call("filters/empty", "filters", "[]", of=lambda: filtered([]))
call("filters/entry", "filters[1]", "0.5", of=lambda: filtered([gnl.filters.Tikhonov(1.0), 0.5]))
call("filters/predict", "predict", "None", of=lambda: filtered([gnl.filters.Tikhonov(1.0)], predict=None))
call("weighted/plain callable", "loss", "the function log_cosh", of=lambda: gnl.losses.weighted(optax.losses.log_cosh))
call(
    "weighted/from_convex",
    "loss",
    "log_cosh",
    of=lambda: gnl.losses.weighted(gnl.losses.from_convex(optax.losses.log_cosh)),
)
call("weighted/class", "loss", "the class SquaredError", of=lambda: gnl.losses.weighted(gnl.losses.SquaredError))

# --- a step: what is missing or in the wrong place --------------------------------------------------------------------


@case("inputs/missing", "inputs", "missing")
def _():
    optimiser = gauss_newton()
    optimiser.update(params(), optimiser.init(params()), params())


@case("params/missing", "params", "None")
def _():
    optimiser = iterative()
    optimiser.update(params(), optimiser.init(params()), inputs=X, targets=Y)


@case("full_params/missing", "full_params", "['b']")
def _():
    optimiser = optax.masked(gauss_newton(), {"w": True, "b": False})
    step(optimiser)


@case("full_params/missing for many", "full_params", "['b0']", "and 4 more")
def _():
    many = {"w": floats(3), **{f"b{i}": floats() for i in range(9)}}
    step(optax.masked(gauss_newton(), {name: name == "w" for name in many}), p=many)


@case("full_params/masked themselves", "full_params", "['b']")
def _():
    optimiser = optax.masked(gauss_newton(), {"w": True, "b": False}, mask_compatible_extra_args=True)
    step(optimiser, full_params=params())


@case("full_params/missing behind optax.flatten", "params", "(4,)")
def _():
    step(optax.flatten(gnl.gauss_newton(linear_of_a_dictionary, SQUARED)))


call("keyword/target", "target", "gauss_newton", of=lambda: step(target=Y))
call("keyword/input", "input", "iterative_linearisation", of=lambda: step(iterative(), input=X))
call("curvature_targets/missing", "curvature_targets", "missing", of=lambda: step(curvature_inputs=X))
call("curvature_inputs/missing", "curvature_inputs", "missing", of=lambda: step(curvature_targets=Y))


@case("curvature_inputs/with fresh batches", "curvature_inputs", "FirstOrder takes 2 fresh batches")
def _():
    batch = {"inputs": floats(2, 4, 3), "targets": floats(2, 4), "curvature_inputs": X, "curvature_targets": Y}
    step(gauss_newton(solver=first_order(fresh_batches=True)), **batch)


@case("with_batch/batch given twice", "inputs, targets", "already bound")
def _():
    step(gnl.wrappers.with_batch(gauss_newton(), inputs=X, targets=Y))


# --- a step: leaves that are no float arrays --------------------------------------------------------------------------

INTEGER_LEAF = {"w": integers(3), "b": floats()}
COMPLEX_LEAF = {"w": jnp.ones(3, jnp.complex64), "b": floats()}
OTHER_LEAF = {**params(), "layer": {"activation": relu}}

call("params/integer leaf", "['w']", "int32", of=lambda: gauss_newton().init(INTEGER_LEAF))
call("params/complex leaf", "['w']", "complex64", of=lambda: iterative().init(COMPLEX_LEAF))
call(
    "params/function leaf",
    "['layer']['activation']",
    "the function relu",
    of=lambda: gauss_newton().init(OTHER_LEAF),
)
call("params/string leaf", "['kind']", "'linear'", of=lambda: iterative().init({**params(), "kind": "linear"}))
call("params/integer array", "params", "int32", of=lambda: gnl.linearise(linear, integers(3), X))
call("params/string", "params", "'weights'", of=lambda: gnl.linearise(linear, "weights", X))
call("anchor/integer leaf", "anchor", "['w']", "int32", of=lambda: gnl.linearised(linear, INTEGER_LEAF)(params(), X))
call("updates/integer leaf", "updates", "['w']", "int32", of=lambda: step(updates=INTEGER_LEAF))
call("updates/string leaf", "updates", "['w']", "'zero'", of=lambda: step(updates={**params(), "w": "zero"}))
call("outputs/integer", "the outputs of predict", "int32", of=lambda: gnl.linearise(labels, params(), X))
call("outputs/complex", "the outputs of predict", "complex64", of=lambda: gnl.linearise(waves, params(), X))


call("outputs/scalar", "the outputs of predict", "()", of=lambda: gnl.linearise(sum_of_outputs, params(), X))
call("outputs/scalar leaf", "['scale']", "()", of=lambda: gnl.linearise(heads_with_a_scalar, params(), X))

# --- a step: trees and shapes that do not fit -------------------------------------------------------------------------

call("updates/shape", "updates", "['w']", "(2,)", "(3,)", of=lambda: step(updates={**params(), "w": floats(2)}))
call("updates/array of another shape", "updates", "(2,)", "(3,)", of=lambda: step(p=floats(3), updates=floats(2)))
call("updates/key missing", "updates", "['b']", "missing", of=lambda: step(updates={"w": floats(3)}))
call("updates/key unknown", "updates", "['c']", "missing", of=lambda: step(updates={**params(), "c": floats()}))
call("updates/array for a dictionary", "updates", "float32", "'w', 'b'", of=lambda: step(updates=floats(3)))
call("updates/none for a leaf", "updates", "['b']", "None", of=lambda: step(updates={**params(), "b": None}))
call("updates/pair of value and gradient", "updates", "a tuple of 2", of=lambda: step(updates=(floats(), params())))


@case("updates/deep difference", "['layers'][1]['w']", "a tuple of 2", "a list of 2")
def _():
    layers = [{"w": [floats(3), floats(3)]}, {"w": [floats(3), floats(3)]}]
    other = [layers[0], {"w": (floats(3), floats(3))}]
    step(p={"layers": layers}, updates={"layers": other})


@case("updates/list too short", "['layers'][1]", "missing")
def _():
    step(p={"layers": [floats(3), floats(3)]}, updates={"layers": [floats(3)]})


@case("updates/other static fields", "['layer']", "Dense")
def _():
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["name"])
    @dataclasses.dataclass(frozen=True)
    class Dense:
        w: Any
        name: str

    step(p={"layer": Dense(floats(3), "first")}, updates={"layer": Dense(floats(3), "second")})


call(
    "linearised/shape",
    "params",
    "['w']",
    "(2,)",
    of=lambda: gnl.linearised(linear, params())({"w": floats(2), "b": 0.0}, X),
)
call("linearised/key missing", "params", "['b']", of=lambda: gnl.linearised(linear, params())({"w": floats(3)}, X))

# --- targets ----------------------------------------------------------------------------------------------------------

call("targets/none", "targets", "None", of=lambda: gnl.losses.poisson(Y))
call("targets/column for a vector", "targets", "(4, 1)", "(4,)", of=lambda: step(targets=COLUMN))
call("targets/other length", "targets", "(5,)", "(4,)", of=lambda: step(targets=floats(5)))
call("targets/scalar", "targets", "()", "(4,)", of=lambda: step(targets=0.0))
call(
    "inputs/one batch for fresh batches",
    "inputs",
    "(4, 3)",
    "length 2",
    of=lambda: step(gauss_newton(solver=first_order(fresh_batches=True))),
)
call(
    "targets/leaf of fresh batches",
    "targets",
    "['scale']",
    "(3, 4)",
    "length 2",
    of=lambda: step(
        gnl.gauss_newton(two_heads, SQUARED, solver=first_order(fresh_batches=True)),
        inputs=floats(2, 4, 3),
        targets={"mean": floats(2, 4), "scale": floats(3, 4)},
    ),
)
call("targets/list of numbers", "targets", "a list of 4", "(4,)", of=lambda: step(targets=[0.0, 1.0, 0.0, 1.0]))
call("targets/pair for a plain loss", "targets", "a tuple of 2", of=lambda: step(targets=(Y, Y)))
call(
    "targets/array for two heads",
    "targets",
    "float32",
    "'mean', 'scale'",
    of=lambda: step(gnl.gauss_newton(two_heads, SQUARED)),
)
call(
    "targets/head missing",
    "targets",
    "['scale']",
    "missing",
    of=lambda: step(gnl.gauss_newton(two_heads, SQUARED), targets={"mean": Y}),
)
call(
    "targets/leaf",
    "targets",
    "['scale']",
    "(4, 1)",
    of=lambda: step(gnl.gauss_newton(two_heads, SQUARED), targets={"mean": Y, "scale": COLUMN}),
)
call("softmax/one column", "the outputs of predict", "(4, 1)", of=lambda: CROSS_ENTROPY(COLUMN, integers(4)))
call("softmax/vector", "the outputs of predict", "(4,)", of=lambda: CROSS_ENTROPY(Y, integers(4)))
call("softmax/column of labels", "targets", "(4, 1)", "int32", of=lambda: CROSS_ENTROPY(X, integers(4, 1)))
call("softmax/float labels", "targets", "(4,)", "float32", of=lambda: CROSS_ENTROPY(X, Y))
call("softmax/leaf", "['a']", "(4,)", "float32", of=lambda: CROSS_ENTROPY({"a": X}, {"a": Y}))
WEIGHTED = gnl.losses.weighted(SQUARED)

call("weighted/no pair", "targets", "float32", "(4,)", of=lambda: WEIGHTED(Y, Y))
call("weighted/three", "targets", "a tuple of 3", of=lambda: WEIGHTED(Y, (Y, Y, Y)))
call("weighted/none", "targets", "None", of=lambda: WEIGHTED(Y))
call("weighted/weights of another shape", "weights", "(4, 1)", of=lambda: WEIGHTED(Y, (Y, COLUMN)))
call("weighted/scalar weight", "weights", "()", of=lambda: WEIGHTED(Y, (Y, 1.0)))
call("weighted/list of weights", "weights", "a list of 4", of=lambda: WEIGHTED(Y, (Y, [1.0, 1.0, 1.0, 0.0])))
call("weighted/leaf", "['a']", "(4, 3)", of=lambda: WEIGHTED({"a": X}, ({"a": X}, {"a": X})))
call(
    "weighted/weights of a missing leaf",
    "weights",
    "['b']",
    of=lambda: WEIGHTED({"a": Y, "b": Y}, ({"a": Y, "b": Y}, {"a": Y})),
)
call(
    "from_convex/broadcast",
    "pairwise_loss",
    "(4, 4)",
    "(4,)",
    of=lambda: step(gnl.gauss_newton(linear, pairwise_loss)),
)
call("from_convex/integer", "count_of_errors", "int32", of=lambda: gnl.losses.from_convex(count_of_errors)(Y, Y))


@case("from_convex/root of two heads", "loss", "'mean', 'scale'")
def _():
    heads = {"mean": Y, "scale": Y}
    gnl.losses.from_convex(sum_of_heads).hessian(heads, None).root(heads)


# --- states -----------------------------------------------------------------------------------------------------------

WARM = {"solver": gnl.solvers.CG(warm_start=0.9)}
LARGER = {"w": floats(4), "b": floats()}

call("state/of another optimiser", "state", "a tuple of 2", of=lambda: step(state=optax.adam(0.1).init(params())))
call("state/empty dictionary", "state", "a dict", of=lambda: step(iterative(), state={}))
call(
    "state/of another model",
    "state.anchor['w']",
    "(4,)",
    "(3,)",
    of=lambda: step(iterative(), state=iterative().init(LARGER)),
)
call(
    "state/of other settings",
    "state.solver.previous['b']",
    "nothing",
    of=lambda: step(gauss_newton(**WARM), state=gauss_newton().init(params())),
)
call(
    "state/of more settings",
    "state.solver.previous['b']",
    "float32",
    "nothing",
    of=lambda: step(state=gauss_newton(**WARM).init(params())),
)
call(
    "state/of another model without a leaf like the parameters",
    "state.model",
    "['b']",
    "(3,)",
    of=lambda: step(state=gauss_newton().init(LARGER)),
)


@case("state/of another large model", "state.model", "and 4 more")
def _():
    many = {"w": floats(3), **{f"b{i}": floats() for i in range(8)}}
    step(p=many, state=gauss_newton().init(params()))


call("info/none", "state", "a tuple of 2", of=lambda: gnl.info(optax.adam(0.1).init(params())))
call("info/parameters", "state", "'w', 'b'", of=lambda: gnl.info(params()))
call("info/two", "state[0]", "state[1]", of=lambda: gnl.info(optax.chain(gauss_newton(), iterative()).init(params())))
call("anchor/none", "state", "a GaussNewtonState", of=lambda: gnl.anchor(gauss_newton().init(params())))
call("anchor/two", "state[0]", "state[1]", of=lambda: gnl.anchor(optax.chain(iterative(), iterative()).init(params())))


# --- where errors are raised ------------------------------------------------------------------------------------------


def is_place(node: ast.AST) -> bool:
    """Whether a statement makes a message: a raise, but for those of interfaces, or a try that adds a note."""
    if isinstance(node, ast.Try):
        return any("add_note" in ast.unparse(handler) for handler in node.handlers)
    bare = isinstance(node, ast.Raise) and (node.exc is None or ast.unparse(node.exc) == "NotImplementedError")
    return isinstance(node, ast.Raise) and not bare


@functools.cache
def places() -> dict[str, tuple[str, int, int]]:
    """Every statement of the package that makes a message: what it is called, and its file and lines."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT.parent).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if is_place(node):
                last = node.body[-1].end_lineno if isinstance(node, ast.Try) else node.end_lineno
                found[f"{file}:{node.lineno}"] = (file, node.lineno, last)
    return found


def place_of(error: BaseException) -> str:
    """The innermost place of the package on an error's way."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT)]
    assert own, f"raised outside of the package: {error!r}"
    file, line = Path(own[-1].filename).relative_to(ROOT.parent).as_posix(), own[-1].lineno
    return next((name for name, (f, first, last) in places().items() if f == file and first <= line <= last), "nowhere")


# --- the neural tangent kernel ----------------------------------------------------------------------------------------


def ntk(predict=linear, p=None, x=X, **options):
    return gnl.diagnostics.empirical_ntk(predict, params() if p is None else p, x, **options)


def centred(p, x):
    return linear(p, x - jnp.mean(x, 0))


for name, diagnose in (
    ("empirical_ntk", gnl.diagnostics.empirical_ntk),
    ("structure_report", gnl.diagnostics.structure_report),
    ("ntk_by_leaf", gnl.diagnostics.ntk_by_leaf),
    ("ntk_diagonal", gnl.diagnostics.ntk_diagonal),
    ("ntk_vector_product", functools.partial(gnl.diagnostics.ntk_vector_product, vector=Y)),
):
    call(f"{name}/predict", "predict", "3", of=functools.partial(diagnose, 3, params(), X))
call("empirical_ntk/output too large", "output", "4", "0", of=lambda: ntk(output=4))
call("empirical_ntk/mask of another structure", "mask", "['b']", "missing", of=lambda: ntk(mask={"w": True}))
call("empirical_ntk/mask of nothing", "mask", "no parameter", of=lambda: ntk(mask=False))
call("empirical_ntk/block of nothing", "block_size", "0", of=lambda: ntk(block_size=0))
call("empirical_ntk/no parameters", "params", "a dict without keys", of=lambda: ntk(lambda p, x: x[:, 0], {}))
call("empirical_ntk/mixed examples", "predict", "its output", of=lambda: ntk(centred, x=X * jnp.arange(4.0)[:, None]))
call("empirical_ntk/inputs of two lengths", "inputs", "4", "3", of=lambda: ntk(lambda p, x: x[0], x=(X, floats(3))))
SQUARE, FULL = jnp.eye(4), jnp.ones((4, 4, 2, 2))
call("kernel/list", "kernel", "[[1.0]] (a list)", of=lambda: gnl.diagnostics.effective_rank([[1.0]]))
call("kernel/integers", "kernel", "int32", "(3, 3)", of=lambda: gnl.diagnostics.effective_rank(integers(3, 3)))
call("kernel/not square", "other", "(4, 3)", of=lambda: gnl.diagnostics.cka(SQUARE, X))
call("kernel/two shapes", "other", "(4, 4)", "(4, 4, 2, 2)", of=lambda: gnl.diagnostics.kernel_distance(SQUARE, FULL))
call("kernel_velocity/no time", "time", "0.0", of=lambda: gnl.diagnostics.kernel_velocity(SQUARE, SQUARE, 0.0))
call("effective_dimension/ridge", "ridge", "-1.0", of=lambda: gnl.diagnostics.effective_dimension(SQUARE, -1.0))
call("spectrum_decay/one rank", "last", "4", "2", of=lambda: gnl.diagnostics.spectrum_decay(SQUARE, first=4, last=2))
call("spectrum_decay/no int", "first", "1.5", of=lambda: gnl.diagnostics.spectrum_decay(SQUARE, first=1.5))
for name, given, classes, *came in (
    ("too few", floats(3), None, "targets", "(3,)", "(4,) or (4, c)"),
    ("of three outputs", X, None, "targets", "(4, 3)", "(4, 2)"),
    ("strings", np.array(["a"]), None, "targets", "array of shape (1,)"),
    ("labels out of range", np.arange(4), 3, "targets", "0 to 3", "3 classes"),
    ("classes of a kernel", integers(4), 3, "classes", "3", "(4, 4, 2, 2)"),
    ("classes without labels", Y, 3, "classes", "float32", "(4,)"),
):
    kernel = FULL if name in ("of three outputs", "classes of a kernel") else SQUARE
    align = functools.partial(gnl.diagnostics.target_alignment, kernel, given, classes=classes)
    call(f"target_alignment/{name}", *came, of=align)
call(
    "target_alignment/traced labels",
    "classes",
    "int32 array of shape (4,)",
    of=traced(functools.partial(gnl.diagnostics.target_alignment, SQUARE), integers(4)),
)
for name, new, residuals, *came in (
    ("kernel_new", X, Y, "kernel_new", "(m, 4)", "(4, 3)"),
    ("residuals", SQUARE, floats(3), "residuals", "(4,) or (4, c)", "(3,)"),
    ("integers", SQUARE, integers(4), "residuals", "int32"),
):
    regress = functools.partial(gnl.diagnostics.kernel_regression, SQUARE, new, residuals)
    call(f"kernel_regression/{name}", *came, of=regress)
call(
    "empirical_ntk/a scalar input",
    "inputs",
    "leaf [1]",
    "scalar",
    of=lambda: _capture.capture(linear, params(), (X, 1.0)),
)
call(
    "capture/output without examples",
    "the outputs of predict",
    "shape ()",
    of=lambda: _capture.capture(sum_of_outputs, params(), X),
)
call(
    "gram/of two structures",
    "factors and other",
    "['w']",
    "['v']",
    of=lambda: _capture.gram(*(_capture.capture(lambda p, x: x @ sum(p.values()), {k: floats(3)}, X) for k in "wv")),
)


# --- other diagnostics ------------------------------------------------------------------------------------------------


def spectrum(predict=linear, p=None, **options):
    p = params() if p is None else p
    return gnl.diagnostics.spectrum(predict, p, X, **{"rank": 2, "key": jax.random.key(0), **options})


call("spectrum/predict", "predict", "3", of=lambda: spectrum(3))
call("spectrum/no parameters", "params", "a dict without keys", of=lambda: spectrum(lambda p, x: x[:, 0], {}))
call(
    "largest_stable_learning_rate/no spectrum",
    "spectrum",
    "float32 array of shape (4,)",
    of=lambda: gnl.diagnostics.largest_stable_learning_rate(Y),
)
call(
    "largest_stable_learning_rate/certain failure",
    "failure",
    "1.5",
    of=lambda: gnl.diagnostics.largest_stable_learning_rate(spectrum(), failure=1.5),
)
call(
    "linearisation_error/predict",
    "predict",
    "3",
    of=lambda: gnl.diagnostics.linearisation_error(3, params(), params(), X),
)


# --- figures ----------------------------------------------------------------------------------------------------------

RUN = {"method": "gauss-newton", "steps": 10, "period": None, "feature_updates": 10, "test_accuracy_f": 90.0}
MEASUREMENT = {"rule": "never", "step": 0, "cka": 1.0}


def without_matplotlib():
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        gnl.plotting.training({"Adam": [1.0]})


def figure_of_runs(*runs, **options):
    return gnl.plotting.feature_updates(list(runs), **options)


def figure_of_spectrum(**fields):
    """Of one probe, unless the fields say otherwise."""
    found = gnl.diagnostics.Spectrum(Y, Y, *(floats(1, 4) for _ in range(3)), jnp.asarray(4))
    return gnl.plotting.spectrum(found._replace(**fields))


for name, given, *came in (
    ("records", {"runs": [RUN]}, "runs", "dict"),
    ("list of names", ["runs"], "runs[0]", "'runs'", "records.runs"),
    ("empty", [], "runs", "[]"),
    ("column missing", [{"method": "adam"}], "runs[0]", "'steps'", "has method"),
    ("text for a number", [RUN, {**RUN, "steps": "10"}], "runs[1]['steps']", "'10'"),
    ("no period but text", [{**RUN, "period": "never"}], "runs[0]['period']", "'never'", "or None"),
):
    call(f"plotting/{name}", *came, of=functools.partial(gnl.plotting.feature_updates, given))
call("plotting/metric", "metric", "'accuracy'", "test_accuracy", of=lambda: figure_of_runs(RUN, metric="accuracy"))
call(
    "plotting/nothing measured",
    "metric",
    "nothing that was measured",
    of=lambda: figure_of_runs({**RUN, "test_accuracy_f": None}),
)
call(
    "plotting/measure",
    "measures",
    "'drift'",
    "cka",
    of=lambda: gnl.plotting.kernel_measures([MEASUREMENT], measures=["cka", "drift"]),
)
call("plotting/no measures", "measures", "[]", of=lambda: gnl.plotting.kernel_measures([MEASUREMENT], measures=[]))
call("plotting/axes", "axes", "'left'", of=lambda: figure_of_runs(RUN, axes="left"))
call(
    "plotting/too few axes",
    "axes",
    "None",
    of=lambda: gnl.plotting.kernel_measures([MEASUREMENT], measures=["cka", "cka"], axes=[None]),
)
call(
    "plotting/two methods",
    "runs",
    "gauss-newton; adam",
    of=lambda: gnl.plotting.phase_diagram([RUN, {**RUN, "method": "adam"}]),
)
case("plotting/without matplotlib", "matplotlib", "pip install 'gn_linear[plot]'")(without_matplotlib)
call("plotting/no spectrum", "spectrum", "float32", "(4,)", of=lambda: gnl.plotting.spectrum(Y))
call(
    "plotting/broken spectrum",
    "spectrum",
    "4 are not finite",
    of=lambda: figure_of_spectrum(nodes=jnp.nan * floats(1, 4)),
)
call("plotting/two spectra", "spectrum", "(2, 1, 4)", of=lambda: figure_of_spectrum(nodes=floats(2, 1, 4)))
call("plotting/no filter", "filters", "{}", of=lambda: gnl.plotting.filters({}, Y))
call("plotting/filter", "filters", "0.5", of=lambda: gnl.plotting.filters(0.5, Y))
call("plotting/named filter", "filters['flow']", "2.0", of=lambda: gnl.plotting.filters({"flow": 2.0}, Y))
call(
    "plotting/eigenvalues",
    "eigenvalues",
    "(4, 3)",
    of=lambda: gnl.plotting.filters(gnl.filters.Tikhonov(1.0), X),
)
call("plotting/histories", "histories", "[1.0, 0.5]", of=lambda: gnl.plotting.training([1.0, 0.5]))
call("plotting/no history", "histories", "{}", of=lambda: gnl.plotting.training({}))
call("plotting/history", "histories['Adam']", "0.5", of=lambda: gnl.plotting.training({"Adam": 0.5}))
call("plotting/quantity", "quantity", "'accuracy'", of=lambda: gnl.plotting.training({"Adam": Y}, "accuracy"))


# --- experiments ------------------------------------------------------------------------------------------------------

SGD = optax.sgd(0.1)


def experiment(**options):
    fields = {"predict": linear, "init": lambda key: params(), "loss": SQUARED, "inputs": X, "targets": Y, **options}
    return gnl.experiments.Problem(**fields)


def sweep(problem=None, optimiser=SGD, periods=(1,), **options):
    problem = experiment() if problem is None else problem
    return gnl.experiments.period_sweep(
        problem, optimiser, periods, **{"steps": 2, "seeds": 1, "progress": False, **options}
    )


def fewest(metric, problem=None):
    problem = experiment() if problem is None else problem
    return gnl.experiments.fewest_updates(problem, SGD, steps=2, seeds=1, tolerance=0.0, metric=metric, progress=False)


def in_folder(files, **options):
    """A sweep in a folder that holds these files and no others, called ``records``."""
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        Path("records").mkdir()
        for name, text in files.items():
            (Path("records") / name).write_text(text)
        sweep(folder="records", **options)


def in_the_folder_of_another(**options):
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        sweep(folder="records")
        sweep(folder="records", **options)


call("Problem/predict", "predict", "3", of=lambda: experiment(predict=3))
call("Problem/accuracy", "accuracy", "'top 1'", of=lambda: experiment(accuracy="top 1"))
call("Problem/inputs of nothing", "inputs", "{} (a dict)", of=lambda: experiment(inputs={}))
call("Problem/scalar leaf", "inputs", "leaf ['t']", "0.5", of=lambda: experiment(inputs={"x": X, "t": 0.5}))
call("Problem/list of targets", "targets", "leaf [0]", "1.0", of=lambda: experiment(targets=[1.0, 2.0]))
call("Problem/targets of other length", "targets", "(3,)", "4", of=lambda: experiment(targets=floats(3)))
call("Problem/test targets missing", "test_targets", "None", of=lambda: experiment(test_inputs=X))
call("Problem/probe inputs missing", "probe_inputs", "None", of=lambda: experiment(probe_targets=Y))
call("Problem/batch too large", "batch_size", "5", "4", of=lambda: experiment(batch_size=5))
call("experiments/problem", "problem", "the function linear", of=lambda: sweep(linear))
call("experiments/optimiser", "optimiser", "the function sgd", of=lambda: sweep(optimiser=optax.sgd))
call("experiments/seeds twice", "seeds", "[1, 1]", of=lambda: sweep(seeds=[1, 1]))
call("experiments/seeds of a float", "seeds", "2.5", of=lambda: sweep(seeds=2.5))
call("experiments/measurements", "measurements", "1", of=lambda: sweep(measurements=1))
call("experiments/steps", "steps", "2.5", of=lambda: sweep(steps=2.5))
call("experiments/one period", "periods", "10", of=lambda: sweep(periods=10))
call("experiments/period of zero", "periods[1]", "0", of=lambda: sweep(periods=[1, 0]))
call("experiments/periods twice", "periods", "[1, 5, 1]", of=lambda: sweep(periods=[1, 5, 1]))
call("experiments/folder of another", "folder", "steps is [2]", "[3]", of=lambda: in_the_folder_of_another(steps=3))
call("experiments/folder without settings", "folder", "runs.jsonl", of=lambda: in_folder({"runs.jsonl": ""}))
call(
    "phase_diagram/one length",
    "steps",
    "10",
    of=lambda: gnl.experiments.phase_diagram(experiment(), SGD, steps=10, periods=[1], seeds=1),
)
call(
    "schedules/one rule",
    "rules",
    "every(k=2)",
    of=lambda: gnl.experiments.schedules(experiment(), SGD, gnl.periods.every(2), steps=2, seeds=1),
)
call("fewest_updates/metric", "metric", "'accuracy'", of=lambda: fewest("accuracy"))
call("fewest_updates/metric without values", "metric", "test_loss_f", of=lambda: fewest("test_loss_f"))
call(
    "side_by_side/no divisor",
    "periods",
    "3",
    "10",
    of=lambda: gnl.experiments.side_by_side(experiment(), learning_rate=0.1, periods=[3], steps=10, seeds=1),
)


@case("experiments/broken line", "folder", "line 1", "runs.jsonl")
def _():
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        sweep(folder="records")
        (Path("records") / "runs.jsonl").write_text("{\n{}\n")
        sweep(folder="records")


# --- least squares ----------------------------------------------------------------------------------------------------


def line_residuals(p, *args):
    return linear(p, X) - Y


def fit(residuals=line_residuals, **settings):
    return gnl.least_squares(residuals, params(), **settings)


def options(**fields):
    return fit(options=gnl.Options(**fields))


def two_parameters_in_conjugate_gradients():
    return fit(solver=gnl.solvers.CG(), max_steps=1)


call("QR/corrections", "corrections", "-1", of=lambda: gnl.solvers.QR(corrections=-1))
call("least_squares/residuals", "residuals", "4", of=lambda: fit(Y))
call("least_squares/args", "args", "float32 array", of=lambda: fit(args=X))
call("least_squares/solver", "solver", "'qr'", of=lambda: fit(solver="qr"))
call("least_squares/solver of networks", "solver", "Lanczos", of=lambda: fit(solver=gnl.solvers.Lanczos()))
call("least_squares/options", "options", "{'loss': 1}", of=lambda: fit(options={"loss": 1}))
call("least_squares/rtol", "rtol", "-1.0", of=lambda: fit(rtol=-1.0))
call("least_squares/labels", "the residuals", "int32", of=lambda: fit(lambda p: labels(p, X)))
call("Options/loss", "loss", "'huber'", of=lambda: gnl.Options(loss="huber"))
call("Options/scaling", "scaling", "'jac'", of=lambda: gnl.Options(scaling="jac"))
call("Options/acceleration", "acceleration", "1", of=lambda: gnl.Options(acceleration=1))
call("Options/bounds of another tree", "lower", "['b'] is missing", of=lambda: options(lower={"w": 0.0, "bias": 0.0}))
call(
    "Options/bounds of another shape", "lower: leaf ['w']", "(2,)", of=lambda: options(lower={"w": floats(2), "b": 0.0})
)
call("Options/frozen numbers", "frozen", "leaf ['w']", "1", of=lambda: options(frozen={"w": 1, "b": False}))
call("Options/traced frozen", "frozen", "bool", of=lambda: jax.jit(lambda f: options(frozen=f))(jnp.ones([], bool)))
call("Options/frozen of another tree", "frozen", "['b']", of=lambda: options(frozen={"w": True}))
call(
    "curve_fit/sigma and weights",
    "sigma",
    "weights",
    of=lambda: gnl.curve_fit(lambda x, p: linear(p, x), X, Y, params(), sigma=1.0, options=gnl.Options(weights=1.0)),
)
call("Solution/level", "level", "1.5", of=lambda: fit().confidence_intervals(1.5))
call("Solution/no Jacobian", "jacobian", "CG", of=lambda: two_parameters_in_conjugate_gradients().covariance())
call(
    "Solution/report of many",
    "status",
    "(2,)",
    of=lambda: jax.vmap(lambda y: gnl.least_squares(lambda p: linear(p, X) - y, params()))(floats(2, 4)).report(),
)


# --- the file ---------------------------------------------------------------------------------------------------------


def message_of(error: BaseException) -> str:
    """The message with its notes, one a line; addresses are left out."""
    return re.sub(r"0x[0-9a-fA-F]+", "0x...", "\n".join([str(error), *getattr(error, "__notes__", [])]))


def run_cases() -> dict[str, dict[str, str]]:
    """The type, the message and the place of the error of each case."""
    jax.config.update("jax_traceback_filtering", "off")
    results = {}
    for name, entry in CASES.items():
        try:
            entry.trigger()
        except Exception as error:
            results[name] = {"type": type(error).__name__, "message": message_of(error), "place": place_of(error)}
        else:
            raise AssertionError(f"{name}: nothing was raised")
    return results


def as_text(results: dict[str, dict[str, str]]) -> str:
    """The golden file of these results."""
    entries = (f"{RULE}\n{name}\n{results[name]['type']}: {results[name]['message']}\n" for name in sorted(results))
    return "".join(entries)


def golden() -> dict[str, str]:
    """The entries of the golden file."""
    entries = GOLDEN.read_text().split(f"{RULE}\n")[1:] if GOLDEN.exists() else []
    return dict(entry.rstrip("\n").split("\n", 1) for entry in entries)


@functools.cache
def as_users_see(x64: bool) -> dict[str, dict[str, str]]:
    """The results of a process of its own, without type checks."""
    environment = {**os.environ, "JAX_ENABLE_X64": str(x64), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.test_error_messages", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("x64", [False, True])
def test_messages_are_those_of_the_golden_file(x64):
    kept, made = GOLDEN.read_text() if GOLDEN.exists() else "", as_text(as_users_see(x64))
    if kept != made:
        diff = difflib.unified_diff(kept.splitlines(), made.splitlines(), GOLDEN.name, "made now", lineterm="")
        pytest.fail("\n".join(["the messages differ from the golden file", *diff, REWRITE]), pytrace=False)


def test_every_raise_has_a_case():
    known = places()
    hit = {name: result["place"] for name, result in as_users_see(False).items()}
    astray = sorted(name for name, place in hit.items() if place not in known)
    assert not astray, f"cases that end at no raise statement of the package: {astray}"
    without = sorted(known.keys() - set(hit.values()))
    assert not without, f"raise statements without a case in CASES: {without}"


TELLS = re.compile(
    r"\b(must|needs?|pass|call|use|start|keep|put|reshape|make|split|wrap|did you mean|check|bind|let)\b", re.IGNORECASE
)


@pytest.mark.parametrize("name", sorted(CASES))
def test_message_obeys_the_law(name):
    """It names the argument or the leaf, shows what came and says what to do, without the inside of JAX."""
    kept = golden()
    assert name in kept, f"{name} is not in the golden file. {REWRITE}"
    kind, _, message = kept[name].partition(": ")
    entry = CASES[name]
    assert kind in {"TypeError", "ValueError", "NotImplementedError", "ImportError"}
    missing = [text for text in (entry.names, *entry.came) if text not in message]
    assert not missing, f"{missing} not in: {message}"
    assert TELLS.search(message), f"does not say what to do: {message}"
    internal = re.search(r"PyTreeDef|ArrayImpl|Tracer|<lambda>|<function|<class|0x|[^.?]$", message)
    assert not internal, f"{internal.group()!r} in: {message}"


if __name__ == "__main__":
    if "--json" in sys.argv:
        json.dump(run_cases(), sys.stdout)
    else:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(as_text(run_cases()))
        print(f"{len(CASES)} messages in {GOLDEN}")
