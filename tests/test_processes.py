"""One model over several processes of faked devices: real processes, which die, hang and differ."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from conftest import COMPILE_FAST
from serving import WAIT_S, free_port, load_tiny, tiny_checkpoint
from test_measure import FIGURES, SMALL

from tpjax import LLM, SamplingParams
from tpjax.checkpoints.digests import digest_of_edges
from tpjax.planning import measure
from tpjax.runtime.processes import flags

ROOT = Path(__file__).parents[1]
LIMIT_S = 30  # by which streams have an error and all processes have ended
PROMPTS = ["the quick brown", "lazy dog", "words become text and", "fox"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(
    temperature=0.9, seed=11, top_p=0.95, repetition_penalty=1.2, max_tokens=12, ignore_eos=True
)


@dataclass
class Process:
    """One of several processes, and what it has printed."""

    popen: subprocess.Popen[bytes]
    out: Path
    err: Path

    def ended(self, seconds: float = WAIT_S) -> int:
        """Its exit status."""
        return self.popen.wait(seconds)

    def until(self, pattern: str, seconds: float = 2 * WAIT_S) -> re.Match[str]:
        """What it prints on stderr, once it does."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.err.read_text())) is None:
            assert self.popen.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.05)
        return found


@contextlib.contextmanager
def processes(
    tmp_path: Path,
    words: Sequence[Sequence[str]],
    environments: Sequence[dict[str, str]] = (),
    *,
    python: bool = True,
    typed: str = "",
) -> Iterator[list[Process]]:
    """Starts a process for each list of arguments, all with the same stdin; kills those that are left."""
    started = []
    (tmp_path / "typed").write_text(typed)
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    kept |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(COMPILE_FAST), "JAX_PLATFORMS": "cpu"}
    kept |= {"TPJAX_CACHE": str(tmp_path / "cache")}
    try:
        for number, arguments in enumerate(words):
            out, err = tmp_path / f"{number}.out", tmp_path / f"{number}.err"
            own = environments[number] if environments else {}
            with open(out, "wb") as to, open(err, "wb") as errors, open(tmp_path / "typed", "rb") as stdin:
                one = subprocess.Popen(
                    [sys.executable, *arguments] if python else arguments,
                    env=kept | own,
                    stdin=stdin,
                    stdout=to,
                    stderr=errors,
                    cwd=tmp_path,
                )
            started.append(Process(one, out, err))
        yield started
    finally:
        for each in started:
            each.popen.kill()
            each.popen.wait()


# counts what is read of a checkpoint, and says so at the end
COUNTING = """
import sys
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
read, reads = SafetensorsCheckpoint.read, []
def reading(*arguments):
    array = read(*arguments)
    reads.append(array.nbytes)
    return array
SafetensorsCheckpoint.read = reading
"""
COMMAND = (
    COUNTING
    + """
from tpjax.cli.app import main
status = main()
print(f"read {sum(reads)} bytes", file=sys.stderr)
sys.exit(status)
"""
)


