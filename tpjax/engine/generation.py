"""A request together with its text: what the Python interface and the server both hand out. No jax."""

from __future__ import annotations

from dataclasses import dataclass, field

from tpjax.engine.request import FinishReason, Request, TokenLogprobs
from tpjax.engine.text import TextStream
from tpjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Delta:
    """What a stream yields: new text and the tokens it came with.

    Attributes:
        text: whole characters only; may be empty.
        token_ids: may be empty in the last delta.
        finish_reason: set in the last delta.
        logprobs: one entry a token where ``SamplingParams.logprobs`` asked for them.
        error: what went wrong, where ``finish_reason`` is ``error``.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids or self.finish_reason)


class Generation:
    """A request and its text as it grows.

    Args:
        request: what the engine runs.
        tokenizer: ``None``: there is no text, only tokens.

    Attributes:
        request: as given.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self._stream = (
            None
            if tokenizer is None
            else TextStream(
                tokenizer, request.prompt_ids, request.params.stop, min_tokens=request.params.min_tokens
            )
        )

    @property
    def text(self) -> str:
        """Everything given out so far."""
        return self._stream.text if self._stream else ""

    def advance(self, tokens: list[int]) -> Delta:
        """Takes the tokens the engine's step gave the request.

        Sets the request's ``finish_reason`` where its text meets a stop string, and takes the tokens after
        it back: they were drawn in the same dispatch and never asked for. The caller tells the engine.
        """
        request = self.request
        first = len(request.output_ids) - len(tokens)
        text = self._push(tokens) if self._stream else ""
        return Delta(
            text, request.output_ids[first:], request.finish_reason, request.logprobs[first:], request.error
        )

    def _push(self, tokens: list[int]) -> str:
        request, stream = self.request, self._stream
        assert stream is not None
        parts = []
        for count, token in enumerate(tokens, start=1):
            ending = token in request.stop_ids and request.finish_reason == "stop" and count == len(tokens)
            if not ending:  # the token that ends a text is not part of it
                parts.append(stream.push(token))
            if stream.stopped:
                length = len(request.output_ids) - (len(tokens) - count)
                del request.output_ids[length:]
                del request.logprobs[length:]
                request.finish_reason = "stop"
                break
        if request.finish_reason is not None:
            parts.append(stream.flush())
        return "".join(parts)
