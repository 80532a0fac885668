"""A tokenizer that knows more tokens than the model has rows, and one that knows fewer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from serving import Running, running, tiny_checkpoint

from tpjax import LLM, SamplingParams
from tpjax.checkpoints.convert import convert
from tpjax.checkpoints.opening import open_checkpoint
from tpjax.cli.app import main
from tpjax.errors import RequestError
from tpjax.text.loading import load_tokenizer

ROWS = 318  # of the model, as many as the tokenizer has tokens before "<|new|>" is added


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("short"))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": ROWS, "content": "<|new|>", "special": True, **flags})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS}))
    weights = load_file(directory / "model.safetensors")
    truncated = {
        name: weights[name][:ROWS].copy() for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save_file({**weights, **truncated}, directory / "model.safetensors")
    templates = directory / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages[0].content }}")
    return directory


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(path, tp=2, max_model_len=64, max_slots=2)


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Running]:
    with running(lambda: LLM(path, tp=2, max_model_len=64, max_slots=2)) as one:
        yield one


REFUSAL = "token id 318 ('<|new|>'), but the vocabulary has 318 (0 to 317)"


def test_a_prompt_of_tokens_the_model_lacks_is_refused(llm: LLM) -> None:
    tokens = llm.tokenizer.encode("the <|new|>")
    assert tokens[-1] == ROWS
    for call in (
        lambda: llm.generate("the <|new|>"),
        lambda: llm.generate(["the", "the <|new|>"]),
        lambda: llm.generate([tokens]),
        lambda: next(iter(llm.stream("the <|new|>"))),
        lambda: llm.prepare("<|new|>"),
        lambda: llm.logits(tokens),
    ):
        with pytest.raises(RequestError) as error:
            call()
        assert REFUSAL in str(error.value)
    (fine,) = llm.generate("the quick", SamplingParams(max_tokens=4, temperature=0))
    assert len(fine.token_ids) == 4 and max(fine.token_ids) < ROWS


def test_the_command_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "the <|new|>", "--model", str(path), "--tp", "1", "--max-model-len", "64"]) == 2
    assert REFUSAL in capsys.readouterr().err


def test_the_server_refuses_and_goes_on(server: Running) -> None:
    with server.client() as client:
        chat = {"messages": [{"role": "user", "content": "the <|new|>"}], "max_tokens": 2}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        for url, body in (
            ("/v1/completions", {"prompt": "the <|new|>", "max_tokens": 2}),
            ("/v1/completions", {"prompt": [5, ROWS], "max_tokens": 2}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", {**chat, "tools": [tool]}),
        ):
            answer = client.post(url, json=body)
            assert answer.status_code == 400 and REFUSAL in answer.json()["error"]["message"], answer.text
        assert client.post("/v1/completions", json={"prompt": "the", "max_tokens": 2}).status_code == 200
        tokenized = client.post("/tokenize", json={"prompt": "the <|new|>", "return_token_strs": True}).json()
        assert tokenized["tokens"][-1] == ROWS and tokenized["token_strs"][-1] == "<|new|>"


def test_sampled_tokens_that_the_tokenizer_lacks_are_no_text(tmp_path: Path) -> None:
    """The model has 384 rows, the tokenizer 318 tokens: rows beyond are sampled, and are no text."""
    directory = tiny_checkpoint(tmp_path)
    weights = load_file(directory / "model.safetensors")
    head = np.zeros_like(weights["lm_head.weight"])
    head[350] = weights["lm_head.weight"][350]
    save_file({**weights, "lm_head.weight": head}, directory / "model.safetensors")
    llm = LLM(directory, tp=2, max_model_len=64, max_slots=1)
    (found,) = llm.generate("the", SamplingParams(max_tokens=40, temperature=1.0, seed=1, logprobs=2))
    assert any(token >= ROWS for token in found.token_ids) and len(found.token_ids) == 40
    assert found.text == llm.tokenizer.decode(token for token in found.token_ids if token < ROWS)


def test_a_converted_model_keeps_its_templates(path: Path, tmp_path: Path) -> None:
    convert(path, tmp_path / "orbax")
    kept, original = load_tokenizer(tmp_path / "orbax"), load_tokenizer(path)
    assert kept is not None and original is not None
    assert kept.chat_templates.sources == original.chat_templates.sources
    assert set(kept.chat_templates.sources) == {"default", "tool_use"}
    assert open_checkpoint(tmp_path / "orbax").config.vocab_size == ROWS
