"""Every subcommand as a process of its own, with each of its options; nothing is replaced.

What it prints is held against the library in this process. The model is a tiny mixture of experts with a
tokenizer, so that all options apply.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import COMPILE_FAST
from serving import WAIT_S, free_port, tiny_checkpoint
from test_measure import FIGURES

from tpjax import LLM, SamplingParams
from tpjax.cli import app
from tpjax.planning import measure

ROOT = Path(app.__file__).parents[2]
PROMPT = "the quick brown fox"

ALONE = (  # the only one of its processes
    "--distributed --coordinator 127.0.0.1:{port} --num-processes 1 --process-id 0 --start-timeout-s 60"
)

# name -> words after `tpjax`; {model}, {tmp} and so on are filled in. Together they use every option there
# is: test_every_option_is_tried says which one is missing.
COMMANDS = {
    "generate": (
        "generate '{prompt}' {model} --tp 2 --dp 2 --dtype float32 --max-model-len 64 --expert-parallel off "
        "--attention xla "
        "--max-tokens 12 --min-tokens 2 --temperature 0.8 --top-k 40 --top-p 0.95 --min-p 0.001 --seed 7 "
        "--stop zebra --stop quagga --stop-token-ids 3 --ignore-eos --repetition-penalty 1.1 "
        "--presence-penalty 0.2 --frequency-penalty 0.1 --logit-bias 7:1.5 9:-2 --generation-config none "
        + ALONE
    ),
    "generate json": (
        "generate --prompts {prompts} --model {model} --json --logprobs 2 --temperature 0 --max-tokens 4 "
        "--max-model-len 64 --chat --profile {tmp}/profile"
    ),
    "generate ids": (
        "generate - {model} --pp 2 --token-ids --temperature 0 --max-tokens 4 --max-model-len 64 --ignore-eos"
    ),
    "generate chat": (
        "generate '{prompt}' {model} --system 'Be brief.' --temperature 0 --max-tokens 4 --max-model-len 128 "
        "--quantize int8 --quantize-head --kv-dtype int8"
    ),
    "chat": (
        "chat --model {model} --tp 2 --dp 1 --pp 2 --dtype float32 --max-model-len 128 --expert-parallel off "
        "--attention auto --quantize int8 --quantize-head --kv-dtype int8 "
        "--system brief --max-tokens 6 --min-tokens 1 --temperature 0 --top-k 5 --top-p 0.9 --min-p 0.01 "
        "--seed 3 --stop zebra --stop-token-ids 3 --ignore-eos --repetition-penalty 1.1 "
        "--presence-penalty 0.1 --frequency-penalty 0.1 --logit-bias 7:1 --logprobs 1 "
        "--generation-config auto " + ALONE
    ),
    "serve": (
        "serve --model {model} --tp 2 --dp 2 --pp 1 --dtype float32 --max-model-len 64 "
        "--expert-parallel auto --attention xla --quantize int8 --quantize-head --kv-dtype int8 "
        "--host 127.0.0.1 --port 0 --served-model-name tiny --max-slots 2 --max-num-batched-tokens 256 "
        "--max-queue 64 --api-key first --api-key-file {keys} --protect-metrics "
        "--allow-origin http://localhost:3000 --max-body-mib 1 --drain-s 5 --generation-config none " + ALONE
    ),
    "bench serve": (
        "bench serve --base-url {url} --model tiny --num-prompts 3 --input-len 5 --output-len 4 "
        "--range-ratio 0.2 --request-rate 50 inf --max-concurrency 2 --goodput ttft:60000 e2el:60000 "
        "--seed 5 --api-key second --output {tmp}/rates.json --plot {tmp}/rates.png"
    ),
    "bench serve json": (
        "bench serve --base-url {url} --num-prompts 1 --output-len 2 --input-len 4 --api-key first --json"
    ),
    "batch": (
        "batch --model {model} --input {requests} --output {tmp}/answers.jsonl --max-slots 2 --tp 2 --dp 2 "
        "--pp 1 --max-num-batched-tokens 256 --generation-config auto "
        "--dtype float32 --max-model-len 64 --expert-parallel off --attention xla --quantize int8 "
        "--quantize-head --kv-dtype int8 " + ALONE
    ),
    "bench": "bench {model} --tp 1 --dp 2 --context 40 --prompt-len 20 --rounds 1 --json " + ALONE,
    "bench table": "bench --model {model} --tp 2 --pp 1 --context 40 --rounds 1",
    "plan": (
        "plan --model mixtral-8x7b --hardware mine:4 --hardware-file {chips} --tp 4 --batch 8 --context 512 "
        "--prompt-len 128 --dtype int8 --kv-dtype fp8 --plot {tmp}/frontier.svg --json"
    ),
    "plan serve": (
        "plan llama-3-8b --hardware v6e:4 --tp 2 --serve --rate 4 inf --lengths 200:20 --num-prompts 8 "
        "--range-ratio 0.5 --max-concurrency 6 --max-slots 4 --goodput ttft:500 tpot:50 --seed 1 --json"
    ),
    "plan trace": "plan llama-3-8b --hardware v6e:4 --serve --trace {trace}",
    "plan measure": "plan {model} --measure --rounds 1 --tp 2 --context 64",
    "explain": (
        "explain --model {model} --tp 3 --dp 2 --dtype bfloat16 --max-model-len 64 --expert-parallel off "
        "--attention reference --plot {tmp}/shards.png --json " + ALONE
    ),
    "explain config": (
        "explain --config {model}/config.json --tp 2 --pp 2 --quantize int8 --quantize-head --kv-dtype int8"
    ),
    "explain topology": "explain llama-3-8b --topology v5e:99x99 --context 64 --batch 8 --prompt-len 64",
    "convert": (
        "convert --model {model} {tmp}/orbax --dtype bfloat16 --quantize int8 --format orbax " + ALONE
    ),
    "pull": "pull --model smollm2-135m --verify",
    "models": "models --json",
    "doctor": "doctor --json",
    "doctor measure": "doctor --measure --json",
}
SHARED = {"--help", "--debug"}


def words(name: str, **places: Any) -> list[str]:
    return [word.format(prompt=PROMPT, **places) for word in shlex.split(COMMANDS[name])]


def start(arguments: list[str], places: dict[str, Any], **pipes: Any) -> subprocess.Popen[str]:
    """``tpjax`` as a shell starts it, but for the optimisation of what it compiles, and the cache folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    environment = kept | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(COMPILE_FAST),
        "TPJAX_CACHE": str(places["cache"]),
    }
    command = [sys.executable, "-m", "tpjax", *arguments]
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def tpjax(name: str, places: dict[str, Any], stdin: str = "", status: int = 0) -> tuple[str, str]:
    """Runs a command to its end and returns its stdout and stderr."""
    pipe = subprocess.PIPE
    process = start(words(name, **places), places, stdin=pipe, stdout=pipe, stderr=pipe)
    out, err = process.communicate(stdin, timeout=540)
    assert process.returncode == status, f"{out[-2000:]}\n{err[-4000:]}"
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "mixtral")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def places(model: Path, cache: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": model, "cache": cache, "tmp": tmp_path, "port": free_port()}


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model, tp=1, max_model_len=128, max_slots=2)


