"""The application: routes of the OpenAI API and a few of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from functools import cached_property
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpjax._version import __version__
from tpjax.errors import RequestError
from tpjax.server.chat import ChatPrompts, ChatResponse
from tpjax.server.completions import CompletionResponse
from tpjax.server.error_responses import ApiError, bad_request, internal_error
from tpjax.server.json_bodies import StrictJsonRoute
from tpjax.server.prompt_encoder import PromptEncoder
from tpjax.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tpjax.server.responses import Answer, event, json_of, token_text
from tpjax.server.service import Service, Stream
from tpjax.text.tokenizer import Tokenizer

T = TypeVar("T")

log = logging.getLogger(__name__)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in (
        (400, "The request is wrong."),
        (401, "The API key is missing or wrong."),
        (404, "There is no such model."),
        (408, "The body did not come in time."),
        (413, "The body is too large."),
        (429, "The queue is full."),
        (500, "The generation failed."),
        (503, "The model is loading, or the server stops."),
    )
}


# As vLLM's model cards have it, for clients that read it.
_PERMISSION = {
    "object": "model_permission",
    "allow_create_engine": False,
    "allow_sampling": True,
    "allow_logprobs": True,
    "allow_search_indices": False,
    "allow_view": True,
    "allow_fine_tuning": False,
    "organization": "*",
    "group": None,
    "is_blocking": False,
}


class _ClientGone(Exception):
    """The client closed the connection."""


class EventStream(Response):
    """Server-sent events, as long as the client listens.

    An error after the first event ends the stream with an event of its own and without ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, stream: Stream, first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]
    ) -> None:
        self._service, self._stream = service, stream
        self._first, self._rest = first, rest
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers as ASGI has it; ends early when the client goes."""
        writer = asyncio.ensure_future(self._write(send))
        try:
            await _first_of(writer, asyncio.ensure_future(_disconnected(receive)))
        finally:
            self._service.close(self._stream)
        if not writer.cancelled():
            writer.result()

    async def _write(self, send: Send) -> None:
        async def data(body: bytes, more_body: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more_body})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await data(event(self._first))
            async for chunk in self._rest:
                await data(event(chunk))
            await data(b"data: [DONE]\n\n", more_body=False)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("an unexpected error in a stream")
                error = internal_error()
            await data(event(error.body(), "error"), more_body=False)


def create_app(service: Service) -> FastAPI:
    """The application over a service, which it starts and stops."""
    state = _State(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()
        state.close()

    app = FastAPI(
        title="tpjax",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service, app.state.pools = service, state
    app.router.route_class = StrictJsonRoute
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)

    @app.post("/v1/completions", responses=_ANSWERS)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continues prompts."""
        state.check_model(body.model)
        templates = state.templates if service.state == "ready" else None
        compiler = None if templates is None else templates.grammars
        begin = CompletionResponse.begin(service, compiler, state.texts, body)
        return await _answered(service, request, begin, bool(body.stream))

    @app.post("/v1/chat/completions", responses=_ANSWERS)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answers a conversation."""
        state.check_model(body.model)
        _ = service.llm  # 503 before anything else
        begin = ChatResponse.begin(service, state.templates, body)
        return await _answered(service, request, begin, bool(body.stream))

    @app.get("/v1/models", responses=_ANSWERS)
    async def models() -> dict[str, Any]:
        """The one model there is."""
        return {"object": "list", "data": [state.model_card()]}

    @app.get("/v1/models/{model:path}", responses=_ANSWERS)
    async def model_card(model: str) -> dict[str, Any]:
        """The model of that name."""
        state.check_model(model)
        return state.model_card()

    @app.post("/tokenize", responses=_ANSWERS)
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        """The tokens of a prompt or of messages."""
        state.check_model(body.model)
        return await _prepared(service, request, state.tokenized(body))

    @app.post("/detokenize", responses=_ANSWERS)
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        """The text of tokens."""
        state.check_model(body.model)
        return await _prepared(service, request, state.detokenized(body))

    @app.get("/tokenizer_info", responses=_ANSWERS)
    async def tokenizer_info() -> dict[str, Any]:
        """What a client needs to know to prepare prompts itself: special tokens and the chat template."""
        return state.tokenizer_info()

    @app.get("/ping")
    @app.post("/ping", include_in_schema=False)
    @app.head("/ping", include_in_schema=False)
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """200 while the process lives and its engine has not failed."""
        return Response(status_code=503 if service.state == "failed" else 200)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses=_ANSWERS)
    async def ready() -> dict[str, str]:
        """200 while requests are taken."""
        _ = service.llm
        return {"status": service.state}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of tpjax."""
        return {"version": __version__}

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """What the page's live panel shows."""
        return state.live()

    @app.get("/shards", responses=_ANSWERS)
    async def model_shards() -> dict[str, Any]:
        """How the model is cut over the mesh."""
        _ = service.llm
        return service.shards or {}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """The web page."""
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; connect-src 'self'; img-src data:; script-src 'nonce-{nonce}'; "
            f"style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        html = files("tpjax.server").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(html.replace("NONCE", nonce), headers={"Content-Security-Policy": policy})

    return app


