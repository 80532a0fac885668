"""The web page in a browser: what is seen, what survives, and what hostile text may not do."""

from __future__ import annotations

import importlib.util
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import SLOTS, WAIT_S, Running, load_tiny, running, tiny_checkpoint
from test_markdown import HOSTILE

from tpjax.server.shards import cut

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TP = 4  # 6 query and 2 KV heads: padding and copies; 90 features, too
RENDERED = ".turn.assistant:last-child small:not(:empty)"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="pip install -e '.[browser]', and a Chromium",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Running]:
    with running(lambda: load_tiny(directory, tp=TP)) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


class Page:
    """A page, what its console said and what it asked for."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * WAIT_S)
        self.troubles: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.sent: list[int] = []  # bytes of each text to be rendered
        self.page.on("request", self._request)

    def _request(self, request: Any) -> None:
        self.asked.append(request.url)
        if request.url.endswith("/render"):
            self.sent.append(len(request.post_data))


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []

    def opened(url: str, **options: Any) -> Page:
        one = Page(browser, **options)
        pages.append(one)
        one.page.goto(url)
        return one

    yield opened
    for one in pages:
        one.context.close()


def say(page: Any, text: str, **settings: str) -> None:
    page.evaluate("document.querySelector('#sampling').open = true")
    for name, value in ({"temperature": "0", "max_tokens": "24"} | settings).items():
        page.fill(f"#{name}", value)
    page.evaluate("document.querySelector('#sampling').open = false")
    page.fill("#text", text)
    page.press("#text", "Enter")


def until(page: Any, expression: str) -> None:
    """Waits; the page's own policy forbids Playwright's ``wait_for_function``, which evaluates strings."""
    deadline = time.monotonic() + WAIT_S
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def bottom(page: Any, selector: str) -> float:
    box = page.locator(selector).bounding_box()
    assert box and box["width"] > 0 and box["height"] > 0, selector
    return float(box["y"] + box["height"])


def test_the_shards_are_above_the_fold(server: Running, opened: Callable[..., Page], tmp_path: Path) -> None:
    one = opened(server.url)
    page = one.page
    page.wait_for_selector("#state.ready")
    page.wait_for_selector("#shards tbody tr")
    for seen in (
        "#figures",
        "#mesh",
        "#shards",
        "#legend",
        "#heads",
        "#pages",
        "#slots",
        "#collectives",
        "#budget",
    ):
        assert bottom(page, seen) <= 800, seen
    assert not page.locator("#temperature").is_visible()  # sampling folds
    page.click("#sampling summary")
    assert page.locator("#temperature").is_visible()
    page.click("#sampling summary")

    report = server.llm.explain()
    assert f'("tp",): {TP} × cpu' in page.inner_text("#mesh")
    sharded = [row for row in report.tensors if not row.replicated]
    rows = page.locator("#shards tbody tr")
    assert rows.count() == len(sharded) + 2  # what is replicated, and the cache
    widest = max(row.bytes_per_device for row in sharded)
    for number, row in enumerate(sharded):
        shown = rows.nth(number)
        text = shown.inner_text()
        assert row.title in text and "×".join(map(str, row.shard_shape)) in text
        assert shown.locator(".how").inner_text().strip() == cut(row)
        bars = shown.locator(".bar")
        assert bars.count() == TP
        for device, content in enumerate(row.devices):
            for kind in ("held", "copied", "zeros"):
                part, size = bars.nth(device).locator(f".{kind}"), getattr(content, kind)
                assert part.count() == bool(size)
                if size:
                    share = part.bounding_box()["width"] / bars.nth(device).bounding_box()["width"]
                    assert share == pytest.approx(size / widest, abs=0.06)
    cuts = {cut(row) for row in sharded}
    assert cuts == {"vocabulary", "column", "row"}
    colours = {
        page.locator(f".glyph.{one}").first.evaluate("e => getComputedStyle(e).borderColor")
        for one in (*cuts, "replicated")
    }
    assert len(colours) == 4  # told apart
    assert page.locator("#shards .zeros").count() > 0 and page.locator("#shards .copied").count() > 0
    assert "replicated" in rows.nth(len(sharded)).inner_text()
    cache = rows.nth(len(sharded) + 1)
    assert "KV cache" in cache.inner_text() and cache.locator(".copied").count() == sum(
        content.copied > 0 for content in report.cache["devices"]
    )

    step = report.steps[0]
    always = sorted(
        (one for one in step.collectives if not one.conditional), key=lambda one: -one.bytes * one.count
    )
    assert page.locator("#collectives tr").count() == min(len(always), 4)
    for number, collective in enumerate(always[:3]):  # the small ones share a row
        text = page.locator("#collectives tr").nth(number).inner_text()
        assert f"{collective.count} ×" in text and collective.kind in text and collective.source in text
    reduces = step.budget["all_reduces"]
    assert f"{reduces} all-reduces" in page.inner_text(
        "#moved"
    ) and f"{reduces} all-reduces" in page.inner_text("#budget")
    page.screenshot(path=tmp_path / "page.png")
    assert one.troubles == []
    assert all(url.startswith((server.url, "data:")) for url in one.asked)  # nothing from elsewhere


def test_pages_and_slots_by_request(server: Running, opened: Callable[..., Page]) -> None:
    page = opened(server.url).page
    page.wait_for_selector("#state.ready")
    capacity = server.llm.engine.scheduler.blocks.capacity
    page.wait_for_selector("#pages i")
    assert page.locator("#pages i").count() == capacity
    assert page.locator("#slots span").count() == SLOTS
    many = {"prompt": "go on", "max_tokens": 900, "n": 8, "ignore_eos": True}
    with server.client() as http, ThreadPoolExecutor(1) as pool:
        answering = pool.submit(http.post, "/v1/completions", json=many)
        page.wait_for_selector("#slots span.busy")
        until(page, "document.querySelectorAll('#pages i.used').length >= 4")
        until(page, "Number(document.querySelector('#rate').textContent) > 0")
        seen = page.evaluate(
            """() => ({
                slots: [...document.querySelectorAll('#slots span.busy')].map(one => one.textContent),
                used: document.querySelectorAll('#pages i.used').length,
                said: document.querySelector('#usage').textContent,
                running: document.querySelector('#running').textContent,
            })"""
        )
        assert answering.result().status_code == 200
    assert seen["said"] == f"{seen['used']} of {capacity}"
    assert seen["running"] == f"{len(seen['slots'])} of {SLOTS}"
    assert all(
        re.fullmatch(r"slot \d: (\d+ tokens|prefill \d+ of \d+), \d+ pages", one) for one in seen["slots"]
    )
    until(page, "document.querySelectorAll('#pages i.used').length == 0")


def test_a_conversation(server: Running, opened: Callable[..., Page]) -> None:
    one = opened(server.url)
    page = one.page
    page.wait_for_selector("#state.ready")
    say(page, "<b>the fox</b>")
    page.wait_for_selector(RENDERED)
    with server.client() as http:
        body = {
            "messages": [{"role": "user", "content": "<b>the fox</b>"}],
            "temperature": 0,
            "max_tokens": 24,
        }
        answer = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        blocks = http.post("/render", json={"text": answer}).json()["blocks"]
    assert page.text_content(".turn.user .text") == "<b>the fox</b>"  # text, and not markup

    def words(html: str) -> str:
        page.evaluate("html => { window.box = document.createElement('div'); box.innerHTML = html; }", html)
        return "".join(str(page.evaluate("box.textContent")).split())

    rendered = words("".join(block["html"] for block in blocks))
    assert "".join(str(page.text_content(".turn.assistant .text")).split()) == rendered
    assert " tokens/s" in page.text_content(RENDERED)

    page.click(".turn.assistant >> text=regenerate")  # temperature 0: the same answer
    page.wait_for_selector(RENDERED)
    page.wait_for_selector("body:not(.busy)")
    assert page.locator(".turn").count() == 2
    assert "".join(str(page.text_content(".turn.assistant .text")).split()) == rendered

    say(page, "and then")
    page.wait_for_selector(".turn:nth-child(4) small:not(:empty)")
    page.click(".turn:first-child >> text=edit")
    page.fill(".turn:first-child textarea", "the dog")
    page.click(".turn:first-child >> text=send again")
    page.wait_for_selector(".turn:nth-child(2) small:not(:empty)")
    assert page.locator(".turn").count() == 2 and page.text_content(".turn.user .text") == "the dog"

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".turn.user >> text=copy")
    assert page.evaluate("navigator.clipboard.readText()") == "the dog"

    page.fill("#text", "half a thou")
    page.reload()
    page.wait_for_selector("#state.ready")
    assert page.text_content(".turn.user .text") == "the dog" and page.locator(".turn").count() == 2
    assert page.input_value("#temperature") == "0" and page.input_value("#max_tokens") == "24"
    assert page.input_value("#text") == "half a thou"
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.locator("#chats option").count() == 2
    page.select_option("#chats", "1")
    assert page.text_content(".turn.user .text") == "the dog"
    page.click("#delete")
    assert page.locator(".turn").count() == 0 and page.locator("#chats option").count() == 1
    assert one.troubles == []


def test_stop_and_errors_leave_the_last_line_visible(server: Running, opened: Callable[..., Page]) -> None:
    page = opened(server.url, viewport={"width": 1280, "height": 420}).page
    page.wait_for_selector("#state.ready")
    say(page, "go on\n" * 20, max_tokens="700")  # more lines than there is room for
    # as soon as it is possible: the answer of a tiny model takes about a second
    deadline = time.monotonic() + WAIT_S
    while page.evaluate("document.querySelector('#stop').disabled"):
        assert time.monotonic() < deadline
    page.evaluate("document.querySelector('#stop').click()")
    page.wait_for_selector(RENDERED)
    assert page.text_content(RENDERED) == "stopped"
    assert page.evaluate("document.querySelector('#log').scrollTop") > 0
    server.until(lambda: server.service.pending == 0)
    until(
        page,
        """() => {
            const note = document.querySelector('.turn:last-child small').getBoundingClientRect();
            return note.bottom <= document.querySelector('#log').getBoundingClientRect().bottom;
        }""",
    )
    say(page, "more", max_tokens="5000")
    page.wait_for_selector(".turn.error")
    assert "context length is 1024 tokens" in page.text_content(".turn.error small")


def test_a_message_waits_for_the_model(directory: Path, opened: Callable[..., Page]) -> None:
    go = threading.Event()

    def load() -> Any:
        go.wait(WAIT_S)
        return load_tiny(directory, tp=1)

    with running(load, wait=False) as one:
        page = opened(one.url).page
        page.wait_for_selector("#state.loading")
        say(page, "the fox", max_tokens="8")
        page.wait_for_selector(".turn.user small:not(:empty)")
        assert page.text_content(".turn.user small") == "waits to be sent: the model loads"
        page.reload()  # it waits still
        page.wait_for_selector(".turn.user small:not(:empty)")
        go.set()
        page.wait_for_selector(".turn.assistant small:not(:empty)")
        assert page.text_content(".turn.user small") == "" and "tokens" in page.text_content(RENDERED)
    page.wait_for_selector("#state.gone")  # and now there is no server any more
    assert "gone" in page.inner_text("#state")
    assert page.evaluate("getComputedStyle(document.querySelector('aside')).opacity") != "1"
    page.fill("#text", "anybody there?")
    page.press("#text", "Enter")
    page.wait_for_selector(".turn.user:last-child small:not(:empty)")
    assert "the server does not answer" in page.text_content(".turn.user:last-child small")


def test_the_page_asks_for_the_key(directory: Path, opened: Callable[..., Page]) -> None:
    with running(lambda: load_tiny(directory, tp=1), api_keys=("open sesame",)) as one:
        page = opened(one.url).page
        page.wait_for_selector("#key:not([hidden])")
        assert "needs an API key" in page.inner_text("#key") and page.text_content("#model") == ""
        page.fill("#secret", "sesame")
        page.press("#secret", "Enter")
        page.wait_for_selector("#key >> text=This API key is wrong")
        page.fill("#secret", "open sesame")
        page.press("#secret", "Enter")
        page.wait_for_selector("#state.ready")
        assert not page.locator("#key").is_visible()
        say(page, "the fox", max_tokens="4")
        page.wait_for_selector(RENDERED)
        page.reload()
        page.wait_for_selector("#state.ready")  # the tab keeps it
        assert page.evaluate("JSON.stringify(localStorage)").find("sesame") < 0


# as the page shows an answer, piece by piece
STREAM = """async ([text, size, pause]) => {
    const { Markdown } = await import('/page/markdown.js');
    const box = document.createElement('div');
    box.className = 'text';
    document.querySelector('#log').append(box);
    const shown = new Markdown(box);
    let longest = 0;
    for (let at = 0; at < text.length; at += size) {
        const begun = performance.now();
        shown.add(text.slice(at, at + size));
        longest = Math.max(longest, performance.now() - begun);
        if (pause && at % (size * 250) === 0) await new Promise(resolve => setTimeout(resolve, pause));
    }
    await shown.finish();
    window.box = box;
    return longest;
}"""


@pytest.mark.slow
def test_a_long_answer_is_rendered_in_parts(server: Running, opened: Callable[..., Page]) -> None:
    """100,000 tokens: every part is rendered a few times at most, and the end is as if rendered at once."""
    one = opened(server.url)
    page = one.page
    page.wait_for_selector("#state.ready")
    piece = "## Part {}\n\nSome **text** with `code`.\n\n```python\nx = {}\n```\n\n- a\n- b\n\n"
    text = "".join(piece.replace("{}", str(number)) for number in range(6000))
    assert len(text) > 400_000
    longest = page.evaluate(STREAM, [text, 4, 20])
    assert longest < 200  # ms of the page's thread for a token
    assert page.evaluate("box.querySelectorAll('h2').length") == 6000
    assert page.evaluate("box.querySelectorAll('pre').length") == 6000
    assert page.evaluate("box.querySelectorAll('ul li').length") == 12000
    assert page.evaluate("box.querySelector('.plain-text').textContent") == ""
    assert sum(one.sent) < 1.5 * len(text)  # hardly anything is rendered twice
    assert max(one.sent) < 20_000
    fence = "```python\n" + "y = 1\n" * 20_000 + "```\n\nafter *it*\n"  # one block, longer than a part
    page.evaluate(STREAM, [fence, 4000, 0])
    assert (
        page.evaluate("[...box.querySelectorAll('pre')].map(pre => pre.textContent).join('').length")
        == 6 * 20_000
    )
    assert page.evaluate("box.querySelector('em').textContent") == "it"


def test_hostile_markdown_does_nothing(server: Running, opened: Callable[..., Page]) -> None:
    one = opened(server.url)
    page = one.page
    page.wait_for_selector("#state.ready")
    page.evaluate("void (window.hacked = () => { window.wasHacked = true; })")
    for size in (1, 10_000):
        for text in ("\n\n".join(HOSTILE), *(HOSTILE if size > 1 else ())):
            page.evaluate(STREAM, [text, size, 0])
            found = page.evaluate(
                """() => ({
                    tags: box.querySelectorAll('script, style, img, svg, iframe, form, input, math').length,
                    handlers: [...box.querySelectorAll('*')].flatMap(e => [...e.attributes])
                        .filter(a => a.name.startsWith('on') || a.name === 'style').length,
                    links: [...box.querySelectorAll('a[href]')].map(a => a.protocol),
                })"""
            )
            assert (found["tags"], found["handlers"]) == (0, 0)
            assert set(found["links"]) <= {"https:", "http:", "mailto:"}
    page.wait_for_timeout(200)
    assert page.evaluate("window.wasHacked") is None
    assert one.troubles == [] and all(url.startswith((server.url, "data:")) for url in one.asked)


@pytest.mark.parametrize(
    "options", ({"color_scheme": "dark"}, {"viewport": {"width": 400, "height": 800}}), ids=("dark", "phone")
)
def test_other_screens(
    server: Running, opened: Callable[..., Page], options: dict[str, Any], tmp_path: Path
) -> None:
    page = opened(server.url, **options).page
    page.wait_for_selector("#shards tbody tr")
    say(page, "the fox " * 20, max_tokens="8")  # the chat's name is as long as one may be
    page.wait_for_selector(RENDERED)
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width  # it scrolls down, not sideways
    assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('main'))") == 0
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.querySelector('aside')).{name}")
        for name in ("color", "backgroundColor")
    )
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ink, paper)]
    assert (
        bright[0] > 0.7 > 0.3 > bright[1] if "color_scheme" in options else bright[0] < 0.3 < 0.7 < bright[1]
    )
    page.screenshot(path=tmp_path / "page.png", full_page=True)
