"""Renders markdown, which a model or a user wrote, to HTML that is safe to show: for the web page.

markdown-it-py reads CommonMark with tables and strikethrough, and no raw HTML; Pygments marks up code; nh3,
an allow-list of tags and attributes, has the last word. Nothing in the result loads anything: images become
links. ``render`` runs in a worker process with limits (``worker_pools.py``): the text is anybody's.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

from tpjax.server.json_types import JsonObject

_CLASSES = set(STANDARD_TYPES.values()) - {""}  # of tokens, such as "kd"
_INLINE = {"a", "br", "code", "em", "s", "span", "strong"}
_BLOCKS = {"blockquote", "hr", "li", "ol", "p", "pre", "ul"} | {f"h{level}" for level in range(1, 7)}
_TABLES = {"table", "tbody", "td", "th", "thead", "tr"}


def render(text: str) -> list[JsonObject]:
    """Renders the blocks of a text.

    Args:
        text: markdown.

    Returns:
        For each block, its ``html`` and ``line``, the number of the line at which it begins. While more text
        comes only the last block can change, but for link definitions, which hold for the text of one call.
    """
    parser = _parser()
    environment: dict[str, object] = {}
    tokens = parser.parse(text, environment)
    blocks: list[JsonObject] = []
    begin = 0
    for index, token in enumerate(tokens):
        if token.level == 0 and token.nesting <= 0:  # the end of a block, or all of it
            block = tokens[begin : index + 1]
            html = parser.renderer.render(block, parser.options, environment)
            blocks.append({"line": _first_line(block), "html": _sanitised(html)})
            begin = index + 1
    return blocks


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "highlight": _highlighted})
    return parser.enable(["table", "strikethrough"]).disable("image")


def _first_line(block: list[Token]) -> int:
    return (block[0].map or [0])[0]


def _highlighted(code: str, language: str, _: str) -> str:
    """Marks up code in a language that Pygments knows; else returns "", and the code is only escaped."""
    lexer = _lexer(language)
    return "" if lexer is None else str(highlight(code, lexer, _formatter()))


@lru_cache(64)
def _lexer(language: str) -> Any:
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


@cache
def _formatter() -> Any:
    return HtmlFormatter(nowrap=True)


def _sanitised(html: str) -> str:
    return nh3.clean(
        html,
        tags=_INLINE | _BLOCKS | _TABLES,
        attributes={"a": {"href", "title"}, "ol": {"start"}},
        allowed_classes={"span": _CLASSES},
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
