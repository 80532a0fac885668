"""Encodes clients' texts: refuses what is certainly too long, and encodes long texts in a worker process."""

from __future__ import annotations

from array import array
from base64 import b64decode
from typing import TYPE_CHECKING

from tpjax.server import admission_budget
from tpjax.server.error_responses import ApiError, bad_request, over_context
from tpjax.server.worker_pools import ThreadPool, WorkerPool

if TYPE_CHECKING:
    from tpjax.llm import LLM

_ENCODE = "tpjax.text.loading:encode_job"
# Longer texts take over 30 ms. They are encoded in a process, which can be killed and returns its memory.
SHORT_CHARS = 64 << 10
SHORT_THREADS, LONG_PROCESSES = 2, 1
TIME_LIMIT_S = 60.0
MEMORY_LIMIT_BYTES = 4 << 30


class PromptEncoder:
    """Encodes texts into prompts.

    Args:
        llm: the model, for its tokenizer and its context.

    Attributes:
        threads: threads for short texts.
        workers: processes for long texts.
    """

    def __init__(self, llm: LLM) -> None:
        self._path, self._context, self._tokenizer = str(llm.path), llm.max_model_len, llm.tokenizer
        self.threads = ThreadPool(SHORT_THREADS, "text")
        self.workers = WorkerPool(LONG_PROCESSES, "the prompt", TIME_LIMIT_S, MEMORY_LIMIT_BYTES)

    async def encode(
        self, text: str, param: str, *, add_special_tokens: bool = True, whole: bool = False
    ) -> list[int]:
        """Returns the token ids of a text.

        Args:
            text: the text.
            param: parameter of the request that holds it, for errors.
            add_special_tokens: as in ``Tokenizer.encode``.
            whole: encode a text that is longer than the context too.

        Raises:
            ApiError: 400, the text is longer than the context; 429, too much text is being prepared.
        """
        if self._tokenizer is None:
            raise bad_request(f"{self._path} has no tokenizer: give the prompt as token ids", param)
        admission_budget.reserve(len(text))
        if len(text) <= SHORT_CHARS:
            return await self.threads.run(self._encoded, text, add_special_tokens)
        if not whole:
            fewest = await self.threads.run(self._tokenizer.fewest_tokens, text)
            self.check_length(fewest, param, "at least ")
        limit = None if whole else self._context
        job = {"path": self._path, "text": text, "add_special_tokens": add_special_tokens, "limit": limit}
        found = await self.workers.run(_ENCODE, job, param)
        if "ids" not in found:
            self.check_length(found["count"], param)
        return await self.threads.run(_decoded_ids, found["ids"])

    def check_length(self, count: int, param: str, about: str = "") -> None:
        """Checks that a prompt of ``count`` tokens fits into the context.

        Raises:
            ApiError: 400.
        """
        if count > self._context:
            raise ApiError(
                400,
                over_context(f"the prompt has {about}{count} tokens", self._context),
                param=param,
                code="context_length_exceeded",
            )

    def close(self) -> None:
        """Ends the threads and processes."""
        self.threads.close()
        self.workers.close()

    def _encoded(self, text: str, special: bool) -> list[int]:
        assert self._tokenizer is not None
        return self._tokenizer.encode(text, add_special_tokens=special)


def _decoded_ids(data: str) -> list[int]:
    return array("I", b64decode(data)).tolist()
