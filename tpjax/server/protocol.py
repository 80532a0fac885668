"""What clients send. Wrong types, unknown names and numbers that are not finite end here, with a 400.

Fields that only OpenAI's own service can honour (``user``, ``metadata``, ...) are taken and ignored, so that
its clients work; whatever else is unknown is refused, so that a misspelt parameter does not pass in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tpjax.sampling_params import MAX_LOGPROBS, MAX_SEED, MIN_SEED, SamplingParams
from tpjax.server.errors import bad_request

MAX_CHOICES = 128  # prompts × n of one request
MAX_STOP = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024

Number = float  # strict mode takes a whole number too
Bias = Annotated[Number, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Body(BaseModel):
    """Strict: a string is no number, and an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream also tells."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """What completions and chat have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # of OpenAI's own service: taken and ignored
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Refuses what no single field can show to be wrong.

        Raises:
            ApiError: with the parameter's name.
        """
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream=true", "stream_options")

    def sampling_params(self, max_tokens: int, **extra: Any) -> SamplingParams:
        """The engine's parameters.

        Raises:
            RequestError: a value is out of range.
            ApiError: a key of ``logit_bias`` is no token id.
        """
        extra.setdefault("min_tokens", _or(self.min_tokens, 0))
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),  # -1 is vLLM's way to say all
            top_p=self.top_p,
            min_p=self.min_p,
            stop=_or(self.stop, ()),
            stop_token_ids=_or(self.stop_token_ids, ()),
            ignore_eos=bool(self.ignore_eos),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=_token_biases(self.logit_bias or {}),
            **extra,
        )


class CompletionBody(Sampling):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        """Refuses what no single field can show to be wrong, before anything is made of it."""
        super().check()
        n = self.n or 1
        if self.best_of is not None and self.best_of != n:
            raise bad_request(
                f"best_of={self.best_of} differs from n={n}: all choices are returned", "best_of"
            )
        if self.suffix:
            raise bad_request("suffix is not supported: the model only continues a prompt", "suffix")
        prompts = self.prompts()
        if not prompts:
            raise bad_request("prompt is an empty list: at least 1 prompt is needed", "prompt")
        if len(prompts) * n > MAX_CHOICES:
            raise bad_request(
                f"{len(prompts)} prompts with n={n} are {len(prompts) * n} choices, over {MAX_CHOICES}",
                "prompt" if len(prompts) > 1 else "n",
            )
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens=0 makes sense with echo=true only", "max_tokens")

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if single else prompt


class FunctionCall(Body):
    """A call the model made."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call the model made, and its id."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(BaseModel):
    """A turn. Templates may know more fields than these, so more are let through to them."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(Body):
    """A function the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """A function's name."""

    name: str


class NamedTool(Body):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A schema the answer follows."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The shape of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # of OpenAI's own service: taken and ignored
    reasoning_effort: str | None = None
    verbosity: str | None = None

    def check(self) -> None:
        """Refuses what no single field can show to be wrong."""
        super().check()
        if not self.messages:
            raise bad_request("messages is empty: at least 1 message is needed", "messages")
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise bad_request("tool_choice needs tools", "tool_choice")
        if isinstance(self.tool_choice, NamedTool):
            name, known = self.tool_choice.function.name, [tool.function.name for tool in self.tools or ()]
            if name not in known:
                raise bad_request(
                    f"tool_choice names {name!r}, but tools has {', '.join(known)}", "tool_choice"
                )
        form = self.response_format
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            raise bad_request(
                "response_format of type json_schema, and no other, has a json_schema", "response_format"
            )

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, where given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeBody(Body):
    """``POST /tokenize``: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(max_length=4096)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _token_biases(biases: dict[str, Number]) -> dict[int, float]:
    wrong = [key for key in biases if not (key.isascii() and key.isdigit() and len(key) < 10)]
    if wrong:
        raise bad_request(f"logit_bias has {wrong[0][:20]!r}, which is not a token id", "logit_bias")
    return {int(key): float(bias) for key, bias in biases.items()}
