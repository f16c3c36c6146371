"""Sphinx configuration; ``scripts/docs`` builds the site into ``docs/_build``."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

from less_export import __version__
from less_export.cli.commands import COMMANDS

project = "less-export"
author = copyright = "the less-export authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"less-export {__version__}"
# Headings are link targets, as on the pages of a code host.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"npt.ArrayLike": "numpy.typing.ArrayLike"}
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_default_options = {"members": True}
maximum_signature_line_length = 100
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Types of other libraries: their documentation is not fetched, so that the site builds without a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(?:np|npt|numpy|torch|tokenizers|pathlib|collections|contextlib|typing|abc|enum|onnx_ir)\..*"),
    (r"py:.*", r"(?:Path|Any|Sequence|Mapping|Iterator|Iterable|Callable|Tensor|Module|ABC|IntEnum|Exception|Array)"),
]


def resolve_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> Any:
    """A link from a name without its module, as docstrings write it, to the one object of that name."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    last = node["reftarget"].rsplit(".", 1)[-1]
    names = [name for name in domain.objects if name.rsplit(".", 1)[-1] == last]
    if len(names) != 1:
        return None
    entry = domain.objects[names[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, names[0])


_COMMAND = """
```{{sphinx_argparse_cli}}
:module: {module}
:func: parser
:title: less-export {name}
```
"""


def add_commands(app: Sphinx, document: str, source: list[str]) -> None:
    """Below the text of the page about the command line, every command as its parser describes it."""
    if document == "command-line":
        source[0] += "".join(_COMMAND.format(module=c.parser.__module__, name=c.name) for c in COMMANDS.values())


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_commands)
    app.connect("missing-reference", resolve_short_name)
