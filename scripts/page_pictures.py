#!/usr/bin/env python
"""Takes the README's pictures of the web page, from a server that is at work.

    python scripts/page_pictures.py             # writes docs/page.png and docs/page-dark.png

Needs the `browser` extra and a Chromium, and fetches `smollm2-135m`.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
from PIL import Image
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent.parent / "docs"
QUESTION = "Write a Python function that adds the numbers of a list, and explain it in two sentences."
PROMPTS = ("The history of bread begins", "Rivers shape the land because", "A good letter starts with")
START_S = 600


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "tpjax", "serve", "smollm2-135m", "--tp", "4", "--max-slots", "4"]
    server = subprocess.Popen([*serve, "--port", str(port)])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S) as http:
            wait_until_ready(http)
            DOCS.mkdir(exist_ok=True)
            with ThreadPoolExecutor() as pool:
                for prompt in PROMPTS:  # what else the server does meanwhile
                    body = {"prompt": prompt * 20, "max_tokens": 1200, "ignore_eos": True}
                    pool.submit(http.post, "/v1/completions", json=body)
                take_pictures(str(http.base_url))
                server.terminate()
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(http: Any) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if http.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"the server was not ready after {START_S} s")
        time.sleep(0.5)


def take_pictures(url: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(1000 * START_S)
        page.goto(url)
        page.wait_for_selector("#shards tbody tr")
        page.click("#sampling summary")
        page.fill("#temperature", "0")
        page.click("#sampling summary")
        page.fill("#text", QUESTION)
        page.press("#text", "Enter")
        page.wait_for_selector(".turn.assistant small:not(:empty)")
        page.wait_for_timeout(2000)
        save(page, DOCS / "page.png")
        page.emulate_media(color_scheme="dark")
        save(page, DOCS / "page-dark.png")
        browser.close()


def save(page: Page, path: Path) -> None:
    """Saves a picture of few colours: it has few, and is a fifth of the size."""
    page.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
