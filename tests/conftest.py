"""Double precision everywhere, fast compilation, and the annotations of the package checked at run time."""

import os

import jax
import jaxtyping

from tests.typechecker import checked

# Compiling takes most of the time, so XLA optimises less than it does for users. `XLA_FLAGS= make test` tests what they
# get; so do the documentation and the tests that start processes of their own.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

jax.config.update("jax_enable_x64", True)

jaxtyping.jaxtyped = checked  # what the hook writes in front of every function
with jaxtyping.install_import_hook("gn_linear", "tests.typechecker.checked"):
    import gn_linear  # noqa: F401  (whatever imports it later gets the checked modules)
