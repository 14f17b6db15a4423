"""The snippets of the README run as they are printed, in order, in one namespace."""

from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

README = Path(__file__).parents[1] / "README.md"


def test_readme_snippets_run():
    snippets = list(Sybil([PythonCodeBlockParser()]).parse(README))
    assert snippets
    for snippet in snippets:
        snippet.evaluate()  # an error's traceback names the line of the README
