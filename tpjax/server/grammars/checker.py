"""Checks grammars in worker processes first: compiling one can run long or end the process."""

from __future__ import annotations

from tpjax.errors import RequestError
from tpjax.server.worker_pools import WorkerPool

CHECKERS = 2
MEMORY_LIMIT_BYTES = 2 << 30


class GrammarChecker:
    """Checks grammars in worker processes."""

    def __init__(self) -> None:
        self._workers = WorkerPool(CHECKERS, "the schema", memory_limit_bytes=MEMORY_LIMIT_BYTES)

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

    Raises:
        RequestError: the grammar is not valid.
    """
    import llguidance

    if wrong := llguidance.LLMatcher.validate_grammar(grammar):
        raise RequestError(f"the schema is not usable: {wrong}")


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
