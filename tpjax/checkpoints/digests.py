"""SHA-256 of files: a directory's manifest, and a record of files that were checked and have not changed.

A manifest has the format of ``sha256sum``, so that ``sha256sum -c`` checks it too. A file whose digest was
right is recorded in the cache folder by its size, times and inode: it is read again only after one has
changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from tpjax.checkpoints import gguf_parts
from tpjax.errors import CheckpointError

MANIFEST = "MANIFEST.sha256"
_LAST_LINE = "# SHA-256 of the lines above: "
_THREADS = 16
_EDGE_BYTES = 1 << 20
# A file that changes twice within the clock's grain has the same times before and after: one so young is not
# remembered. Network file systems count in seconds.
_GRAIN_NS = 2 * 10**9

_Identity: TypeAlias = list[int]


def sha256(path: Path) -> str:
    """Returns the digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_edges(path: Path) -> str:
    """Returns a digest of names, sizes, and both ends of files: it tells checkpoints apart, quickly.

    Args:
        path: a file, with the other parts of a split model, or a directory with all that is in it but hidden
            files: where Hugging Face's client has downloaded, ``.cache`` says when.
    """
    if path.is_dir():
        folder, files = path, sorted(_shown_files(path))
    else:
        folder, parts = path.parent, (path.with_name(name) for name in gguf_parts.names_of(path.name))
        files = [part for part in parts if part == path or part.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        edges = list(pool.map(_edges, files))
    digest = hashlib.sha256()
    for file, edge in zip(files, edges, strict=True):
        name = file.relative_to(folder).as_posix() if file != path else ""
        digest.update(f"{name}\0{file.stat().st_size}\0{edge}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _shown_files(directory: Path) -> Iterator[Path]:
    for file in directory.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(directory).parts):
            yield file


def _edges(file: Path) -> str:
    """Returns the digest of the first and last ``_EDGE_BYTES`` of a file."""
    with open(file, "rb") as opened:
        digest = hashlib.sha256(opened.read(_EDGE_BYTES))
        opened.seek(max(_EDGE_BYTES, file.stat().st_size - _EDGE_BYTES))
        digest.update(opened.read())
    return digest.hexdigest()


def write_manifest(directory: Path) -> None:
    """Writes the digests of all files of a directory into it."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(sha256, (directory / name for name in names))
        listed = dict(zip(names, digests, strict=True))
    (directory / MANIFEST).write_bytes(_render(listed))


def has_manifest(directory: Path) -> bool:
    """Returns whether :func:`write_manifest` made the manifest of a directory; others have such files too."""
    try:
        return _LAST_LINE.encode() in (directory / MANIFEST).read_bytes()
    except OSError:
        return False


def read_manifest(directory: Path) -> dict[str, str] | None:
    """Returns the digest of each file that a directory was written with; ``None``: it has no manifest.

    Raises:
        CheckpointError: a byte of the manifest is not as it was written.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    lines = (
        re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in text.decode("utf-8", "replace").split("\n")
    )
    listed = {found[2]: found[1] for found in lines if found}
    if not listed or _render(listed) != text:
        raise CheckpointError(f"{path}: damaged: its last line is not the digest of those above it")
    return listed


def check(directory: Path, wanted: Mapping[str, str], memory: Path) -> None:
    """Compares files with their digests.

    Args:
        directory: directory of the files.
        wanted: the digest of each file.
        memory: a folder for the records; if it cannot be written, files are read each time.

    Raises:
        CheckpointError: files are missing or differ; the message names them.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = list(pool.map(lambda item: _problem(directory / item[0], item[1], memory), wanted.items()))
    if bad := [problem for problem in problems if problem is not None]:
        more = f" (and {len(bad) - 1} more files)" if len(bad) > 1 else ""
        raise CheckpointError(f"{bad[0]}{more}")


def matches(path: Path, digest: str, memory: Path) -> bool:
    """Returns whether a file has a digest. It is read only if it has changed since that was last recorded.

    Raises:
        OSError: it is missing or cannot be read.
    """
    note = memory / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}.json"
    before = _identity(path)
    if _remembered(note) == [digest, *before]:
        return True
    if sha256(path) != digest:
        return False
    if before == _identity(path) and time.time_ns() - max(before[1], before[2]) > _GRAIN_NS:
        _remember(note, [digest, *before])
    return True


def _problem(path: Path, digest: str, memory: Path) -> str | None:
    try:
        if matches(path, digest, memory):
            return None
    except FileNotFoundError:
        return f"{path}: missing, and {MANIFEST} lists it"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return f"{path}: damaged or edited: its SHA-256 is not the one in {MANIFEST}, {digest[:16]}…"


def _render(listed: Mapping[str, str]) -> bytes:
    lines = "".join(f"{digest}  {name}\n" for name, digest in listed.items()).encode()
    return lines + f"{_LAST_LINE}{hashlib.sha256(lines).hexdigest()}\n".encode()


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _remembered(note: Path) -> object:
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _remember(note: Path, value: list[str | int]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as file:
            json.dump(value, file)
        os.replace(file.name, note)
    except OSError:  # it only saves time
        return
