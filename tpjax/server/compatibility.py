"""Parameters of OpenAI's service and of vLLM that this server accepts for compatibility, or refuses by name.

Parameters that change no response are accepted and ignored, so that clients work. Parameters that would
change it and are not supported are refused by name, unless their value asks for the default behaviour.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from tpjax.server.error_responses import bad_request
from tpjax.server.json_bodies import Body
from tpjax.server.json_types import Json, JsonObject


class CompatibilityFields(Body):
    """Compatibility parameters of completions and chat. Strict: no strings for numbers, no unknown fields."""

    # accepted and ignored: OpenAI's
    user: str | None = None
    metadata: JsonObject | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: JsonObject | None = None
    prompt_cache_retention: str | None = None
    # accepted and ignored: vLLM's
    session_id: str | None = None
    spaces_between_special_tokens: bool | None = None  # no tokenizer that tpjax loads puts any
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    guided_decoding_backend: str | None = None
    return_token_offsets: bool | None = None
    return_mm_kwargs: bool | None = None
    routed_experts_prompt_start: Annotated[int, Field(ge=0)] | None = None
    # not supported, see UNSUPPORTED
    use_beam_search: Json = None
    early_stopping: Json = None
    length_penalty: Json = None
    watermarking: Json = None
    logits_processors: Json = None
    logprob_token_ids: Json = None
    repetition_detection: Json = None
    thinking_token_budget: Json = None
    kv_transfer_params: Json = None
    ec_transfer_params: Json = None
    vllm_xargs: Json = None

    #: Unsupported parameters -> (values that ask for the default behaviour, why others are not supported).
    UNSUPPORTED: ClassVar[dict[str, tuple[tuple[Json, ...], str]]] = {
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
        """Checks that no unsupported parameter is set.

        Raises:
            ApiError: 400, with the name of the parameter.
        """
        for name, (nothing, why) in self.UNSUPPORTED.items():
            value = getattr(self, name)
            if value is not None and value not in nothing:
                raise bad_request(f"{name} is not supported: {why}", name)


class CompletionCompatibilityFields(CompatibilityFields):
    """Compatibility parameters of completions."""

    suffix: Json = None
    prompt_embeds: Json = None

    UNSUPPORTED: ClassVar[dict[str, tuple[tuple[Json, ...], str]]] = CompatibilityFields.UNSUPPORTED | {
        "suffix": (("",), "the model only continues a prompt"),
        "prompt_embeds": ((), "a prompt is text or token ids"),
    }


class ChatCompatibilityFields(CompatibilityFields):
    """Compatibility parameters of chat."""

    # accepted and ignored
    verbosity: str | None = None
    prediction: JsonObject | None = None
    # not supported
    modalities: Json = None
    audio: Json = None
    web_search_options: Json = None
    moderation: Json = None
    media_io_kwargs: Json = None
    mm_processor_kwargs: Json = None
    return_prompt_text: Json = None

    UNSUPPORTED: ClassVar[dict[str, tuple[tuple[Json, ...], str]]] = CompatibilityFields.UNSUPPORTED | {
        "modalities": ((["text"], []), 'responses are text: only ["text"] is'),
        "audio": ((), "responses are text"),
        "web_search_options": ((), "the server does not search the web"),
        "moderation": ((), "nothing is moderated"),
        "media_io_kwargs": (({},), "messages are text"),
        "mm_processor_kwargs": (({},), "messages are text"),
        "return_prompt_text": ((False,), "use return_token_ids and /detokenize"),
    }
