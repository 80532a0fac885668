"""The command line without a model: help, exit statuses, one-line errors, streaming, doctor."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import typer
from conftest import COMPILE_FAST
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from serving import WAIT_S

from tpjax import __version__
from tpjax.checkpoints import hub
from tpjax.cli import app as cli
from tpjax.cli import batch, console, generate
from tpjax.errors import EngineError
from tpjax.inspect import doctor
from tpjax.inspect.accelerators import has_nvidia_gpu, has_tpu
from tpjax.llm import Completion
from tpjax.planning.arrivals import Arrival, read_trace
from tpjax.sampling_params import SamplingParams
from tpjax.server.app import create_app
from tpjax.server.service import name_in_api

SUBCOMMANDS = (
    *("generate", "chat", "serve", "batch", "models", "pull", "convert", "explain", "plan", "bench"),
    *("bench serve", "doctor"),
)
ROOT = Path(cli.__file__).parents[2]
LLAMA = ROOT / "tests/goldens/llama"


def tpjax(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, as a user does: without the faked devices of the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    return subprocess.run(
        [sys.executable, "-m", "tpjax", *arguments],
        env={**kept, "XLA_FLAGS": " ".join(COMPILE_FAST), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def status(*args: str) -> int:
    """Runs the command in this process and returns its exit status, however it ends."""
    try:
        return cli.main(args)
    except SystemExit as exit:
        return exit.code


# --- help and versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", (("--help",), ("-h",), ()))
def test_help_lists_exactly_the_subcommands_there_are(arguments, capsys):
    assert status(*arguments) == 0
    listed = capsys.readouterr().out.partition("Commands")[2]
    rows = [line[2:].split("  ")[0] for line in listed.splitlines() if line[2:3].strip(" ─")]
    assert tuple(rows) == SUBCOMMANDS


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_every_subcommand_shows_examples_that_parse(subcommand, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert status(*subcommand.split(), "--help") == 0
    shown = capsys.readouterr().out.partition("Examples:")[2].strip().splitlines()
    examples = [line.strip() for line in shown if line.strip()]
    assert len(examples) >= 2
    command = typer.main.get_command(cli.app).commands[subcommand]
    for example in examples:
        arguments = shlex.split(example)
        arguments = arguments[arguments.index("tpjax") + 1 :]
        words = subcommand.split()
        assert arguments[: len(words)] == words
        command.make_context(subcommand, arguments[len(words) :])


def test_version(capsys):
    assert status("--version") == 0
    assert capsys.readouterr().out == f"tpjax {__version__}\n"


def test_help_starts_neither_jax_nor_anything_else_heavy():
    program = (
        "import sys; from tpjax.cli import app as cli\n"
        "try: cli.main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'huggingface_hub', 'tokenizers'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("HEAVY []\n"), done.stdout + done.stderr


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "no prompt is given: PROMPT, - for stdin, or --prompts FILE"),
        (["generate", "x"], "no model is given: name one, such as smollm2-135m"),
        (["generate", "x", "a", "--model", "b"], "two models are given: 'a' and --model 'b'"),
        (["generate", "x", "llama-3-8b"], "'llama-3-8b' names a published model, whose weights are at "),
        (["generate", "x", "nope", "--prompts", "y"], "--prompts FILE has the prompts: leave PROMPT out"),
        (["generate", "--prompts", "none.txt", "nope"], "none.txt: No such file or directory"),
        (["generate", "5 x", "nope", "--token-ids"], "--token-ids: 'x' is not a token id"),
        (["convert", "a", "t", "--model", "b"], "two models are given: 'a' and --model 'b'"),
        (["explain", "a", "--model", "b"], "two models are given: 'a' and --model 'b'"),
        (["convert", "smollm2-135m"], "no target is given: convert MODEL TARGET"),
        (["batch", "x", "--input", "none.jsonl", "--output", "y"], "none.jsonl: No such file or directory"),
        (["generate", "x", "--model", "nope"], "unknown model 'nope': not a built-in alias ("),
        (
            ["generate", "x", "--model", "nope", "--tp", "0"],
            "Invalid value for '--tp': '0' is not a whole number of devices, 1",
        ),
        (
            ["generate", "x", "--model", "nope", "--tp", "-4"],
            "Invalid value for '--tp': '-4' is not a whole number of devices",
        ),
        (
            ["generate", "x", "--model", "nope", "--tp", "2.5"],
            "Invalid value for '--tp': '2.5' is not a whole number of devices",
        ),
        (
            ["explain", "nope", "--max-model-len", "0"],
            "Invalid value for '--max-model-len': '0' is not a whole number of tokens",
        ),
        (
            ["generate", "x", "--model", "nope", "--temperature", "nan"],
            "temperature=nan is not a finite number",
        ),
        (
            ["generate", "x", "--model", "nope", "--temperature", "-1"],
            "temperature=-1.0 is not a finite number",
        ),
        (
            ["generate", "x", "--model", "nope", "--max-tokens", "-1"],
            "max_tokens=-1 is not a whole number, 0 or more",
        ),
        (["generate", "x", "--model", "nope", "--stop", ""], "stop='' is not a non-empty string"),
        (
            ["generate", "x", "--model", "nope", "--dtype", "int3"],
            "Invalid value for '--dtype': 'int3' is not",
        ),
        (["pull", "./none"], "./none: no such file or directory"),
        (
            ["pull", ".", "--verify"],
            "--verify knows the digests of built-in aliases (smollm2-135m, gemma3-270m)",
        ),
        (["generate", "x", "nope", "--profile", __file__], f"{__file__}: File exists"),
        (["generate", "x", "nope", "--profile", f"{__file__}/x"], f"{__file__}/x: Not a directory"),
        (["bench", "serve", "--output", "/nowhere/x"], "/nowhere/x: No such file or directory"),
        (["bench", "serve", "--base-url", "nope"], "nope does not answer as an OpenAI server: "),
        (
            ["generate", "x", "nope", "--temperature", "hot"],
            "Invalid value for '--temperature': 'hot' is ",
        ),
        (
            ["generate", "x", "nope", "--seed", "1.5"],
            "Invalid value for '--seed': '1.5' is not a whole",
        ),
        (
            ["generate", "x", "nope", "--logit-bias", "5"],
            "Invalid value for '--logit-bias': '5' is not ID:",
        ),
        (["plan", "nope", "--seed", "x"], "Invalid value for '--seed': 'x' is not a whole number"),
        (["bench", "serve", "--goodput", "ttft"], "Invalid value for '--goodput': 'ttft' is not ttft:MS, "),
        (
            ["explain", "llama-3-9b"],
            "'llama-3-9b' is neither a checkpoint nor a built-in model; did you ",
        ),
        (["explain", "none.json"], "none.json: no such file or directory"),
        (
            ["bench", str(LLAMA), "--context", "9999999", "--prompt-len", "5"],
            "--context 9999999 and --prompt-len 5 need sequences of 10000063 tokens, over the model's ",
        ),
        (["explain"], "give either MODEL or --config FILE"),
        (["explain", "smollm2-135m", "--batch", "64"], "--batch means nothing without --topology"),
        (["explain", "smollm2-135m", "--config", "x.json"], "give either MODEL or --config FILE"),
        (["frobnicate"], "No such command 'frobnicate'. (see `tpjax --help`)"),
        (["generat"], "No such command 'generat'. Did you mean 'generate'? (see `tpjax --help`)"),
        (["explain", "x", "--tpp", "3"], "No such option: --tpp (did you mean --dtype, --pp, --tp?)"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert status(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"tpjax: error: {message}"), err
    assert (out, err.count("\n")) == ("", 1)


def test_an_invalid_value_is_said():
    """Typer's own parsers do not say it: "Input should be a valid integer, unable to parse string"."""
    seen = 0
    for name, command in typer.main.get_command(cli.app).commands.items():
        for option in command.params:
            try:
                command.make_context(name, [option.opts[0], "zebra"])
            except cli.TyperException as error:
                message = error.format_message()
                if message.startswith("Invalid value"):
                    seen += 1
                    assert "'zebra'" in message, f"{name}: {message}"
    assert seen > 60


