"""One model over several processes of faked devices: real processes, which die, hang and differ."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
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
import openai
import pytest
from conftest import COMPILE_FAST
from serving import WAIT_S, free_port, load_tiny, tiny_checkpoint

from tpjax import LLM, SamplingParams

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
) -> Iterator[list[Process]]:
    """Starts a process for each list of arguments; kills those that are left."""
    started = []
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    kept |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(COMPILE_FAST), "JAX_PLATFORMS": "cpu"}
    kept |= {"TPJAX_CACHE": str(tmp_path / "cache")}
    try:
        for number, arguments in enumerate(words):
            out, err = tmp_path / f"{number}.out", tmp_path / f"{number}.err"
            own = environments[number] if environments else {}
            with open(out, "wb") as to, open(err, "wb") as errors:
                one = subprocess.Popen(
                    [sys.executable, *arguments] if python else arguments,
                    env=kept | own,
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


def commands(subcommand: Sequence[str], count: int, own: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """The same command for each process, but for its number, and its own arguments."""
    port = free_port()
    return [
        [
            *("-m", "tpjax", *subcommand, "--coordinator", f"127.0.0.1:{port}"),
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


SCRIPT = """
import json, sys
import numpy as np
import tpjax
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
number, count, port, directory, prompts, params = sys.argv[1:]
read, reads = SafetensorsCheckpoint.read, []
def reading(*arguments):
    array = read(*arguments)
    reads.append(array.nbytes)
    return array
SafetensorsCheckpoint.read = reading
tpjax.initialize_distributed(f"127.0.0.1:{port}", int(count), int(number))
tpjax.fake_devices(2)
llm = tpjax.LLM(directory, max_model_len=1024, max_slots=4)
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
        "tp": llm.explain().to_dict()["tp"],
    }
    json.dump(found, sys.stdout)
    llm.close()
else:
    try:
        llm.generate("fox")
    except tpjax.TpjaxError as error:
        print(error, file=sys.stderr)
