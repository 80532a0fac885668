"""Renders conversations with chat templates, as the prompts their models were trained on.

Templates come with the checkpoint and are code. They run in Jinja's immutable sandbox, with transformers'
settings and helpers, and that in a process with limits on time and memory (``sandbox.py``): Jinja's sandbox
keeps a template from Python's internals, not from ``{{ 'a' * 10**9 }}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tpjax.errors import CheckpointError, RequestError, TpjaxError
from tpjax.sandbox import sandbox

if TYPE_CHECKING:
    import jinja2

RENDER = "tpjax.text.chat_template:rendered"
WHAT = "the chat template"
MAX_RENDERED_CHARS = 4 << 20
WORKER_IMPORTS = ("jinja2.ext", "jinja2.sandbox")  # imported by a worker before the clock of a job starts


# Appended to the message that is to be continued; the rendering is truncated there. The space shows whether
# the template strips white space (transformers does the same, with the same text).
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplates:
    """Holds and renders the chat templates of a checkpoint.

    Args:
        sources: name -> Jinja source; ``"default"`` is the usual one, ``"tool_use"`` is preferred with tools.
        variables: template variables besides the conversation (``bos_token``, ...).

    Attributes:
        sources: name -> Jinja source.
        variables: template variables besides the conversation.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self.variables = dict(variables)
        self._compiled: dict[str, jinja2.Template] = {}

    def render(self, messages: Sequence[Mapping[str, Any]], **conversation: Any) -> str:
        """Renders a conversation in the sandbox; the arguments are those of :meth:`render_here`.

        Raises:
            RequestError: there is no template, it rejects the messages, or it exceeds a limit.
            CheckpointError: the template is not valid Jinja.
        """
        _check_messages(messages)
        own = conversation.get("chat_template") is not None
        if not own:
            self._check_known(self.chosen(conversation.get("tools")))
        text: str = sandbox.run(RENDER, self.job({"messages": messages, **conversation}), WHAT)
        return text

    def job(self, conversation: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of :func:`rendered` for a conversation (arguments of :meth:`render_here`)."""
        return {"sources": self.sources, "variables": self.variables, "conversation": conversation}

    def render_here(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Renders a conversation in this process, without limits; see ``Tokenizer.apply_chat_template``.

        Raises:
            RequestError: there is no template, it rejects the messages, or the request's template is not
                valid Jinja.
            CheckpointError: the checkpoint's template is not valid Jinja.
        """
        import jinja2

        _check_messages(messages)
        if continue_final_message:
            final, messages = messages[-1], _tagged(messages, add_generation_prompt)
        template = self._template(self.chosen(tools)) if chat_template is None else _compiled(chat_template)
        variables = {**self.variables, "documents": None, **kwargs}
        try:
            text = template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        # A template is code and can fail in any way; each failure on odd messages is the request's fault.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise RequestError(f"the chat template refused the messages: {error}"[:500]) from error
        return _cut(text, final["content"]) if continue_final_message else text

    def chosen(self, tools: Sequence[Any] | None) -> str:
        """Returns the name of the template for a conversation with these tools."""
        return "tool_use" if tools and "tool_use" in self.sources else "default"

    def after_reply(self) -> str:
        """Returns what the default template writes after an assistant's message; empty if that is unknown."""
        reply = "tpjaxreply"
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": reply}]
        try:
            _, found, after = self.render(messages, add_generation_prompt=False).rpartition(reply)
        except (TpjaxError, RecursionError):  # a request that uses the template gets its error
            return ""
        return after if found else ""

    def _check_known(self, name: str) -> None:
        if name not in self.sources:
            others = ", ".join(sorted(self.sources))
            named = f" named {name!r}: it has {others}" if others else ""
            raise RequestError(f"this checkpoint has no chat template{named}")

    def _template(self, name: str) -> jinja2.Template:
        import jinja2

        self._check_known(name)
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self.sources[name])
            except jinja2.TemplateSyntaxError as error:
                raise CheckpointError(
                    f"chat template {name!r}, line {error.lineno}: {error.message}"
                ) from error
        return self._compiled[name]


def rendered(
    sources: Mapping[str, str], variables: Mapping[str, str], conversation: Mapping[str, Any]
) -> str:
    """Renders a conversation; runs in the worker process.

    Raises:
        RequestError: as for ``ChatTemplates.render``, or the prompt is too long.
        CheckpointError: the template is not valid Jinja.
    """
    text = _templates(tuple(sources.items()), tuple(variables.items())).render_here(**conversation)
    if len(text) > MAX_RENDERED_CHARS:
        raise RequestError(f"the prompt has {len(text)} characters, over {MAX_RENDERED_CHARS}")
    return text


@lru_cache(8)
def _templates(sources: tuple[tuple[str, str], ...], variables: tuple[tuple[str, str], ...]) -> ChatTemplates:
    return ChatTemplates(dict(sources), dict(variables))


def _compiled(source: str) -> jinja2.Template:
    """Compiles a template from a request, without caching it."""
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"chat_template, line {error.lineno}: {error.message}") from error


def _tagged(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[Mapping[str, Any]]:
    """Returns the messages with a marker at the end of the last one."""
    if add_generation_prompt:
        raise RequestError("continue_final_message and add_generation_prompt cannot both be true")
    content = messages[-1].get("content")
    if not isinstance(content, str):
        raise RequestError("continue_final_message needs a final message with text to continue")
    return [*messages[:-1], {**messages[-1], "content": content + _CONTINUE}]


def _cut(text: str, content: str) -> str:
    at = text.rfind(_CONTINUE.strip())
    if at < 0 or content.strip() not in text:
        raise RequestError("continue_final_message: the chat template does not show the final message")
    kept = text[:at]
    return kept if text.startswith(_CONTINUE, at) else kept.rstrip()


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages must be a non-empty list of messages, got {type(messages).__name__}")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{position}] must be an object with a role")


def _environment() -> jinja2.Environment:
    """Returns transformers' environment for chat templates. They are untrusted code, hence the sandbox."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's text for training; here it only renders its body."""

        tags = {"generation"}  # noqa: RUF012 -- as the base class declares it

        def parse(self, parser: Any) -> list[Any]:
            next(parser.stream)
            body: list[Any] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