@pytest.mark.parametrize(("text", "said"), (("[]", "an object, not a list"), ("{}", "model_type=None is ")))
def test_an_invalid_configuration_is_named(text, said, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(text)
    for model in (file, tmp_path):
        assert status("explain", str(model)) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"tpjax: error: {file}: ") and said in err and err.count("\n") == 1


def test_a_server_of_something_else_is_one_line(capsys):
    import http.server
    import threading

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        assert status("bench", "serve", "--base-url", url) == 2
        other.shutdown()
    said = f"{url} does not answer as an OpenAI server: /v1/models is 404 Not Found"
    assert capsys.readouterr().err == f"tpjax: error: {said}\n"


@pytest.mark.parametrize("arguments", [["--debug", "pull", "nope"], ["pull", "nope", "--debug"]])
def test_debug_shows_the_traceback(arguments, capsys):
    assert status(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert "tpjax.errors.CheckpointError: unknown model 'nope'" in err
    assert err.splitlines()[-1].startswith("tpjax: error: unknown model 'nope'")


def test_an_unforeseen_error_is_one_line_and_status_1():
    done = tpjax("explain", str(LLAMA), "--tp", "1", JAX_PLATFORMS="abacus")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tpjax: error: RuntimeError: ") and "abacus" in line
    assert line.endswith(" (a bug, or the machine's; --debug shows where)")


def test_a_terminal_without_a_character_shows_another():
    done = tpjax("plan", "--help", PYTHONIOENCODING="ascii", COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "") and "--cache-dt?" in done.stdout


def test_a_reader_that_leaves_is_no_error():
    program = f"{sys.executable} -m tpjax doctor --json"
    script = f"set -o pipefail; {program} | true; echo status ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.stderr) == ("status 141\n", "")


def test_interrupting_a_compilation_ends_at_once():
    """A thread in XLA does not stop, as one that sleeps does not."""
    program = (
        "import time; from tpjax.cli.compiling import wait_for\n"
        "wait_for(lambda: (print('begun', flush=True), time.sleep(600)), 'compiling')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        time.sleep(1)  # it waits now
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (130, "")


def test_a_full_disk_is_one_line():
    program = f"{sys.executable} -m tpjax models > /dev/full"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (2, "tpjax: error: the output: No space left on device\n")


def test_a_measurement_that_cannot_be_kept_is_not_begun(monkeypatch, capsys):
    monkeypatch.setenv("TPJAX_CACHE", f"{__file__}/cache")
    assert status("plan", "llama-3-8b", "--measure", "--tp", "1") == 2
    assert capsys.readouterr().err == f"tpjax: error: {__file__}/cache: Not a directory\n"


@pytest.mark.skipif(has_nvidia_gpu() or has_tpu(), reason="the plugin of a chip that is there starts")
@pytest.mark.parametrize("platforms", ({}, {"JAX_PLATFORMS": "cpu"}), ids=("any", "cpu"))
def test_plugins_for_chips_that_are_not_there_do_not_start(tmp_path, platforms):
    plugin = tmp_path / "jax_plugins/xla_cuda12"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("def initialize():\n    raise RuntimeError('no CUDA')\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "JAX"))}
    done = subprocess.run(
        [sys.executable, "-m", "tpjax", "explain", str(LLAMA), "--tp", "2"],
        env={
            **kept,
            **platforms,
            "XLA_FLAGS": " ".join(COMPILE_FAST),
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path))),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "tpjax: the only device is a CPU: faking 2 devices\n")


@pytest.mark.parametrize("debug", (False, True))
def test_what_native_libraries_print_is_hidden(debug):
    """But not what Python says, warnings included, nor what comes before and after, nor an error."""
    program = f"""
import os, sys, warnings
from tpjax.cli import console
console.debug = {debug}
os.write(2, b"before\\n")
try:
    with console.native_output_hidden():
        os.write(2, b"I0000 chatter\\n")
        print("said", file=sys.stderr)
        warnings.warn("warned é", stacklevel=1)
        os.system("echo child >&2")
        raise ValueError
except ValueError:
    os.write(2, b"after\\n")
print("last", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    native = ["I0000 chatter"] if debug else []
    child = ["child"] if debug else []
    assert lines == ["before", *native, "said", "<string>:10: UserWarning: warned é", *child, "after", "last"]


# --- subcommands -------------------------------------------------------------------------------------------


def test_prompts_of_a_file(tmp_path, capsys):
    file = tmp_path / "prompts"
    file.write_text('{"prompt": "a", "max_tokens": 3}\n{"messages": 1, "bogus": 2}\n')
    assert status("generate", "nope", "--prompts", str(file)) == 2
    assert f"{file}, line 2: unknown field 'bogus'; known are allowed_token_ids, " in capsys.readouterr().err
    file.write_text('{"prompt": "a", "max_tokens": -3}\n')
    assert status("generate", "nope", "--prompts", str(file)) == 2
    assert f"{file}, line 1: max_tokens=-3 is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    (
        ('{"prompt": 5}', "prompt=5 is not a string"),
        ('{"messages": "hi"}', "messages='hi' is not a non-empty list of objects"),
        (
            '{"prompt_token_ids": [1, "a"]}',
            "prompt_token_ids=[1, 'a'] is not a non-empty list of whole ",
        ),
        ('{"prompt_token_ids": [99999999]}', "the prompt has token id 99999999, but the vocabulary has "),
        ('{"messages": [{"role": "user"}]}', "the chat template refused the messages: "),
    ),
)
def test_a_bad_line_of_a_file_is_named(line, message, tmp_path, capsys, smollm2_first_layers):
    """Whether its file tells, or only the model."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    assert status("generate", str(smollm2_first_layers), "--prompts", str(file)) == 2
    err = capsys.readouterr().err
    assert f"tpjax: error: {file}, line 2: {message}" in err and err.count("tpjax: error") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ("serve {model} --port 65536", "'65536' is not a port, 0 to 65535"),
        ("serve {model} --port " + "9" * 5000, "' is not a port, 0 to 65535"),
        ("serve {model} --process-id " + "9" * 5000, "' is not the number of a process, 0 or more"),
        ("bench serve --num-prompts 1000001", "'1000001' is not a whole number of requests, 1000000 at most"),
        ("bench serve --input-len 99999999", "'99999999' is not a whole number of tokens, 10000000 at most"),
        (
            "serve {model} --pp 1000000000",
            "pp=1000000000 is not a whole number of pipeline stages, 1 to",
        ),
        ("serve {model} --max-slots 0", "'0' is not a whole number of requests, 1 or more"),
        ("serve {model} --api-key-file /nowhere/keys", "/nowhere/keys: No such file or directory"),
        ("serve {model} --api-key ''", "Invalid value for '--api-key': a key is empty"),
        ("serve {model} --host 203.0.113.1", "port 8000 of 203.0.113.1 cannot be used: "),
        ("bench serve --request-rate 0", "'0' is not a rate above 0, or inf"),
        ("bench serve --goodput itl:3", "'itl:3' is not ttft:MS, tpot:MS or e2el:MS"),
        ("bench serve --range-ratio 2", "'2' is not a fraction, 0 to 1"),
    ),
)
def test_bad_flags_of_the_server_s_subcommands(arguments, message, capsys):
    assert status(*shlex.split(arguments.format(model=LLAMA))) == 2
    assert message in capsys.readouterr().err