@pytest.fixture(scope="module")
def quantized(model: Path) -> LLM:
    return LLM(
        model,
        tp=1,
        max_model_len=128,
        max_slots=2,
        quantize="int8",
        quantize_head=True,
        kv_dtype="int8",
    )


def test_every_option_is_tried() -> None:
    """An option that no command above has was never seen to work."""
    missing = {}
    for name, command in typer.main.get_command(app.app).commands.items():
        options = {option.opts[0] for option in command.params if option.opts[0].startswith("--")}
        tried = {
            word
            for line in COMMANDS.values()
            if line.startswith(f"{name} ") and (name != "bench" or not line.startswith("bench serve"))
            for word in shlex.split(line)
        }
        if left := options - tried - SHARED:
            missing[name] = sorted(left)
    assert missing == {}


def test_generate(places: dict[str, Any], llm: LLM) -> None:
    out, err = tpjax("generate", places)
    params = SamplingParams(
        max_tokens=12, min_tokens=2, temperature=0.8, top_k=40, top_p=0.95, min_p=0.001, seed=7,
        stop=("zebra", "quagga"), stop_token_ids=(3,), ignore_eos=True, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=0.1, logit_bias={7: 1.5, 9: -2.0},
    )  # fmt: skip
    (completion,) = llm.generate([PROMPT], params)
    assert out == completion.text + "\n" and len(completion.token_ids) > 1
    lines = err.splitlines()
    assert lines[0] == "tpjax: the only device is a CPU: faking 4 devices"
    pattern = (
        r"tpjax: loaded in [\d.]+ s, compiled in [\d.]+ s, first token after \d+ ms, \d+ tokens? \(\w+\)"
    )
    assert re.match(pattern, lines[-1]) and lines[-1].endswith(", dp=2 × tp=2, cpu")