class _State:
    """What the routes share."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.created = int(time.time())

    @cached_property
    def templates(self) -> ChatPrompts | None:
        """``None`` where the model has no tokenizer; first asked for when the model is there."""
        llm = self.service.llm
        if llm.tokenizer is None:
            return None
        return ChatPrompts(llm.tokenizer, llm.config.vocab_size, self.texts)

    @cached_property
    def texts(self) -> PromptEncoder:
        """Encodes texts; first asked for when the model is there."""
        return PromptEncoder(self.service.llm)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ApiError: there is none.
        """
        tokenizer = self.service.llm.tokenizer
        if tokenizer is None:
            raise bad_request("the model has no tokenizer")
        return tokenizer

    def check_model(self, name: str | None) -> None:
        """Refuses a model that is not this one."""
        if name is not None and name != self.service.model:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist: this server has {self.service.model!r}",
                param="model",
                code="model_not_found",
            )

    def model_card(self) -> dict[str, Any]:
        """What the API says about the model."""
        return {
            "id": self.service.model,
            "object": "model",
            "created": self.created,
            "owned_by": "tpjax",
            "root": self.service.llm.name,
            "parent": None,
            "max_model_len": self.service.llm.max_model_len,
            "vocab_size": self.service.llm.config.vocab_size,
            "permission": [_PERMISSION | {"id": f"modelperm-{self.created:x}", "created": self.created}],
        }

    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer under the names of Hugging Face's ``tokenizer_config.json``."""
        tokenizer, llm = self.tokenizer, self.service.llm
        before, after = tokenizer.edges
        roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        return {
            "tokenizer_class": "TpjaxTokenizer",
            **{role: tokenizer.chat_templates.variables.get(role) for role in roles},
            "add_bos_token": before > 0,
            "add_eos_token": after > 0,
            "model_max_length": llm.max_model_len,
            "vocab_size": tokenizer.vocab_size,
            "chat_template": tokenizer.chat_template,
        }

    async def tokenized(self, body: TokenizeBody) -> Response:
        """The answer of ``/tokenize``."""
        llm, tokenizer = self.service.llm, self.tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give prompt or messages, one of them", "prompt")
        if body.messages is not None:
            assert self.templates is not None
            tokens = await self.templates.prompt(body.messages, body.tools, asked=body)
        else:
            assert body.prompt is not None
            special = body.add_special_tokens is not False
            tokens = await self.texts.encode(body.prompt, "prompt", add_special_tokens=special, whole=True)
        head = {"count": len(tokens), "max_model_len": llm.max_model_len}
        texts = map(token_text(tokenizer), tokens) if body.return_token_strs else None
        lists: dict[str, Iterable[Any] | None] = {"tokens": tokens, "token_strs": texts}
        data = await self.texts.threads.run(json_of, head, lists)
        return Response(data, media_type="application/json")

    async def detokenized(self, body: DetokenizeBody) -> Response:
        """The answer of ``/detokenize``."""
        vocab, tokenizer = self.service.llm.config.vocab_size, self.tokenizer

        def text() -> str:
            wrong = next((token for token in body.tokens if not 0 <= token < vocab), None)
            if wrong is not None:
                raise bad_request(
                    f"tokens has token id {wrong}, but the vocabulary has {vocab} (0 to {vocab - 1})",
                    "tokens",
                )
            return tokenizer.decode(body.tokens, skip_special_tokens=False)

        return JSONResponse({"prompt": await self.texts.threads.run(text)})

    def live(self) -> dict[str, Any]:
        """What changes from second to second."""
        stats, service = self.service.stats, self.service
        figures = {
            "state": service.state,
            "model": service.model,
            "generated_tokens": service.metrics.generated_tokens,
            "time": time.monotonic(),
        }
        if stats is None:
            return figures
        return figures | {
            "slots": stats.slots,
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "prefix_hits": stats.prefix_hits,
            "prefix_queries": stats.prefix_queries,
        }

    def close(self) -> None:
        """Ends the workers, if there are any."""
        for one in (self.__dict__.get("templates"), self.__dict__.get("texts")):
            if one is not None:
                one.close()


