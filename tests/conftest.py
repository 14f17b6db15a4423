"""Double precision everywhere, and the annotations of the package checked at run time."""

import jax
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook looks it up as an attribute of the package tests)

jax.config.update("jax_enable_x64", True)

with install_import_hook("gn_linear", "tests.typechecker.checked"):
    import gn_linear  # noqa: F401  (whatever imports it later gets the checked modules)