@pytest.mark.slow
def test_generate_many_as_json(places: dict[str, Any], llm: LLM, tmp_path: Path) -> None:
    places["prompts"] = tmp_path / "prompts.jsonl"
    lines = [{"prompt": PROMPT}, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}]
    places["prompts"].write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, err = tpjax("generate json", places)
    first, second = map(json.loads, out.splitlines())
    greedy = SamplingParams(max_tokens=4, temperature=0, logprobs=2)
    prompt = llm.chat_prompt([{"role": "user", "content": PROMPT}])
    (completion,) = llm.generate([prompt], greedy)
    assert (first["token_ids"], first["text"]) == (completion.token_ids, completion.text)
    assert len(first["logprobs"]) == len(completion.token_ids) and len(second["token_ids"]) == 2
    assert "2 prompts" in err and list((tmp_path / "profile").rglob("*.pb"))


@pytest.mark.slow
def test_generate_from_stdin(places: dict[str, Any], llm: LLM) -> None:
    out, _ = tpjax("generate ids", places, "5, 6 7\n")
    (completion,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert out.split() == [str(token) for token in completion.token_ids]


@pytest.mark.slow
def test_generate_a_message(places: dict[str, Any], quantized: LLM) -> None:
    out, _ = tpjax("generate chat", places)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    (completion,) = quantized.generate(
        [quantized.chat_prompt(messages)], SamplingParams(max_tokens=4, temperature=0)
    )
    assert out == completion.text + "\n"


@pytest.mark.slow
def test_interrupting_generate_is_quiet(places: dict[str, Any]) -> None:
    arguments = ["generate", PROMPT, str(places["model"]), "--max-tokens", "900", "--ignore-eos"]
    with start(arguments, places, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (130, "")


@pytest.mark.slow
def test_chat(places: dict[str, Any], quantized: LLM) -> None:
    out, err = tpjax("chat", places, "hi\n/reset\nhi\n/exit\n")
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}]
    params = SamplingParams(
        max_tokens=6, min_tokens=1, temperature=0, stop=("zebra",), stop_token_ids=(3,), ignore_eos=True,
        repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={7: 1.0},
    )  # fmt: skip
    (completion,) = quantized.generate([quantized.chat_prompt(messages)], params)
    assert completion.text and out.count(completion.text) == 2  # the conversation was forgotten in between
    assert f"{places['model']} at pp=2 × tp=2; /help shows the commands" in err