def test_models_has_titles_of_one_line(capsys):
    assert status("models") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "aliases: fetched with pip, no account is needed" in lines
    assert "published: plan and explain need no files" in lines


def test_pull_prints_the_path(tmp_path, capsys):
    assert status("pull", str(tmp_path)) == 0
    assert capsys.readouterr() == (f"{tmp_path}\n", "")


# --- doctor ------------------------------------------------------------------------------------------------


def test_doctor_json(tmp_path):
    (tmp_path / "hf/hub/models--org--name").mkdir(parents=True)
    (tmp_path / "hf/hub/models--org--name/blob").write_bytes(bytes(1000))
    environment = {
        "TPJAX_CACHE": str(tmp_path / "own"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_very_secret",
        "HF_ENDPOINT": "http://me:password@mirror/hf",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
        "JAX_PLATFORMS": "cpu",
    }
    done = tpjax("doctor", "--json", **environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["packages"]["jax"] == jax.__version__
    assert facts["python"]["executable"] == sys.executable
    assert facts["devices"] == {
        "platform": "cpu",
        "count": 3,
        "kind": "cpu",
        "memory_bytes": None,
        "faked": True,
        "error": None,
    }
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]
    assert facts["environment"]["XLA_FLAGS"] == "--xla_force_host_platform_device_count=3"
    assert facts["environment"]["HF_TOKEN"] == "(set)"
    assert facts["environment"]["HF_ENDPOINT"] == "http://***@mirror/hf"
    assert "secret" not in done.stdout and "password" not in done.stdout
    caches = {cache["name"]: cache for cache in facts["caches"]}
    hugging_face = {"path": str(tmp_path / "hf/hub"), "bytes": 1000, "models": ["org/name"]}
    assert caches["cache: Hugging Face"] == {"name": "cache: Hugging Face", **hugging_face}


def test_doctor_counts_cached_models(tmp_path, monkeypatch):
    monkeypatch.setenv("TPJAX_CACHE", str(tmp_path))
    alias = hub.ALIASES["smollm2-135m"]
    file = tmp_path / "models/smollm2-135m" / alias.filename
    file.parent.mkdir(parents=True)
    with file.open("wb") as sparse:
        sparse.truncate(alias.size_bytes)
    digest = f"{alias.sha256}  {alias.filename}\n"
    file.with_name(f"{alias.filename}.sha256").write_text(digest)
    (models,) = [cache for cache in doctor.examine()["caches"] if cache["name"] == "cache: models"]
    assert models == {
        "name": "cache: models",
        "path": str(tmp_path / "models"),
        "bytes": alias.size_bytes + len(digest),
        "models": ["smollm2-135m"],
    }


def test_doctor_warns_of_a_cache_folder_that_cannot_be_made(monkeypatch):
    monkeypatch.setenv("TPJAX_CACHE", f"{__file__}/cache")
    problem = f"cache folder {__file__}/cache cannot be made: {__file__} is not a directory"
    assert problem in doctor.examine()["warnings"]


def test_doctor_reports_a_jax_that_does_not_start():
    done = tpjax("doctor", "--json", JAX_PLATFORMS="abacus")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert "abacus" in facts["devices"]["error"] and facts["devices"]["count"] == 0
    assert facts["warnings"][0].startswith("JAX did not start: ")


def test_doctor_draws_a_table(capsys):
    facts = doctor.examine() | {"warnings": ["something [odd]"]}
    console.show(doctor.render(facts))
    out = capsys.readouterr().out
    assert "│ devices" in out and "warning: something [odd]" in out


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "unknown"), (0, "0 bytes"), (999, "999 bytes"), (98_362_432, "98.4 MB"), (3 * 10**13, "30 TB")],
)
def test_doctor_sizes(count, text):
    assert doctor._size(count) == text


