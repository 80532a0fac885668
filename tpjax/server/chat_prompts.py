"""Renders conversations with chat templates and encodes them, in worker processes."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence

from tpjax.server.chat_format import ChatFormat
from tpjax.server.conversation import as_text, conversation
from tpjax.server.error_responses import bad_request
from tpjax.server.grammars.checker import GrammarChecker
from tpjax.server.grammars.compiler import GrammarCompiler
from tpjax.server.json_types import JsonObject
from tpjax.server.prompt_encoder import PromptEncoder
from tpjax.server.protocol import ChatBody, Message, TokenizeBody, Tool
from tpjax.server.worker_pools import TieredWorkerPool
from tpjax.text.chat_template import RENDER, WHAT
from tpjax.text.tokenizer import Tokenizer

_MAX_FORMATS = 64  # chat formats kept of templates that requests have brought
# Rendering takes a millisecond, and a tenth of a second for megabytes. With more processes a conversation
# waits less behind others whose template does not end: each of those holds one for QUICK_LIMIT_S, or, where
# many wait, for CROWDED_LIMIT_S. They start on demand.
QUICK_RENDERERS = max(4, min(8, (os.cpu_count() or 4) // 2))
SLOW_RENDERERS, QUICK_LIMIT_S, CROWDED_LIMIT_S = 2, 0.5, 0.15

# Template variables that have a field of their own in a request.
_RENDERING = {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}


class ChatPrompts:
    """Turns conversations into prompts for one model.

    Args:
        tokenizer: the model's tokenizer, with its chat templates.
        vocab_size: rows of the model's embedding.
        encoder: encodes what was rendered.

    Attributes:
        encoder: encodes what was rendered.
        workers: processes that render.
        grammars: compiles grammars for the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, encoder: PromptEncoder) -> None:
        self._templates = tokenizer.chat_templates
        self.encoder = encoder
        self.workers = TieredWorkerPool(QUICK_RENDERERS, SLOW_RENDERERS, WHAT, QUICK_LIMIT_S, CROWDED_LIMIT_S)
        self.grammars = GrammarCompiler(tokenizer, vocab_size, GrammarChecker())
        self._tokenizer = tokenizer
        self._formats: dict[tuple[str, bool], ChatFormat] = {}  # of the model's own templates
        self._brought: OrderedDict[tuple[bytes, bool], ChatFormat] = OrderedDict()  # latest last, by digest

    async def chat_format(self, tools: Sequence[Tool] | None, own: str | None = None) -> ChatFormat:
        """Returns the format of conversations with these tools; probes each template once.

        Args:
            tools: tools the model may call.
            own: a template that the request brings.

        Raises:
            ApiError: the server is too busy to probe the template, or the template is too slow.
        """
        name = self._templates.chosen(tools)
        with_tools = own is None and bool(tools) and name != self._templates.chosen(None)
        source = self._templates.sources.get(name, "") if own is None else own
        key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest(), with_tools
        found = self._formats.get((source, with_tools)) or self._brought.get(key)
        if found is None:
            more = {} if own is None else {"chat_template": own}

            async def render(conversation: JsonObject) -> str:
                job = self._templates.job({**conversation, **more})
                text: str = await self.workers.run(RENDER, job, "messages")
                return text

            found = await ChatFormat.of(source, self._tokenizer, render, with_tools=with_tools)
        if own is None:
            self._formats[source, with_tools] = found
            return found
        self._brought[key] = found
        self._brought.move_to_end(key)
        while len(self._brought) > _MAX_FORMATS:
            self._brought.popitem(last=False)
        return found

    async def encode(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, body: ChatBody | TokenizeBody
    ) -> list[int]:
        """Returns the token ids of a conversation.

        Args:
            messages: oldest first.
            tools: tools the model may call.
            body: the request, for its other options of the rendering.

        Raises:
            ApiError: 400, the messages are invalid or the template rejects them.
        """
        if not messages:
            raise bad_request("messages is empty: at least 1 message is needed", "messages")
        form = await self.chat_format(tools, body.chat_template)
        turns = conversation(messages, tools, form.traits, form.tool_calls)
        if body.continue_final_message:
            # as text: the template is given where it ends; it may have been joined with what came before
            turns[-1] = {**turns[-1], "content": as_text(turns[-1].get("content") or "")}
        described = tools if tools and form.traits.tools else ()
        plain_tools = [tool.described() for tool in described]
        rendering = {"messages": turns, "tools": plain_tools or None, **_rendering(body)}
        text = await self.workers.run(RENDER, self._templates.job(rendering), "messages")
        whole = not isinstance(body, ChatBody) or body.truncate_prompt_tokens is not None
        special = bool(body.add_special_tokens)
        return await self.encoder.encode(text, "messages", add_special_tokens=special, whole=whole)

    def close(self) -> None:
        """Ends the workers."""
        self.workers.close()
        self.grammars.close()


def _rendering(body: ChatBody | TokenizeBody) -> JsonObject:
    """Returns the template variables of a request besides messages and tools."""
    options = body.chat_template_kwargs or {}
    if clash := _RENDERING & set(options):
        raise bad_request(f"chat_template_kwargs has {min(clash)}", "chat_template_kwargs")
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt cannot both be true", "continue_final_message"
        )
    more: JsonObject = {"chat_template": body.chat_template} if body.chat_template is not None else {}
    if isinstance(body, ChatBody) and body.documents is not None:
        more["documents"] = body.documents
    if isinstance(body, ChatBody) and body.reasoning_effort is not None:
        more |= _effort(body.reasoning_effort)
    return {
        "add_generation_prompt": body.add_generation_prompt is not False and not continues,
        "continue_final_message": continues,
        **more,
        **options,
    }


def _effort(effort: str) -> JsonObject:
    """Returns the reasoning effort as templates name it: gpt-oss has three levels, others a switch."""
    level = {"none": "low", "minimal": "low", "xhigh": "high"}.get(effort, effort)
    thinking = {"enable_thinking": False, "thinking": False} if effort == "none" else {}
    return {"reasoning_effort": level, **thinking}
