"""Grammars over tokens: JSON schemas and tool calls, as masks for the sampler, by llguidance."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np

from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.grammars.json_schemas import Schema, patterns, ready, without_patterns
from tpjax.server.worker_pools import ThreadPool

if TYPE_CHECKING:
    from tpjax.server.grammars.checker import GrammarChecker
    from tpjax.text.tokenizer import Tokenizer

MAX_GRAMMAR_BYTES = 64 << 10
DEADLINE_S = 10.0
_THREADS = 2
# Between tokens of JSON: nothing, a space, or a line with some indentation. A model that has lost its thread
# would otherwise write white space until its limit.
WHITESPACE = r"( |\n {0,16})?"
MAX_PATTERNS = 64  # of one schema, tried one by one where it cannot be used as it is
_UNUSABLE = "is not usable"  # in the message of what is wrong with the grammar, and not with the machine

log = logging.getLogger(__name__)


class TokenGrammar:
    """What a request's next token may be; the engine asks and tells.

    Attributes:
        finished: nothing may follow.
        error: the grammar met a limit while it ran; the request fails.
    """

    def __init__(self, matcher: Any, eos_ids: frozenset[int], vocab_size: int) -> None:
        self.finished = False
        self.error: str | None = None
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._stop_ids: frozenset[int] = frozenset()
        self._words = -(-vocab_size // 32)

    def add_stop_ids(self, stop_ids: Collection[int]) -> None:
        """Takes tokens that end the text as an end-of-text token does."""
        self._stop_ids = frozenset(stop_ids) - self._eos_ids

    def mask(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: bit ``i`` of word ``w`` allows token ``32 * w + i``."""
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        self._check()
        # a model may have more rows than its tokenizer has tokens: those are never drawn
        mask = np.pad(allowed, (0, self._words - len(allowed)))
        if self._stop_ids and any(mask[i >> 5] >> (i & 31) & 1 for i in self._eos_ids):
            for i in self._stop_ids:
                mask[i >> 5] |= np.uint32(1 << (i & 31))
        return mask

    def advance(self, token: int) -> None:
        """Takes the token that was drawn."""
        if token in self._eos_ids or token in self._stop_ids:
            self.finished = True
        elif not self.finished:
            self._matcher.consume_token(token)
            self._check()
            # what is complete and cannot go on needs no end-of-text token
            self.finished = self.finished or self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            self.finished, self.error = True, "the schema is too complex to follow"


