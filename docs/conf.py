"""Sphinx configuration; ``scripts/docs`` builds the site into ``docs/_build``."""

from __future__ import annotations

from less_export import __version__

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
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Types of other libraries: their documentation is not fetched, so that the site builds without a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(?:np|npt|numpy|torch|tokenizers|pathlib|collections|typing|abc|enum|onnx_ir)\..*"),
    (r"py:.*", r"(?:Path|Any|Sequence|Mapping|Iterator|Iterable|Callable|Tensor|Module|ABC|IntEnum|Exception|Array)"),
]