"""


def params(one: SamplingParams) -> dict[str, Any]:
    return {name: value for name, value in vars(one).items() if value != getattr(SamplingParams(), name)}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_tokens_logits_and_scores_are_those_of_one_process(
    count: int, directory: Path, alone: LLM, tmp_path: Path
) -> None:
    port, each = free_port(), json.dumps([params(GREEDY), params(SEEDED)])
    words = [
        ["-c", SCRIPT, str(number), str(count), str(port), str(directory), json.dumps(PROMPTS), each]
        for number in range(count)
    ]
    with processes(tmp_path, words) as started:
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
    assert found["tp"] == 2 * count
    assert "process 1 has no requests" in started[1].err.read_text()


@pytest.mark.slow
def test_generate_prints_the_text_of_one_process_and_nothing_else(
    directory: Path, alone: LLM, tmp_path: Path
) -> None:
    words = ["generate", PROMPTS[0], str(directory), "--tp", "4", "--temperature", "0"]
    with processes(tmp_path, commands([*words, "--max-tokens", "12", "--ignore-eos"], 2)) as started:
        assert [one.ended(3 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
    assert started[0].out.read_text() == alone.generate(PROMPTS[0], GREEDY)[0].text + "\n"
    assert started[1].out.read_text() == ""


@dataclass
class Served:
    """A server over two processes."""

    url: str
    started: list[Process]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=3 * WAIT_S)

    def begin_stream(self) -> tuple[threading.Thread, list[str]]:
        """A long stream that has begun, and the lines that come."""
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            body = {"prompt": [7, 8, 9], "max_tokens": 1000, "ignore_eos": True, "stream": True}
            with (
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
def served(directory: Path, tmp_path: Path) -> Iterator[Served]:
    words = [
        "serve",
        str(directory),
        "--tp",
        "2",
        "--port",
        "0",
        "--max-slots",
        "4",
        "--max-model-len",
        "1024",
    ]
    with processes(tmp_path, commands([*words, "--drain-s", "20"], 2)) as started:
        url = started[0].until(r"is ready at (http://[^ \n]+)", 4 * WAIT_S)[1]
        yield Served(url, started)


@pytest.mark.slow
def test_a_server_answers_16_clients_and_ends_at_a_followers_sigterm(
    directory: Path, alone: LLM, tmp_path: Path
) -> None:
    prompts = [f"{words} {number}" for number in range(4) for words in PROMPTS]
    wanted = alone.generate(prompts, GREEDY)
    with served(directory, tmp_path) as server, server.client() as client:
        name = client.models.list().data[0].id

        def ask(prompt: str) -> str:
            answer = client.completions.create(
                model=name, prompt=prompt, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text

        with ThreadPoolExecutor(16) as pool:
            texts = list(pool.map(ask, prompts))
        assert texts == [one.text for one in wanted]
        server.started[1].popen.send_signal(signal.SIGTERM)
        assert [one.ended() for one in server.started] == [0, 0], server.started[0].err.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_follower_that_dies_or_hangs_ends_all_with_an_error(
    fault: signal.Signals, directory: Path, tmp_path: Path
) -> None:
    with served(directory, tmp_path) as server:
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
        assert server.started[0].ended() not in (0, None)
        assert time.monotonic() - start < LIMIT_S
        assert health is not None and "process 1 was lost" in health.text
        errors = [line for line in lines if '"error"' in line]
        assert "process 1 was lost" in errors[0], lines[-3:]
        assert "process 1 was lost" in server.started[0].err.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_followers_end_where_process_0_dies_or_hangs(
    fault: signal.Signals, directory: Path, tmp_path: Path
) -> None:
    with served(directory, tmp_path) as server:
        server.started[0].popen.send_signal(fault)
        assert server.started[1].ended(LIMIT_S) != 0
        assert re.search("lost process 0|JAX distributed service", server.started[1].err.read_text())


@pytest.mark.slow
def test_a_process_that_differs_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    words = ["generate", "fox", str(directory), "--tp", "2", "--max-tokens", "1"]
    with processes(tmp_path, commands(words, 2, ((), ("--max-model-len", "64")))) as started:
        assert all(one.ended() for one in started)
    why = "process 1 is refused: max_model_len is 64 in process 1 and None in process 0"
    assert all(f"tpjax: error: {why}\n" in one.err.read_text() for one in started)


@pytest.mark.slow
def test_another_checkpoint_is_refused(directory: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    (tmp_path / directory.name).mkdir()
    other = tiny_checkpoint(tmp_path / directory.name)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, other / "model.safetensors")
    port = free_port()
    words = [
        [
            *("-m", "tpjax", "generate", "fox", str(path), "--tp", "2", "--max-tokens", "1"),
            *("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(number)),
        ]
        for number, path in enumerate((directory, other))
    ]
    with processes(tmp_path, words) as started:
        assert all(one.ended() for one in started)
    assert "process 1 is refused: checkpoint is '" in started[0].err.read_text()


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
        assert only.ended() == 2
    assert "all 2 processes were not at 127.0.0.1:" in only.err.read_text()


@pytest.mark.slow
def test_slurm_s_environment_is_enough(directory: Path, alone: LLM, tmp_path: Path) -> None:
    """``--distributed`` and no address: detection is JAX's own."""
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),  # decides the coordinator's port
        "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    tasks = [slurm | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(2)]
    words = ["-m", "tpjax", "generate", PROMPTS[0], str(directory), "--tp", "2", "--temperature", "0"]
    words += ["--max-tokens", "4", "--ignore-eos", "--distributed"]
    with processes(tmp_path, [words, words], tasks) as started:
        assert [one.ended(3 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
    assert (
        started[0].out.read_text() == alone.generate(PROMPTS[0], temperature=0, max_tokens=4)[0].text + "\n"
    )


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


@pytest.mark.slow
def test_processes_in_time_wait_for_one_that_is_late_to_load(directory: Path, tmp_path: Path) -> None:
    """Longer than the silence after which a process counts as lost; process 0 says whom it waits for."""
    port = free_port()
    each = json.dumps([params(GREEDY)])
    late = SCRIPT.replace(
        "llm = tpjax.LLM(", "import time, jax; jax.devices(); time.sleep(25)\nllm = tpjax.LLM("
    )
    words = [
        ["-c", late if number == 2 else SCRIPT, str(number), "3", str(port), str(directory), '["fox"]', each]
        for number in range(3)
    ]
    with processes(tmp_path, words) as started:
        assert [one.ended(5 * WAIT_S) for one in started] == [0, 0, 0], started[0].err.read_text()
    assert "process 0 waits for process 2 to begin to load the model" in started[0].err.read_text()


LAUNCH = sorted((ROOT / "scripts" / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", LAUNCH, ids=[script.name for script in LAUNCH])
def test_recipes_are_sound_and_say_what_they_need(script: Path) -> None:
    """Without arguments each prints its usage; shellcheck, of the test extra, finds nothing."""
    done = subprocess.run([script], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and "MODEL" in done.stderr
    shellcheck = shutil.which("shellcheck", path=os.fspath(Path(sys.executable).parent))
    if shellcheck is not None:
        checked = subprocess.run([shellcheck, script], capture_output=True, text=True, timeout=WAIT_S)
        assert checked.stdout == ""


@pytest.mark.slow
def test_the_recipe_by_hand_serves_starts_again_and_ends(directory: Path, tmp_path: Path) -> None:
    """Over two processes, of which one is killed."""
    script = os.fspath(ROOT / "scripts" / "launch" / "by_hand.sh")
    coordinator, ready = f"127.0.0.1:{free_port()}", r"is ready at http"
    words = [
        [script, coordinator, "2", str(number), str(directory), "--tp", "2", "--port", "0"]
        for number in range(2)
    ]
    path = {"PATH": os.pathsep.join((os.fspath(Path(sys.executable).parent), os.environ["PATH"]))}
    with processes(tmp_path, words, [path, path], python=False) as started:
        started[0].until(ready, 4 * WAIT_S)
        children = subprocess.run(
            ["pgrep", "-P", str(started[1].popen.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(children[0]), signal.SIGKILL)
        started[0].until(rf"starts again(.|\n)*{ready}", 4 * WAIT_S)
        started[1].popen.send_signal(signal.SIGTERM)
        started[0].popen.send_signal(signal.SIGTERM)
        assert [one.ended(2 * WAIT_S) for one in started] == [0, 0], started[0].err.read_text()
