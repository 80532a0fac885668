"""What a model says about sampling where a request says nothing, through every door; and what ends a text."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import CONTEXT, SLOTS, VOCAB, load_tiny, running, tiny_checkpoint

from tpjax import LLM, SamplingParams
from tpjax.checkpoints.convert import convert
from tpjax.checkpoints.generation_config import eos_ids, sampling_defaults
from tpjax.engine.request import Request
from tpjax.errors import CheckpointError, ConfigError, RequestError
from tpjax.server.protocol import CompletionBody
from tpjax.server.responses import checked_params, make_requests

PROMPT = "the quick brown fox"
# a model that wants the likeliest token: what is sampled shows whether it was heard
GREEDY = {"temperature": 0.7, "top_k": 1, "do_sample": False, "max_new_tokens": 3, "eos_token_id": 1}
EOS, IM_START, IM_END = 1, 2, 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_checkpoint(tmp_path_factory.mktemp("greedy"))
    (path / "generation_config.json").write_text(json.dumps(GREEDY))
    return path


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return load_tiny(directory)


@pytest.fixture(scope="module")
def greedy(llm: LLM) -> list[int]:
    (completion,) = llm.generate(
        PROMPT, SamplingParams(max_tokens=12, temperature=0, top_k=0, ignore_eos=True)
    )
    return completion.token_ids


# --- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    (
        ({}, {}),
        ({"do_sample": False, "max_length": 20, "bos_token_id": 1, "transformers_version": "5"}, {}),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05},
        ),
        ({"temperature": None, "top_k": 50.0, "top_p": 1}, {"top_k": 50, "top_p": 1}),
        ({"top_k": -1, "temperature": 0}, {"top_k": 0, "temperature": 0}),
    ),
)
def test_defaults_of_a_file(tmp_path: Path, content: Any, expected: dict[str, float]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert sampling_defaults(tmp_path) == expected
    assert sampling_defaults(tmp_path, "none") == {}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert sampling_defaults(elsewhere) == {}
    assert sampling_defaults(elsewhere, tmp_path) == expected
    assert sampling_defaults(elsewhere, str(tmp_path / "generation_config.json")) == expected
    assert sampling_defaults(tmp_path / "model.gguf") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ('{"top_p": 2}', "top_p=2 is not a finite number, above 0 and at most 1"),
        ('{"temperature": "hot"}', "temperature='hot' is not a finite number"),
        ('{"top_k": true}', "top_k=True is not a whole number"),
        ('{"repetition_penalty": NaN}', "repetition_penalty=nan is not a finite number"),
        ('{"min_p": [1]}', r"min_p=\[1\] is not a finite number"),
        ("[1]", "expected a JSON object, got list"),
        ("{", "not valid JSON"),
    ),
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}"):
        sampling_defaults(tmp_path)
    assert sampling_defaults(tmp_path, "none") == {}


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^generation_config='auot' is not auto, none, or a file: no auot$"
    ):
        sampling_defaults(tmp_path, "auot")


# --- every door --------------------------------------------------------------------------------------------


def test_the_library_asks_the_model(llm: LLM, greedy: list[int], directory: Path) -> None:
    assert llm.sampling_defaults == {"temperature": 0.7, "top_k": 1}
    silent = SamplingParams(max_tokens=12, ignore_eos=True, seed=3)
    (completion,) = llm.generate(PROMPT, silent)
    assert completion.token_ids == greedy  # and twelve of them: the file's limit is not read
    deltas = list(llm.stream(PROMPT, silent))
    assert [token for delta in deltas for token in delta.token_ids] == greedy
    given = SamplingParams(max_tokens=12, ignore_eos=True, seed=3, temperature=3.0, top_k=0)
    (other,) = llm.generate(PROMPT, given)
    assert other.token_ids != greedy
    request = llm.request(PROMPT, SamplingParams(temperature=0.1))
    assert (request.params.temperature, request.params.top_k, request.params.top_p) == (0.1, 1, 1.0)
    assert llm.request(PROMPT, given).params.top_k == 0


def test_none_turns_it_off(directory: Path, greedy: list[int]) -> None:
    deaf = load_tiny(directory, generation_config="none")
    assert deaf.sampling_defaults == {} and deaf.eos_ids == {EOS, IM_END}
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=3)
    request = deaf.request(PROMPT, params)
    assert (request.params.temperature, request.params.top_k) == (1.0, 0)
    (completion,) = deaf.generate(PROMPT, params)
    assert completion.token_ids != greedy
    explicit = SamplingParams(max_tokens=12, ignore_eos=True, seed=3, temperature=1.0, top_k=0, top_p=1.0)
    assert deaf.generate(PROMPT, explicit)[0].token_ids == completion.token_ids


def test_the_server_asks_the_model(llm: LLM, greedy: list[int]) -> None:
    # one server, one model in it: the fixture's own, so that nothing is compiled again
    with running(lambda: llm) as server, server.client() as client:
        ask = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "seed": 3, "logprobs": 0}
        text = llm.tokenizer.decode(greedy) if llm.tokenizer else ""
        answer = client.post("/v1/completions", json=ask).json()
        assert answer["choices"][0]["text"] == text
        other = client.post("/v1/completions", json=ask | {"top_k": -1, "temperature": 3.0}).json()
        assert other["choices"][0]["text"] != text
        messages = [{"role": "user", "content": "hi"}]
        chats = [
            client.post(
                "/v1/chat/completions",
                json={"messages": messages, "max_tokens": 12, "ignore_eos": True, **extra},
            ).json()["choices"][0]["message"]["content"]
            for extra in ({"seed": 1}, {"seed": 2}, {"temperature": 0})
        ]
        assert chats[0] == chats[1] == chats[2]
        for seed, status in ((-1, 200), (2**63 - 1, 200), (-(2**63), 200), (2**63, 400), (1.5, 400)):
            answer = client.post("/v1/completions", json=ask | {"seed": seed, "n": 2})
            assert answer.status_code == status, seed
            assert status == 200 or answer.json()["error"]["param"] == "seed"
        few = client.post("/v1/completions", json=ask | {"min_tokens": 13}).json()
        assert "min_tokens=13 is over max_tokens=12" in few["error"]["message"]
        assert few["error"]["param"] == "min_tokens"
        more = {"prompt": PROMPT, "min_tokens": 20, "logit_bias": {str(EOS): 100}}  # over the default of 16
        assert client.post("/v1/completions", json=more).json()["usage"]["completion_tokens"] == 20


@pytest.mark.slow
def test_the_command_asks_the_model(directory: Path, llm: LLM, greedy: list[int]) -> None:
    command = [sys.executable, "-m", "tpjax", "generate", PROMPT, "--model", str(directory), "--tp", "1"]
    command += ["--max-tokens", "12", "--ignore-eos", "--seed", "3"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], capture_output=True, text=True, timeout=280, check=False)

    assert llm.tokenizer is not None
    heard = run()
    assert heard.returncode == 0, heard.stderr
    assert heard.stdout == llm.tokenizer.decode(greedy) + "\n"
    assert "tpjax: where no option says otherwise, temperature=0.7, top_k=1\n" in heard.stderr
    deaf = run("--generation-config", "none")
    assert deaf.returncode == 0 and deaf.stdout != heard.stdout and "top_k" not in deaf.stderr
    wrong = run("--generation-config", "nowhere")
    assert wrong.returncode == 2 and "generation_config='nowhere' is not auto" in wrong.stderr


def test_conversion_keeps_it(directory: Path, tmp_path: Path) -> None:
    convert(directory, tmp_path / "orbax")
    assert sampling_defaults(tmp_path / "orbax") == {"temperature": 0.7, "top_k": 1}
    assert eos_ids(tmp_path / "orbax") == {EOS}


# --- what ends a text --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return load_tiny(tiny_checkpoint(tmp_path_factory.mktemp("plain")))


def test_without_a_tokenizer_the_settings_say_what_ends(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    bare = load_tiny(path)
    assert bare.tokenizer is None and bare.eos_ids == {7, 9}
    for end in (7, 9):
        params = SamplingParams(max_tokens=5, temperature=0, logit_bias={end: 100.0})
        (completion,) = bare.generate([[5, 6]], params)
        assert (completion.token_ids, completion.finish_reason) == ([end], "stop")


ENDS = {
    "eos": {"logit_bias": {EOS: 100.0, IM_END: 99.0}},
    "stop tokens": {"stop_token_ids": [40, 41], "logit_bias": {40: 100.0, 41: 100.0}},
    "more than a row carries": {
        "stop_token_ids": range(100, 140),
        "logit_bias": dict.fromkeys(range(100, 140), 90),
    },
    "a special token": {"stop": ["<|im_start|>"], "ignore_eos": True, "logit_bias": {IM_START: 100.0}},
    "several ways": {
        "stop": ["<|im_start|>"],
        "stop_token_ids": [40],
        "logit_bias": {IM_START: 99, 40: 99, EOS: 99},
    },
}


@pytest.mark.parametrize("temperature", (0, 1))
@pytest.mark.parametrize("fewest", (0, 1, 6, 20))
@pytest.mark.parametrize("name", ENDS)
def test_nothing_ends_before_min_tokens(plain: LLM, name: str, fewest: int, temperature: float) -> None:
    """The model wants nothing but to end: it does so right after the fewest tokens, within a dispatch too."""
    params = SamplingParams(max_tokens=20, min_tokens=fewest, temperature=temperature, seed=5, **ENDS[name])  # type: ignore[arg-type]
    free = SamplingParams(max_tokens=20, temperature=temperature, seed=6, ignore_eos=True)
    ended, other = plain.generate([[5, 6, 7], [8, 9]], [params, free])
    ends = set(params.logit_bias)
    assert len(ended.token_ids) == min(fewest + 1, 20)
    assert not ends & set(ended.token_ids[:fewest])
    assert ended.finish_reason == ("stop" if fewest < 20 else "length")
    assert fewest == 20 or ended.token_ids[-1] in ends
    assert "<|im_start|>" not in ended.text
    assert other.token_ids == plain.generate([[8, 9]], free)[0].token_ids


def test_min_tokens_changes_no_other_draw(plain: LLM) -> None:
    """Of a request that would not have ended: the same tokens."""
    params = {"max_tokens": 20, "temperature": 1.0, "seed": 8, "logit_bias": {EOS: -100.0, IM_END: -100.0}}
    (without,) = plain.generate(PROMPT, SamplingParams(**params))  # type: ignore[arg-type]
    (with_it,) = plain.generate(PROMPT, SamplingParams(min_tokens=11, **params))  # type: ignore[arg-type]
    assert with_it.token_ids == without.token_ids and len(with_it.token_ids) == 20


@pytest.mark.slow
def test_min_tokens_outlives_preemption(tmp_path: Path, plain: LLM) -> None:
    """Pages run out and the request starts over: its slot is told again."""
    params = SamplingParams(max_tokens=300, min_tokens=290, temperature=0, logit_bias={EOS: 100.0})
    (wanted,) = plain.generate([[5, 6, 7]], params)
    small = load_tiny(tiny_checkpoint(tmp_path))
    blocks = small.engine.scheduler.blocks
    held = blocks.allocate(blocks.free - 5)  # five pages of 128 are left to three requests of three
    completions = small.generate([[5, 6, 7], [7, 7], [5, 6, 7]], params)
    assert small.engine.scheduler.preemptions
    assert [len(c.token_ids) for c in completions] == [291] * 3
    assert completions[0].token_ids == completions[2].token_ids == wanted.token_ids
    blocks.release(held)


def test_stop_strings_do_not_count_within_min_tokens(plain: LLM) -> None:
    space = plain.tokenizer.encode(" t", add_special_tokens=False)[0] if plain.tokenizer else 0
    bias = {"temperature": 0, "logit_bias": {space: 100.0}, "max_tokens": 12, "ignore_eos": True}
    text = plain.generate(PROMPT, SamplingParams(**bias))[0].text  # type: ignore[arg-type]
    stop = text[: len(text) // 12] * 2  # two of its twelve equal tokens
    (early,) = plain.generate(PROMPT, SamplingParams(stop=stop, **bias))  # type: ignore[arg-type]
    (late,) = plain.generate(PROMPT, SamplingParams(stop=stop, min_tokens=6, **bias))  # type: ignore[arg-type]
    assert (len(early.token_ids), early.finish_reason) == (2, "stop")
    assert (len(late.token_ids), late.finish_reason) == (7, "stop")


@pytest.mark.parametrize(("schema", "fewest", "tokens"), (({"const": 7}, 9, 2), ({"type": "integer"}, 4, 5)))
def test_a_grammar_that_can_only_end_goes_first(plain: LLM, schema: Any, fewest: int, tokens: int) -> None:
    pytest.importorskip("llguidance")
    from tpjax.server.grammars.checker import GrammarChecker
    from tpjax.server.grammars.compiler import GrammarCompiler

    assert plain.tokenizer is not None
    checker = GrammarChecker()
    compiler = GrammarCompiler(plain.tokenizer, VOCAB, checker)
    (grammar,) = asyncio.run(compiler.schema(schema, "schema", 1))
    checker.close()
    params = SamplingParams(max_tokens=12, min_tokens=fewest, temperature=0, logit_bias={EOS: 100.0})
    request = plain.request(PROMPT, params, grammar=grammar)
    plain.engine.add(request)
    while plain.engine.busy:
        plain.engine.step()
    assert request.finish_reason == "stop"
    assert len(request.output_token_ids) <= tokens and (
        schema == {"const": 7} or len(request.output_token_ids) == tokens
    )


# --- seeds -------------------------------------------------------------------------------------------------


def test_seeds_take_the_whole_range(plain: LLM) -> None:
    def sampled(seed: int | None) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=10, temperature=2.0, seed=seed, ignore_eos=True)
        return tuple(plain.generate(PROMPT, params)[0].token_ids)

    seeds = (0, 1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), -2)
    once = {seed: sampled(seed) for seed in seeds}
    assert len(set(once.values())) == len(seeds)
    assert all(sampled(seed) == tokens for seed, tokens in once.items())
    assert len({sampled(-1), sampled(-1), sampled(None), sampled(-1)}) == 4


def test_seeds_of_the_model_itself(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    first, again, high = (
        load_tiny(path, seed=seed).request("a", SamplingParams()).seed for seed in (-5, -5, 2**40)
    )
    assert first == again != high
    assert len({load_tiny(path, seed=-1).request("a", SamplingParams()).seed for _ in range(2)}) == 2
    with pytest.raises(ConfigError, match=r"seed=9223372036854775808 is not a whole number"):
        load_tiny(path, seed=2**63)


def requests_of(llm: LLM, body: CompletionBody) -> list[Request]:
    return make_requests(llm, body, checked_params(llm, body, 4), "a", 4, 16)


@pytest.mark.parametrize("seed", (-3, -2, 0, 2**63 - 2, 2**63 - 1, -(2**63)))
def test_choices_have_seeds_of_their_own(plain: LLM, seed: int) -> None:
    body = CompletionBody(prompt="a", n=4, seed=seed)
    seeds = [request.seed for request in requests_of(plain, body)]
    assert seeds[0] == seed and len(set(seeds)) == 4 and -1 not in seeds
    assert all(-(2**63) <= one < 2**63 for one in seeds)


def test_random_choices_differ(plain: LLM) -> None:
    sampled = requests_of(plain, CompletionBody(prompt="a", n=2, seed=-1))
    assert len({request.seed for request in sampled}) == 2
    assert SLOTS >= 2 and CONTEXT > 16


def test_too_few_is_refused_before_anything_runs(plain: LLM) -> None:
    with pytest.raises(RequestError, match=r"^min_tokens=5 is over max_tokens=4$"):
        plain.generate(PROMPT, SamplingParams(max_tokens=4, min_tokens=5))
