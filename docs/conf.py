"""How Sphinx builds the site: ``python -m sphinx -W -b html docs docs/_build``."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

import invact

project = "invact"
author = "The invact authors"
release = invact.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "accuracy_table.md"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # single backticks in docstrings: a link where the name is known, else code
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "invact"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"


def setup(app: Any) -> None:
    """Mathematics as MathML, which browsers draw themselves: the site runs no script for it and needs no network."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda writer, node: _write(writer, node, "inline"), None),
        block_renderers=(lambda writer, node: _write(writer, node, "block"), None),
    )


def _write(writer: Any, node: nodes.math | nodes.math_block, display: str) -> None:
    formula = convert(node.astext(), display=display)
    # Without a font for mathematics, browsers set a raised prime far off and tiny; an apostrophe is well everywhere.
    formula = re.sub(
        r"<msup><mi>(\w)</mi><mi>&#x0203([23]);</mi></msup>",
        lambda found: f'<mrow><mi>{found[1]}</mi><mo lspace="0" rspace="0">{chr(39) * (int(found[2]) - 1)}</mo></mrow>',
        formula,
    )
    writer.body.append(formula if display == "inline" else f'<div class="math-block">{formula}</div>')
    raise nodes.SkipNode
