"""Prompts from texts: what is certainly too long is refused at once, and what is long is encoded elsewhere."""

from __future__ import annotations

from array import array
from base64 import b64decode
from typing import TYPE_CHECKING

from tpjax.server import budget
from tpjax.server.errors import ApiError, bad_request
from tpjax.server.sandbox import ThreadPool, WorkerPool

if TYPE_CHECKING:
    from tpjax.llm import LLM
    from tpjax.tokenizer import Tokenizer

ENCODE = "tpjax.tokenizer:encoded"
# Longer texts are encoded in a process: it can be killed, and gives its memory back. They take over 30 ms.
SHORT_CHARS = 64 << 10
SHORT_THREADS, LONG_PROCESSES = 2, 1
TIME_LIMIT_S = 60.0
MEMORY_LIMIT_BYTES = 4 << 30


class Texts:
    """Encodes clients' texts.

    Args:
        llm: whose tokenizer and context.
        tokenizer: of the model.

    Attributes:
        threads: for what is short.
        workers: for what is long.
    """

    def __init__(self, llm: LLM, tokenizer: Tokenizer) -> None:
        self._path, self._context, self._tokenizer = str(llm.path), llm.max_model_len, tokenizer
        self.threads = ThreadPool(SHORT_THREADS, "text")
        self.workers = WorkerPool(LONG_PROCESSES, "the prompt", TIME_LIMIT_S, MEMORY_LIMIT_BYTES)

    async def prompt(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ApiError: 400, naming ``param``: it is over the context. 429: too much text is being prepared.
        """
        budget.take(len(text))
        if len(text) > SHORT_CHARS:
            fewest = await self.threads.run(self._tokenizer.fewest_tokens, text)
            if fewest > self._context:
                raise over_context(f"at least {fewest}", self._context, param)
        return await self._encoded(text, param, add_special_tokens, self._context)

    async def tokens(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, however many.

        Raises:
            ApiError: 429: too much text is being prepared.
        """
        budget.take(len(text))
        return await self._encoded(text, param, add_special_tokens, None)

    def close(self) -> None:
        """Ends what runs."""
        self.threads.close()
        self.workers.close()

    async def _encoded(self, text: str, param: str, special: bool, limit: int | None) -> list[int]:
        if len(text) <= SHORT_CHARS:
            return await self.threads.run(self._here, text, special)
        job = {"path": self._path, "text": text, "add_special_tokens": special, "limit": limit}
        found = await self.workers.run(ENCODE, job, param)
        if "ids" not in found:
            raise over_context(str(found["count"]), limit or 0, param)
        return await self.threads.run(_ids, found["ids"])

    def _here(self, text: str, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)


def over_context(count: str, context: int, param: str) -> ApiError:
    """Status 400: a prompt has more tokens than the context."""
    return bad_request(
        f"the prompt has {count} tokens, over the context of {context}", param, "context_length_exceeded"
    )


def _ids(data: str) -> list[int]:
    return array("I", b64decode(data)).tolist()