@contextlib.contextmanager
def serving(places: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """``tpjax serve`` until the block ends; its address is in ``places["url"]``."""
    with start(words("serve", **places), places, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"http://[\d.:]+", line):
                    places["url"] = found[0]
                if "is ready" in line:
                    break
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_serve_and_bench_serve(places: dict[str, Any], tmp_path: Path, quantized: LLM) -> None:
    places["keys"] = tmp_path / "keys"
    places["keys"].write_text("second\n")
    with serving(places) as process:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
        headers = {"authorization": "Bearer second", "content-type": "application/json"}
        request = urllib.request.Request(
            f"{places['url']}/v1/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=2 * WAIT_S) as answer:
            text = json.load(answer)["choices"][0]["text"]
        (completion,) = quantized.generate([PROMPT], SamplingParams(max_tokens=5, temperature=0))
        assert text == completion.text
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{places['url']}/metrics", timeout=2 * WAIT_S)
        out, _ = tpjax("bench serve", places)
        assert out.count("Request throughput") == out.count("Time to First Token") == 2
        for result in json.loads((tmp_path / "rates.json").read_text()):
            assert result["completed"] == 3
        assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
        out, _ = tpjax("bench serve json", places)
        assert json.loads(out)[0]["completed"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
        assert process.wait(WAIT_S) == 0


@pytest.mark.slow
def test_batch(places: dict[str, Any], tmp_path: Path, quantized: LLM) -> None:
    places["requests"] = tmp_path / "requests.jsonl"
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    places["requests"].write_text(json.dumps(line) + "\n")
    _, err = tpjax("batch", places)
    (answer,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    (completion,) = quantized.generate([PROMPT], SamplingParams(max_tokens=5, temperature=0))
    assert answer["custom_id"] == "a" and answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["choices"][0]["text"] == completion.text
    assert "1 answered, 0 failed" in err


@pytest.mark.slow
def test_bench(places: dict[str, Any]) -> None:
    out, err = tpjax("bench", places)
    data = json.loads(out)
    assert (data["model"], data["tp"], data["context"]) == (str(places["model"]), 1, 40)
    assert (data["prompt_len"], data["dtype"], data["device"]) == (20, "float32", "cpu")
    for step in ("decode", "prefill"):
        assert data[step]["measured_ms"] > 0 and data[step]["predicted_ms"] > 0
    assert "measuring this machine at tp=2" in err


@pytest.mark.slow
def test_bench_as_a_table(places: dict[str, Any], tmp_path: Path) -> None:
    """The cache folder has figures of this machine: it is not measured again."""
    places["cache"] = tmp_path / "cache"
    measure.keep(places["cache"] / "measured.json", 2, FIGURES)
    out, err = tpjax("bench table", places)
    assert "predicted / measured" in out and "decode at 40 tokens" in out and "abacus" in out
    assert "measuring" not in err


def test_plan(places: dict[str, Any], tmp_path: Path) -> None:
    places["chips"] = tmp_path / "chips.toml"
    places["chips"].write_text(
        "[mine]\nmemory_gb = 80\nbandwidth_gb_s = 2000\nbf16_tflops = 300\nfp8_tflops = 600\n"
        'link = "nvlink"\nlink_gb_s = 300\n'
    )
    out, _ = tpjax("plan", places)
    data = json.loads(out)
    assert (data["chips"], data["tp"], data["dtype"], data["hardware"]) == (4, 4, "int8", "mine")
    assert (tmp_path / "frontier.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_plan_serves(places: dict[str, Any], tmp_path: Path) -> None:
    out, _ = tpjax("plan serve", places)
    data = json.loads(out)
    assert (data["tp"], data["replicas"], data["max_slots"]) == (2, 2, 4)
    assert [run["completed"] for run in data["runs"]] == [8, 8]
    assert data["goodput_objective_ms"] == {"ttft": 500.0, "tpot": 50.0}
    places["trace"] = tmp_path / "trace.jsonl"
    places["trace"].write_text('{"timestamp": 0, "input_length": 90, "output_length": 8}\n')
    out, _ = tpjax("plan trace", places)
    assert "TTFT median" in out


@pytest.mark.slow
def test_plan_measures(places: dict[str, Any]) -> None:
    out, err = tpjax("plan measure", places)
    assert "tp=2" in out and "measuring this machine at tp=2" in err


@pytest.mark.slow
def test_explain(places: dict[str, Any], tmp_path: Path) -> None:
    out, _ = tpjax("explain", places)
    report = json.loads(out)
    assert (report["tp"], report["dp"], report["dtype"]) == (3, 2, "bfloat16")
    assert {step["name"] for step in report["steps"]} >= {"decode"}
    assert (tmp_path / "shards.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_explain_a_configuration(places: dict[str, Any]) -> None:
    out, _ = tpjax("explain config", places)
    assert "mixtral" in out and "all-reduces (" in out


def test_explain_for_chips_that_do_not_exist(places: dict[str, Any]) -> None:
    """The part that needs no TPU or GPU compiler: tests/test_topology_*.py have the rest."""
    out, err = tpjax("explain topology", places, status=2)
    assert out == "" and len(err.splitlines()) == 1 and "v5e:99x99" in err


@pytest.mark.slow
def test_convert_and_generate(places: dict[str, Any], tmp_path: Path) -> None:
    out, _ = tpjax("convert", places)
    assert out == f"{tmp_path}/orbax\n"
    places["model"] = tmp_path / "orbax"
    out, _ = tpjax("generate ids", places, "5 6 7")
    converted = LLM(tmp_path / "orbax", tp=1, max_model_len=64, max_slots=1)
    greedy = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    (completion,) = converted.generate([[5, 6, 7]], greedy)
    assert out.split() == [str(token) for token in completion.token_ids]


def test_pull(places: dict[str, Any], smollm2_gguf: Path) -> None:
    places["cache"] = smollm2_gguf.parents[2]
    out, _ = tpjax("pull", places)
    assert out == f"{smollm2_gguf}\n"


@pytest.mark.slow
def test_models_and_doctor(places: dict[str, Any]) -> None:
    out, _ = tpjax("models", places)
    facts = json.loads(out)
    assert set(facts["aliases"]) == {"smollm2-135m", "gemma3-270m"} and "mixtral" in facts["families"]
    out, _ = tpjax("doctor", places)
    facts = json.loads(out)
    assert facts["devices"]["platform"] == "cpu" and str(places["cache"]) in out


@pytest.mark.slow
def test_doctor_measures(places: dict[str, Any]) -> None:
    out, _ = tpjax("doctor measure", places)
    report = json.loads(out)
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert report["attention"].startswith("xla")
    assert {"reading memory", "product in float32", "prompt of 512 tokens"} < set(figures)
    assert all(figure["measured"] > 0 and figure["expected"] is None for figure in figures.values())
