"""The GGUF reader: every quantisation, metadata, memory, and every kind of bad input."""

import os
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from tpjax.checkpoints import gguf as reader
from tpjax.checkpoints.gguf import SUPPORTED_TYPES, GGUFFile
from tpjax.checkpoints.source import extents, split_box
from tpjax.errors import CheckpointError

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
TYPE_F32, TYPE_Q4_0 = 0, 2


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, code: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + value


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(code: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", code, count) + values


def tensor(name: str, dims: list[int], kind: int = TYPE_F32, offset: int = 0) -> bytes:
    """A tensor's description; `dims` in GGUF order, the fastest first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    pair_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """Assembles a file with whatever counts it is given, right or wrong."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def small_file(path: Path) -> Path:
    """A tiny valid file with every kind of metadata and three tensors, from gguf's own writer."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.5)
    writer.add_bool("flag", True)
    writer.add_int64("negative", -(2**40))
    writer.add_float64("double", 0.1)
    writer.add_string("name", "Größe ✓")
    writer.add_array("tokens", ["<s>", "a", "▁b", ""])
    writer.add_array("scores", [0.5, -1.0, 2.0])
    writer.add_array("types", [1, 2, -3])
    writer.add_array("flags", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("norm", rng.standard_normal(5).astype(np.float32))
    weight = rng.standard_normal((3, 64)).astype(np.float32)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        writer.add_tensor(kind.name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def rejects(path: Path, *words: str) -> Iterator[None]:
    """Expects a `CheckpointError` within a CPU second and a megabyte: a line with the file and the words."""
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            yield
        elapsed, (_, peak) = time.thread_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert elapsed < 1
    assert peak < 1024 * 1024
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    for word in (str(path), *words):
        assert word in message


# Values


def random_raw(kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random bytes: every bit pattern is a valid block of every type, though a scale may be infinite."""
    block_size, type_size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    return rng.integers(0, 256, (rows, columns // block_size * type_size), dtype=np.uint8)


@pytest.mark.parametrize("chunk", [reader._CHUNK_ELEMENTS, 1], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("name", SUPPORTED_TYPES)
def test_every_type_reads_whole_and_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr(reader, "_CHUNK_ELEMENTS", chunk)
    kind = GGMLQuantizationType[name]
    columns = max(96, 3 * GGML_QUANT_SIZES[kind][0])
    raw = random_raw(kind, 10, columns)
    with np.errstate(all="ignore"):
        full = dequantize(raw, kind)
    assert np.isfinite(full).mean() > 0.5  # most of it is comparable
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("other", np.ones(3, np.float32))
    writer.add_tensor("matrix", raw, raw_dtype=kind)
    writer.add_tensor("experts", raw.reshape(2, 5, -1), raw_dtype=kind)
    writer.add_tensor("vector", raw[0], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(path)
    assert file.quantization("matrix") == name
    assert file.quantization("other") == "F32"
    tensors = {"matrix": full, "experts": full.reshape(2, 5, -1), "vector": full[0]}
    column = slice(columns // 3 - 1, columns // 3 * 2 + 1)
    indices: dict[str, list[tuple[slice, ...] | None]] = {
        "matrix": [None, (slice(2, 9),), (slice(None), column), (slice(3, 4), slice(5, 6)), (slice(4, 4),)],
        "experts": [None, (slice(1, 2),), (slice(None), slice(1, 3), column), (slice(0, 2), slice(4, 5))],
        "vector": [None, (column,)],
    }
    for tensor_name, expected in tensors.items():
        assert file.tensors[tensor_name].shape == expected.shape
        for index in indices[tensor_name]:
            got = file.read(tensor_name, index)
            np.testing.assert_array_equal(got, expected[index or ...])
            assert got.dtype == file.tensors[tensor_name].dtype == np.float32
            assert got.flags.c_contiguous


def test_values_follow_the_formulas_of_ggml(tmp_path: Path) -> None:
    """Q8_0 is d·q, Q4_0 is d·(q - 8) with the low nibbles first: worked by hand, without gguf."""
    q8 = np.arange(-16, 16, dtype=np.int8)
    low, high = np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8)[::-1]
    data = np.float16(0.5).tobytes() + q8.tobytes() + bytes(30)
    data += np.float16(2).tobytes() + (low | high << 4).astype(np.uint8).tobytes()
    path = tmp_path / "a.gguf"
    path.write_bytes(build((), (tensor("q8", [32], 8), tensor("q4", [32], TYPE_Q4_0, 64)), data))
    file = GGUFFile(path)
    np.testing.assert_array_equal(file.read("q8"), 0.5 * q8.astype(np.float32))
    expected = 2 * (np.concatenate([low, high]).astype(np.float32) - 8)
    np.testing.assert_array_equal(file.read("q4"), expected)


@pytest.mark.parametrize("limit", [1, 7, 20, 60, 1000])
def test_split_boxes_tile_in_order_and_are_small(limit: int) -> None:
    box = ((1, 4), (2, 6), (3, 8))
    seen = np.zeros((5, 7, 9), int)
    parts = list(split_box(box, limit))
    assert parts == sorted(parts)
    for part in parts:
        assert np.prod(extents(part)) <= limit
        seen[tuple(slice(*ends) for ends in part)] += 1
    expected = np.zeros_like(seen)
    expected[1:4, 2:6, 3:8] = 1
    np.testing.assert_array_equal(seen, expected)


def test_random_boxes_equal_numpy_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_CHUNK_ELEMENTS", 256)
    rng = np.random.default_rng(1)
    full = rng.integers(-127, 128, (3, 4, 160)).astype(np.float32)
    kind = GGMLQuantizationType.Q8_0
    path = tmp_path / "a.gguf"
    raw = quantize(full, kind)
    full = dequantize(raw, kind)
    path.write_bytes(build((), (tensor("w", [160, 4, 3], kind.value),), raw.tobytes()))
    file = GGUFFile(path)
    for _ in range(200):
        ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in full.shape]
        index = tuple(slice(*end) for end in ends[: rng.integers(0, 4)])
        np.testing.assert_array_equal(file.read("w", index), full[index])


# Metadata


def test_metadata_of_every_type(tmp_path: Path) -> None:
    metadata = GGUFFile(small_file(tmp_path / "a.gguf")).metadata
    assert metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.rope.freq_base": 10000.5,
        "flag": True,
        "negative": -(2**40),
        "double": 0.1,
        "name": "Größe ✓",
        "tokens": ["<s>", "a", "▁b", ""],
        "scores": [0.5, -1.0, 2.0],
        "types": [1, 2, -3],
        "flags": [True, False],
    }
    assert metadata["flag"] is True
    assert metadata["flags"][1] is False


@pytest.mark.parametrize("form", "BbHhIifQqd")
def test_scalars_and_arrays_of_each_width(tmp_path: Path, form: str) -> None:
    code = dict(zip("BbHhIifQqd", (0, 1, 2, 3, 4, 5, 6, 10, 11, 12), strict=True))[form]
    values = [0, 1, 100] + ([-100] if form in "bhifqd" else []) + ([0.25] if form in "fd" else [])
    many = array(code, len(values), struct.pack(f"<{len(values)}{form}", *values))
    pairs = (pair("many", ARRAY, many), pair("one", code, struct.pack(f"<{form}", values[-1])))
    (tmp_path / "a.gguf").write_bytes(build((*pairs, pair("none", ARRAY, array(code, 0)))))
    assert GGUFFile(tmp_path / "a.gguf").metadata == {"many": values, "one": values[-1], "none": []}


def test_version_2_and_a_larger_alignment(tmp_path: Path) -> None:
    header = build((pair("general.alignment", U32, u32(128)),), (tensor("a", [2]),), version=2)
    data = header + bytes(-len(header) % 128) + np.array([1, 2], np.float32).tobytes()
    (tmp_path / "a.gguf").write_bytes(data)
    np.testing.assert_array_equal(GGUFFile(tmp_path / "a.gguf").read("a"), [1, 2])


def test_a_vocabulary_of_262144_tokens_opens_quickly(tmp_path: Path) -> None:
    count = 262_144
    tokens = array(STRING, count, b"".join(text(f"token{i}") for i in range(count)))
    scores = array(F32, count, np.arange(count, dtype=np.float32).tobytes())
    path = tmp_path / "a.gguf"
    path.write_bytes(build((pair("tokens", ARRAY, tokens), pair("scores", ARRAY, scores))))
    start = time.thread_time()
    file = GGUFFile(path)
    assert time.thread_time() - start < 1
    assert file.metadata["tokens"][262_143] == "token262143"
    assert file.metadata["scores"][-1] == 262_143


# Real files


@pytest.mark.slow
def test_real_file_agrees_with_the_reference_reader(smollm2_gguf: Path) -> None:
    file, reference = GGUFFile(smollm2_gguf), GGUFReader(smollm2_gguf)
    expected = {
        key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")
    }
    assert file.metadata == expected
    assert {name: list(info.shape) for name, info in file.tensors.items()} == {
        t.name: t.shape.tolist()[::-1] for t in reference.tensors
    }
    for stored in reference.tensors[:8] + reference.tensors[-3:]:
        assert file.quantization(stored.name) == stored.tensor_type.name
        rows = slice(0, 1000)
        want = dequantize(stored.data[rows], stored.tensor_type)
        np.testing.assert_array_equal(file.read(stored.name, (rows,)), want)
    assert file.quantization("token_embd.weight") == "Q8_0"


def test_real_file_with_a_large_vocabulary(gemma3_gguf: Path) -> None:
    start = time.thread_time()
    file = GGUFFile(gemma3_gguf)
    assert time.thread_time() - start < 1
    assert len(file.tensors) == 236
    assert file.metadata["general.architecture"] == "gemma3"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 262_144
    assert file.metadata["tokenizer.ggml.tokens"][2] == "<bos>"
    assert file.tensors["token_embd.weight"].shape == (262_144, 640)
    assert {file.quantization(name) for name in file.tensors} == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    part = file.read("blk.0.ffn_down.weight", (slice(5, 9), slice(1000, 1100)))
    np.testing.assert_array_equal(part, file.read("blk.0.ffn_down.weight")[5:9, 1000:1100])
    assert 1e-4 < np.abs(part).mean() < 1


# Memory and imports

MEMORY_SCRIPT = """
import sys
from pathlib import Path
from tpjax.checkpoints.gguf import GGUFFile
assert not {"jax", "torch", "transformers"} & set(sys.modules), "reading a file needs none of them"
def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
file = GGUFFile(Path(sys.argv[1]))
file.read("w0", (slice(0, 1),))
before = peak_kib()
for name in file.tensors:
    for part in range(2):
        file.read(name, (slice(part * 512, (part + 1) * 512),))
        file.read(name, (slice(None), slice(part * 1024, (part + 1) * 1024)))
print(peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_one_slice_and_a_buffer(tmp_path: Path) -> None:
    count, size = 96, 1024 * 2048 // 256 * 210  # Q6_K: 1.6 MiB each, 157 MiB together, 8 MiB as float32
    tensors = [tensor(f"w{i}", [2048, 1024], GGMLQuantizationType.Q6_K.value, i * size) for i in range(count)]
    path = tmp_path / "a.gguf"
    path.write_bytes(build((), tuple(tensors)))
    os.truncate(path, path.stat().st_size + count * size)  # sparse: nothing on the disk
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * 1024 + 8 * 1024  # KiB: a slice of 4 MiB, and temporaries


# Bad files: content, and words that the message must have

HUGE = 2**60
SIXTEEN = bytes(16)
FOUR_KEYS = tuple(pair(f"k{i}", U8, b"\0") for i in range(4))
BAD_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("0 bytes",)),
    "short": (b"GGUF\3\0\0\0", ("8 bytes",)),
    "other magic": (build(magic=b"GGML"), ("not a GGUF file", "b'GGML'")),
    "reversed magic": (build(magic=b"FUGG"), ("big-endian",)),
    "big-endian": (build(version=3 << 24), ("big-endian",)),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid", ("Git LFS", "git lfs pull")),
    "version 1": (build(version=1), ("version 1", "2 and 3")),
    "version 4": (build(version=4), ("version 4", "2 and 3")),
    "huge pair count": (build(pair_count=HUGE), (f"{HUGE} metadata pairs", "hold 0")),
    "huge tensor count": (build(FOUR_KEYS, tensor_count=2**64 - 1), (f"{2**64 - 1} tensors", "hold 2")),
    "one pair too many": (build(FOUR_KEYS, pair_count=5), ("truncated", "file has 96")),
    "huge key": (build((struct.pack("<Q", HUGE) + SIXTEEN,)), (f"{HUGE} bytes", "file has 32 left")),
    "huge string": (build((pair("k", STRING, struct.pack("<Q", HUGE)),)), ("'k'", str(HUGE), "file has 19")),
    "huge array": (build((pair("k", ARRAY, array(U8, HUGE)),)), ("'k'", f"{HUGE} elements", "hold 15")),
    "huge string array": (build((pair("k", ARRAY, array(STRING, HUGE)),)), ("'k'", str(HUGE), "hold 1")),
    "string array, one too many": (
        build((pair("k", ARRAY, array(STRING, 3, text("a") + text("b") + struct.pack("<Q", 99))),)),
        ("'k'", "99 bytes", "file has"),
    ),
    "string cut by one byte": (build((pair("k", STRING, text("abc")),))[:47], ("3 bytes", "file has 2 left")),
    "nested array": (
        build((pair("k", ARRAY, array(ARRAY, 1, array(ARRAY, 1, array(U8, 1, b"\0")))),)),
        ("'k'", "array of arrays"),
    ),
    "unknown value type": (build((pair("k", 13, SIXTEEN),)), ("'k'", "type 13")),
    "unknown element type": (build((pair("k", ARRAY, array(99, 1, SIXTEEN)),)), ("'k'", "type 99")),
    "key twice": (build((FOUR_KEYS[0], FOUR_KEYS[0])), ("'k0'", "twice")),
    "key not UTF-8": (build((pair(b"\xff", U8, b"\0"),)), ("not UTF-8",)),
    "value not UTF-8": (build((pair("k", STRING, text(b"\xc3(")),)), ("'k'", "not UTF-8")),
    "control characters": (build((pair("\n\x1b", 13, SIXTEEN),)), ("'\\n\\x1b'",)),
    "alignment not a power of 2": (build((pair("general.alignment", U32, u32(48)),)), ("alignment", "48")),
    "alignment zero": (build((pair("general.alignment", U32, u32(0)),)), ("general.alignment", "0")),
    "alignment a string": (build((pair("general.alignment", STRING, text("32")),)), ("general.alignment",)),
    "split": (
        build((pair("split.count", 2, b"\3\0"),)),
        ("part 1 of 3", "must end with -00001-of-00003.gguf"),
    ),
    "parts a string": (build((pair("split.count", STRING, text("3")),)), ("split.count is '3'", "65535")),
    "too many parts": (build((pair("split.count", U32, u32(65536)),)), ("split.count is 65536", "65535")),
    "part of none": (build((pair("split.no", I32, u32(2**32 - 1)),)), ("split.no is -1", "65534")),
    "tensor twice": (build((), (tensor("a", [4]), tensor("a", [4], offset=32)), bytes(64)), ("'a'", "twice")),
    "no axes": (build((), (tensor("a", []),), SIXTEEN), ("'a'", "0 axes", "1 to 4")),
    "five axes": (build((), (tensor("a", [1] * 5),), SIXTEEN), ("'a'", "5 axes", "1 to 4")),
    "endless axes": (build((), (text("a") + u32(2**32 - 1) + bytes(40),)), (f"{2**32 - 1} axes",)),
    "zero size": (build((), (tensor("a", [4, 0]),), SIXTEEN), ("'a'", "(0, 4)")),
    "overflow": (build((), (tensor("a", [2**32, 2**32]),), SIXTEEN), ("'a'", "2**61")),
    "huge size": (build((), (tensor("a", [2**50]),), SIXTEEN), ("'a'", str(2**52 + 64), "file has 80")),
    "unknown type": (build((), (tensor("a", [4], 4),), SIXTEEN), ("'a'", "unknown (4)", "Q4_K")),
    "integer type": (build((), (tensor("a", [4], 26),), SIXTEEN), ("'a'", "I32 (26)", "Q4_K")),
    "half a block": (
        build((), (tensor("a", [48], TYPE_Q4_0),), bytes(27)),
        ("'a'", "rows of 48", "32 in a Q4_0"),
    ),
    "misaligned": (build((), (tensor("a", [4], offset=8),), bytes(64)), ("'a'", "byte 72", "multiple of 32")),
    "past the end": (build((), (tensor("a", [4], offset=32),), SIXTEEN), ("bytes 96 to 112", "file has 80")),
    "far past the end": (build((), (tensor("a", [4], offset=2**63),), SIXTEEN), (str(2**63 + 64), "has 80")),
    "cut by one byte": (build((), (tensor("a", [4]),), bytes(15)), ("truncated", "to 80", "file has 79")),
    "overlapping": (
        build((), (tensor("a", [16]), tensor("b", [4], offset=32)), bytes(64)),
        ("'b' starts at byte 128", "'a' ends at byte 160"),
    ),
}


@pytest.mark.parametrize("case", list(BAD_FILES))
def test_bad_file_is_refused(tmp_path: Path, case: str) -> None:
    content, words = BAD_FILES[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with rejects(path, *words):
        GGUFFile(path)


def test_arrays_beyond_the_bound_are_refused_unread(tmp_path: Path) -> None:
    count = reader.MAX_METADATA_VALUES + 1
    path = tmp_path / "a.gguf"
    path.write_bytes(build((pair("k", ARRAY, array(U8, count)),)))
    os.truncate(path, 2 * count)
    with rejects(path, "'k'", str(count), str(reader.MAX_METADATA_VALUES)):
        GGUFFile(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with rejects(tmp_path / "absent.gguf", "No such file"):
        GGUFFile(tmp_path / "absent.gguf")
    with rejects(tmp_path, "not a regular file"):
        GGUFFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with rejects(tmp_path / "pipe", "not a regular file"):
        GGUFFile(tmp_path / "pipe")


def test_reading_what_is_not_there_is_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path / "a.gguf")
    file = GGUFFile(path)
    with rejects(path, "no tensor 'absent' among its 3 tensors"):
        file.read("absent")
    with rejects(path, "no tensor 'absent'"):
        file.quantization("absent")
    with pytest.raises(IndexError, match="2 slices for a tensor of 1 axes"):
        file.read("norm", (slice(None), slice(None)))
    os.truncate(path, path.stat().st_size - 64)
    with rejects(path, "ended at byte", "runs to"):
        file.read("Q4_0")


# Damaged files of every kind


def load_or_refuse(path: Path) -> bool:
    """Reads all there is; True where it loaded. Any exception but `CheckpointError` fails the test."""
    try:
        file = GGUFFile(path)
        for name, info in file.tensors.items():
            assert file.read(name).shape == info.shape
    except CheckpointError as error:
        assert str(error).isprintable()
        return False
    return True


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path / "a.gguf")
    good = path.read_bytes()
    tensors = GGUFFile(path)._tensors.values()
    end = max(t.start + t.stored_bytes for t in tensors)
    for length in range(len(good) + 1):
        path.write_bytes(good[:length])
        assert load_or_refuse(path) == (length >= end)  # only padding follows `end`


def test_damaged_files_load_or_are_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path / "a.gguf")
    good = path.read_bytes()
    start = min(t.start for t in GGUFFile(path)._tensors.values())
    outcomes = set()
    for at in range(start):
        damaged: list[bytes] = [bytes([value]) for value in (0, 0xFF, good[at] ^ 1, good[at] ^ 0x80)]
        for patch in [*damaged, struct.pack("<Q", HUGE), struct.pack("<Q", 2**64 - 1), bytes(8)]:
            path.write_bytes(good[:at] + patch + good[at + len(patch) :])
            outcomes.add(load_or_refuse(path))
    assert outcomes == {True, False}


def test_randomly_damaged_files_load_or_are_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path / "a.gguf")
    good = np.frombuffer(path.read_bytes(), np.uint8)
    rng: Any = np.random.default_rng(7)
    for _ in range(1000):
        damaged = good.copy()
        where = rng.integers(0, len(good), rng.integers(1, 6))
        damaged[where] = rng.integers(0, 256, len(where))
        path.write_bytes(damaged.tobytes())
        load_or_refuse(path)
