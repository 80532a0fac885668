"""The safetensors reader: values, what it reads and keeps in memory, and every kind of bad input."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tpjax.checkpoints import safetensors as reader
from tpjax.checkpoints import source
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
from tpjax.errors import CheckpointError

CODES = {np.dtype(kind): code for code, kind in reader._DTYPES.items()}
INDEX = "model.safetensors.index.json"


def entry(code: Any, shape: list[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": code, "shape": shape, "data_offsets": [first, last]}


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> None:
    """Writes a file with whatever header it is given, right or wrong."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = entry(CODES[array.dtype], list(array.shape), len(data), len(data) + len(raw))
        data += raw
    write_raw(path, header, data)


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def random_array(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, 100, shape).astype(np.uint8).astype(dtype)


@contextmanager
def rejects(where: Path, *words: str) -> Iterator[None]:
    """Expects a `CheckpointError` within a CPU second: one printable line with `where` and the words."""
    start = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        yield
    assert time.thread_time() - start < 1
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    for word in (str(where), *words):
        assert word in message


# Values


@pytest.mark.parametrize("dtype", list(CODES), ids=list(CODES.values()))
def test_every_dtype_reads_whole_and_in_slices(tmp_path: Path, dtype: np.dtype) -> None:
    arrays = {
        "other": random_array((3,), dtype),
        "matrix": random_array((6, 10), dtype, 1),
        "experts": random_array((2, 5, 4), dtype, 2),
        "scalar": random_array((), dtype, 3),
        "empty": random_array((0, 4), dtype, 4),
    }
    write(tmp_path / "model.safetensors", arrays)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.tensors) == set(arrays)
    for name, array in arrays.items():
        assert checkpoint.tensors[name] == source.TensorInfo(array.shape, array.dtype)
        got = checkpoint.read(name)
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes()
    for index in [
        (slice(2, 5),),
        (slice(None), slice(3, 7)),
        (slice(1, 3), slice(-2, None)),
        (slice(4, 1),),
        (slice(0, 99), slice(9, 10)),
    ]:
        got = checkpoint.read("matrix", index)
        assert got.tobytes() == np.ascontiguousarray(arrays["matrix"][index]).tobytes()
        assert got.shape == arrays["matrix"][index].shape
        assert got.flags.c_contiguous
        assert got.flags.writeable
    assert checkpoint.read("scalar", ()).shape == ()


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {"a": random_array((4, 8), np.dtype("float32")), "b": random_array((3,), np.dtype("int8"))}
    arrays["c"] = random_array((4, 2), np.dtype(ml_dtypes.bfloat16))
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert list(checkpoint.tensors) != ["__metadata__"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


@pytest.mark.parametrize(
    ("gap", "buffer"), [(32 * 1024, 2 * 1024 * 1024), (0, 1), (1 << 30, 1 << 30), (1 << 30, 64)]
)
def test_random_boxes_equal_numpy_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: int, buffer: int
) -> None:
    """Both ways of reading a box, seeking over the gaps and reading through them, give `full[index]`."""
    monkeypatch.setattr(source, "_SEEK_GAP_BYTES", gap)
    monkeypatch.setattr(source, "_BUFFER_BYTES", buffer)
    rng = np.random.default_rng(0)
    shapes = [(7,), (5, 6), (3, 4, 5), (2, 3, 4, 5), (1, 9, 1)]
    arrays = {str(shape): rng.standard_normal(shape).astype(np.float32) for shape in shapes}
    write(tmp_path / "model.safetensors", arrays)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for _ in range(60):
        for name, array in arrays.items():
            ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in array.shape]
            index = tuple(slice(*end) for end in ends[: rng.integers(0, array.ndim + 1)])
            np.testing.assert_array_equal(checkpoint.read(name, index), array[index])


def test_a_slice_reads_little_more_than_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(256 * 32768, dtype=np.float32).reshape(256, 32768)  # rows of 128 KiB
    write(tmp_path / "model.safetensors", {"w": array})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    sizes: list[int] = []
    original = source.read_exactly

    def counting(file: Any, offset: int, out: np.ndarray, path: Path) -> None:
        sizes.append(out.nbytes)
        original(file, offset, out, path)

    monkeypatch.setattr(source, "read_exactly", counting)
    for index in [(slice(32, 64),), (slice(None), slice(4096, 8192)), (slice(8, 16), slice(0, 16384))]:
        sizes.clear()
        np.testing.assert_array_equal(checkpoint.read("w", index), array[index])
        assert sum(sizes) == array[index].nbytes


