"""How vocabularies spell bytes: GPT-2's byte-level alphabet, and byte-fallback tokens such as ``<0x0A>``."""

from __future__ import annotations

import re

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_fallback(token: str) -> bytes | None:
    """Returns the byte that a token such as ``<0x0A>`` stands for; ``None`` for any other token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else None


def byte_level_alphabet() -> dict[str, int]:
    """Returns GPT-2's printable character of each byte: printable Latin-1 as itself, the rest from U+0100."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
