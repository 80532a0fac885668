"""Checks grammars in worker processes first: compiling one can run long or end the process."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from tpjax.errors import RequestError
from tpjax.server.worker_pools import WorkerPool

if TYPE_CHECKING:
    import llguidance

CHECKERS = 2
MEMORY_LIMIT_BYTES = 2 << 30
# Processor time. The server's own process compiles again what passes, on a thread that nothing ends, and
# holds the automaton while the request runs: two seconds of it are 150 MB.
TIME_LIMIT_S = 2.0
_TOKEN_IDS = re.compile(r"<\[[0-9, -]+\]>")


class GrammarChecker:
    """Checks grammars in worker processes.

    Args:
        time_limit_s: processor time of a check, seconds.
    """

    def __init__(self, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._workers = WorkerPool(CHECKERS, "the schema", time_limit_s, MEMORY_LIMIT_BYTES)

    async def check_grammar(self, grammar: str, param: str) -> None:
        """Checks that a grammar compiles.

        Raises:
            ApiError: 400, the grammar is not valid, or takes too long.
        """
        await self._workers.run(f"{__name__}:check", {"grammar": grammar}, param)

    async def to_lark(self, grammar: str, param: str) -> str:
        """Converts a grammar in GBNF or Lark to Lark.

        Raises:
            ApiError: 400, the grammar is neither, or takes too long.
        """
        lark: str = await self._workers.run(
            f"{__name__}:as_lark", {"grammar": grammar, "param": param}, param
        )
        return lark

    def close(self) -> None:
        """Ends the processes."""
        self._workers.close()


def check(grammar: str) -> None:
    """Checks that a grammar compiles; runs in the worker process.

    The automaton is built as well, over bytes: it may be large although the grammar is short, as that of the
    multiples of a large prime is.

    Raises:
        RequestError: the grammar is not valid.
    """
    import llguidance

    if wrong := llguidance.LLMatcher.validate_grammar(grammar):
        raise RequestError(f"the schema is not usable: {wrong}")
    llguidance.LLMatcher(_byte_tokens(), _TOKEN_IDS.sub("<[1]>", grammar), log_level=0)


@lru_cache(1)
def _byte_tokens() -> llguidance.LLTokenizer:
    """Returns a vocabulary of bytes: a model's takes a second to build."""
    import llguidance

    return llguidance.LLTokenizer("byte")


def as_lark(grammar: str, param: str) -> str:
    """Converts a grammar to Lark; runs in the worker process.

    Raises:
        RequestError: the grammar is not valid.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # a parser of untrusted text: it can fail in any way
        raise RequestError(f"{param}: grammar is not usable: {error}"[:500]) from error