def commands(subcommand: Sequence[str], count: int, own: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """The same command for each process, but for its number, and its own arguments."""
    port = free_port()
    return [
        [
            *("-c", COMMAND, *subcommand, "--coordinator", f"127.0.0.1:{port}"),
            *("--num-processes", str(count), "--process-id", str(number)),
            *(own[number] if own else ()),
        ]
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(directory: Path) -> LLM:
    return load_tiny(directory, tp=1)


SCRIPT = (
    COUNTING
    + """
import json, os
import tpjax
number, count, port, directory, prompts, params, kv_dtype = sys.argv[1:]
tpjax.initialize_distributed(f"127.0.0.1:{port}", int(count), int(number))
tpjax.fake_devices(2)
if os.environ.get("LATE") == number:
    import time, jax
    jax.devices()
    time.sleep(25)
stages, tp = int(os.environ.get("STAGES", "1")), json.loads(os.environ.get("TP", "null"))
llm = tpjax.LLM(directory, tp, max_model_len=1024, max_slots=4, kv_dtype=kv_dtype, pp=stages)
print(f"read {sum(reads)} bytes", file=sys.stderr)
llm.follow()
if number == "0":
    found = {
        "tokens": [
            [one.token_ids for one in llm.generate(json.loads(prompts), tpjax.SamplingParams(**each))]
            for each in json.loads(params)
        ],
        "scored": [
            entry and entry.logprob
            for entry in llm.generate("the quick brown", max_tokens=1, prompt_logprobs=1)[0].prompt_logprobs
        ],
        "logits": llm.logits([5, 6, 7, 8]).tolist(),
        "explained": llm.explain().to_dict(),
    }
    json.dump(found, sys.stdout)
    llm.close()
else:
    try:
        llm.generate("fox")
    except tpjax.TpjaxError as error:
        print(error, file=sys.stderr)
"""
)


def params(one: SamplingParams) -> dict[str, Any]:
    return {name: value for name, value in vars(one).items() if value != getattr(SamplingParams(), name)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "stages", "kv_dtype", "tp"),
    ((2, 1, "int8", None), (4, 1, "auto", None), (2, 2, "auto", None), (2, 2, "auto", (1, 2))),
)
def test_tokens_logits_and_scores_are_those_of_one_process(
    count: int, stages: int, kv_dtype: str, tp: tuple[int, ...] | None, directory: Path, tmp_path: Path
) -> None:
    """Sharded over all devices, or in pipeline stages: a stage of two devices on each process, or of one.

    The last of four is late to load, by more than the silence after which a process counts as lost.
    """
    alone = load_tiny(directory, tp=1, kv_dtype=kv_dtype)
    port, each = free_port(), json.dumps([params(GREEDY), params(SEEDED)])
    words = [
        [
            "-c",
            SCRIPT,
            str(number),
            str(count),
            str(port),
            str(directory),
            json.dumps(PROMPTS),
            each,
            kv_dtype,
        ]
        for number in range(count)
    ]
    environment = {"STAGES": str(stages), "TP": json.dumps(tp), "LATE": "3"}
    with processes(tmp_path, words, [environment] * count) as started:
        assert [one.ended(5 * WAIT_S) for one in started] == [0] * count, started[0].err.read_text()
    stored = (directory / "model.safetensors").stat().st_size
    for one in started:  # its own slices: what is replicated is small
        assert stored / count / 2 < int(one.until(r"read (\d+) bytes")[1]) < 1.2 * stored / count
    found = json.loads(re.sub(r"\[Gloo\].*\n", "", started[0].out.read_text()))
    for one, tokens in zip((GREEDY, SEEDED), found["tokens"], strict=True):
        assert tokens == [completion.token_ids for completion in alone.generate(PROMPTS, one)]
    logits = alone.logits([5, 6, 7, 8])
    assert abs(logits - found["logits"]).max() <= 1e-4 * abs(logits).max()
    scored = alone.generate("the quick brown", max_tokens=1, prompt_logprobs=1)[0].prompt_logprobs
    assert scored is not None
    assert found["scored"][0] is None
    assert found["scored"][1:] == pytest.approx([entry.logprob for entry in scored[1:] if entry], abs=1e-4)
    explained = found["explained"]
    if stages > 1:
        assert explained["tp"] == list(tp or (2, 2)) and explained["layers"] == [[0, 1], [1, 2]]
        reduces = [
            sum(one["count"] for one in stage["steps"][0]["collectives"] if one["kind"] == "all-reduce")
            for stage in explained["stages"]
        ]
        assert reduces == [2 + 1 if explained["tp"][0] > 1 else 0, 2]  # two a layer, the embedding's
    else:
        assert explained["tp"] == 2 * count
    assert "process 1 has no requests" in started[1].err.read_text()
    late = "process 0 waits for process 3 to begin to load the model"
    assert (late in started[0].err.read_text()) == (count > 3)


@pytest.mark.slow
def test_generate_prints_the_text_of_one_process_and_nothing_else(
    directory: Path, alone: LLM, tmp_path: Path
) -> None:
    words = ["generate", PROMPTS[0], str(directory), "--tp", "4", "--temperature", "0"]
    with processes(tmp_path, commands([*words, "--max-tokens", "12", "--ignore-eos"], 2)) as started:
        assert [one.ended(3 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
    assert started[0].out.read_text() == alone.generate(PROMPTS[0], GREEDY)[0].text + "\n"
    assert started[1].out.read_text() == ""


FAKED = {"XLA_FLAGS": " ".join((*COMPILE_FAST, "--xla_force_host_platform_device_count=2")), "NPROC": "4"}


@pytest.mark.slow
def test_explain_reports_what_one_process_does(directory: Path, tmp_path: Path) -> None:
    from tpjax.inspect.explain import explain_model

    words = ["explain", str(directory), "--tp", "4", "--max-model-len", "64", "--json"]
    with processes(tmp_path, commands(words, 2)) as started:
        assert [one.ended(3 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
        assert started[1].out.read_text() == ""
        assert started[1].until(r"read (\d+) bytes")[1] == "0"
    found, alone = json.loads(started[0].out.read_text()), explain_model(str(directory), 4, max_model_len=64)
    wanted = json.loads(json.dumps(alone.to_dict()))
    assert found["tensors"] == wanted["tensors"] and found["cache"] == wanted["cache"]
    for one, other in zip(found["steps"], wanted["steps"], strict=True):
        assert (one["collectives"], one["argument_bytes"]) == (other["collectives"], other["argument_bytes"])


@pytest.mark.slow
def test_explain_shows_stages_of_all_processes(directory: Path, tmp_path: Path) -> None:
    from tpjax.inspect.explain import explain_model

    words = ["explain", str(directory), "--pp", "2", "--tp", "1,2", "--max-model-len", "64", "--json"]
    with processes(tmp_path, commands(words, 2)) as started:
        assert [one.ended(3 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
    alone = explain_model(str(directory), (1, 2), pp=2, max_model_len=64)
    found, wanted = json.loads(started[0].out.read_text()), json.loads(json.dumps(alone.to_dict()))
    assert found == wanted and started[1].out.read_text() == ""


@pytest.mark.slow
def test_convert_writes_what_one_process_does_and_reads_its_own_part(directory: Path, tmp_path: Path) -> None:
    from tpjax.checkpoints.convert import convert
    from tpjax.checkpoints.orbax import OrbaxCheckpoint, check_files

    convert(directory, tmp_path / "alone")
    words = commands(["convert", str(directory), str(tmp_path / "both")], 2)
    with processes(tmp_path, words, [FAKED, FAKED]) as started:
        assert [one.ended(3 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
        stored = (directory / "model.safetensors").stat().st_size
        assert all(0 < int(one.until(r"read (\d+) bytes")[1]) < 0.6 * stored for one in started)
    assert [one.out.read_text() for one in started] == [f"{tmp_path / 'both'}\n", ""]
    check_files(tmp_path / "both")
    found, wanted = OrbaxCheckpoint(tmp_path / "both"), OrbaxCheckpoint(tmp_path / "alone")
    assert found.tensors == wanted.tensors
    for name in wanted.tensors:
        np.testing.assert_array_equal(found.read(name), wanted.read(name))
    files = ({one.name for one in (tmp_path / place).iterdir()} for place in ("alone", "both"))
    assert next(files) == next(files)


@pytest.mark.slow
def test_convert_ends_all_where_process_0_fails(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    words = commands(["convert", str(directory), str(tmp_path / "there")], 2)
    with processes(tmp_path, words) as started:
        assert all(one.ended() for one in started)
    assert all("exists: name a directory that does not" in one.err.read_text() for one in started)


def measuring_little(words: Sequence[Sequence[str]]) -> list[list[str]]:
    """The same commands, with sizes at which measuring takes seconds."""
    small = f"from tpjax.planning import measure\nvars(measure).update({SMALL!r})\n"
    return [[option, small + command, *rest] for option, command, *rest in words]


@pytest.mark.slow
def test_bench_measures_the_mesh_of_all(directory: Path, tmp_path: Path) -> None:
    words = ["bench", str(directory), "--tp", "2", "--context", "40", "--rounds", "1", "--json"]
    with processes(tmp_path, measuring_little(commands(words, 2))) as started:
        assert [one.ended(4 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
    assert "measuring the machines of 2 processes at tp=2" in started[0].err.read_text()
    found = json.loads(started[0].out.read_text())
    assert (found["tp"], found["dp"]) == (2, 1) and started[1].out.read_text() == ""
    for step in ("decode", "prefill"):
        assert found[step]["measured_ms"] > 0 and found[step]["predicted_ms"] > 0


@pytest.mark.slow
def test_bench_measures_the_stages_of_all_processes(directory: Path, tmp_path: Path) -> None:
    words = ["bench", str(directory), "--pp", "2", "--tp", "1,2", "--context", "40"]
    words += ["--rounds", "1", "--json"]
    measure.keep(tmp_path / "cache" / "measured.json", 2, FIGURES, alone=True)
    with processes(tmp_path, measuring_little(commands(words, 2))) as started:
        assert [one.ended(4 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
    assert "measuring this machine at tp=1, once" in started[0].err.read_text()
    assert "measuring" not in started[1].err.read_text()  # it knows its machine at tp=2
    found = json.loads(started[0].out.read_text())
    assert found["tp"] == [1, 2] and started[1].out.read_text() == ""
    for step in ("decode", "prefill"):
        assert all(one[f"{step}_ms"] > 0 and one[f"{step}_plan_ms"] > 0 for one in found["stages"])
        assert found[f"{step}_transfer_ms"] > 0 and found[f"{step}_bytes"] > 0


@pytest.mark.slow
def test_bench_is_refused_where_rounds_differ(directory: Path, tmp_path: Path) -> None:
    """Process 1 would otherwise wait for a collective that never comes."""
    words = ["bench", str(directory), "--tp", "2", "--context", "40"]
    own = (("--rounds", "1"), ("--rounds", "2"))
    with processes(tmp_path, commands(words, 2, own)) as started:
        assert all(one.ended() for one in started)
    why = "process 1 is refused: rounds is 2 in process 1 and 1 in process 0"
    assert all(why in one.err.read_text() for one in started)


@pytest.mark.slow
def test_replicas_of_several_processes_are_refused_before_anything_is_measured(
    directory: Path, tmp_path: Path
) -> None:
    words = ["bench", str(directory), "--dp", "2", "--context", "40", "--rounds", "1"]
    with processes(tmp_path, commands(words, 2)) as started:
        assert all(one.ended() for one in started)
    said = started[0].err.read_text() + started[1].err.read_text()
    assert "dp=2 replicas run in one process, but there are 2: start each replica by itself" in said
    assert "measuring" not in said


@pytest.mark.slow
def test_batch_answers_in_process_0(directory: Path, alone: LLM, tmp_path: Path) -> None:
    """A second time there is nothing to do, and nobody waits."""
    body = {"prompt": PROMPTS[0], "max_tokens": 5, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "requests.jsonl").write_text(json.dumps(line) + "\n")
    words = ["batch", str(directory), "--tp", "2", "--input", "requests.jsonl", "--output", "answers.jsonl"]
    for _ in range(2):
        with processes(tmp_path, commands(words, 2)) as started:
            assert [one.ended(3 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
    (answer,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    wanted = alone.generate(PROMPTS[0], max_tokens=5, temperature=0)[0].text
    assert answer["response"]["body"]["choices"][0]["text"] == wanted


@pytest.mark.slow
def test_chat_answers_in_process_0(directory: Path, alone: LLM, tmp_path: Path) -> None:
    words = ["chat", str(directory), "--tp", "2", "--max-tokens", "6", "--temperature", "0"]
    with processes(tmp_path, commands(words, 2), typed="hi\n/exit\n") as started:
        assert [one.ended(3 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
    (wanted,) = alone.chat([{"role": "user", "content": "hi"}], max_tokens=6, temperature=0)
    assert wanted.text in started[0].out.read_text() and started[1].out.read_text() == ""


@dataclass
class Served:
    """A server over two processes."""

    url: str
    started: list[Process]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=3 * WAIT_S)

    def begin_stream(self, tokens: int = 1000) -> tuple[threading.Thread, list[str]]:
        """A stream that has begun, and the lines that come."""
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            body = {"prompt": [7, 8, 9], "max_tokens": tokens, "ignore_eos": True, "stream": True}
            with (
                contextlib.suppress(httpx.HTTPError),  # process 0 may be killed
                httpx.Client(timeout=3 * WAIT_S) as client,
                client.stream("POST", f"{self.url}/v1/completions", json=body) as response,
            ):
                for line in response.iter_lines():
                    lines.append(line)
                    begun.set()

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        assert begun.wait(2 * WAIT_S)
        return thread, lines


@contextlib.contextmanager
def served(
    directory: Path, tmp_path: Path, count: int = 2, devices: int = 1, stages: int = 1
) -> Iterator[Served]:
    """A server over ``count`` processes of so many devices each."""
    words = ["serve", str(directory), "--tp", str(count * devices // stages), "--pp", str(stages)]
    words += ["--port", "0", "--drain-s", "20", "--max-slots", "4", "--max-model-len", "1024"]
    with processes(tmp_path, commands(words, count)) as started:
        url = started[0].until(r"is ready at (http://[^ \n]+)", 4 * WAIT_S)[1]
        yield Served(url, started)


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "ended"), [(signal.SIGTERM, (1,)), (signal.SIGINT, (0, 1))])
def test_a_server_answers_16_clients_and_drains_at_a_signal(
    ending: signal.Signals, ended: Sequence[int], directory: Path, alone: LLM, tmp_path: Path
) -> None:
    """To one follower alone, as a cluster ends a pod, or to all, as Ctrl-C does."""
    prompts = [f"{words} {number}" for number in range(4) for words in PROMPTS]
    wanted = alone.generate(prompts, GREEDY)
    with served(directory, tmp_path, devices=2) as server, server.client() as client:
        name = client.models.list().data[0].id

        def ask(prompt: str) -> str:
            answer = client.completions.create(
                model=name, prompt=prompt, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text

        with ThreadPoolExecutor(16) as pool:
            texts = list(pool.map(ask, prompts))
        assert texts == [one.text for one in wanted]
        thread, lines = server.begin_stream(tokens=100)
        for number in ended:
            server.started[number].popen.send_signal(ending)
        thread.join(WAIT_S)
        assert [one.ended() for one in server.started] == [0, 0], server.started[0].err.read_text()
        assert [line for line in lines if line][-1] == "data: [DONE]"  # it ran to its end


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("count", "stages"), ((3, 1), (2, 2)))
def test_a_follower_that_dies_or_hangs_ends_all_with_an_error(
    count: int, stages: int, fault: signal.Signals, directory: Path, tmp_path: Path
) -> None:
    """One that has a part of each layer, or one that has the last layers."""
    with served(directory, tmp_path, count, stages=stages) as server:
        thread, lines = server.begin_stream()
        follower = server.started[1].popen
        follower.send_signal(fault)
        start = time.monotonic()
        health = None
        while time.monotonic() < start + LIMIT_S and server.started[0].popen.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{server.url}/health", timeout=2)
                health = answer if answer.status_code != 200 else health
            time.sleep(0.1)
        thread.join(LIMIT_S)
        assert 0 not in [one.ended() for number, one in enumerate(server.started) if number != 1]
        assert time.monotonic() - start < LIMIT_S
        assert health is not None and "process 1 was lost" in health.text
        errors = [line for line in lines if '"error"' in line]
        assert "process 1 was lost" in errors[0], lines[-3:]
        assert "process 1 was lost" in server.started[0].err.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "stages"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 2)])
def test_followers_end_where_process_0_dies_or_hangs(
    fault: signal.Signals, stages: int, directory: Path, tmp_path: Path
) -> None:
    with served(directory, tmp_path, stages=stages) as server:
        server.begin_stream()
        server.started[0].popen.send_signal(fault)
        assert server.started[1].ended(LIMIT_S) != 0
        assert re.search("lost process 0|JAX distributed service", server.started[1].err.read_text())


@pytest.mark.slow
def test_another_model_checkpoint_version_and_options_are_refused_by_name(
    directory: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    (tmp_path / "other").mkdir()
    other = tiny_checkpoint(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, other / "model.safetensors")
    one, two = commands(["generate", "fox", "--model", "MODEL", "--tp", "2", "--max-tokens", "1"], 2)
    one[one.index("MODEL")], two[two.index("MODEL")] = str(directory), str(other)
    two += ["--max-model-len", "64"]
    two[1] = "import tpjax._version; tpjax._version.__version__ = '9'\n" + two[1]
    flags = " ".join((*COMPILE_FAST, "--xla_cpu_enable_fast_math=true"))
    with processes(tmp_path, [one, two], [{}, {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"}]) as started:
        assert [process.ended() for process in started] == [1, 1]  # recipes start them again
    for process in started:
        said = process.err.read_text()
        assert "tpjax: error: process 1 is refused: version is '9' in process 1 and '" in said
        assert "; max_model_len is 64 in process 1 and None in process 0; " in said
        assert "; --xla_cpu_enable_fast_math is 'true' in process 1 and None in process 0\n" in said
        assert "; jax_enable_x64 is 'True' in process 1 and 'False' in process 0; " in said
        assert f"; model is 'other' in process 1 and '{directory.name}' in process 0; " in said
        assert re.search("; checkpoint is '[0-9a-f]{64}' in process 1 and '[0-9a-f]{64}' in process 0", said)


def test_what_may_differ_between_processes(tmp_path: Path) -> None:
    """Devices that are faked, what goes to a path, and what a client of a hub leaves beside a checkpoint."""
    kept = {"--xla_a": "2", "--xla_b": "", "--xla_c": "x"}
    assert flags("--xla_a=1 --xla_b  --xla_a=2 --xla_c=x") == kept
    assert flags("--xla_force_host_platform_device_count=2 --xla_dump_hlo_as_text --xla_kept_at=/a/b") == {}
    (tmp_path / "config.json").write_text("{}")
    digest = digest_of_edges(tmp_path)
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "config.json.metadata").write_text("2026-11-27")
    assert digest_of_edges(tmp_path) == digest
    (tmp_path / "config.json").write_text("[]")
    assert digest_of_edges(tmp_path) != digest


@pytest.mark.slow
def test_one_that_differs_ends_all_and_those_too_that_have_not_come(directory: Path, tmp_path: Path) -> None:
    """With the reason, and not with JAX's trace of a coordinator that is gone."""
    own = ((), ("--max-model-len", "64"), ())
    words = commands(["generate", "fox", str(directory), "--tp", "3", "--max-tokens", "1"], 3, own)
    words[2][1] = SLOW + words[2][1]
    with processes(tmp_path, words, [{}, {}, {"SLOW": "resolve"}]) as started:
        assert [one.ended() for one in started] == [1, 1, 1]
    why = "process 1 is refused: max_model_len is 64 in process 1 and None in process 0\n"
    for one in started:
        said = one.err.read_text()
        assert f"tpjax: error: {why}" in said and "Check failure" not in said


# what SLOW names takes longer than anybody waits
SLOW = """
import os, sys, time
import tpjax.llm
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
from tpjax.runtime.programs import Programs

def slow(where, name):
    real = getattr(where, name)
    def call(*arguments):
        if os.environ.get("SLOW") == name:
            print(name, "begins", file=sys.stderr, flush=True)
            time.sleep(4 if name == "read" else 300)  # those that have begun are waited for
        return real(*arguments)
    setattr(where, name, call)

slow(tpjax.llm, "resolve")
slow(SafetensorsCheckpoint, "read")
slow(Programs, "_compile")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subcommand", "phase", "signalled", "statuses"),
    [
        ("serve", "resolve", (0,), [0, 0]),
        ("serve", "read", (1,), [0, 0]),
        ("serve", "_compile", (0, 1), [0, 0]),
        ("generate", "resolve", (1,), [130, 0]),
        ("generate", "read", (0, 1), [130, 0]),
    ],
)
def test_a_signal_while_a_model_loads_ends_all(
    subcommand: str,
    phase: str,
    signalled: Sequence[int],
    statuses: list[int],
    directory: Path,
    tmp_path: Path,
) -> None:
    """To one or to all: nobody waits for a process that does not come, and recipes start nothing again."""
    words = [subcommand, *(("fox",) if subcommand == "generate" else ("--port", "0"))]
    both = commands([*words, "--model", str(directory), "--tp", "2"], 2)
    both = [[option, SLOW + command, *rest] for option, command, *rest in both]
    with processes(tmp_path, both, [{"SLOW": phase}] * 2) as started:
        for one in started[: 1 if phase == "_compile" else 2]:  # process 1 compiles when it is told to
            one.until(f"{phase} begins")
        for number in signalled:
            started[number].popen.send_signal(signal.SIGTERM)
        assert [one.ended(20) for one in started] == statuses, started[0].err.read_text()
    assert "Traceback" not in started[0].err.read_text() + started[1].err.read_text()


@pytest.mark.slow
def test_ctrl_c_ends_a_process_that_waits_for_the_others(directory: Path, tmp_path: Path) -> None:
    words, _ = commands(["generate", "fox", str(directory)], 2)
    host, port = words[words.index("--coordinator") + 1].split(":")
    with processes(tmp_path, [words]) as (only,):
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
                break
            time.sleep(0.05)
        only.popen.send_signal(signal.SIGINT)
        assert only.ended(10) == 128 + signal.SIGINT


@pytest.mark.slow
def test_a_process_that_cannot_load_ends_the_others(directory: Path, tmp_path: Path) -> None:
    port = free_port()
    words = [
        [
            *("-m", "tpjax", "generate", "fox", path, "--coordinator", f"127.0.0.1:{port}"),
            *("--num-processes", "2", "--process-id", str(number)),
        ]
        for number, path in enumerate((str(directory), "nothing-here"))
    ]
    with processes(tmp_path, words) as started:
        assert [one.ended() for one in started] == [1, 2]
    assert "process 1 failed: unknown model 'nothing-here'" in started[0].err.read_text()


def test_late_processes_are_waited_for_no_longer_than_the_limit(directory: Path, tmp_path: Path) -> None:
    words = commands(["generate", "fox", str(directory), "--start-timeout-s", "2"], 2)
    with processes(tmp_path, words[:1]) as (only,):
        assert only.ended() == 1  # recipes start it again
    assert "all 2 processes were not at 127.0.0.1:" in only.err.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("", "all 2 processes were not at 127.0.0.1:"),
        ("import jax; jax.devices()", "process 1 did not begin to load the model within 10 s"),
    ],
)
def test_a_process_that_does_not_load_is_waited_for_no_longer_than_the_limit(
    last: str, said: str, directory: Path, tmp_path: Path
) -> None:
    """Whatever it did last: JAX itself would wait for its devices for minutes, and say nothing."""
    one, _ = commands(["generate", "fox", str(directory), "--start-timeout-s", "10"], 2)
    address = one[one.index("--coordinator") + 1]
    idle = f"import time, tpjax; tpjax.initialize_distributed('{address}', 2, 1); {last}\ntime.sleep(100)"
    with processes(tmp_path, [one, ["-c", idle]]) as started:
        assert started[0].ended() == 1
    assert said in started[0].err.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [(0, 1), (1,)])
def test_a_signal_to_generate_ends_all(signalled: tuple[int, ...], directory: Path, tmp_path: Path) -> None:
    """To all processes, as a launcher sends it, or to a follower alone."""
    words = ["generate", "fox", str(directory), "--tp", "2", "--max-tokens", "1000", "--ignore-eos"]
    with processes(tmp_path, commands([*words, "--max-model-len", "1024"], 2)) as started:
        started[1].until("process 1 follows process 0")
        time.sleep(2)
        for number in signalled:
            started[number].popen.send_signal(signal.SIGTERM)
        assert all(one.ended() is not None for one in started)
        assert started[0].popen.returncode != 0


BESIDE_PYTHON = {"PATH": os.pathsep.join((os.fspath(Path(sys.executable).parent), os.environ["PATH"]))}


def kill_a_child(process: Process) -> None:
    """Kills one of the processes that a recipe has started."""
    words = ["pgrep", "-P", str(process.popen.pid)]
    children = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)


@pytest.mark.slow
def test_the_recipe_by_hand_serves_starts_again_and_ends(directory: Path, tmp_path: Path) -> None:
    """Over two processes, of which one is killed."""
    script = os.fspath(ROOT / "scripts" / "launch" / "by_hand.sh")
    coordinator, ready = f"127.0.0.1:{free_port()}", r"is ready at http"
    words = [
        [script, coordinator, "2", str(number), str(directory), "--tp", "2", "--port", "0"]
        for number in range(2)
    ]
    with processes(tmp_path, words, [BESIDE_PYTHON] * 2, python=False) as started:
        started[0].until(ready, 4 * WAIT_S)
        kill_a_child(started[1])
        started[0].until(rf"starts again(.|\n)*{ready}", 4 * WAIT_S)
        started[1].popen.send_signal(signal.SIGTERM)
        started[0].popen.send_signal(signal.SIGTERM)
        assert [one.ended(2 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()


# srun of two tasks on one node: it makes SLURM's environment, and ends with the highest status of a task
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost,other SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
trap 'kill -TERM "${tasks[@]}"' TERM
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks[task]=$!
done
echo "${tasks[@]}" >"$SRUN_TASKS"
highest=0
for task in "${tasks[@]}"; do
    while wait "$task"; status=$?; kill -0 "$task" 2>/dev/null; do :; done
    (( status > highest )) && highest=$status
done
exit "$highest"
"""


@pytest.mark.slow
def test_the_recipe_for_slurm_serves_starts_again_and_ends(
    directory: Path, alone: LLM, tmp_path: Path
) -> None:
    """``--distributed`` and no address: detection is JAX's own, in the environment that srun makes."""
    (tmp_path / "bin").mkdir()
    srun, tasks = tmp_path / "bin" / "srun", tmp_path / "tasks"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),  # decides the coordinator's port
        "SRUN_TASKS": str(tasks),
        "PATH": os.pathsep.join((str(tmp_path / "bin"), BESIDE_PYTHON["PATH"])),
    }
    script, ready = os.fspath(ROOT / "scripts" / "launch" / "slurm.sh"), r"is ready at http://0.0.0.0:(\d+)"
    words = [script, str(directory), "--tp", "2", "--port", "0", "--served-model-name", "tiny"]
    with processes(tmp_path, [words], [slurm], python=False) as (job,):
        job.until(ready, 4 * WAIT_S)
        os.kill(int(tasks.read_text().split()[1]), signal.SIGKILL)
        again = job.until(rf"starts again(?:.|\n)*{ready}", 4 * WAIT_S)
        body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}
        url = f"http://127.0.0.1:{again[1]}/v1/completions"
        answer = httpx.post(url, json=body, timeout=2 * WAIT_S).json()
        wanted = alone.generate(PROMPTS[0], temperature=0, max_tokens=4)[0].text
        assert answer["choices"][0]["text"] == wanted
        for task in tasks.read_text().split():  # as SLURM signals a step
            os.kill(int(task), signal.SIGTERM)
        assert job.ended(2 * WAIT_S) == 0, job.err.read_text()
