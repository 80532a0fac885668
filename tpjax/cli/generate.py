"""``tpjax generate``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpjax.cli.compiling import compile_for, wait_for
from tpjax.cli.console import decoded, note, read_lines, read_text
from tpjax.cli.loading import chosen_model, load, note_defaults
from tpjax.cli.options import GenerationConfig, ModelOption, Processes, Sampling, Sharding, takes
from tpjax.distributed import process_id
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


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(one) is kind for one in value)


# fields in a line of --prompts that are not sampling parameters: what each is, and whether a value is that
_OF_A_PROMPT: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "messages": ("a non-empty list of objects", lambda value: _is_list_of(dict, value)),
    "prompt": ("a string", lambda value: isinstance(value, str)),
    "prompt_token_ids": ("a non-empty list of whole numbers", lambda value: _is_list_of(int, value)),
}

Prompt = str | list[int]


@dataclass(frozen=True)
class Entry:
    """A prompt as it was given.

    Attributes:
        place: file and line, for errors; empty on the command line.
        kind: which of ``_OF_A_PROMPT``.
        value: the prompt, checked to be of that kind.
        params: its sampling parameters.
    """

    place: str
    kind: str
    value: Any
    params: SamplingParams


@takes(sharding=Sharding, sampling=Sampling, processes=Processes)
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
    processes: Processes,
) -> None:
    """Continue a prompt: text on stdout as it comes, figures on stderr."""
    if prompts is not None and prompt is not None:
        if model is not None:
            raise RequestError("--prompts FILE has the prompts: leave PROMPT out")
        prompt, model = None, prompt  # the only argument is the model
    processes.join()
    if process_id():
        load(chosen_model(model, model_option), sharding, generation_config=generation_config)
    params = sampling.params(max_tokens=MAX_TOKENS)
    entries = _entries(prompts, prompt, params)
    if token_ids:
        entries = [_as_token_ids(entry) for entry in entries]
    name = chosen_model(model, model_option)
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    llm = load(name, sharding, generation_config=generation_config)
    note_defaults(llm)
    figures = Figures(load_s=time.perf_counter() - start)
    chat = chat or system is not None
    requests = [_request(llm, entry, chat, system) for entry in entries]
    with _profiled(profile):
        if prompts is None and not as_json:
            _stream(llm, *requests[0], figures, as_ids=token_ids)
        else:
            _all(llm, requests, figures, as_json=as_json, as_ids=token_ids)
    device = llm.mesh.devices.flat[0]
    note(f"{figures.line()}, {llm.layout}, {device.device_kind}")


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
        print(_json(one) if as_json else _text(one, as_ids))
    if failed := [one for one in completions if one.finish_reason == "error"]:
        sys.stdout.flush()
        raise EngineError(f"{len(failed)} of {len(completions)} prompts failed; the first: {failed[0].error}")


def _json(one: Completion) -> str:
    """Writes a completion as JSON, in ASCII where stdout may not have all characters."""
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
    encoding = sys.stdout.encoding or "ascii"
    return json.dumps(data, ensure_ascii=encoding.lower() != "utf-8")


def _text(one: Completion, as_ids: bool) -> str:
    return " ".join(map(str, one.token_ids)) if as_ids else one.text


# --- prompts -----------------------------------------------------------------------------------------------


def _entries(file: Path | None, prompt: str | None, params: SamplingParams) -> list[Entry]:
    """Reads the prompts and their sampling parameters, before the model loads."""
    if file is None:
        if prompt is None:
            raise RequestError("no prompt is given: PROMPT, - for stdin, or --prompts FILE")
        return [Entry("", "prompt", read_text(Path("-")) if prompt == "-" else prompt, params)]
    lines = read_lines(file)
    if not lines:
        raise RequestError(f"{file}: no prompt in it")
    are_json = lines[0][1].lstrip().startswith("{")
    entries = []
    for number, line in lines:
        place = f"{file}, line {number}"
        entries.append(_entry(place, line, params) if are_json else Entry(place, "prompt", line, params))
    return entries


def _entry(place: str, line: str, params: SamplingParams) -> Entry:
    """Reads a line of JSON."""
    given = decoded(line, place)
    known = {field.name for field in fields(params)}
    if not isinstance(given, dict) or len(_OF_A_PROMPT.keys() & given.keys()) != 1:
        raise RequestError(f"{place}: an object with one of {', '.join(_OF_A_PROMPT)} is needed")
    if unknown := given.keys() - known - _OF_A_PROMPT.keys():
        raise RequestError(f"{place}: unknown field {min(unknown)!r}; known are {', '.join(sorted(known))}")
    (kind,) = _OF_A_PROMPT.keys() & given.keys()
    value = given.pop(kind)
    what, fits = _OF_A_PROMPT[kind]
    if not fits(value):
        raise RequestError(f"{place}: {kind}={value!r} is not {what}")
    try:
        return Entry(place, kind, value, replace(params, **given))
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from error


def _as_token_ids(entry: Entry) -> Entry:
    """Reads the token ids that stand in the place of a prompt."""
    if entry.kind != "prompt":
        return entry
    words = entry.value.replace(",", " ").split()
    if wrong := [word for word in words if not (word.isascii() and word.isdigit())]:
        place = f"{entry.place}: " if entry.place else ""
        raise RequestError(f"{place}--token-ids: {wrong[0]!r} is not a token id")
    return replace(entry, kind="prompt_token_ids", value=[int(word) for word in words])


def _request(llm: LLM, entry: Entry, chat: bool, system: str | None) -> tuple[Prompt, SamplingParams]:
    """Returns the prompt for the model and its parameters, after the model has looked at them."""
    try:
        prompt = _prompt_of(llm, entry, chat, system)
        seed = entry.params.seed or 0  # one that is drawn here would be missing later
        llm.request(prompt, replace(entry.params, seed=seed))
    except RequestError as error:
        if not entry.place:
            raise
        raise RequestError(f"{entry.place}: {error}") from error
    return prompt, entry.params


def _prompt_of(llm: LLM, entry: Entry, chat: bool, system: str | None) -> Prompt:
    if entry.kind == "messages":
        return llm.chat_prompt(entry.value)
    if entry.kind == "prompt" and chat:
        messages = [{"role": "system", "content": system}] if system else []
        return llm.chat_prompt([*messages, {"role": "user", "content": entry.value}])
    prompt: Prompt = entry.value
    return prompt


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
    """Writes deltas as they come and fills in the figures.

    Raises:
        EngineError: the generation ended with an error.
    """
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
