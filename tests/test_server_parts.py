"""Parts of the server by themselves: grammars over vocabularies, tool calls, the terminal's conversation."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import GOLDENS
from fastapi import FastAPI
from serving import tiny_checkpoint

from tpjax import LLM
from tpjax.cli.app import main
from tpjax.cli.terminal import Chat
from tpjax.engine.generation import Delta
from tpjax.sampling_params import SamplingParams
from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.exception_handlers import add_exception_handlers
from tpjax.server.grammars.compiler import GrammarCompiler
from tpjax.server.json_types import strict_json
from tpjax.server.responses import event
from tpjax.text.loading import load_tokenizer
from tpjax.text.tokenizer import Tokenizer

# --- grammars


class Unchecked:
    """A sandbox that finds nothing wrong."""

    async def check_grammar(self, grammar: str, param: str) -> None: ...


def grammars_of(compiler: GrammarCompiler, schema: Any, count: int = 1) -> list[Any]:
    return asyncio.run(compiler.schema(schema, "response_format", count))


def allowed(grammar: Any) -> set[int]:
    bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


@pytest.fixture(scope="module", params=("byte-level", "gguf", "sentencepiece", "space before a text"))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path
    if request.param == "space before a text":
        spm: Tokenizer = request.getfixturevalue("spm")
        return spm
    if request.param == "byte-level":
        path = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    else:
        path = request.getfixturevalue("smollm2_gguf" if request.param == "gguf" else "gemma3_gguf")
    loaded = load_tokenizer(path)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> int:
    """Of a model that has more of them than its tokenizer has tokens."""
    return tokenizer.vocab_size + 37


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer, rows: int) -> Iterator[GrammarCompiler]:
    """One for all tests of a tokenizer: llguidance takes a second for a large vocabulary."""
    made = GrammarCompiler(tokenizer, rows, Unchecked())  # type: ignore[arg-type]
    yield made
    made._threads.close()


def test_masks_are_the_schema_s(tokenizer: Tokenizer, compiler: GrammarCompiler, rows: int) -> None:
    """Walking the text's own tokens, and any other that is allowed, never leaves the schema."""
    schema = {"type": "object", "properties": {"é": {"enum": ["a b", 12]}}, "required": ["é"]}
    schema["additionalProperties"] = False
    (grammar,) = grammars_of(compiler, schema)
    assert grammar.mask().dtype == np.uint32 and grammar.mask().shape == (-(-rows // 32),)
    texts = ['{"é": "a b"}', '{"é":12}', '{ "é": 12\n}']
    for text in texts:
        (walk,) = grammars_of(compiler, schema)
        data = b""
        for token in tokenizer.encode(text, add_special_tokens=False):
            piece = tokenizer.token_bytes(token)
            assert not walk.finished
            if not data and piece.startswith(b" "):
                continue  # SentencePiece's leading space
            assert token in allowed(walk)
            data += piece
            walk.advance(token)
        assert walk.finished and walk.error is None
    draw = random.Random(0)
    for _ in range(5):
        (walk,) = grammars_of(compiler, schema)
        data = b""
        while not walk.finished:
            token = draw.choice(sorted(allowed(walk)))
            assert token < tokenizer.vocab_size and token not in tokenizer.special_ids
            data += tokenizer.token_bytes(token)
            walk.advance(token)
        assert json.loads(data) in ({"é": "a b"}, {"é": 12})


@pytest.mark.parametrize("text", ("①", "<|im_end|>", " ", "a  b", "ﬁn", "\x02"))
def test_a_text_that_is_forced_is_written_byte_by_byte(
    tokenizer: Tokenizer, compiler: GrammarCompiler, text: str
) -> None:
    """Whatever the tokenizer adds or normalises, and though some texts are names of special tokens."""
    (walk,) = grammars_of(compiler, {"const": text})
    data = b""
    while not walk.finished:
        token = min(allowed(walk) - tokenizer.eos_ids)
        data += tokenizer.token_bytes(token)
        walk.advance(token)
    assert walk.error is None and json.loads(data) == text


def test_grammars_of_several_choices_are_apart(compiler: GrammarCompiler) -> None:
    one, other = grammars_of(compiler, {"enum": ["a", "b"]}, 2)
    before = allowed(other)
    token = min(before)
    one.advance(token)
    assert allowed(other) == before and allowed(one) != before


def test_end_of_text_ends_a_grammar(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    (grammar,) = grammars_of(compiler, {"type": "integer"})
    digit = next(i for i in allowed(grammar) if tokenizer.token_bytes(i) == b"7")
    grammar.advance(digit)
    assert tokenizer.eos_ids <= allowed(grammar) and not grammar.finished
    grammar.advance(min(tokenizer.eos_ids))
    assert grammar.finished and grammar.error is None


def test_a_grammar_that_allows_nothing_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(ApiError) as caught:
        grammars_of(compiler, {"$ref": "#"})
    assert caught.value.status == 400 and caught.value.param == "response_format"


# --- events


def test_an_event_is_one_line_to_every_client() -> None:
    """Python's own splitlines ends a line at U+2028 and U+0085, and clients are built on it."""
    data = event({"text": "\u2028\x85é\n"}, "error")
    assert data.isascii() and len(data.decode().splitlines()) == 3
    assert json.loads(data.decode().splitlines()[1].removeprefix("data: ")) == {"text": "\u2028\x85é\n"}


def test_surrogates_in_a_message_are_no_fault_of_the_server() -> None:
    """A client's chat template raises what it likes."""
    error = bad_request("\ud83d\ude00 \ud800 \u2028")
    told = {"message": "😀 \ufffd \u2028", "type": "invalid_request_error", "param": None, "code": None}
    app = FastAPI()
    add_exception_handlers(app)
    response = asyncio.run(app.exception_handlers[ApiError](None, error))  # type: ignore[arg-type, misc]
    assert response.status_code == 400 and strict_json(response.body) == {"error": told}
    assert strict_json(event(error.body()).removeprefix(b"data: ")) == {"error": told}
    assert event(error.body()).isascii()


# --- the terminal


class FakeLLM:
    """Answers every prompt with its length, one character a delta."""

    def __init__(self, max_model_len: int = 200, template: str | None = "chatml") -> None:
        self.max_model_len = max_model_len
        self.seen: list[SamplingParams] = []
        self.closed = 0
        self.tokenizer = SimpleNamespace(
            chat_template=template,
        )

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return [ord(char) for m in messages for char in f"[{m['role']}]{m['content']}"]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Delta]:
        self.seen.append(params)
        try:
            for char in f"<{len(prompt)}>":
                yield Delta(char, [1])
        finally:
            self.closed += 1


def conversation(llm: FakeLLM, system: str | None = None) -> tuple[Chat, list[str]]:
    written: list[str] = []
    return Chat(llm, SamplingParams(max_tokens=150), system, written.append), written  # type: ignore[arg-type]


def test_a_conversation_remembers_and_forgets() -> None:
    chat, written = conversation(FakeLLM(), system="be")
    first = len("[system]be[user]hi")
    assert chat.say("hi")
    assert "".join(written) == f"<{first}>\n"
    assert chat.say("more")
    assert chat.messages == [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": f"<{first}>"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": f"<{first + len(f'[assistant]<{first}>[user]more')}>"},
    ]
    assert chat.say("/reset") and chat.messages == [{"role": "system", "content": "be"}]
    assert chat.say("/help") and "Ctrl-C" in written[-1]
    assert chat.say("/nothing") and written[-1] == "/nothing is no command: try /help\n"
    assert chat.say("   ") and len(chat.messages) == 1
    assert not chat.say("/exit")


def test_an_answer_is_cut_to_the_context() -> None:
    llm = FakeLLM(max_model_len=100)
    chat, written = conversation(llm)
    chat.say("a" * 50)
    assert llm.seen[0].max_tokens == 100 - len("[user]") - 50
    chat.say("b" * 100)
    assert "over the context of 100: /reset" in written[-1] and len(chat.messages) == 2


def test_ctrl_c_stops_the_answer_only() -> None:
    llm = FakeLLM()
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if text == "<":
            os.kill(os.getpid(), signal.SIGINT)

    chat = Chat(llm, SamplingParams(), None, write)  # type: ignore[arg-type]
    before = signal.getsignal(signal.SIGINT)
    assert chat.say("hi")
    assert written == ["<", " [stopped]", "\n"] and llm.closed == 1
    assert chat.messages[-1] == {"role": "assistant", "content": "<"}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_can_be_set_and_saved(tmp_path: Path) -> None:
    llm = FakeLLM()
    chat, written = conversation(llm, system="be")
    assert chat.say("/set temperature 0.25") and chat.params.temperature == 0.25
    assert chat.say("/set stop ###") and chat.params.stop == ("###",)
    assert chat.say("/set") and "temperature = 0.25" in written[-1]
    assert chat.say("/set temperature -1") and "temperature=-1 is not" in written[-1]
    assert chat.say("/set bogus 1") and written[-1] == "bogus is no sampling parameter\n"
    chat.say("hi")
    assert llm.seen[0].temperature == 0.25
    file = tmp_path / "chat.json"
    assert chat.say(f"/save {file}") and json.loads(file.read_text()) == chat.messages
    assert chat.say(f"/save {tmp_path}/none/x")
    assert written[-1] == f"{tmp_path}/none/x: No such file or directory\n"
    assert chat.say("/system be brief") and chat.messages == [{"role": "system", "content": "be brief"}]
    assert chat.say("/system") and chat.messages == []


def test_chat_needs_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    golden = str(GOLDENS / "llama")  # it has no tokenizer
    assert main(["chat", golden]) == 2
    assert capsys.readouterr().err == (f"tpjax: error: {golden} has no chat template: try `tpjax generate`\n")


@pytest.mark.slow
def test_the_chat_subcommand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hi", "/reset"])

    def typed(prompt: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    model = str(tiny_checkpoint(tmp_path))
    sampling = ["--max-tokens", "6", "--temperature", "0"]
    assert main(["chat", "--model", model, "--tp", "1", "--max-model-len", "128", *sampling]) == 0
    llm = LLM(model, tp=1, max_model_len=128, max_slots=1)
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    (expected,) = llm.generate(
        [llm.tokenizer.encode(prompt, add_special_tokens=False)], SamplingParams(max_tokens=6, temperature=0)
    )
    printed = capsys.readouterr()
    assert printed.out == f"{expected.text}\nthe conversation is forgotten\n\n"
    assert "/help shows the commands" in printed.err
