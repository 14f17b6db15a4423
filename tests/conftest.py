"""Double precision everywhere, fast compilation, and the annotations of the package checked at run time."""

import os

import jax
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook looks it up as an attribute of the package tests)

# Compiling takes most of the time, so XLA optimises less than it does for users. `XLA_FLAGS= make test` tests what they
# get; so do the documentation and the tests that start processes of their own.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

jax.config.update("jax_enable_x64", True)

with install_import_hook("gn_linear", "tests.typechecker.checked"):
    import gn_linear  # noqa: F401  (whatever imports it later gets the checked modules)