# --- answering ---------------------------------------------------------------------------------------------


async def _answered(
    service: Service, request: Request, begin: Coroutine[Any, Any, Answer], streamed: bool
) -> Response:
    """Runs an answer for as long as its client is there."""
    answer: Answer | None = None

    async def work() -> Any:
        nonlocal answer
        answer = await begin
        if not streamed:
            return await answer.whole()
        events = answer.events()
        # An error before the first token still gets its status: the answer begins with the token.
        return await anext(events), events

    handed_over = False
    try:
        result = await _while_connected(request, work())
        if not streamed:
            return JSONResponse(result)
        assert answer is not None
        handed_over = True
        return EventStream(service, answer.stream, *result)
    except _ClientGone:
        return Response(status_code=499)  # nobody reads it; the log shows it
    finally:
        if answer is not None and not handed_over:
            service.close(answer.stream)


async def _prepared(service: Service, request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Runs what needs no engine, in a place of the queue, for as long as its client is there."""
    try:
        with service.preparing(1):
            return await _while_connected(request, work)
    except _ClientGone:
        return Response(status_code=499)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work; it is cancelled if the client goes first."""
    task = asyncio.ensure_future(work)
    await _first_of(task, asyncio.ensure_future(_disconnected(request.receive)))
    if task.cancelled():
        raise _ClientGone
    return task.result()


async def _first_of(*tasks: asyncio.Future[Any]) -> None:
    """Waits for one, and ends the others."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# --- errors ------------------------------------------------------------------------------------------------


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _request_error(_: Request, error: Exception) -> Response:
    return await _api_error(_, bad_request(str(error)))


async def _validation_error(_: Request, error: Exception) -> Response:
    """The first thing wrong, in a line."""
    assert isinstance(error, RequestValidationError)
    # where one of several types would do, the one that was meant is the one that has another complaint
    errors = error.errors()
    same = [one for one in errors if one["loc"][1:2] == errors[0]["loc"][1:2]]
    first = next((one for one in same if not one["type"].endswith("_type")), errors[0])
    where = [str(part) for part in first["loc"] if part != "body"]
    param = where[0] if where else None
    if not where and first["type"] in ("missing", "model_attributes_type"):
        message = "the body is empty, no JSON object, or not sent as application/json"
    elif first["type"] == "extra_forbidden":
        message = f"{'.'.join(where)[:200]} is not a known parameter"
    else:
        message = f"{'.'.join(where)[:200] or 'body'}: {first['msg']}"
    return await _api_error(_, bad_request(message, param))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return await _api_error(_, ApiError(error.status_code, str(error.detail), headers=headers))


async def _unexpected_error(_: Request, error: Exception) -> Response:
    return await _api_error(_, internal_error())  # Starlette raises it on: the outermost layer logs it
