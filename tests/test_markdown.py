"""Markdown of the web page: what is rendered, and what hostile text may not do."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest

from tpjax.sandbox import Worker
from tpjax.server.markdown import render
from tpjax.server.protocol import MAX_MARKDOWN_CHARS

NO_ATTRIBUTES = "blockquote br code em hr li p pre s strong ul table tbody td th thead tr h1 h2 h3 h4 h5 h6"
ALLOWED: dict[str, set[str]] = {
    "a": {"href", "title", "target", "rel"},
    "ol": {"start"},
    "span": {"class"},
    **{tag: set() for tag in NO_ATTRIBUTES.split()},
}
HOSTILE = [
    "<script>hacked()</script>",
    "<img src=x onerror=hacked()>",
    "<svg/onload=hacked()>",
    "a <b onmouseover=hacked()>b</b> c",
    "[a](javascript:hacked())",
    "[a](JaVaScRiPt:hacked())",
    "[a](&#106;avascript:hacked())",
    "[a](java\tscript:hacked())",
    "[a](\x01javascript:hacked())",
    "[a](vbscript:hacked())",
    "[a](data:text/html;base64,PHNjcmlwdD5oYWNrZWQoKTwvc2NyaXB0Pg==)",
    "![a](data:image/svg+xml,<svg onload=hacked()>)",
    "![a](https://elsewhere.example/pixel.png)",
    "<javascript:hacked()>",
    '[a](https://a.example "\\" onclick=hacked() x=\\"")',
    "[a](https://a.example/\"onclick='hacked()')",
    "[a]: javascript:hacked()\n\n[a]",
    '```"><script>hacked()</script>\ncode\n```',
    "```html\n<script>hacked()</script>\n<img src=x onerror=hacked()>\n```",
    "`<script>hacked()</script>`",
    "<style>body{display:none}</style>",
    "<iframe src=https://elsewhere.example></iframe>",
    "<form action=https://elsewhere.example><input></form>",
    "<!--><script>hacked()</script>-->",
    "<math><mtext><table><mglyph><style><img src=x onerror=hacked()>",
    "| a |\n|---|\n| <img src=x onerror=hacked()> |",
    "\0<script>hacked()</script>",
]


class Found(HTMLParser):
    """Tags and attributes of a text as a browser reads them, entities resolved."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def html(text: str) -> str:
    return "".join(str(block["html"]) for block in render(text))


def test_what_is_rendered() -> None:
    text = "# Title\n\nSome *text*, **bold**, ~~gone~~ and `x < y`.\n\n- a\n- b\n  1. c\n\n> said\n\n---\n"
    assert html(text) == (
        "<h1>Title</h1>\n"
        "<p>Some <em>text</em>, <strong>bold</strong>, <s>gone</s> and <code>x &lt; y</code>.</p>\n"
        "<ul>\n<li>a</li>\n<li>b\n<ol>\n<li>c</li>\n</ol>\n</li>\n</ul>\n"
        "<blockquote>\n<p>said</p>\n</blockquote>\n<hr>\n"
    )
    table = Found(html("| a | b |\n|---|--:|\n| 1 | 2 |\n"))
    assert [tag for tag, _ in table.tags] == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    (link,) = (given for tag, given in Found(html("[a](https://a.example/?b=1&c=2)")).tags if tag == "a")
    assert link == {
        "href": "https://a.example/?b=1&c=2",
        "target": "_blank",
        "rel": "noopener noreferrer nofollow",
    }


def test_code_is_marked_up_and_its_text_is_kept() -> None:
    code = 'def f(x):\n    return x < 1 and "a & b"  # why\n'
    found = Found(html(f"```python\n{code}```"))
    assert found.words == f"{code}\n"  # one after the block
    kinds = {given["class"] for tag, given in found.tags if tag == "span"}
    assert {"k", "nf", "c1"} <= kinds
    for language in ("", "no-such-language", "python title=x"):
        assert Found(html(f"```{language}\n{code}```")).words == f"{code}\n"


def test_blocks_begin_where_the_next_call_can_go_on() -> None:
    """What the page does while text comes: all but the last block are kept, the rest comes again."""
    text = "# A\n\nb\nb\n\n```\nc\n\nc\n```\n- d\n\n  d\n- e\n\n| f |\n|---|\n| g |\n\nh\n"
    blocks = render(text)
    assert [block["line"] for block in blocks] == [0, 2, 5, 10, 15, 19]
    lines = text.splitlines(keepends=True)
    for number, block in enumerate(blocks):
        assert isinstance(block["line"], int)
        rest = render("".join(lines[block["line"] :]))
        assert [one["html"] for one in rest] == [one["html"] for one in blocks[number:]]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("around", ("{}", "- {}\n", "> {}\n\n**{}**", "# {}"))
def test_hostile_text_is_text(text: str, around: str) -> None:
    for tag, given in Found(html(around.replace("{}", text))).tags:
        assert tag in ALLOWED and set(given) <= ALLOWED[tag], (tag, given)
        if tag == "a" and "href" in given:
            assert re.match(r"(https?|mailto):", given["href"] or "")


@pytest.mark.parametrize(
    "piece",
    ("[", "a*", "> ", "- ", "![[]()", "[a](b", "<", "`", "_a ", "|a|b|\n|-|-|\n", "&", "  - a\n", "(("),
    ids=repr,
)
@pytest.mark.parametrize("before", ("", "```html\n", "```c++\n"), ids=("text", "html", "c++"))
def test_nesting_and_repetition_end_in_time(piece: str, before: str) -> None:
    """As much as one request may bring, in the worker that the server uses, within its limits."""
    text = (before + piece * MAX_MARKDOWN_CHARS)[:MAX_MARKDOWN_CHARS]
    begun = time.process_time()
    blocks = WORKER.ask("tpjax.server.markdown:render", {"text": text}, "rendering", 2.0)
    assert blocks is not None and time.process_time() - begun < 2


WORKER = Worker()


@pytest.fixture(autouse=True, scope="module")
def _ends_the_worker() -> object:
    yield
    WORKER.kill()
