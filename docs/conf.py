"""Builds the documentation: sphinx-build -W -c docs . build/site

The source folder is the repository, so links between Markdown files are the same on GitHub and on the site, and the
README of each folder is a page.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import config_pages

project = "Meshwork"
author = copyright = "the Meshwork authors"
root_doc = "docs/index"
include_patterns = ["*.md", "*/README.md", "tests/faults/README.md", "docs/**.md", "docs/notebooks/*.ipynb"]
exclude_patterns = [".*", "build", "runs", "**/__pycache__"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

myst_heading_anchors = 4
nb_execution_mode = "off"  # the slow tests execute the notebooks

# Docstrings quote names with single backticks: a link if the reference has the name, else only code.
default_role = "py:obj"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "Meshwork"
html_extra_path = ["index.html"]
html_copy_source = False


def _mark_literal_blocks(app, what, name, obj, options, lines):
    """Makes what is indented after a colon and a blank line, such as commands and formulas, a literal block."""
    for i in range(len(lines) - 2):
        if lines[i].endswith(":") and not lines[i + 1] and lines[i + 2].startswith("    "):
            lines[i] += ":"


def setup(app):
    """Connects the generated pages, and the docstrings as they are before napoleon reads them."""
    app.connect("source-read", config_pages.insert)
    app.connect("autodoc-process-docstring", _mark_literal_blocks, priority=400)
