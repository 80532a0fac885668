"""Prompts from texts: what is certainly too long is refused, and what is long is encoded elsewhere."""

from __future__ import annotations

from array import array
from base64 import b64decode
from typing import TYPE_CHECKING

from tpjax.server import admission_budget
from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.worker_pools import ThreadPool, WorkerPool

if TYPE_CHECKING:
    from tpjax.llm import LLM

ENCODE = "tpjax.text.loading:encode_job"
# Longer texts are encoded in a process: it can be killed, and gives its memory back. They take over 30 ms.
SHORT_CHARS = 64 << 10
SHORT_THREADS, LONG_PROCESSES = 2, 1
TIME_LIMIT_S = 60.0
MEMORY_LIMIT_BYTES = 4 << 30


class PromptEncoder:
    """Encodes clients' texts.

    Args:
        llm: whose tokenizer and context.

    Attributes:
        threads: for what is short.
        workers: for what is long.
    """

    def __init__(self, llm: LLM) -> None:
        self._path, self._context, self._tokenizer = str(llm.path), llm.max_model_len, llm.tokenizer
        self.threads = ThreadPool(SHORT_THREADS, "text")
        self.workers = WorkerPool(LONG_PROCESSES, "the prompt", TIME_LIMIT_S, MEMORY_LIMIT_BYTES)

    async def encode(
        self, text: str, param: str, *, add_special_tokens: bool = True, whole: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: a client's.
            param: which it was, for errors.
            add_special_tokens: as in ``Tokenizer.encode``.
            whole: of a text over the context too.

        Raises:
            ApiError: 400; it is over the context. 429: too much text is being prepared.
        """
        if self._tokenizer is None:
            raise bad_request(f"{self._path} has no tokenizer: give the prompt as token ids", param)
        admission_budget.take(len(text))
        if len(text) <= SHORT_CHARS:
            return await self.threads.run(self._encoded, text, add_special_tokens)
        if not whole:
            fewest = await self.threads.run(self._tokenizer.fewest_tokens, text)
            self.check_length(fewest, param, "at least ")
        limit = None if whole else self._context
        job = {"path": self._path, "text": text, "add_special_tokens": add_special_tokens, "limit": limit}
        found = await self.workers.run(ENCODE, job, param)
        if "ids" not in found:
            self.check_length(found["count"], param)
        return await self.threads.run(_ids, found["ids"])

    def check_length(self, count: int, param: str, about: str = "") -> None:
        """Refuses a prompt of more tokens than the context.

        Raises:
            ApiError: 400.
        """
        if count > self._context:
            raise ApiError(
                400,
                f"the prompt has {about}{count} tokens, over the context of {self._context}",
                param=param,
                code="context_length_exceeded",
            )

    def close(self) -> None:
        """Ends what runs."""
        self.threads.close()
        self.workers.close()

    def _encoded(self, text: str, special: bool) -> list[int]:
        assert self._tokenizer is not None
        return self._tokenizer.encode(text, add_special_tokens=special)


def _ids(data: str) -> list[int]:
    return array("I", b64decode(data)).tolist()