# --- with models -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_at_tp3(smollm2_gguf: Path) -> None:
    out = tpjax(
        *("generate", "The capital of France is", "--model", "smollm2-135m", "--tp", "3"),
        *("--temperature", "0", "--max-tokens", "8"),
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(" Paris") and out.stdout.endswith("\n")
    assert out.stderr.splitlines()[0] == "tpjax: the only device is a CPU: faking 3 devices"
    assert "8 tokens (length)" in out.stderr and "tp=3" in out.stderr


def test_explain_reads_no_weights_and_prints_every_table(smollm2_first_layers: Path) -> None:
    """Of two of SmolLM2's layers; test_readme has the tables of all thirty."""
    out = tpjax("explain", str(smollm2_first_layers), "--tp", "4", "--json")
    assert out.returncode == 0, out.stderr
    report = json.loads(out.stdout)
    rows = {row["name"]: row for row in report["tensors"]}
    qkv = rows["layers.*.self_attn.qkv_proj.weight"]
    assert (qkv["shape"], qkv["shard_shape"], qkv["count"]) == ([1280, 576], [320, 576], 2)
    assert qkv["padding"] == pytest.approx(1 / 3)
    assert qkv["bytes_per_device"] == 2 * 576 * 320 * 4
    assert rows["embed_tokens.weight"]["shard_shape"] == [49152 // 4, 576]
    assert report["weight_bytes_per_device"] == sum(row["bytes_per_device"] for row in rows.values())
    decode, prefill = report["steps"]
    always = [one for one in decode["collectives"] if not one["conditional"]]
    assert [(one["kind"], one["count"], one["bytes"]) for one in always] == [
        ("all-reduce", 2, 576 * 4),  # attention
        ("all-reduce", 2, 576 * 4),  # MLP
        ("all-reduce", 1, 576 * 4),  # embedding
        ("all-gather", 1, 4 * 2 * 4),
    ]
    assert (prefill["tokens"], prefill["budget"]["all_reduce_bytes"]) == (512, 5 * 512 * 576 * 4)
    assert report["cache"]["bytes_per_token_per_device"] == 2 * 2 * 64 * 4
    table = tpjax("explain", str(LLAMA), "--tp", "3")
    for text in ("self_attn.qkv_proj ×", "every device normalises", "a token", "predicted", "all-reduces ("):
        assert text in table.stdout


@pytest.mark.parametrize("how", (("{}",), ("{}/config.json",), ("--config", "{}/config.json")))
def test_explain_of_a_configuration_alone(
    how: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without weights: the directory, or the file in it. Qwen2.5-7B's heads at tp=8 are on paper."""
    published = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    model = [word.format(tmp_path) for word in how]
    assert status("explain", *model, "--tp", "8", "--max-model-len", "1024", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["heads"]["padded_heads"], report["heads"]["kv_head_slots"]) == (32, 8)
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows["layers.*.self_attn.qkv_proj.weight"]["shape"] == [(32 + 2 * 8) * 128, 3584]
    assert rows["layers.*.mlp.down_proj.weight"]["shard_shape"] == [3584, 18944 // 8]
    assert report["steps"][0]["budget"]["all_reduces"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("--model", "smolm2-135m"), "smollm2-135m"),
        (
            ("--model", "{short}", "--max-model-len", "64", "--max-tokens", "100"),
            "over max_model_len=64",
        ),
        (("--model", "{short}", "--temperature", "nan"), "temperature=nan"),
        (("--model", "{short}", "--top-k", "-1"), "top_k=-1"),
        (("--model", "{empty}"), "config.json"),
    ),
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    smollm2_first_layers: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"empty": tmp_path, "short": smollm2_first_layers}
    assert status("generate", "Hi", *(a.format(**places) for a in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith("tpjax: error: ") and message in err


def test_more_devices_than_are_faked_are_one_line_and_exit_2() -> None:
    out = tpjax("generate", "Hi", "--model", str(LLAMA), "--tp", "65536")
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.startswith("tpjax: error: tp=65536 is over 64") and out.stderr.count("\n") == 1


# --- arguments and files as people write them --------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    (
        ("generate --stop '###' Hello m", {"prompt": "Hello", "model": "m", "stop": ["###"]}),
        ("serve --api-key secret m", {"model": "m", "api_key": ["secret"]}),
        ("serve --allow-origin * m", {"model": "m", "allow_origin": ["*"]}),
        (
            "generate --logit-bias 7:1.5 9:-2 Hello m",
            {"prompt": "Hello", "model": "m", "logit_bias": [(7, 1.5), (9, -2.0)]},
        ),
        ("plan --serve --rate 1 2 inf m", {"model": "m", "rate": [1.0, 2.0, float("inf")]}),
        ("plan --goodput ttft:5 tpot:4 m", {"model": "m", "goodput": [("ttft", 5.0), ("tpot", 4.0)]}),
    ),
)
def test_what_follows_an_option(line, expected):
    """The model and the prompt are not one more of its values: several have a form of their own."""
    name, *words = shlex.split(line)
    given = typer.main.get_command(cli.app).commands[name].make_context(name, words).params
    assert {key: given[key] for key in expected} == expected


class Scripted:
    """Answers a batch in place of a service whose model is loaded: with statuses, or by the application."""

    def __init__(self, statuses: dict[str, list[int]] | None = None) -> None:
        self.state, self.model, self.error = "ready", "m", None
        self.front = SimpleNamespace(slots=1)
        self.llm = SimpleNamespace(path="m", max_model_len=8, tokenizer=None, front=self.front)
        self.statuses, self.asked, self.running, self.most = statuses, [], 0, 0

    def start(self) -> None: ...
    async def stop(self) -> None: ...
    def admit(self, choices: int) -> None: ...

    def answers(self, file: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        app = create_app(self)
        if self.statuses is not None:
            app = FastAPI()
            app.post("/v1/completions")(self.answer)
        asked = [{"custom_id": f"{i}", "url": "/v1/completions"} | one for i, one in enumerate(requests)]
        self.counts = asyncio.run(batch._answer(self, app, asked, file, at_once=4))
        return [json.loads(line) for line in file.read_bytes().splitlines()]

    async def answer(self, request: Request) -> Response:
        prompt = (await request.json())["prompt"]
        self.asked.append(prompt)
        self.running += (n := (await request.json()).get("n", 1))
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= n
        if prompt == "lost":
            self.state, self.error = "failed", RuntimeError("the device is gone")
        if (status := self.statuses.get(prompt, [200]).pop(0)) == 0:
            raise ArithmeticError("a bug")
        return JSONResponse({"choices": []}, status)


def answer_line(custom_id: str, status: int = 200) -> str:
    """A line that a batch writes, without its line feed."""
    response = {"status_code": status, "request_id": "x", "body": {}}
    line = {"id": "batch_req_x", "custom_id": custom_id, "response": response, "error": None}
    return batch._encoded(line).decode().removesuffix("\n")


def test_an_odd_request_of_a_batch_is_answered_by_its_error(tmp_path: Path) -> None:
    """What JSON or UTF-8 cannot say, and deep nesting, keep no other request from its answer."""
    deep: list[Any] = []
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    odd = (float("nan"), float("inf"), "\ud800", deep)
    requests = [{"body": {"prompt": value}} for value in odd]
    answers = Scripted().answers(
        tmp_path / "x.jsonl", *requests, {"custom_id": "\ud800", "body": {"prompt": 1e9}}
    )
    found = {one["custom_id"]: one["response"] for one in answers}
    assert found.keys() == {"0", "1", "2", "3", "\ud800"}
    for response in found.values():
        assert response["status_code"] == 400 and response["body"]["error"]["type"] == "invalid_request_error"
    assert [one.custom_id for one in batch.read_answered(tmp_path / "x.jsonl")] == [*found]


def test_requests_that_a_lost_engine_ended_have_no_answer(tmp_path: Path) -> None:
    bodies = [{"body": {"prompt": text}} for text in ("fine", "lost", "later", "later")]
    service = Scripted({"lost": [500], "later": [503, 503]})
    with pytest.raises(
        EngineError, match=r"RuntimeError: the device is gone \(1 of 4 requests were answered"
    ):
        service.answers(tmp_path / "x.jsonl", *bodies)
    (answer,) = batch.read_answered(tmp_path / "x.jsonl")
    assert (answer.custom_id, answer.status) == ("0", 200)


def test_a_batch_counts_choices_in_flight(tmp_path: Path) -> None:
    service = Scripted({})
    bodies = [{"prompt": "x", "n": n} for n in (3, 3, 9, 1, 1, 2)]
    service.answers(tmp_path / "x.jsonl", *({"body": body} for body in bodies))
    assert service.most == 9 and len(service.asked) == 6 and service.counts == {200: 6}
    bodies = ({"prompt": ["a", [1]], "n": 3}, {"prompt": [1, 2], "n": 3}, {"prompt": [], "n": -1}, {"n": "x"})
    assert [batch._choices(body) for body in bodies] == [6, 3, 1, 1]


def test_a_batch_tries_again_what_failed_by_no_fault_of_its_own(tmp_path, capsys, monkeypatch):
    """The lines of such requests are replaced; exit status 1 says that another run has work to do."""
    requests, file = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    asked = [{"custom_id": c, "url": "/v1/completions", "body": {"prompt": c}} for c in "abcde"]
    requests.write_text("\n".join(map(json.dumps, asked)))
    kept = [answer_line("other", 503), answer_line("b", 400), answer_line("d")]
    expired = json.dumps({"id": "x", "custom_id": "e", "response": None, "error": {"code": "expired"}})
    lines = [answer_line("a", 429), *kept, answer_line("c", 500), expired]
    file.write_text("\n".join(lines) + "\n")
    app, scripted = FastAPI(), Scripted({"c": [503, 200]})
    app.post("/v1/completions")(scripted.answer)
    made = []

    def service(load: object, model: str, max_queue: int, **_: object) -> Scripted:
        made.append(max_queue)
        return scripted

    monkeypatch.setattr("tpjax.server.service.Service", service)
    monkeypatch.setattr("tpjax.server.app.create_app", lambda service: app)
    words = ("batch", str(LLAMA), "--input", str(requests), "--output", str(file))
    assert status(*words) == 1
    err = capsys.readouterr().err
    assert "5 requests, 2 of them answered before" in err and "2 answered, 1 failed" in err
    assert "requests failed that the next run tries again: 1 of status 503" in err
    assert sorted(scripted.asked) == ["a", "c", "e"] and made[0] > 10**9
    assert file.read_text().splitlines()[:3] == kept
    assert status(*words) == 0 and status(*words) == 0
    assert sorted(scripted.asked) == ["a", "c", "c", "e"]
    answers = batch.read_answered(file)
    assert sorted(one.custom_id for one in answers) == ["a", "b", "c", "d", "e", "other"]
    assert list(tmp_path.glob(".*")) == []


def test_a_bug_in_one_request_of_a_batch_ends_no_other(tmp_path: Path) -> None:
    answers = Scripted({"bad": [0]}).answers(
        tmp_path / "x.jsonl", {"body": {"prompt": "bad"}}, {"body": {"prompt": "fine"}}
    )
    assert {one["custom_id"]: one["response"]["status_code"] for one in answers} == {"0": 500, "1": 200}


def test_a_batch_goes_on_wherever_its_last_line_was_cut(tmp_path: Path) -> None:
    """Inside a character too; the line is taken away only once the batch goes on."""
    file = tmp_path / "answers.jsonl"
    whole, last = (answer_line("a") + "\n").encode(), answer_line("\u00fcb\u20ac").encode()
    for before in (b"", whole):
        for cut in range(len(last) + 1):
            file.write_bytes(before + last[:cut])
            answers = batch.read_answered(file)
            assert file.read_bytes() == before + last[:cut]
            batch._keep(file, answers)
            assert file.read_bytes() == before


@pytest.mark.parametrize(
    "other",
    (
        '{"precious": 1}',
        "precious",
        '{"custom_id": "a"}\n{"cus',
        '{"custom_id": "a", "response": 1}\n',
        "\xfc\n",
    ),
)
def test_a_batch_leaves_a_file_that_is_no_output_of_one(other, tmp_path, capsys):
    requests, file = tmp_path / "requests.jsonl", tmp_path / "mine.json"
    requests.write_text('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}')
    file.write_bytes(other.encode("latin-1"))
    assert status("batch", "smollm2-135m", "--input", str(requests), "--output", str(file)) == 2
    assert f"{file} is there and holds no answers of a batch" in capsys.readouterr().err
    assert file.read_bytes() == other.encode("latin-1")


def test_a_batch_does_not_write_into_its_requests(tmp_path, capsys):
    file, same = tmp_path / "requests.jsonl", tmp_path / "same"
    file.write_text('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}')
    same.symlink_to(file)
    before = file.read_bytes()
    for output in (file, same):
        assert status("batch", "smollm2-135m", "--input", str(file), "--output", str(output)) == 2
        assert f"--output {output} is the file of --input" in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize("as_json", (False, True))
def test_prompts_that_failed_are_an_error_after_all_is_printed(as_json, capsys):
    fine = [Completion("a", [1], "x", [2], "stop"), Completion("c", [1], "y", [2], "length")]
    failed = [Completion("b", [1], "z", [3], "error", error=why) for why in ("the logits are NaN", "lost")]
    completions = [fine[0], *failed, fine[1]]
    llm = SimpleNamespace(generate=lambda prompts, params: completions)
    requests = [(one.prompt, SamplingParams()) for one in completions]
    with pytest.raises(EngineError, match=r"^2 of 4 prompts failed; the first: the logits are NaN$"):
        generate._all(llm, requests, generate.Figures(0.0), as_json=as_json, as_ids=False)
    printed = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["text"] if as_json else line for line in printed] == ["x", "z", "z", "y"]


@pytest.mark.parametrize("mark", ("", "\ufeff"))
def test_lines_end_at_line_feeds_alone(mark, tmp_path):
    """JSON may hold other line separators as they are, and editors put a byte order mark first."""
    texts = ["a\u2028b", "c\x85d", "e\x0cf\x1cg"]
    asked = [
        {"custom_id": text, "method": "POST", "url": "/v1/completions", "body": {"prompt": text}}
        for text in texts
    ]
    file = tmp_path / "requests.jsonl"
    for end in ("\n", "\r\n"):
        lines = (json.dumps(one, ensure_ascii=False) + end for one in asked)
        file.write_bytes((mark + end.join(lines)).encode())
        assert batch.read_requests(file) == asked
    answers = "".join(answer_line(text) + "\n" for text in texts)
    file.write_text(mark + answers)
    assert [answer.custom_id for answer in batch.read_answered(file)] == texts
    file.write_text(mark + "".join(json.dumps({"prompt": t}, ensure_ascii=False) + "\n\n" for t in texts))
    entries = generate._entries(file, None, SamplingParams())
    assert [entry.value for entry in entries] == texts and entries[2].place == f"{file}, line 5"
    file.write_text(mark + "\n".join(texts))
    assert [entry.value for entry in generate._entries(file, None, SamplingParams())] == texts
    row = {"timestamp": 1, "input_length": 2, "output_length": 3, "note": texts[0]}
    file.write_text(mark + json.dumps(row, ensure_ascii=False))
    assert read_trace(file) == [Arrival(0.0, 2, 3)]


def test_a_model_is_served_under_the_name_that_clients_know(tmp_path: Path) -> None:
    """A Hugging Face id whole, as vLLM does; of a path no more than its last part."""
    (tmp_path / "mine").mkdir()
    assert name_in_api("org/name") == "org/name" and name_in_api("smollm2-135m") == "smollm2-135m"
    assert name_in_api(str(tmp_path / "mine")) == "mine"
