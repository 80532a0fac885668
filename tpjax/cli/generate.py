"""``tpjax generate``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpjax.cli.compiling import compile_for, wait_for
from tpjax.cli.console import note, read_text
from tpjax.cli.loading import chosen_model, load, note_defaults
from tpjax.cli.options import GenerationConfig, ModelOption, Sampling, Sharding, takes
from tpjax.errors import EngineError, RequestError

if TYPE_CHECKING:
    from tpjax.llm import LLM, Completion
    from tpjax.sampling_params import SamplingParams

EXAMPLES = """
  tpjax generate "The capital of France is" smollm2-135m --tp 4 --temperature 0
  tpjax generate "Why is the sky blue?" --model smollm2-135m --chat --max-tokens 200 --seed 1
  cat notes.txt | tpjax generate - --model ./Llama-3.2-1B --tp 8 --stop "###"
  tpjax generate --prompts prompts.jsonl --model smollm2-135m --json
"""
MAX_TOKENS = 128
# fields in a line of --prompts that are not sampling parameters
_OF_A_PROMPT = {"prompt", "messages", "prompt_token_ids"}

Prompt = str | list[int]


@takes(sharding=Sharding, sampling=Sampling)
def run(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")
    ] = None,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Or --model M.")] = None,
    model_option: ModelOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Many prompts: one a line or, as JSON lines, objects with prompt or messages and sampling "
            "parameters; - is stdin.",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a message, by the chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system message; implies --chat.")
    ] = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="The prompt is token ids, and ids are printed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per prompt.")] = False,
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="DIR", help="Write a JAX profile of the generation.")
    ] = None,
    generation_config: GenerationConfig = "auto",
    *,
    sharding: Sharding,
    sampling: Sampling,
) -> None:
    """Continue a prompt: text on stdout as it comes, figures on stderr."""
    if prompts is not None and prompt is not None:
        if model is not None:
            raise RequestError("--prompts FILE has the prompts: leave PROMPT out")
        prompt, model = None, prompt  # the only argument is the model
    params = sampling.params(max_tokens=MAX_TOKENS)
    entries = _entries(prompts, prompt, params)
    if token_ids:
        entries = [(_as_token_ids(entry), one) for entry, one in entries]
    name = chosen_model(model, model_option)
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    llm = load(name, sharding, generation_config=generation_config)
    note_defaults(llm)
    figures = Figures(load_s=time.perf_counter() - start)
    chat = chat or system is not None
    requests = [(_prompt_of(llm, entry, chat, system), one) for entry, one in entries]
    with _profiled(profile):
        if prompts is None and not as_json:
            _stream(llm, *requests[0], figures, as_ids=token_ids)
        else:
            _all(llm, requests, figures, as_json=as_json, as_ids=token_ids)
    device = llm.mesh.devices.flat[0]
    note(f"{figures.line()}, tp={llm.mesh.size}, {device.device_kind}")


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams, figures: Figures, *, as_ids: bool) -> None:
    figures.compile_s = compile_for(llm, prompt, params)  # tokens/s does not include it
    print_stream(llm.stream(prompt, params), figures, as_ids=as_ids or llm.tokenizer is None)


def _all(
    llm: LLM,
    requests: list[tuple[Prompt, SamplingParams]],
    figures: Figures,
    *,
    as_json: bool,
    as_ids: bool,
) -> None:
    start = time.perf_counter()
    prompts, params = [prompt for prompt, _ in requests], [one for _, one in requests]
    completions: list[Completion] = []
    what = f"compiling and generating, {len(requests)} prompts"
    wait_for(lambda: completions.extend(llm.generate(prompts, params)), what)
    seconds = time.perf_counter() - start
    figures.tokens = sum(len(one.token_ids) for one in completions)
    figures.tokens_per_s = figures.tokens / seconds
    figures.finish_reason = f"{len(completions)} prompts"
    for one in completions:
        print(json.dumps(_plain(one), ensure_ascii=False) if as_json else _text(one, as_ids))


def _plain(one: Completion) -> dict[str, Any]:
    """Returns a completion as plain data."""
    data: dict[str, Any] = {
        "prompt": one.prompt,
        "prompt_token_ids": one.prompt_token_ids,
        "text": one.text,
        "token_ids": one.token_ids,
        "finish_reason": one.finish_reason,
    }
    if one.logprobs is not None:
        data["logprobs"] = [
            {"token_id": entry.token_id, "logprob": entry.logprob, "top": entry.top} for entry in one.logprobs
        ]
    if one.error is not None:
        data["error"] = one.error
    return data


def _text(one: Completion, as_ids: bool) -> str:
    return " ".join(map(str, one.token_ids)) if as_ids else one.text


# --- prompts -----------------------------------------------------------------------------------------------


def _entries(
    file: Path | None, prompt: str | None, params: SamplingParams
) -> list[tuple[dict[str, Any], SamplingParams]]:
    """Reads the prompts and their sampling parameters, before the model loads."""
    if file is None:
        if prompt is None:
            raise RequestError("no prompt is given: PROMPT, - for stdin, or --prompts FILE")
        return [({"prompt": read_text(Path("-")) if prompt == "-" else prompt}, params)]
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise RequestError(f"{file}: no prompt in it")
    if not lines[0].lstrip().startswith("{"):
        return [({"prompt": line}, params) for line in lines]
    return [_entry(f"{file}, line {number}", line, params) for number, line in enumerate(lines, start=1)]


def _entry(where: str, line: str, params: SamplingParams) -> tuple[dict[str, Any], SamplingParams]:
    import dataclasses

    try:
        fields = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    known = {field.name for field in dataclasses.fields(params)}
    if not isinstance(fields, dict) or len(_OF_A_PROMPT & set(fields)) != 1:
        raise RequestError(f"{where}: an object with one of {', '.join(sorted(_OF_A_PROMPT))} is needed")
    if unknown := set(fields) - known - _OF_A_PROMPT:
        raise RequestError(f"{where}: unknown field {min(unknown)!r}; known are {', '.join(sorted(known))}")
    entry = {name: fields.pop(name) for name in _OF_A_PROMPT & set(fields)}
    try:
        return entry, dataclasses.replace(params, **fields)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _as_token_ids(entry: dict[str, Any]) -> dict[str, Any]:
    """Reads the token ids that stand in the place of a prompt."""
    if "prompt" not in entry:
        return entry
    words = str(entry["prompt"]).replace(",", " ").split()
    if wrong := [word for word in words if not (word.isascii() and word.isdigit())]:
        raise RequestError(f"--token-ids: {wrong[0]!r} is not a token id")
    return {"prompt_token_ids": [int(word) for word in words]}


def _prompt_of(llm: LLM, entry: dict[str, Any], chat: bool, system: str | None) -> Prompt:
    if "prompt_token_ids" in entry:
        return list(entry["prompt_token_ids"])
    if "messages" in entry:
        return llm.chat_prompt(entry["messages"])
    text = entry["prompt"]
    if not chat:
        return str(text)
    messages = [{"role": "system", "content": system}] if system else []
    return llm.chat_prompt([*messages, {"role": "user", "content": text}])


# --- figures -----------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """Times and counts of a generation."""

    load_s: float
    compile_s: float | None = None
    first_token_ms: float | None = None
    tokens: int = 0
    tokens_per_s: float | None = None
    finish_reason: str | None = None

    def line(self) -> str:
        """Returns the figures that there are on one line."""
        parts = [f"loaded in {self.load_s:.1f} s"]
        if self.compile_s is not None:
            parts.append(f"compiled in {self.compile_s:.1f} s")
        if self.first_token_ms is not None:
            parts.append(f"first token after {self.first_token_ms:.0f} ms")
        parts.append(f"{self.tokens} token{'' if self.tokens == 1 else 's'} ({self.finish_reason})")
        if self.tokens_per_s is not None:
            after = " after the first" if self.first_token_ms is not None else ""
            parts.append(f"{self.tokens_per_s:.1f} tokens/s{after}")
        return ", ".join(parts)


def print_stream(deltas: Iterable[Any], figures: Figures, *, as_ids: bool = False) -> None:
    """Writes deltas as they come and fills in the figures."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without an emoji must not end the generation
    start = time.perf_counter()
    first = last = start
    first_tokens = 0
    for delta in deltas:
        last = time.perf_counter()
        figures.tokens += len(delta.token_ids)
        figures.finish_reason = delta.finish_reason
        if figures.first_token_ms is None and delta.token_ids:
            first, first_tokens = last, figures.tokens
            figures.first_token_ms = (first - start) * 1000
        sys.stdout.write("".join(f"{token} " for token in delta.token_ids) if as_ids else delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if figures.finish_reason == "error":
        raise EngineError(delta.error)
    if figures.tokens > first_tokens and last > first:
        figures.tokens_per_s = (figures.tokens - first_tokens) / (last - first)


def _profiled(directory: Path | None) -> Any:
    """Writes a JAX profile of the block, if a directory is given."""
    import contextlib

    if directory is None:
        return contextlib.nullcontext()
    import jax

    return jax.profiler.trace(directory)
