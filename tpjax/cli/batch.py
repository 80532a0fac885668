"""``tpjax batch``: OpenAI's batch format without a server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpjax.cli.console import check_writable, decoded, note, read_lines
from tpjax.cli.loading import chosen_model, ensure, load
from tpjax.cli.options import (
    GenerationConfig,
    MaxNumBatchedTokens,
    MaxSlots,
    Model,
    ModelOption,
    Processes,
    Sharding,
    takes,
)
from tpjax.distributed import process_id
from tpjax.errors import ConfigError, EngineError, RequestError

if TYPE_CHECKING:
    import httpx2 as httpx
    from fastapi import FastAPI

    from tpjax.llm import LLM
    from tpjax.server.service import Service

log = logging.getLogger(__name__)

EXAMPLES = """
  tpjax batch smollm2-135m --input requests.jsonl --output answers.jsonl
  tpjax batch ./Llama-3.1-8B-Instruct --input requests.jsonl --output answers.jsonl --tp 8 --max-slots 64
"""
URLS = ("/v1/chat/completions", "/v1/completions")
_MOST_SLOTS = 256  # unless told
_AHEAD = 2  # choices in flight for each slot
_JSON = {"Content-Type": "application/json"}
_LINE_START = b'{"id": "batch_req_'  # of each line that is written


@takes(sharding=Sharding, processes=Processes)
def run(
    model: Model = None,
    model_option: ModelOption = None,
    input_file: Annotated[
        Path, typer.Option("--input", metavar="FILE", help="JSON lines with custom_id, method, url and body.")
    ] = ...,  # type: ignore[assignment]
    output_file: Annotated[
        Path,
        typer.Option("--output", metavar="FILE", help="JSON lines of responses; continued if it is there."),
    ] = ...,  # type: ignore[assignment]
    max_slots: MaxSlots = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    generation_config: GenerationConfig = "auto",
    *,
    sharding: Sharding,
    processes: Processes,
) -> None:
    """Answer a file of OpenAI batch requests; run it again to go on where it stopped.

    A request that fails is answered by its error. The exit status is 1 if some
    failed that were not wrong (status 429, or 500 and above): the next run
    tries them again and replaces their lines. Others count as answered.
    """
    try:
        from tpjax.server.app import create_app
        from tpjax.server.service import Service
    except ImportError as error:
        raise ConfigError(f"batch needs more packages ({error}): pip install 'tpjax[serve]'") from error
    name = chosen_model(model, model_option)

    def loaded() -> LLM:
        return load(
            name,
            sharding,
            max_slots=max_slots,
            generation_config=generation_config,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    processes.join()
    if process_id():
        loaded()  # follows process 0, which has the files
    if output_file.is_file() and input_file.is_file() and output_file.samefile(input_file):
        raise RequestError(f"--output {output_file} is the file of --input")
    requests = read_requests(input_file)
    earlier = read_answered(output_file)
    check_writable(output_file)
    answered = {answer.custom_id for answer in earlier if not _is_tried_again(answer.status)}
    waiting = [request for request in requests if request["custom_id"] not in answered]
    if waiting:
        ensure(name, sharding.tp, sharding.dp, sharding.pp)
    replaced = {request["custom_id"] for request in waiting}
    _keep(output_file, [answer for answer in earlier if answer.custom_id not in replaced])
    note(f"{len(requests)} requests, {len(requests) - len(waiting)} of them answered before")
    if not waiting:
        if processes.several:
            loaded().close()  # the others wait for it
        return
    ahead = _AHEAD * (max_slots or _MOST_SLOTS)  # how many there will be is known once it is loaded
    # what is in flight is counted here: no request is refused for those before it
    service = Service(loaded, Path(name).name, max_queue=sys.maxsize)
    answers = _answer(service, create_app(service), waiting, output_file, ahead)
    try:
        statuses = asyncio.run(answers)
    except OSError as error:
        raise RequestError(f"{error.filename or output_file}: {error.strerror or error}") from error
    note(f"{statuses[200]} answered, {statuses.total() - statuses[200]} failed: {output_file}")
    if again := {status: count for status, count in statuses.items() if _is_tried_again(status)}:
        counts = ", ".join(f"{count} of status {status}" for status, count in sorted(again.items()))
        raise EngineError(f"requests failed that the next run tries again: {counts}")


def _is_tried_again(status: int) -> bool:
    return status == 429 or status >= 500


def read_requests(file: Path) -> list[dict[str, Any]]:
    """Reads and checks the requests in a batch file.

    Raises:
        RequestError: a request is invalid; the message names its line.
    """
    requests: dict[str, dict[str, Any]] = {}
    for number, line in read_lines(file):
        where = f"{file}, line {number}"
        request = decoded(line, where)
        if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
            raise RequestError(f"{where}: an object with a custom_id is needed")
        if request.get("url") not in URLS or request.get("method", "POST") != "POST":
            asked = f"{request.get('method', 'POST')} {request.get('url')}"
            raise RequestError(f"{where}: {asked} is not supported: use POST and {' or '.join(URLS)}")
        if not isinstance(request.get("body"), dict) or request["body"].get("stream"):
            raise RequestError(f"{where}: a body is needed, and no stream in it")
        if request["custom_id"] in requests:
            raise RequestError(f"{where}: custom_id {request['custom_id']!r} is there twice")
        requests[request["custom_id"]] = request
    if not requests:
        raise RequestError(f"{file}: no request in it")
    return list(requests.values())


@dataclass(frozen=True)
class Answer:
    """A line of an output file.

    Attributes:
        custom_id: of its request.
        status: HTTP status; 500 where the line has none, as OpenAI's of requests that expired.
        line: its bytes, with the line feed.
    """

    custom_id: str
    status: int
    line: bytes


def read_answered(file: Path) -> list[Answer]:
    """Reads the answers in an output file, without an incomplete last line; the file stays as it is.

    Raises:
        RequestError: the file is not the output of a batch.
    """
    if not file.is_file():
        return []
    *lines, rest = file.read_bytes().split(b"\n")  # bytes: a character may be incomplete, too
    try:
        answers = [_read_answer(line + b"\n") for line in lines if line.strip()]
        # the last run was killed while it wrote, unless this is another file
        if not answers and not (rest.startswith(_LINE_START) or _LINE_START.startswith(rest)):
            raise ValueError("no line of an answer")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise RequestError(f"{file} is there and holds no answers of a batch: it stays as it is") from error
    return answers


def _read_answer(line: bytes) -> Answer:
    found = json.loads(line)
    custom_id, response = found["custom_id"], found["response"]
    status = 500 if response is None else response["status_code"]
    if not isinstance(custom_id, str) or not isinstance(status, int):
        raise TypeError("no answer of a batch")
    return Answer(custom_id, status, line)


def _keep(file: Path, answers: Sequence[Answer]) -> None:
    """Leaves only some answers in an output file; if this ends midway, the file is as it was.

    Raises:
        RequestError: the file cannot be written.
    """
    if not file.is_file():
        return
    there, kept = file.read_bytes(), b"".join(answer.line for answer in answers)
    try:
        if there.startswith(kept):
            if there != kept:
                os.truncate(file, len(kept))
            return
        real = file.resolve()
        with tempfile.NamedTemporaryFile(dir=real.parent, prefix=f".{real.name}.", delete=False) as whole:
            try:
                whole.write(kept)
                whole.flush()
                shutil.copymode(real, whole.name)
                os.replace(whole.name, real)
            except BaseException:
                os.unlink(whole.name)
                raise
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror or error}") from error


def _choices(body: dict[str, Any]) -> int:
    """Returns how many choices a request asks for; 1 if it is wrong: the server says so."""
    n, prompt = body.get("n"), body.get("prompt")
    prompts = 1
    if isinstance(prompt, list) and all(isinstance(one, str | list) for one in prompt):
        prompts = len(prompt)
    return max(1, n if isinstance(n, int) else 1) * max(1, prompts)


async def _answer(
    service: Service, app: FastAPI, requests: list[dict[str, Any]], output: Path, at_once: int
) -> Counter[int]:
    """Sends every request to the application in this process; returns how many have each status.

    Raises:
        EngineError: the engine stopped; requests that this ended have no answer.
    """
    import httpx2 as httpx

    room, statuses = asyncio.Semaphore(at_once), Counter[int]()
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app):
        while service.state == "loading":
            await asyncio.sleep(0.05)
        if service.error is not None:
            raise service.error
        async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
            with output.open("ab") as file, _progress(len(requests)) as advance:

                async def one(request: dict[str, Any], choices: int) -> None:
                    line = await _line(client, request, service.model)
                    for _ in range(choices):
                        room.release()
                    status = line["response"]["status_code"]
                    if service.state == "failed" and status != 200:
                        what = f"{type(service.error).__name__}: {service.error}"
                        done = f"{statuses.total()} of {len(requests)} requests were answered"
                        raise EngineError(f"the engine stopped: {what} ({done}; the next run goes on)")
                    statuses[status] += 1
                    file.write(_encoded(line))
                    file.flush()
                    advance()

                try:
                    async with asyncio.TaskGroup() as tasks:
                        for request in requests:
                            # a request of more choices than may be in flight is in flight alone
                            choices = min(_choices(request["body"]), at_once)
                            for _ in range(choices):
                                await room.acquire()
                            tasks.create_task(one(request, choices))
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from errors
    return statuses


async def _line(client: httpx.AsyncClient, request: dict[str, Any], model: str) -> dict[str, Any]:
    """Sends a request and makes a line of the output, in OpenAI's batch format."""
    from tpjax.server.error_responses import ApiError, bad_request, internal_error

    identity = uuid.uuid4().hex
    try:
        # escapes and NaN as they came: the server refuses what is no strict JSON, and that is the answer
        content = json.dumps({**request["body"], "model": model}).encode()
        response = await client.post(request["url"], content=content, headers=_JSON)
        status, body = response.status_code, response.json()
        identity = response.headers.get("x-request-id", identity)
    except Exception as error:  # of one request; the others have their answers
        refused: ApiError = internal_error()
        if isinstance(error, RecursionError):
            refused = bad_request("the body is nested too deep")
        else:
            log.exception("the request %r failed", request["custom_id"])
        status, body = refused.status, refused.body()
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": request["custom_id"],
        "response": {"status_code": status, "request_id": identity, "body": body},
        "error": None,
    }


def _encoded(line: dict[str, Any]) -> bytes:
    # lone surrogates, which have no UTF-8, are escaped as JSON does it
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Shows a progress bar if stderr is a terminal; yields a function that advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda: bar.advance(task)
