"""What hostile clients can do to `tpjax serve`: long prompts whose senders hang up, chats, slow templates.

    python scripts/attack_server.py                  # SmolLM2-135M, ten rounds
    python scripts/attack_server.py --rounds 2 --context 2048

Each round sends eight completions of four million characters over sockets that close after 0.1 s. Then come
forty chats as long that stay, bodies of four million bytes that are costly to parse, and three templates that
never end with thirty more behind them. Beside each, another client asks for one token, and another for a
chat. Prints how long those waited, what was refused, and the memory of the server and its workers; exits
with 1 if one waited over a second, failed, or the memory grew by over 200 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from contenders import served

from tpjax.checkpoints.gguf import GGUFFile
from tpjax.checkpoints.hub import resolve

CHARS = 4_000_000
POOLED_CHARS = 200_000  # long enough for the tokenizer's process, short enough to be admitted
LATENCY_S, GROWTH_MB = 1.0, 200.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEXTS = {
    "a": "a",
    "words": "hello, world ",
    "spaces": " ",
    "accents": "é",
    "digits": "0123456789 ",
    "controls": "\x04",
}


@dataclass
class Seen:
    """What other clients saw: seconds each request took, and statuses that were not 200."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    failed: collections.Counter[str] = field(default_factory=collections.Counter)


class Target:
    """A server under attack.

    Args:
        url: of it.
        pid: of its process.
    """

    def __init__(self, url: str, pid: int) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._pid = parts.hostname or "", parts.port or 80, pid

    @contextlib.asynccontextmanager
    async def _sent(self, path: str, body: bytes) -> AsyncIterator[asyncio.StreamReader]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        try:
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            yield reader
        finally:
            writer.transport.abort()

    async def status(self, path: str, body: bytes) -> int:
        """Sends a body and waits for the answer's status; 0 if the connection was closed."""
        try:
            async with self._sent(path, body) as reader:
                line = await reader.readline()
                await reader.read()
                return int(line.split()[1])
        except (OSError, IndexError):
            return 0

    async def hang_up(self, path: str, body: bytes, after_s: float = 0.1) -> None:
        """Sends a body and closes the connection, answered or not."""
        async with self._sent(path, body):
            await asyncio.sleep(after_s)

    def memory_mb(self) -> float:
        """Memory of the server's process and all below it, MB; a page that several share counts once."""
        return sum(map(_proportional, _tree(self._pid))) / 1e6


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for tasks in Path(f"/proc/{pid}/task").iterdir():
            for child in (tasks / "children").read_text().split():
                yield from _tree(int(child))


