"""Compiles JSON schemas and tool calls to grammars over tokens, with llguidance."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import llguidance
import numpy as np

from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.grammars.json_schemas import Schema, patterns, prepared, without_patterns
from tpjax.server.json_types import Json
from tpjax.server.worker_pools import ThreadPool

if TYPE_CHECKING:
    from tpjax.server.grammars.checker import GrammarChecker
    from tpjax.text.tokenizer import Tokenizer

MAX_GRAMMAR_BYTES = 64 << 10
DEADLINE_S = 10.0
_THREADS = 2
# White space between JSON tokens: none, a space, or a line break with some indentation. With more, a model
# could write white space up to its token limit.
WHITESPACE = r"( |\n {0,16})?"
MAX_PATTERNS = 64  # of one schema, each checked if the schema is not usable
_UNUSABLE = "is not usable"  # marks messages about the grammar, as opposed to the machine

log = logging.getLogger(__name__)


class TokenGrammar:
    """The grammar of one choice: masks the next token, and advances with each sampled token.

    Attributes:
        finished: no token may follow.
        error: message if the grammar exceeded a limit; the request fails.
    """

    def __init__(self, matcher: llguidance.LLMatcher, eos_ids: frozenset[int], vocab_size: int) -> None:
        self.finished = False
        self.error: str | None = None
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._stop_ids: frozenset[int] = frozenset()
        self._words = -(-vocab_size // 32)

    def add_stop_ids(self, stop_ids: Collection[int]) -> None:
        """Adds tokens that end the text as EOS does."""
        self._stop_ids = frozenset(stop_ids) - self._eos_ids

    def mask(self) -> np.ndarray:
        """Returns the allowed tokens, uint32 [ceil(V / 32)]: bit ``i`` of word ``w`` is token ``32w + i``."""
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        self._check()
        # a model may have more rows than its tokenizer has tokens: those are never sampled
        mask = np.pad(allowed, (0, self._words - len(allowed)))
        if self._stop_ids and any(mask[i >> 5] >> (i & 31) & 1 for i in self._eos_ids):
            for i in self._stop_ids:
                mask[i >> 5] |= np.uint32(1 << (i & 31))
        return mask

    def advance(self, token: int) -> None:
        """Advances by a sampled token."""
        if token in self._eos_ids or token in self._stop_ids:
            self.finished = True
        elif not self.finished:
            self._matcher.consume_token(token)
            self._check()
            # a complete text that cannot continue needs no EOS
            self.finished = self.finished or self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            self.finished, self.error = True, "the schema is too complex to follow"


class GrammarCompiler:
    """Compiles grammars for one model.

    Args:
        tokenizer: the model's tokenizer; llguidance gets its vocabulary with the first grammar.
        vocab_size: rows of the model's embedding, at least the tokenizer's vocabulary.
        checker: checks each grammar in a worker process first.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, checker: GrammarChecker) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._checker = checker
        self._threads = ThreadPool(_THREADS, "grammar")
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    async def compile(
        self, write: Callable[[Sequence[Json]], str], schemas: Sequence[Schema], param: str, count: int
    ) -> list[TokenGrammar]:
        """Returns the grammars of a response, one for each of ``count`` choices.

        What cannot be enforced in a schema that is not strict is removed, with a warning in the log.

        Args:
            write: function from the prepared schemas to llguidance's dialect of Lark.
            schemas: schemas of the response.
            param: parameter of the request, for errors.
            count: number of choices.

        Raises:
            ApiError: 400, a schema is too large, not valid, or takes too long to compile.
        """
        values = await self._threads.run(_prepared, schemas, param)
        try:
            return await self.lark(await self._threads.run(_written, write, values, schemas), param, count)
        except ApiError as error:
            if _UNUSABLE not in error.message or all(schema.strict for schema in schemas):
                raise
        relaxed = [await self._relaxed(*both, param) for both in zip(values, schemas, strict=True)]
        return await self.lark(await self._threads.run(_written, write, relaxed, schemas), param, count)

    async def schema(
        self,
        schema: Json,
        param: str,
        count: int,
        *,
        whitespace: str | None = None,
        closed: bool | None = None,
    ) -> list[TokenGrammar]:
        """Returns the grammars of a JSON schema that is not strict, one for each of ``count`` choices.

        Args:
            schema: decoded schema.
            param: parameter of the request, for errors.
            count: number of choices.
            whitespace: expression of the white space between JSON tokens; ``None``: a little.
            closed: as in :class:`Schema`.

        Raises:
            ApiError: as for :meth:`compile`.
        """
        one = Schema(schema, False, "the schema", whitespace=whitespace, closed=closed)
        return await self.compile(grammar_of_schema, [one], param, count)

    async def lark(self, lark: str, param: str, count: int) -> list[TokenGrammar]:
        """Returns the grammars of a text in llguidance's dialect of Lark, one for each of ``count`` choices.

        Raises:
            ApiError: as for :meth:`compile`.
        """
        return await self.grammar(llguidance.LLMatcher.grammar_from_lark(lark), param, count)

    async def grammar(self, grammar: str, param: str, count: int) -> list[TokenGrammar]:
        """Returns the grammars of llguidance's serialised form, one for each of ``count`` choices.

        Raises:
            ApiError: as for :meth:`compile`.
        """
        check_size(grammar, param)
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
            log.warning("%s: ignored: %s", param, warning[:500])
        matchers = [first, *(first.deep_copy() for _ in range(count - 1))]
        return [TokenGrammar(one, self._tokenizer.eos_ids, self._vocab_size) for one in matchers]

    async def to_lark(self, grammar: str, param: str) -> str:
        """Converts a grammar in GBNF or Lark to Lark.

        Raises:
            ApiError: 400, the grammar is neither, too large, or takes too long.
        """
        check_size(grammar, param)
        return await self._checker.to_lark(grammar, param)

    def close(self) -> None:
        """Ends the threads and processes."""
        self._threads.close()
        self._checker.close()

    async def _relaxed(self, value: Json, schema: Schema, param: str) -> Json:
        """Removes what makes a schema unusable, unless it is strict."""
        if schema.strict or await self._usable(value, schema, param):
            return value
        found = (await self._threads.run(patterns, value))[: MAX_PATTERNS + 1]
        if len(found) > MAX_PATTERNS:
            raise bad_request(f"{schema.name} has over {MAX_PATTERNS} patterns", param)
        strings = [{"type": "string", "pattern": pattern} for pattern in found]
        usable = [await self._usable(one, schema, param) for one in strings]
        unusable = frozenset(one for one, fine in zip(found, usable, strict=True) if not fine)
        for pattern in unusable:
            log.warning("%s: the pattern %r is not enforced", schema.name, pattern[:200])
        value = await self._threads.run(without_patterns, value, unusable)
        if schema.replaceable and not await self._usable(value, schema, param):
            log.warning("%s cannot be used as a schema: any object is allowed", schema.name)
            return {"type": "object"}
        return value

    async def _usable(self, value: Json, schema: Schema, param: str) -> bool:
        lark = grammar_of_schema([_with_options(value, schema)])
        try:
            await self._checker.check_grammar(llguidance.LLMatcher.grammar_from_lark(lark), param)
        except ApiError as error:
            if _UNUSABLE not in error.message:
                raise
            return False
        return True

    def _compile(self, grammar: str, param: str) -> llguidance.LLMatcher:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = vocabulary(self._tokenizer)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        allowed = matcher.compute_bitmask()  # a cyclic schema is detected only here
        if matcher.is_error():
            raise bad_request(f"the schema is not usable: {matcher.get_error()[:500]}", param)
        if not any(allowed):
            raise bad_request("the schema allows no text at all", param)
        return matcher


