"""Parameters of OpenAI's own service and of vLLM that have nothing to do here.

What changes no answer is taken and ignored, so that their clients work. What would change it and cannot be
had is refused by name, unless it asks for what happens anyway.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from tpjax.server.error_responses import bad_request
from tpjax.server.json_bodies import FailFastModel


class CompatibilityFields(FailFastModel):
    """What completions and chat have in common; strict: a string is no number, an unknown field an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    # taken and ignored: OpenAI's
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    # taken and ignored: vLLM's
    session_id: str | None = None
    spaces_between_special_tokens: bool | None = None  # no tokenizer that loads here puts any
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    guided_decoding_backend: str | None = None
    return_token_offsets: bool | None = None
    return_mm_kwargs: bool | None = None
    routed_experts_prompt_start: Annotated[int, Field(ge=0)] | None = None
    # refused, see UNSUPPORTED
    use_beam_search: Any = None
    early_stopping: Any = None
    length_penalty: Any = None
    watermarking: Any = None
    logits_processors: Any = None
    logprob_token_ids: Any = None
    repetition_detection: Any = None
    thinking_token_budget: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    vllm_xargs: Any = None

    #: Refused parameters: the values that ask for nothing, and why others cannot be had.
    UNSUPPORTED: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "use_beam_search": ((False,), "tokens are sampled, or the likeliest is taken"),
        "early_stopping": ((False,), "it belongs to beam search"),
        "length_penalty": ((1, 1.0), "it belongs to beam search"),
        "watermarking": ((False,), "there are no watermarks"),
        "logits_processors": (([],), "a request brings no code"),
        "logprob_token_ids": (([],), "log-probabilities are of the likeliest tokens"),
        "repetition_detection": (({},), "no repetition is looked for"),
        "thinking_token_budget": ((-1,), "reasoning has no budget of its own"),
        "kv_transfer_params": (({},), "keys and values stay in this server"),
        "ec_transfer_params": (({},), "there is no encoder"),
        "vllm_xargs": (({},), "there are no plugins"),
    }

    def check(self) -> None:
        """Refuses what cannot be had.

        Raises:
            ApiError: with the parameter's name.
        """
        for name, (nothing, why) in self.UNSUPPORTED.items():
            value = getattr(self, name)
            if value is not None and value not in nothing:
                raise bad_request(f"{name} is not supported: {why}", name)


class CompletionCompatibilityFields(CompatibilityFields):
    """What only completions have."""

    suffix: Any = None
    prompt_embeds: Any = None

    UNSUPPORTED: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = CompatibilityFields.UNSUPPORTED | {
        "suffix": (("",), "the model only continues a prompt"),
        "prompt_embeds": ((), "a prompt is text or token ids"),
    }


class ChatCompatibilityFields(CompatibilityFields):
    """What only chat has."""

    # taken and ignored
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    # refused
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None
    media_io_kwargs: Any = None
    mm_processor_kwargs: Any = None
    return_prompt_text: Any = None

    UNSUPPORTED: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = CompatibilityFields.UNSUPPORTED | {
        "modalities": ((["text"], []), 'answers are text: only ["text"] is'),
        "audio": ((), "answers are text"),
        "web_search_options": ((), "the server does not search the web"),
        "moderation": ((), "nothing is moderated"),
        "media_io_kwargs": (({},), "messages are text"),
        "mm_processor_kwargs": (({},), "messages are text"),
        "return_prompt_text": ((False,), "use return_token_ids and /detokenize"),
    }