def _proportional(pid: int) -> int:
    """Resident bytes of a process; a shared page is divided among those that share it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def completion(text: str) -> bytes:
    return json.dumps({"prompt": text, "max_tokens": 1}, ensure_ascii=False).encode()


def chat(text: str, **options: Any) -> bytes:
    messages = [{"role": "user", "content": text}]
    return json.dumps({"messages": messages, "max_tokens": 1, **options}, ensure_ascii=False).encode()


def with_slow_template(model: str, directory: str) -> str:
    """A copy of a GGUF model whose chat template does not end where it is told not to."""
    own, path = resolve(model), Path(directory) / "slow.gguf"
    template = GGUFFile(own).metadata["tokenizer.chat_template"]
    slow = f"{{% if messages[0]['content'] == 'slow' %}}{SLOW}{{% endif %}}"
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", slow + template]
    subprocess.run([*command, str(own), str(path)], check=True, capture_output=True)
    return str(path)


def costly_bodies() -> dict[str, tuple[str, bytes]]:
    """Bodies of four million bytes that are small print for a parser: name -> (path, body)."""

    def filled(start: str, part: str, end: str) -> bytes:
        return (start + part * ((CHARS - len(start) - len(end)) // len(part)) + end).encode()

    keys = "".join(f',"{i:x}":1' for i in range(CHARS // 10))
    message = '{"messages":[{"role":"user","content":"a",'
    return {
        "ids": (COMPLETIONS, filled('{"prompt":[', "1,", "1]}")),
        "ids and texts": (COMPLETIONS, filled('{"prompt":[', '"a",1,', "1]}")),
        "lists": (COMPLETIONS, filled('{"prompt":[', "[],", "[1]]}")),
        "keys": (COMPLETIONS, f'{{"prompt":"a"{keys}}}'.encode()),
        "calls": (CHAT, filled(message + '"tool_calls":[', "{},", "1]}]}")),
        "stops": (COMPLETIONS, filled('{"prompt":"a","stop":[', "1,", "1]}")),
        "tokens": ("/detokenize", filled('{"tokens":[', "1,", '"a"]}')),
        "strings": ("/tokenize", filled('{"prompt":"', " b", '","return_token_strs":true}')),
    }


async def watched(target: Target, seen: Seen, work: Sequence[Any]) -> collections.Counter[int]:
    """Runs what attacks while others ask; the statuses the attackers got."""
    attack = asyncio.gather(*work)

    async def asks(name: str, path: str, body: bytes) -> None:
        while True:
            start = time.perf_counter()
            status = await target.status(path, body)
            seen.seconds[name].append(time.perf_counter() - start)
            if status != 200:
                seen.failed[f"{name}: {status}"] += 1
            if attack.done():
                return
            await asyncio.sleep(0.05)

    await asyncio.gather(asks("token", COMPLETIONS, completion("hi")), asks("chat", CHAT, chat("hi")))
    return collections.Counter(status for status in await attack if status is not None)


async def attack(target: Target, rounds: int, latency_s: float) -> bool:
    """All attacks one after the other; says whether the server held."""
    for body, path in ((completion("hi"), COMPLETIONS), (chat("hi"), CHAT)) * 4:
        await target.status(path, body)
    # A pool starts its processes with its first jobs, and keeps them: they are no growth.
    await asyncio.gather(*[target.status(CHAT, chat("\x04" * POOLED_CHARS)) for _ in range(8)])
    before = target.memory_mb()
    worst: dict[str, float] = {}
    failures: collections.Counter[str] = collections.Counter()

    async def run(name: str, work: Sequence[Any], chats: bool = True) -> None:
        seen, start = Seen(), time.perf_counter()
        statuses = await watched(target, seen, work)
        for who, seconds in seen.seconds.items():
            if (
                chats or who != "chat"
            ):  # a chat behind more slow templates than there are places waits its turn
                worst[who] = max(worst.get(who, 0), *seconds)
        failures.update(seen.failed)
        waited = ", ".join(f"{who} {max(s):.2f} s (of {len(s)})" for who, s in sorted(seen.seconds.items()))
        print(
            f"{name}: {waited} at most; attackers' statuses {dict(statuses)}; "
            f"{time.perf_counter() - start:.1f} s, {target.memory_mb():.0f} MB",
            flush=True,
        )

    texts = [text * (CHARS // max(len(text.encode()), len(json.dumps(text)) - 2)) for text in TEXTS.values()]
    for number in range(rounds):
        body = completion(texts[number % len(texts)])
        await run(f"round {number + 1}", [target.hang_up(COMPLETIONS, body) for _ in range(8)])
    await asyncio.sleep(2)
    after = target.memory_mb()
    for name, text in zip(TEXTS, texts, strict=True):
        await run(f"40 chats, {name}", [target.status(CHAT, chat(text)) for _ in range(40)])
    for name, (path, body) in costly_bodies().items():
        await run(f"8 bodies, {name}", [target.status(path, body) for _ in range(8)])
    slow = chat("slow")
    await run("3 slow templates", [target.status(CHAT, slow) for _ in range(3)])
    await run("8 slow templates, hung up", [target.hang_up(CHAT, slow) for _ in range(8)])
    await run(
        "3 slow templates and 30 behind", [target.hang_up(CHAT, slow, 8) for _ in range(33)], chats=False
    )
    await asyncio.sleep(2)
    last = target.memory_mb()
    checks = {
        f"memory after {rounds} rounds, MB: {before:.0f} to {after:.0f}": after - before <= GROWTH_MB,
        f"memory at the end, MB: {before:.0f} to {last:.0f}": last - before <= GROWTH_MB,
        f"nobody else was turned away: {dict(failures)}": not failures,
        f"the longest wait, s: {worst}": max(worst.values()) <= latency_s,
    }
    for what, held in checks.items():
        print(f"{'held  ' if held else 'BROKEN'}  {what}")
    return all(checks.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--latency-s", type=float, default=LATENCY_S, help="that others may wait at most")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = with_slow_template(args.model, directory)
        with served(model, args.tp, "--max-model-len", str(args.context)) as server:
            held = asyncio.run(attack(Target(server.url, server.pid), args.rounds, args.latency_s))
    return 0 if held and server.status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