class GrammarCompiler:
    """Makes grammars for one model.

    Args:
        tokenizer: its vocabulary is handed to llguidance when the first grammar is made.
        vocab_size: of the model, which may have more rows than the tokenizer.
        checker: tries a grammar first.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, checker: GrammarChecker) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._checker = checker
        self._threads = ThreadPool(_THREADS, "grammar")
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    async def compile(
        self, write: Callable[[Sequence[Any]], str], schemas: Sequence[Schema], param: str, count: int
    ) -> list[TokenGrammar]:
        """Grammars of an answer, one for each of ``count`` choices.

        What a schema that is not strict asks for and cannot have is passed over, with a line in the log.

        Args:
            write: from the schemas to llguidance's dialect of Lark.
            schemas: what the answer follows.
            param: the parameter they came in.
            count: how many.

        Raises:
            ApiError: 400; a schema is too large, not valid, or cannot be compiled in time.
        """
        values = [ready(schema.value) for schema in schemas]
        try:
            return await self.lark(write(list(map(_with_options, values, schemas))), param, count)
        except ApiError as error:
            if _UNUSABLE not in error.message or all(schema.strict for schema in schemas):
                raise
        mended = [await self._mended(*both, param) for both in zip(values, schemas, strict=True)]
        return await self.lark(write(list(map(_with_options, mended, schemas))), param, count)

    async def schema(
        self, schema: Any, param: str, count: int, *, whitespace: str | None = None
    ) -> list[TokenGrammar]:
        """Grammars of a JSON schema, one for each of ``count`` choices; it is not strict.

        Args:
            schema: decoded.
            param: of the request, for errors.
            count: of choices.
            whitespace: expression of what may stand between tokens of JSON; ``None``: a little.

        Raises:
            ApiError: as for :meth:`compile`.
        """
        one = Schema(schema, False, "the schema", whitespace=whitespace)
        return await self.compile(only, [one], param, count)

    async def lark(self, lark: str, param: str, count: int) -> list[TokenGrammar]:
        """Grammars in llguidance's dialect of Lark.

        Raises:
            ApiError: as for a schema.
        """
        return await self.grammar(llguidance.LLMatcher.grammar_from_lark(lark), param, count)

    async def grammar(self, grammar: str, param: str, count: int) -> list[TokenGrammar]:
        """Grammars in llguidance's own form.

        Raises:
            ApiError: as for a schema.
        """
        _check_size(grammar, param)
        if not self._tokenizer.eos_ids:
            raise bad_request("a schema needs an end-of-text token, and the model has none", param)
        try:
            await self._checker.check_grammar(grammar, param)
            first = await self._threads.run(self._compile, grammar, param, limit_s=DEADLINE_S)
        except TimeoutError as error:
            raise bad_request(f"the schema took over {DEADLINE_S:g} s to compile", param) from error
        except ApiError as error:
            raise ApiError(
                error.status, _in_a_line(error.message), param=param, code=error.code, headers=error.headers
            ) from error
        for warning in first.get_grammar_warnings():
            log.warning("%s: passed over: %s", param, warning[:500])
        matchers = [first, *(first.deep_copy() for _ in range(count - 1))]
        return [TokenGrammar(one, self._tokenizer.eos_ids, self._vocab_size) for one in matchers]

    async def to_lark(self, grammar: str, param: str) -> str:
        """A grammar in Lark's dialect, which it may be, or may be GBNF.

        Raises:
            ApiError: 400; it is neither, too large, or takes too long.
        """
        _check_size(grammar, param)
        return await self._checker.to_lark(grammar, param)

    def close(self) -> None:
        """Ends what runs."""
        self._threads.close()
        self._checker.close()

    async def _mended(self, value: Any, schema: Schema, param: str) -> Any:
        """A schema without what makes it unusable, where it is not strict."""
        if schema.strict or await self._usable(value, schema, param):
            return value
        found = patterns(value)[: MAX_PATTERNS + 1]
        if len(found) > MAX_PATTERNS:
            raise bad_request(f"{schema.name} has over {MAX_PATTERNS} patterns", param)
        strings = [{"type": "string", "pattern": pattern} for pattern in found]
        usable = [await self._usable(one, schema, param) for one in strings]
        unusable = frozenset(one for one, fine in zip(found, usable, strict=True) if not fine)
        for pattern in unusable:
            log.warning("%s: the pattern %r is not enforced", schema.name, pattern[:200])
        value = without_patterns(value, unusable)
        if schema.replaceable and not await self._usable(value, schema, param):
            log.warning("%s cannot be used as a schema: any object will do", schema.name)
            return {"type": "object"}
        return value

    async def _usable(self, value: Any, schema: Schema, param: str) -> bool:
        lark = only([_with_options(value, schema)])
        try:
            await self._checker.check_grammar(llguidance.LLMatcher.grammar_from_lark(lark), param)
        except ApiError as error:
            if _UNUSABLE not in error.message:
                raise
            return False
        return True

    def _compile(self, grammar: str, param: str) -> Any:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = vocabulary(self._tokenizer)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        allowed = matcher.compute_bitmask()  # a cyclic schema shows only here
        if matcher.is_error():
            raise bad_request(f"the schema is not usable: {matcher.get_error()[:500]}", param)
        if not any(allowed):
            raise bad_request("the schema allows no text at all", param)
        return matcher


def _check_size(grammar: str, param: str) -> None:
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise bad_request(f"the schema takes {len(grammar)} bytes, over {MAX_GRAMMAR_BYTES}", param)


def _with_options(value: Any, schema: Schema) -> Any:
    """A schema with what tells the engine how to read it."""
    if not isinstance(value, dict):
        return value
    space = WHITESPACE if schema.whitespace is None else schema.whitespace
    options = {"whitespace_pattern": space, "lenient": not schema.strict}
    return {**value, "x-guidance": options}


def only(schemas: Sequence[Any]) -> str:
    """The grammar of one schema."""
    return f"start: %json {json.dumps(schemas[0], ensure_ascii=False, separators=(',', ':'))}"


def _in_a_line(message: str) -> str:
    """What the engine says of a grammar, without the grammar."""
    if _UNUSABLE not in message:
        return message
    before, _, wrong = message.partition(f"{_UNUSABLE}: ")
    wrong = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", wrong)
    wrong = re.sub(r'^invalid regex ".*" \(in regex\): ', "", wrong)
    pattern = re.match(r"regex parse error:\n\s*(.*)\n[\s\S]*?error: (.*)", wrong)
    wrong = f"the pattern {pattern[1][:200]!r}: {pattern[2]}" if pattern else wrong.split("\n")[0]
    return f"{before}{_UNUSABLE}: {wrong}"[:500]


class _Vocabulary:
    """Our tokenizer in the form llguidance takes one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.eos_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False)


def vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """A tokenizer's vocabulary as llguidance keeps it; takes a second for a large one."""
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=sorted(tokenizer.eos_ids)
    )