def test_index_and_slice_errors_are_the_callers(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"w": np.zeros((4, 4), np.float32)})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with pytest.raises(IndexError, match="3 slices for a tensor of 2 axes"):
        checkpoint.read("w", (slice(None),) * 3)
    with pytest.raises(IndexError, match="step 1"):
        checkpoint.read("w", (slice(None, None, 2),))
    with rejects(tmp_path, "no tensor 'v'"):
        checkpoint.read("v")


# Directories of shards


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    a, b, extra = (random_array((4, 3), np.dtype("float16"), seed) for seed in range(3))
    write(tmp_path / "model-00001-of-00002.safetensors", {"a": a, "unlisted": extra})
    write(tmp_path / "model-00002-of-00002.safetensors", {"b": b})
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for name, array in {"a": a, "b": b, "unlisted": extra}.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    write_index(tmp_path, {"b": "absent.safetensors"})
    assert set(SafetensorsCheckpoint(tmp_path).tensors) == {"a"}


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write(blobs / "0123abc", {"a": np.ones(2, np.float32)})
    (snapshot / "model.safetensors").symlink_to("../blobs/0123abc")
    np.testing.assert_array_equal(SafetensorsCheckpoint(snapshot).read("a"), np.ones(2))


def test_three_hundred_tensors_open_quickly(tmp_path: Path) -> None:
    weight_map: dict[str, str] = {}
    for shard in range(10):
        names = [f"model.layers.{shard}.weight_{i}" for i in range(30)]
        file = f"model-{shard:05}-of-00010.safetensors"
        write(tmp_path / file, {name: np.full((8, 8), shard, np.float32) for name in names})
        weight_map |= dict.fromkeys(names, file)
    write_index(tmp_path, weight_map)
    start = time.thread_time()
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert time.thread_time() - start < 0.5
    assert len(checkpoint.tensors) == 300
    assert checkpoint.read("model.layers.7.weight_3")[0, 0] == 7


# Memory and imports

