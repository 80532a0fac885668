"""The FastAPI application: routes of the OpenAI API, of vLLM's server and of this one.

To add an endpoint, add its body to ``protocol.py`` and a route to ``create_app``. A route that generates
returns ``generation(...)``; one that only tokenises or renders returns ``without_engine(...)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from starlette.responses import Response

from tpjax._version import __version__
from tpjax.errors import LostProcessError
from tpjax.server.app_state import AppState
from tpjax.server.chat import ChatResponse
from tpjax.server.completions import CompletionResponse
from tpjax.server.event_stream import generation, while_connected, without_engine
from tpjax.server.exception_handlers import RESPONSES, add_exception_handlers
from tpjax.server.json_bodies import JsonResponse, StrictJsonRoute
from tpjax.server.json_types import JsonObject
from tpjax.server.page_files import page_file
from tpjax.server.protocol import ChatBody, CompletionBody, DetokenizeBody, RenderBody, TokenizeBody
from tpjax.server.service import Service


def create_app(service: Service) -> FastAPI:
    """Returns the application over a service, which it starts and stops."""
    state = AppState(service)

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
        docs_url=None,  # both pages load scripts from other hosts
        redoc_url=None,
        default_response_class=JsonResponse,
    )
    app.state.service, app.state.shared = service, state
    app.router.route_class = StrictJsonRoute
    add_exception_handlers(app)
    _add_generation(app, state)
    _add_models(app, state)
    _add_tokenizer(app, state)
    _add_monitoring(app, state)
    _add_page(app, state)
    return app


def _add_generation(app: FastAPI, state: AppState) -> None:
    service = state.service

    @app.post("/v1/completions", responses=RESPONSES)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continues prompts."""
        state.check_model(body.model)
        prompts = state.chat_prompts if service.state == "ready" else None
        compiler = None if prompts is None else prompts.grammars
        begin = CompletionResponse.begin(service, compiler, state.encoder, body)
        return await generation(service, request, begin, bool(body.stream))

    @app.post("/v1/chat/completions", responses=RESPONSES)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answers a conversation."""
        state.check_model(body.model)
        _ = service.llm  # 503 before anything else
        begin = ChatResponse.begin(service, state.chat_prompts, body)
        return await generation(service, request, begin, bool(body.stream))


def _add_models(app: FastAPI, state: AppState) -> None:
    service = state.service

    @app.get("/v1/models", responses=RESPONSES)
    async def models() -> JsonObject:
        """Lists the models, of which there is one."""
        return {"object": "list", "data": [state.model_card()]}

    @app.get("/v1/models/{model:path}", responses=RESPONSES)
    async def model_card(model: str) -> JsonObject:
        """Returns the model of that name."""
        state.check_model(model)
        return state.model_card()

    @app.get("/shards", responses=RESPONSES)
    async def model_shards() -> JsonObject:
        """Returns how the weights and the cache are sharded over the mesh."""
        _ = service.llm
        return service.shards or {}


def _add_tokenizer(app: FastAPI, state: AppState) -> None:
    service = state.service

    @app.post("/tokenize", responses=RESPONSES)
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        """Returns the tokens of a prompt or of messages."""
        state.check_model(body.model)
        return await without_engine(service, request, state.tokenized(body))

    @app.post("/detokenize", responses=RESPONSES)
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        """Returns the text of tokens."""
        state.check_model(body.model)
        return await without_engine(service, request, state.detokenized(body))

    @app.get("/tokenizer_info", responses=RESPONSES)
    async def tokenizer_info() -> JsonObject:
        """Returns what a client needs to prepare prompts itself: special tokens and the chat template."""
        return state.tokenizer_info()


def _add_monitoring(app: FastAPI, state: AppState) -> None:
    service = state.service

    @app.get("/ping")
    @app.post("/ping", include_in_schema=False)
    @app.head("/ping", include_in_schema=False)
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Returns 200 unless the engine, or every replica, has failed; and which replicas work."""
        lost = {"error": f"{service.error}"} if isinstance(service.error, LostProcessError) else {}
        return JsonResponse(
            {"status": service.state, "replicas": state.replicas()} | lost,
            status_code=503 if service.state == "failed" else 200,
        )

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses=RESPONSES)
    async def ready() -> dict[str, str]:
        """Returns 200 while requests are accepted, and which program compiles in the background."""
        _ = service.llm
        compiling = {"compiling": service.compiling} if service.compiling else {}
        return {"status": service.state} | compiling

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Returns the version of tpjax."""
        return {"version": __version__}

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics() -> Response:
        """Returns metrics in Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/stats")
    async def stats() -> JsonObject:
        """Returns the figures of the page's live panel."""
        return state.live()


def _add_page(app: FastAPI, state: AppState) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """Returns the web page."""
        return page_file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_part(name: str) -> Response:
        """Returns a style sheet or a script of the web page."""
        return page_file(name)

    @app.post("/render", responses=RESPONSES)
    async def render(body: RenderBody, request: Request) -> Response:
        """Returns the blocks of a markdown text as HTML: see ``tpjax.server.markdown``."""
        return await while_connected(request, state.rendered(body))
