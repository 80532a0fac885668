"""Chat templates: a conversation to the prompt its model was trained on.

Templates come with the checkpoint and are code. They run in Jinja's immutable sandbox, with transformers'
settings and helpers; the server also puts time and memory limits round them (``server/sandbox.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tpjax.errors import CheckpointError, RequestError, TpjaxError

if TYPE_CHECKING:
    import jinja2


class ChatTemplates:
    """The chat templates of a checkpoint.

    Args:
        sources: name -> Jinja source; ``"default"`` is the usual one, ``"tool_use"`` goes first with tools.
        variables: what every template sees besides the conversation (``bos_token``, ...).

    Attributes:
        sources: as given.
        variables: as given.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self.variables = dict(variables)
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """Renders a conversation; see ``Tokenizer.apply_chat_template``.

        Raises:
            RequestError: there is no template, or the template refuses the messages.
            CheckpointError: the template is not valid Jinja.
        """
        import jinja2

        _check_messages(messages)
        template = self._template(self.chosen(tools))
        variables = {**self.variables, "documents": None, **kwargs}
        try:
            return template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        # A template is code: it can fail on odd messages in any way, and each is the request's fault.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise RequestError(f"the chat template refused the messages: {error}") from error

    def chosen(self, tools: Sequence[Any] | None) -> str:
        """Name of the template for these tools."""
        return "tool_use" if tools and "tool_use" in self.sources else "default"

    def after_reply(self) -> str:
        """What the default template writes after an assistant's message; empty where that cannot be told."""
        reply = "tpjaxreply"
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": reply}]
        try:
            _, found, after = self.render(messages, add_generation_prompt=False).rpartition(reply)
        except (TpjaxError, RecursionError):  # whoever uses the template is told what is wrong with it
            return ""
        return after if found else ""

    def _template(self, name: str) -> jinja2.Template:
        import jinja2

        if name not in self.sources:
            raise RequestError("this checkpoint has no chat template")
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self.sources[name])
            except jinja2.TemplateSyntaxError as error:
                raise CheckpointError(
                    f"chat template {name!r}, line {error.lineno}: {error.message}"
                ) from error
        return self._compiled[name]


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages must be a non-empty list of messages, got {type(messages).__name__}")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{position}] must be an object with a role")


def _environment() -> jinja2.Environment:
    """The environment transformers renders chat templates in. They are untrusted code, hence the sandbox."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text for training; here it only renders its body."""

        tags = {"generation"}  # noqa: RUF012 -- as the base class declares it

        def parse(self, parser: Any) -> list[Any]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

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
