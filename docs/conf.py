"""Builds the documentation: sphinx-build -W -c docs . build/site

The source folder is the repository, so links between Markdown files are the same on GitHub and on the site, and the
README of each folder is a page.
"""

import dataclasses
import re
import sys
from pathlib import Path

from sphinx.errors import ExtensionError

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

project = "Meshwork"
author = copyright = "the Meshwork authors"
root_doc = "docs/index"
include_patterns = ["*.md", "*/README.md", "tests/faults/README.md", "docs/**.md", "docs/notebooks/*.ipynb"]
exclude_patterns = [".*", "build", "runs", "**/__pycache__"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "config_pages"]

myst_heading_anchors = 4
nb_execution_mode = "off"  # the slow tests execute the notebooks

# Docstrings quote names with single backticks: a link if the reference has the name, else only code.
default_role = "py:obj"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
smartquotes = False  # "--config" is not a dash
highlight_language = "text"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "Meshwork"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["index.html"]
html_copy_source = False


def _to_rst(app, what, name, obj, options, lines):
    """Translates what is Markdown in the docstrings to reStructuredText, before napoleon reads their sections."""
    # Commands and formulas, indented after a colon and a blank line, are a literal block.
    text = re.sub(r":\n\n(?=    )", "::\n\n", "\n".join(lines))
    # What is quoted and not a name is code: `runs/<name>` would be a link with a title.
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda m: m[0] if re.fullmatch(r"[\w.]+", m[1]) else f"`{m[0]}`", text)
    # Napoleon would take what is before a colon in the first line of a property for its type.
    lines[:] = [""] * (what == "property") + text.split("\n")


def _without_fields(app, what, name, obj, options, signature, returns):
    """Leaves out the signature of a dataclass, which repeats its attributes."""
    return ("", None) if dataclasses.is_dataclass(obj) else None


def _check_offline(app, exception):
    """Raises an error if a page needs the network: scripts, styles, fonts or images of other hosts."""
    for page in Path(app.outdir).rglob("*.html"):
        if found := re.search(r'<(?:script|img|iframe|link)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*', page.read_text()):
            raise ExtensionError(f"{page} cannot be read offline: {found[0]}")


def setup(app):
    """Connects these to Sphinx; docstrings are translated before napoleon, of priority 500, reads them."""
    app.connect("autodoc-process-docstring", _to_rst, priority=400)
    app.connect("autodoc-process-signature", _without_fields)
    app.connect("build-finished", _check_offline)
