"""Sphinx settings."""

from sphinx.util import logging

import gn_linear

logger = logging.getLogger(__name__)

project = "gn_linear"
author = "the gn_linear authors"
version = release = gn_linear.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.bibtex"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_show_copyright = False
html_title = f"gn_linear {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Pages run anew at every build, and an error in one fails the build: a cache would not see a change of the package.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

bibtex_bibfiles = ["references.bib"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the Args sections say it in words
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False


def check_reference(app, env):
    """Warn, and so fail the build, where a public name is missing from the reference."""
    described = env.domains.python_domain.objects
    for name in gn_linear.__all__:
        value = getattr(gn_linear, name)
        inner = getattr(value, "__all__", ())
        for path in (f"gn_linear.{name}", *(f"gn_linear.{name}.{part}" for part in inner)):
            if name != "__version__" and path not in described:
                logger.warning("%s is public but not in the reference", path)


def skip_tuple_fields(app, what, name, obj, skip, options):
    """Leave out what Python says of a NamedTuple's fields: the class describes them better."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """Connect the functions above to the build."""
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("env-check-consistency", check_reference)
