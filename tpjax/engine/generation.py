"""A request together with its text: what the Python API and the server stream. No jax."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from tpjax.engine.request import FinishReason, Request, TokenLogprobs
from tpjax.text.stream import TextStream
from tpjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Delta:
    """New text of a stream and its tokens.

    Attributes:
        text: whole characters only; may be empty.
        token_ids: may be empty in the last delta.
        finish_reason: set in the last delta.
        logprobs: one entry per token if ``SamplingParams.logprobs`` is given.
        offsets: where each token begins in the whole text, in characters; a token without text begins where
            the next one would.
        error: what went wrong, if ``finish_reason`` is ``error``.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    error: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids or self.finish_reason)


class Generation:
    """A request and its text so far.

    Args:
        request: what the engine runs.
        tokenizer: ``None``: there are only tokens and no text, as with ``detokenize=False``.
        shown: special tokens that appear in the text.

    Attributes:
        request: as given.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None, shown: Collection[int] = ()) -> None:
        self.request = request
        params = request.params
        self._stream: TextStream | None = None
        if tokenizer is not None and params.detokenize:
            if params.include_stop_str_in_output:  # also if it is a special token
                shown = {
                    *shown,
                    *(i for text in params.stop if (i := tokenizer.special_id(text)) is not None),
                }
            self._stream = TextStream(
                tokenizer,
                request.prompt_token_ids,
                params.stop,
                min_tokens=params.min_tokens,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                shown=shown,
            )

    @property
    def text(self) -> str:
        """The text so far."""
        return self._stream.text if self._stream else ""

    def advance(self, tokens: list[int]) -> Delta:
        """Returns the text of the tokens that an engine step has appended to the request.

        Sets the request's ``finish_reason`` if its text contains a stop string, and removes the tokens after
        it, which were sampled in the same dispatch. The caller then cancels it in the engine.
        """
        request = self.request
        first = len(request.output_token_ids) - len(tokens)
        text, offsets = self._push(tokens) if self._stream else ("", [0] * len(tokens))
        ids, logprobs = request.output_token_ids[first:], request.logprobs[first:]
        return Delta(text, ids, request.finish_reason, logprobs, offsets, request.error)

    def _push(self, tokens: list[int]) -> tuple[str, list[int]]:
        """Returns the text of new tokens, and where each that is kept begins in the whole text."""
        request, stream = self.request, self._stream
        assert stream is not None
        parts: list[str] = []
        offsets: list[int] = []
        for count, token in enumerate(tokens, start=1):
            ending = token in request.stop_ids and request.finish_reason == "stop" and count == len(tokens)
            if ending and not request.params.include_stop_str_in_output:
                offsets.append(stream.end)  # the token that ends a text is not part of it
            else:
                parts.append(stream.push(token))
                offsets.append(stream.start)
            if stream.stopped:
                length = len(request.output_token_ids) - (len(tokens) - count)
                del request.output_token_ids[length:]
                del request.logprobs[length:]
                request.finish_reason = "stop"
                break
        if request.finish_reason is not None:
            parts.append(stream.flush())
        return "".join(parts), offsets
