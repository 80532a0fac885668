"""The first look at a grammar, in a process that may be killed: compiling one can run long or end it."""

from __future__ import annotations

from tpjax.errors import RequestError
from tpjax.server.worker_pools import WorkerPool

CHECKERS = 2
MEMORY_LIMIT_BYTES = 2 << 30


class GrammarChecker:
    """Tries grammars."""

    def __init__(self) -> None:
        self._workers = WorkerPool(CHECKERS, "the schema", memory_limit_bytes=MEMORY_LIMIT_BYTES)

    async def check_grammar(self, grammar: str, param: str) -> None:
        """Compiles a grammar and throws it away.

        Raises:
            ApiError: 400; it is not valid, or takes too long.
        """
        await self._workers.run(f"{__name__}:check", {"grammar": grammar}, param)

    async def to_lark(self, grammar: str, param: str) -> str:
        """A grammar in Lark's dialect, which it may be, or may be GBNF.

        Raises:
            ApiError: 400; it is neither, or takes too long.
        """
        lark: str = await self._workers.run(
            f"{__name__}:as_lark", {"grammar": grammar, "param": param}, param
        )
        return lark

    def close(self) -> None:
        """Ends the processes."""
        self._workers.close()


def check(grammar: str) -> None:
    """Compiles a grammar: what the worker runs.

    Raises:
        RequestError: it is not valid.
    """
    import llguidance

    if wrong := llguidance.LLMatcher.validate_grammar(grammar):
        raise RequestError(f"the schema is not usable: {wrong}")


def as_lark(grammar: str, param: str) -> str:
    """A grammar in Lark's dialect: what the worker runs.

    Raises:
        RequestError: it is not valid.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # a parser over a client's text: it can fail in any way
        raise RequestError(f"{param}: grammar is not usable: {error}"[:500]) from error
