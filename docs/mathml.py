"""Formulas as MathML, which browsers draw without a script and without the network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

_LOGGER = logging.getLogger(__name__)


def _to_mathml(node: nodes.Element, display: str) -> str:
    tex = node.astext()
    try:
        markup = convert(tex, display=display)
    except Exception as error:  # the library has an error for each slip of TeX
        _LOGGER.warning("formula %r: %s", tex, error, location=node)
        return ""
    if unknown := re.findall(r"\\\S+", markup):
        _LOGGER.warning("formula %r: %s is not known", tex, unknown[0], location=node)
    return str(markup)


def _visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_to_mathml(node, "inline"))
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{_to_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Announce the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
