"""State shared by the routes, and their responses without generation: model card, tokenizer, figures."""

from __future__ import annotations

import time
from functools import cached_property

from starlette.responses import Response

from tpjax.config import brief
from tpjax.engine.engine import Stats
from tpjax.server.chat_prompts import ChatPrompts
from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.json_bodies import JsonResponse
from tpjax.server.json_types import Json, JsonObject
from tpjax.server.prompt_encoder import PromptEncoder
from tpjax.server.protocol import DetokenizeBody, RenderBody, TokenizeBody
from tpjax.server.responses import json_of, token_text
from tpjax.server.service import Service
from tpjax.server.worker_pools import WorkerPool
from tpjax.text.tokenizer import Tokenizer
from tpjax.text.tokenizer_files import ROLES

RENDERERS = 2  # processes
RENDER_LIMIT_S = 2.0
MAX_WAITING_RENDERS = 64  # each takes milliseconds, or RENDER_LIMIT_S at the worst

# As in vLLM's model cards, for clients that read it.
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


class AppState:
    """Holds what the routes share.

    Args:
        service: serves the model.

    Attributes:
        service: serves the model.
        created: start of the server, seconds since the epoch.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.created = int(time.time())

    @cached_property
    def chat_prompts(self) -> ChatPrompts | None:
        """Renders conversations; ``None`` if the model has no tokenizer. Created when the model is loaded."""
        llm = self.service.llm
        if llm.tokenizer is None:
            return None
        return ChatPrompts(llm.tokenizer, llm.config.vocab_size, self.encoder)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Encodes texts. Created when the model is loaded."""
        return PromptEncoder(self.service.llm)

    @cached_property
    def renderer(self) -> WorkerPool:
        """Renders markdown for the web page."""
        return WorkerPool(RENDERERS, "rendering", RENDER_LIMIT_S, max_waiting=MAX_WAITING_RENDERS)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ApiError: the model has none.
        """
        tokenizer = self.service.llm.tokenizer
        if tokenizer is None:
            raise bad_request("the model has no tokenizer")
        return tokenizer

    def check_model(self, name: str | None) -> None:
        """Checks that a request names this server's model, or none.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.service.model:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist: this server has {self.service.model!r}",
                param="model",
                code="model_not_found",
            )

    def model_card(self) -> JsonObject:
        """Returns the model as ``/v1/models`` lists it."""
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

    def tokenizer_info(self) -> JsonObject:
        """Returns the tokenizer's settings under the names of Hugging Face's ``tokenizer_config.json``."""
        tokenizer, llm = self.tokenizer, self.service.llm
        before, after = tokenizer.edges
        return {
            "tokenizer_class": "TpjaxTokenizer",
            **{role: tokenizer.chat_templates.variables.get(role) for role in ROLES},
            "add_bos_token": before > 0,
            "add_eos_token": after > 0,
            "model_max_length": llm.max_model_len,
            "vocab_size": tokenizer.vocab_size,
            "chat_template": tokenizer.chat_template,
        }

    async def tokenized(self, body: TokenizeBody) -> Response:
        """Returns the response of ``/tokenize``.

        Raises:
            ApiError: 400, neither prompt nor messages are given, or both, or they cannot be encoded.
        """
        llm, tokenizer = self.service.llm, self.tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give prompt or messages, one of them", "prompt")
        if body.messages is not None:
            assert self.chat_prompts is not None
            tokens = await self.chat_prompts.encode(body.messages, body.tools, body)
        else:
            assert body.prompt is not None
            special = body.add_special_tokens is not False
            tokens = await self.encoder.encode(body.prompt, "prompt", add_special_tokens=special, whole=True)
        texts = map(token_text(tokenizer), tokens) if body.return_token_strs else None
        found = {
            "count": len(tokens),
            "max_model_len": llm.max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }
        data = await self.encoder.threads.run(json_of, found)
        return Response(data, media_type="application/json")

    async def detokenized(self, body: DetokenizeBody) -> Response:
        """Returns the response of ``/detokenize``.

        Raises:
            ApiError: 400, a token is not in the vocabulary, or the model has no tokenizer.
        """
        vocab, tokenizer = self.service.llm.config.vocab_size, self.tokenizer

        def text() -> str:
            wrong = next((token for token in body.tokens if not 0 <= token < vocab), None)
            if wrong is not None:
                raise bad_request(
                    f"tokens has token id {brief(wrong)}, but the vocabulary has {vocab} (0 to {vocab - 1})",
                    "tokens",
                )
            return tokenizer.decode(body.tokens, skip_special_tokens=False)

        return JsonResponse({"prompt": await self.encoder.threads.run(text)})

    async def rendered(self, body: RenderBody) -> Response:
        """Returns the response of ``/render``."""
        blocks = await self.renderer.run("tpjax.server.markdown:render", {"text": body.text}, "text")
        return JsonResponse({"blocks": blocks})

    def live(self) -> JsonObject:
        """Returns the figures of ``/stats``: state, slots and pages by request, queue, tokens generated."""
        service = self.service
        figures = {
            "state": service.state,
            "model": service.model,
            "generated_tokens": service.metrics.generated_tokens,
            "time": time.monotonic(),
        }
        if not service.replicas:
            return figures
        stats = Stats.of_all([one.stats for one in service.replicas])
        return figures | {
            "replicas": self.replicas(),
            "slots": stats.slots,
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "pages": stats.pages,
            "pages_in_use": stats.pages_in_use,
            "pages_cached": stats.pages_cached,
            "requests": [one._asdict() for one in stats.requests],
            "prefix_hits": stats.prefix_hits,
            "prefix_queries": stats.prefix_queries,
        }

    def replicas(self) -> list[Json]:
        """Returns which replicas work, and what each has to do."""
        return [
            {
                "state": "ready" if one.error is None else "failed",
                "running": one.stats.running,
                "waiting": one.stats.waiting,
                "slots": one.stats.slots,
            }
            for one in self.service.replicas
        ]

    def close(self) -> None:
        """Ends the workers that have been started."""
        for name in ("chat_prompts", "encoder", "renderer"):
            if (one := self.__dict__.get(name)) is not None:
                one.close()