def check_size(grammar: str, param: str) -> None:
    """Checks the size of a grammar or schema.

    Raises:
        ApiError: 400, it is too large.
    """
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise bad_request(f"the schema takes {len(grammar)} bytes, over {MAX_GRAMMAR_BYTES}", param)


def _prepared(schemas: Sequence[Schema], param: str) -> list[Json]:
    """Prepares schemas that together are not too large: it takes microseconds for each byte of some."""
    check_size("".join(_text(schema.value) for schema in schemas), param)
    return [prepared(schema.value, schema.closed) for schema in schemas]


def _written(
    write: Callable[[Sequence[Json]], str], values: Sequence[Json], schemas: Sequence[Schema]
) -> str:
    return write(list(map(_with_options, values, schemas)))


def _text(schema: Json) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _with_options(value: Json, schema: Schema) -> Json:
    """Adds llguidance's options to a schema."""
    if not isinstance(value, dict):
        return value
    space = WHITESPACE if schema.whitespace is None else schema.whitespace
    options = {"whitespace_pattern": space, "lenient": not schema.strict}
    return {**value, "x-guidance": options}


def grammar_of_schema(schemas: Sequence[Json]) -> str:
    """Writes the grammar of a response that is one JSON value."""
    return f"start: %json {_text(schemas[0])}"


def _in_a_line(message: str) -> str:
    """Shortens llguidance's message to one line without the grammar."""
    if _UNUSABLE not in message:
        return message
    before, _, wrong = message.partition(f"{_UNUSABLE}: ")
    wrong = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", wrong)
    wrong = re.sub(r'^invalid regex ".*" \(in regex\): ', "", wrong)
    pattern = re.match(r"regex parse error:\n\s*(.*)\n[\s\S]*?error: (.*)", wrong)
    wrong = f"the pattern {pattern[1][:200]!r}: {pattern[2]}" if pattern else wrong.split("\n")[0]
    return f"{before}{_UNUSABLE}: {wrong}"[:500]


# Put before a text that must not get the space that some tokenizers add to what they encode.
_MARK = "\x02"


class _Vocabulary:
    """Adapts a tokenizer to llguidance's interface.

    If a grammar leaves only one text, llguidance allows the tokens of that text alone, and no others that
    would spell it. So the tokens that a call returns have to have exactly the bytes of the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.eos_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer
        self._marked = len(self._encode(_MARK))

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        text = data.decode("utf-8", "replace")
        for ids in (self._encode(text), self._encode(_MARK + text)[self._marked :]):
            exact = b"".join(self.tokens[i] for i in ids) == data
            if exact and self._tokenizer.special_ids.isdisjoint(ids):
                return ids
        return self._longest_first(data)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _longest_first(self, data: bytes) -> list[int]:
        """Returns tokens of what the tokenizer would normalise; none if a byte has no token."""
        ids: list[int] = []
        at = 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids), None)
            if end is None:
                return []
            ids.append(self._ids[data[at:end]])
            at = end
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = self._tokenizer.special_ids
        return {token: i for i, token in enumerate(self.tokens) if token and i not in special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)


def vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """Returns a tokenizer's vocabulary as llguidance's object; takes a second for a large one."""
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=sorted(tokenizer.eos_ids)
    )
