"""The server as the official client sees it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from serving import Running, load_tiny, running, tiny_checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    with running(lambda: load_tiny(directory)) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_completion_is_the_library_s(server: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="the quick", max_tokens=12, temperature=0)
    tokenizer = server.llm.tokenizer
    assert tokenizer is not None
    choice = answer.choices[0]
    assert answer.model == "tiny" and answer.object == "text_completion"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(tokenizer.encode("the quick"))
    assert choice.finish_reason in ("length", "stop")
    streamed = client.completions.create(
        model="tiny",
        prompt="the quick",
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == choice.text
    assert chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_chat(server: Running, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=12, temperature=0
    )
    print(answer)
    s = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=12, temperature=0, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in s) == answer.choices[0].message.content
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=100,
        temperature=1,
        seed=1,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "integer", "maximum": 99}},
                    "required": ["a"],
                    "additionalProperties": False,
                },
            },
        },
    )
    print(answer)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=100,
        temperature=1,
        seed=1,
        tool_choice="required",
        n=2,
        tools=[
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "parameters": {
                        "type": "object",
                        "properties": {"a": {"type": "integer", "maximum": 99}},
                        "required": ["a"],
                        "additionalProperties": False,
                    },
                },
            }
        ],
    )
    print(answer)
