"""Request bodies as pydantic models: wrong types, unknown fields and non-finite numbers get status 400.

An unknown field is an error, so that a misspelt parameter does not pass silently. Parameters of OpenAI and
vLLM that have no effect here are in ``compatibility.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field

from tpjax.sampling_params import MAX_COUNT, MAX_LOGPROBS, MAX_SEED, MIN_SEED, SamplingParams
from tpjax.server.compatibility import (
    ChatCompatibilityFields,
    CompatibilityFields,
    CompletionCompatibilityFields,
)
from tpjax.server.error_responses import bad_request
from tpjax.server.json_bodies import Body, FailFastModel, at_most
from tpjax.server.json_types import Json, JsonObject

MAX_CHOICES = 128  # prompts × n of one request
MAX_STOP = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 1024
MAX_GUIDED_CHOICES = 1024
MAX_PRIORITY = 2**63 - 1
MAX_MARKDOWN_CHARS = 16_384  # rendered at once; the page sends a longer text in parts

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Number = float  # pydantic's strict mode accepts an integer too
Bias = Annotated[Number, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
ChoiceTexts = Annotated[list[str], Field(min_length=1, max_length=MAX_GUIDED_CHOICES)]


class StreamOptions(Body):
    """``stream_options``: what a stream includes besides the response."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``: constrains the response by exactly one of the first six fields."""

    json_: JsonObject | bool | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: ChoiceTexts | None = None
    grammar: str | None = None
    structural_tag: Json = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None  # there is one grammar engine, and nothing to fall back to


class JsonSchema(Body):
    """``response_format.json_schema``."""

    name: str | None = None
    description: str | None = None
    schema_: JsonObject | bool | None = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(CompatibilityFields):
    """Parameters of completions and chat."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], at_most(MAX_LOGIT_BIAS)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    detokenize: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: Annotated[list[StopText], Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    structured_outputs: StructuredOutputs | None = None
    # older names of structured_outputs, of the same types: `structure` builds one from the other
    guided_json: JsonObject | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: ChoiceTexts | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY - 1, le=MAX_PRIORITY)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def limit_name(self) -> str:
        """Name of the parameter that limits the generated tokens."""
        return "max_tokens"

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of a stream includes the usage of its choice so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def structure(self) -> StructuredOutputs | None:
        """The structured outputs, from ``structured_outputs`` or the older ``guided_*``.

        Raises:
            ApiError: 400, both are given.
        """
        guided = {
            name: value
            for name in ("json", "regex", "choice", "grammar")
            if (value := getattr(self, f"guided_{name}")) is not None
        }
        if self.structured_outputs is not None and guided:
            raise bad_request("structured_outputs and guided_* say the same: give one", "structured_outputs")
        if not guided:
            return self.structured_outputs
        return StructuredOutputs(**guided, whitespace_pattern=self.guided_whitespace_pattern)

    def check(self) -> None:
        """Checks what depends on several fields.

        Raises:
            ApiError: 400, with the name of the parameter.
        """
        super().check()
        form = self.response_format
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            raise bad_request(
                "response_format of type json_schema, and no other, has a json_schema", "response_format"
            )
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream=true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs is not available with stream", "prompt_logprobs")

    def sampling_params(self, max_tokens: int, **extra: Json) -> SamplingParams:
        """Returns the engine's sampling parameters.

        Raises:
            RequestError: a value is out of range.
            ApiError: 400, a key of ``logit_bias`` is not a token id.
        """
        extra.setdefault("min_tokens", _or(self.min_tokens, 0))
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),  # -1 is vLLM's value for all tokens
            top_p=self.top_p,
            min_p=self.min_p,
            stop=_or(self.stop, ()),
            stop_token_ids=_or(self.stop_token_ids, ()),
            ignore_eos=bool(self.ignore_eos),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=_token_biases(self.logit_bias or {}),
            allowed_token_ids=self.allowed_token_ids and list(dict.fromkeys(self.allowed_token_ids)),
            bad_words=list(dict.fromkeys(self.bad_words or ())),
            detokenize=self.detokenize is not False,
            skip_special_tokens=self.skip_special_tokens is not False,
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            **{"prompt_logprobs": self.prompt_logprobs, **extra},
        )


class CompletionBody(Sampling, CompletionCompatibilityFields):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        """Checks what depends on several fields."""
        super().check()
        n = self.n or 1
        if self.best_of is not None and self.best_of != n:
            raise bad_request(
                f"best_of={self.best_of} differs from n={n}: all choices are returned", "best_of"
            )
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
        """Returns the prompts as a list."""
        prompt: Json = self.prompt
        single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if single else prompt


class FunctionCall(FailFastModel):
    """A function and its arguments in a tool call of the model.

    Here and in :class:`ToolCall` what clients keep beside them is ignored, as no template shows it:
    ``parsed_arguments`` of the official client's ``parse``, ``provider_specific_fields``.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    name: str
    arguments: str


class ToolCall(FailFastModel):
    """A tool call of the model."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(FailFastModel):
    """A message. Other fields are passed on to the chat template, which may use them."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[JsonObject] | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None  # older name of tool_calls
    tool_call_id: str | None = None
    name: str | None = None


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    return_: JsonObject | None = Field(default=None, alias="return")  # of transformers' get_json_schema
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only type."""

    type: Literal["function"]
    function: Function
    cache_control: JsonObject | None = Field(default=None, exclude=True)  # of Anthropic's clients; no effect

    def described(self) -> JsonObject:
        """Returns the tool as chat templates describe it to the model."""
        return self.model_dump(exclude_none=True, by_alias=True)


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """``tool_choice`` that names the tool to call."""

    type: Literal["function"]
    function: NamedFunction


class Allowance(Body):
    """The allowed tools, and whether one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedTools(Body):
    """``tool_choice`` that lists the tools that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowance


class ChatBody(Sampling, ChatCompatibilityFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=128)] | None = None  # older name of tools
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    documents: list[JsonObject] | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None

    def check(self) -> None:
        """Checks what depends on several fields."""
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

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, if given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """Name of the parameter that limits the generated tokens."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class TokenizeBody(Body):
    """``POST /tokenize``: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(max_length=4096)] | None = None
    # by default for a prompt only: templates write special tokens themselves
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


class RenderBody(Body):
    """``POST /render``: markdown of the web page's conversations."""

    text: Annotated[str, Field(max_length=MAX_MARKDOWN_CHARS)]


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _token_biases(biases: dict[str, Number]) -> dict[int, float]:
    wrong = [key for key in biases if not (key.isascii() and key.isdigit() and len(key) < 10)]
    if wrong:
        raise bad_request(f"logit_bias has {wrong[0][:20]!r}, which is not a token id", "logit_bias")
    return {int(key): float(bias) for key, bias in biases.items()}