MEMORY_SCRIPT = """
import sys
from pathlib import Path
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
assert not {"jax", "torch", "transformers"} & set(sys.modules), "reading a file needs none of them"
def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
checkpoint = SafetensorsCheckpoint(Path(sys.argv[1]))
before = peak_kib()
for name in checkpoint.tensors:
    checkpoint.read(name)
    for part in range(4):
        checkpoint.read(name, (slice(None), slice(part * 256, (part + 1) * 256)))
print(peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_one_tensor_and_a_buffer(tmp_path: Path) -> None:
    count, size = 24, 8 * 1024 * 1024
    header = {f"w{i}": entry("F32", [2048, 1024], i * size, (i + 1) * size) for i in range(count)}
    path = tmp_path / "model.safetensors"
    write_raw(path, header)
    os.truncate(path, path.stat().st_size + count * size)  # sparse: 192 MiB of zeros, none on the disk
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (size + 6 * 1024 * 1024) // 1024  # KiB


# Bad files: header, what follows it, words that the message must have

ONE = entry("U8", [2], 0, 2)
BAD_FILES: dict[str, tuple[bytes | dict[str, Any], bytes, tuple[str, ...]]] = {
    "truncated": (
        {"a": entry("U8", [9], 0, 9)},
        b"1234",
        ("truncated", "header says 77 bytes", "file has 72"),
    ),
    "trailing bytes": ({"a": ONE}, b"123", ("header says 70 bytes", "file has 71")),
    "overlap": ({"a": ONE, "b": entry("U8", [2], 1, 3)}, b"123", ("'b' begins at byte 1", "ends at byte 2")),
    "hole": ({"a": ONE, "b": entry("U8", [1], 3, 4)}, b"1234", ("bytes 2 to 3", "no tensor")),
    "offsets against shape": ({"a": entry("F32", [3], 0, 8)}, b"12345678", ("'a'", "12 bytes", "give 8")),
    "offsets reversed": ({"a": entry("U8", [1], 2, 1)}, b"12", ("'a'", "data_offsets")),
    "offsets missing": ({"a": {"dtype": "U8", "shape": [1]}}, b"1", ("'a'", "data_offsets")),
    "offsets negative": ({"a": entry("U8", [1], -1, 0)}, b"", ("'a'", "data_offsets")),
    "offsets of floats": ({"a": {**ONE, "data_offsets": [0.0, 2.0]}}, b"12", ("'a'", "data_offsets")),
    "unknown dtype": ({"a": entry("F7", [2], 0, 2)}, b"12", ("'a'", "dtype 'F7'", "BF16")),
    "packed dtype": ({"a": entry("F4", [4], 0, 2)}, b"12", ("'a'", "dtype 'F4'", "BF16")),
    "dtype not a string": ({"a": entry([1], [2], 0, 2)}, b"12", ("'a'", "dtype '[1]'")),
    "shape of booleans": ({"a": entry("U8", [True, 2], 0, 2)}, b"12", ("'a'", "shape")),
    "shape negative": ({"a": entry("U8", [-1, -2], 0, 2)}, b"12", ("'a'", "shape")),
    "shape too deep": ({"a": entry("U8", [1] * 99, 0, 1)}, b"1", ("'a'", "at most 8")),
    "shape overflows": ({"a": entry("F32", [0, 2**40, 2**40], 0, 0)}, b"", ("'a'", "more bytes")),
    "shape huge": (
        {"a": entry("U8", [2**62], 0, 2**62)},
        b"",
        ("truncated", str(2**62 + 104), "file has 104"),
    ),
    "not an object": (b"[1, 2]", b"", ("not an object",)),
    "entry not an object": ({"a": 3}, b"", ("'a'", "object")),
    "garbage": (b"\xff\xfe{}{}", b"", ("not valid JSON",)),
    "unclosed": (b'{"a": ', b"", ("not valid JSON",)),
    "nested deeply": (b'{"a":' + b"[" * 200_000, b"", ("not valid JSON",)),
    "endless number": (b'{"a":' + b"9" * 100_000 + b"}", b"", ("not valid JSON",)),
    "key twice": (b'{"a\\n":' + json.dumps(ONE).encode() + b',"a\\n":1}', b"12", ("'a\\n'", "twice")),
    "endless name": ({"x" * 500_000: 3}, b"", ("500000 characters",)),
    "lone surrogate": ({"\ud800": ONE}, b"12", ("JSON",)),
    "bad metadata": ({"__metadata__": {"a": 1}, "a": ONE}, b"12", ()),  # the library's own check
}


@pytest.mark.parametrize("case", list(BAD_FILES))
def test_bad_file_is_refused(tmp_path: Path, case: str) -> None:
    header, data, words = BAD_FILES[case]
    path = tmp_path / "model.safetensors"
    write_raw(path, header, data)
    with rejects(path, *words):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("0 bytes",)),
        (b"1234567", ("7 bytes",)),
        (struct.pack("<Q", 2**60) + b"{}", (str(2**60), "has 2 after")),
        (struct.pack("<Q", 3) + b"{}", ("3 bytes", "has 2 after")),
        (b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS", "git lfs pull")),
    ],
)
def test_bad_prefix_is_refused(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with rejects(path, *words):
        SafetensorsCheckpoint(tmp_path)


def test_oversized_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**30))
    os.truncate(path, 2**30 + 8)
    with rejects(path, str(2**30), str(reader.MAX_JSON_BYTES)):
        SafetensorsCheckpoint(tmp_path)


def test_file_cut_short_after_opening_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"a": np.zeros(100, np.uint8)})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    os.truncate(path, path.stat().st_size - 50)
    with rejects(path, "ended at byte", "runs to"):
        checkpoint.read("a")


# Bad directories


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # opening it would hang
    with rejects(tmp_path, name, "never opened", "safetensors", "save_pretrained"):
        SafetensorsCheckpoint(tmp_path)


def test_directories_without_weights_are_refused(tmp_path: Path) -> None:
    with rejects(tmp_path / "absent", "does not exist"):
        SafetensorsCheckpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with rejects(tmp_path / "file", "not a directory"):
        SafetensorsCheckpoint(tmp_path / "file")
    with rejects(tmp_path, "no weights"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with rejects(tmp_path, "model-00001-of-00002.safetensors", INDEX):
        SafetensorsCheckpoint(tmp_path)


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with rejects(path, "not a regular file"):
        SafetensorsCheckpoint(tmp_path)
    path.unlink()
    path.mkdir()
    with rejects(path, "not a regular file"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("not valid JSON",)),
        ("{", ("not valid JSON",)),
        ("[]", ("not an object",)),
        ("{}", ("weight_map",)),
        ('{"weight_map": []}', ("weight_map",)),
        ('{"weight_map": {}}', ("weight_map",)),
        ('{"weight_map": {"a": 1}}', ("'a'", "not a file name")),
        ('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', ("'a'", "twice")),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    (tmp_path / INDEX).write_text(content)
    with rejects(tmp_path / INDEX, *words):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        "model.bin",
        "",
    ],
)
def test_shards_outside_the_directory_are_refused(tmp_path: Path, shard: str) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    write(tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)})
    write_index(directory, {"a": shard})
    with rejects(directory / INDEX, "'a'", ascii(shard), "plain name"):
        SafetensorsCheckpoint(directory)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "m1.safetensors", {"a": np.ones(2, np.float32)})
    long = "x" * 300 + ".safetensors"  # longer than a file name may be
    write_index(tmp_path, {"a": "m1.safetensors", "b": "m2.safetensors", "c": long})
    with rejects(tmp_path / INDEX, "2 of 3 shards are missing", "m2.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_index_and_shards_that_disagree_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = tmp_path / "m1.safetensors", tmp_path / "m2.safetensors"
    write(one, {"a": np.ones(2, np.float32)})
    write(two, {"b": np.full(2, 7, np.float32)})
    write_index(tmp_path, {"a": one.name, "b": one.name, "c": two.name})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a", "b"} and checkpoint.read("b")[0] == 7
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{tmp_path / INDEX}: no shard has 'c'",
        f"{tmp_path / INDEX}: another shard than it says has 'b'",
    ]


@pytest.mark.parametrize("home", (0, 1, 2))
def test_a_stale_copy_in_another_shard_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, home: int
) -> None:
    shards = [f"m{number}.safetensors" for number in range(3)]
    for number, shard in enumerate(shards):
        write(tmp_path / shard, {"a": np.full(2, number, np.float32), f"own{number}": np.ones(1, np.float32)})
    write_index(tmp_path, {"a": shards[home]} | {f"own{n}": shard for n, shard in enumerate(shards)})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [home, home]
    assert any("a second 'a'" in record.getMessage() for record in caplog.records)
    assert checkpoint.unlisted == frozenset()


def test_copies_of_which_none_is_listed_must_be_equal(tmp_path: Path) -> None:
    one, two = tmp_path / "m1.safetensors", tmp_path / "m2.safetensors"
    same, ones = np.arange(4, dtype=np.float32), np.ones(2, np.float32)
    write(one, {"a": ones, "same": same, "other": ones})
    write(two, {"b": ones, "same": same, "other": 2 * ones})
    write_index(tmp_path, {"a": one.name, "b": two.name})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.unlisted == {"same", "other"}
    np.testing.assert_array_equal(checkpoint.read("same", (slice(1, 3),)), same[1:3])
    with rejects(two, "'other' is also in m1.safetensors", "the index names neither"):
        checkpoint.read("other")


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "m1.safetensors", {"a": np.ones(2, np.float32)})
    write_index(tmp_path, {"a": "m1.safetensors"})
    (tmp_path / "consolidated.safetensors").write_bytes(b"junk")
    write(tmp_path / "adapter_model.safetensors", {"a": np.zeros(2, np.float32)})
    assert SafetensorsCheckpoint(tmp_path).read("a")[0] == 1


# Damaged files of every kind


def load_or_refuse(directory: Path) -> bool:
    """Reads all there is; True where it loaded. Any exception but `CheckpointError` fails the test."""
    try:
        checkpoint = SafetensorsCheckpoint(directory)
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == info.shape
    except CheckpointError as error:
        assert str(error).isprintable()
        return False
    return True


def test_damaged_files_load_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    arrays: dict[str, np.ndarray] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    arrays |= {"b": np.arange(4, dtype=np.int8)}
    save_file(arrays, path, metadata={"format": "np"})
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert not load_or_refuse(tmp_path)
    loaded = 0
    for at in range(len(good)):
        for value in (0, 0xFF, good[at] ^ 0x80, good[at] ^ 1, ord("9")):
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            loaded += load_or_refuse(tmp_path)
    assert loaded >= 5 * 28  # a change to the 28 bytes of data cannot be seen


def test_damaged_indexes_load_or_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m1.safetensors", {"a": np.ones(2, np.float32)})
    write_index(tmp_path, {"a": "m1.safetensors"})
    good = (tmp_path / INDEX).read_bytes()
    for at in range(len(good)):
        for damaged in (good[:at], good[:at] + b"\xff" + good[at + 1 :], good[:at] + b'"' + good[at + 1 :]):
            (tmp_path / INDEX).write_bytes(damaged)
            load_or_refuse(tmp_path)
