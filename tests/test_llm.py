"""``LLM`` with SmolLM2's vocabulary and first layers, and the errors a caller gets."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import GOLDENS

from tpjax import LLM, SamplingParams, TpjaxError
from tpjax.engine.generation import Generation
from tpjax.errors import CheckpointError, ConfigError, DeviceError, EngineError, RequestError
from tpjax.runtime.memory import DeviceMemory

PROMPT = "The capital of France is"


@pytest.fixture
def llm(smollm2_short: LLM) -> LLM:
    return smollm2_short


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return LLM(GOLDENS / "llama", tp=2, max_model_len=64, max_slots=2)


def greedy(max_tokens: int, **extra: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **extra)


def test_generate_and_stream_agree(llm: LLM) -> None:
    (completion,) = llm.generate(PROMPT, greedy(24))
    assert completion.prompt == PROMPT
    assert llm.tokenizer is not None
    assert completion.prompt_token_ids == llm.tokenizer.encode(PROMPT)
    deltas = list(llm.stream(PROMPT, greedy(24)))
    assert "".join(delta.text for delta in deltas) == completion.text
    assert [token for delta in deltas for token in delta.token_ids] == completion.token_ids
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == completion.finish_reason
    assert len(deltas) > 3  # it did stream


def test_chat_takes_sampling_parameters_and_variables_of_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (short,) = llm.chat(messages, max_tokens=3, temperature=0)
    (same,) = llm.generate([llm.chat_prompt(messages)], greedy(3))
    assert short.token_ids == same.token_ids and len(short.token_ids) == 3
    (open_,) = llm.chat(messages, max_tokens=1, add_generation_prompt=False)
    assert len(open_.prompt_token_ids) < len(short.prompt_token_ids)
    with pytest.raises(RequestError, match="max_tokens"):
        llm.chat(messages, greedy(3), max_tokens=4)


def test_end_of_text_ends_and_is_not_text(llm: LLM) -> None:
    """The model wants nothing but to end, and may after five tokens."""
    assert llm.tokenizer is not None
    (end,) = llm.tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert end in llm.tokenizer.eos_ids
    (ended,) = llm.generate(PROMPT, greedy(40, min_tokens=5, logit_bias={end: 100.0}))
    assert ended.finish_reason == "stop"
    assert len(ended.token_ids) == 6 and ended.token_ids[-1] == end
    assert ended.text == llm.tokenizer.decode(ended.token_ids[:-1]) != ""
    (on,) = llm.generate(PROMPT, greedy(40, ignore_eos=True, logit_bias={end: 100.0}))
    assert on.finish_reason == "length" and on.token_ids == [end] * 40 and on.text == ""


def test_stop_string_and_stop_token(llm: LLM) -> None:
    (free,) = llm.generate(PROMPT, greedy(20))
    stop = free.text[6:12]  # crosses a token border
    (stopped,) = llm.generate(PROMPT, greedy(20, stop=stop))
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < len(free.token_ids)
    third = free.token_ids[2]
    (by_token,) = llm.generate(PROMPT, greedy(20, stop_token_ids=[third]))
    assert by_token.token_ids == free.token_ids[: free.token_ids.index(third) + 1]
    assert by_token.finish_reason == "stop"


def test_stream_never_splits_a_character(llm: LLM) -> None:
    """Emoji and Chinese take several tokens a character; make the model write them by a bias."""
    assert llm.tokenizer is not None
    text = "🙂语🎉"
    wanted = llm.tokenizer.encode(text)
    params = SamplingParams(
        max_tokens=60, temperature=1.5, seed=4, ignore_eos=True, logit_bias=dict.fromkeys(wanted, 60.0)
    )
    deltas = [delta.text for delta in llm.stream("x", params)]
    (completion,) = llm.generate("x", params)
    assert "".join(deltas) == completion.text
    # an incomplete character may only ever show at the very end, or where the bytes are no character at all
    for delta in deltas[:-1]:
        assert delta.encode("utf-8", "strict").decode() == delta
    decoded = llm.tokenizer.decode(completion.token_ids)
    assert completion.text == decoded


def test_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    (completion,) = llm.generate(PROMPT, SamplingParams(max_tokens=6, temperature=0.7, seed=2, logprobs=3))
    assert completion.logprobs is not None and len(completion.logprobs) == 6
    logits = llm.logits(completion.prompt_token_ids + completion.token_ids)
    for i, entry in enumerate(completion.logprobs):
        row = logits[len(completion.prompt_token_ids) - 1 + i].astype(np.float64)
        logprobs = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert entry.token_id == completion.token_ids[i]
        assert entry.logprob == pytest.approx(logprobs[entry.token_id], abs=1e-3)
        assert list(entry.top) == np.argsort(-logprobs)[:3].tolist()
        assert list(entry.top.values()) == pytest.approx(np.sort(logprobs)[::-1][:3].tolist(), abs=1e-3)


def test_seedless_requests_follow_the_engines_seed() -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)

    def draw(seed: int) -> list[list[int]]:
        llm = LLM(GOLDENS / "llama", tp=2, max_model_len=64, max_slots=2, seed=seed)
        return [c.token_ids for c in llm.generate([[5, 6], [5, 6]], params)]

    first = draw(3)
    assert first == draw(3)
    assert first[0] != first[1]  # two requests are two draws
    assert first != draw(4)


def test_abandoned_stream_gives_its_place_back(tiny: LLM) -> None:
    blocks = tiny.engine.scheduler.blocks
    free = blocks.free
    stream = tiny.stream([1, 2, 3], greedy(40, ignore_eos=True))
    next(stream)
    assert blocks.free < free
    stream.close()
    assert blocks.free == free and not tiny.engine.scheduler.busy


def test_without_a_tokenizer_token_ids_go_in_and_out(tiny: LLM) -> None:
    assert tiny.tokenizer is None
    (completion,) = tiny.generate([[5, 6, 7]], greedy(4))
    assert completion.prompt is None and completion.text == "" and len(completion.token_ids) == 4
    with pytest.raises(RequestError, match="has no tokenizer: give the prompt as token ids"):
        tiny.generate("text")
    with pytest.raises(RequestError, match=r"stop=\('x',\) needs a tokenizer"):
        tiny.generate([[5]], greedy(4, stop="x"))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    (
        ([], greedy(4), "the prompt is empty"),
        (list(range(64)), greedy(1), "the prompt has 64 tokens, but max_model_len=64"),
        ([1, 2, 3], greedy(62), "3 tokens and max_tokens=62: together 65, over max_model_len=64"),
        ([1, 131], greedy(4), "token id 131, but the vocabulary has 131"),
        ([-1], greedy(4), "token id -1"),
        ([1], greedy(4, logit_bias={500: 1.0}), "logit_bias has token id 500"),
        ([1], greedy(4, stop_token_ids=[131]), "stop_token_ids has token id 131"),
    ),
)
def test_bad_request_runs_nothing(tiny: LLM, prompt: list[int], params: SamplingParams, message: str) -> None:
    free = tiny.engine.scheduler.blocks.free
    with pytest.raises(RequestError, match=message):
        tiny.generate([[1, 2], prompt], params if params.max_tokens < 60 else [greedy(1), params])
    with pytest.raises(RequestError, match=message):
        tiny.stream(prompt, params)  # at the call, not at the first delta
    assert tiny.engine.scheduler.blocks.free == free and not tiny.engine.scheduler.busy


@pytest.mark.parametrize(
    ("prompts", "message"),
    (
        (None, "prompts is a NoneType, not a text or a list of texts"),
        (5, "prompts is a int, not a text or"),
        (b"text", "prompts is a bytes, not a text or"),
        ({"prompt": "text"}, "prompts is a dict, not a text or"),
        ([b"text"], "the prompt is of bytes, not a list of token ids"),
        ([{5: 6}], "the prompt is of dict, not a list of token ids"),
        ([5, 6], "the prompt is not a list of token ids: 'int' object is not iterable"),
        ([[5, None]], "the prompt is not a list of token ids: 'NoneType' object"),
        ([[10**5000]], "token id a int too long to write"),
    ),
)
def test_what_is_no_prompt(tiny: LLM, prompts: Any, message: str) -> None:
    """Some of these have items that would pass for token ids or texts."""
    with pytest.raises(RequestError, match=message):
        tiny.generate(prompts, max_tokens=1)


@pytest.mark.parametrize("messages", (None, 5, "hi", {"role": "user", "content": "hi"}))
def test_what_are_no_messages(tiny: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match=f"messages is a {type(messages).__name__}, not a list"):
        tiny.chat(messages, max_tokens=1)


def test_fields_of_the_parameters_as_keywords(tiny: LLM) -> None:
    (wanted,) = tiny.generate([[5, 6, 7]], greedy(6, ignore_eos=True))
    (short,) = tiny.generate([[5, 6, 7]], max_tokens=6, temperature=0, ignore_eos=True)
    assert short.token_ids == wanted.token_ids and len(short.token_ids) == 6
    deltas = list(tiny.stream([5, 6, 7], max_tokens=6, temperature=0, ignore_eos=True))
    assert [token for delta in deltas for token in delta.token_ids] == wanted.token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (
            {"params": greedy(4), "max_tokens": 4, "seed": 1},
            "params and max_tokens, seed are both given: give all sampling parameters in one way",
        ),
        ({"max_token": 4}, "max_token=4 is no sampling parameter: is max_tokens meant?"),
        ({"temprature": 0}, "temprature=0 is no sampling parameter: is temperature meant?"),
        ({"n": 2}, f"n=2 is no sampling parameter: there are {', '.join(vars(SamplingParams()))}"),
        (
            {"params": {"max_tokens": 4}},
            "params is a dict, not SamplingParams or a list of them; fields go by name: max_tokens=4",
        ),
        ({"max_tokens": -1}, "max_tokens=-1 is not a whole number, 0 or more"),
    ),
)
def test_bad_keywords(tiny: LLM, arguments: dict[str, Any], message: str) -> None:
    for call in (tiny.generate, tiny.stream):
        with pytest.raises(RequestError) as error:
            call([1, 2] if call == tiny.stream else [[1, 2]], **arguments)
        assert str(error.value) == message
    assert not tiny.engine.busy


def bytes_of(arrays: Iterable[jax.Array]) -> int:
    """Bytes on all devices. By the shardings: a shard's ``data`` would be one more array."""
    shards = ((array.sharding.shard_shape(array.shape), array) for array in arrays)
    return sum(len(a.sharding.device_set) * math.prod(shape) * a.dtype.itemsize for shape, a in shards)


def test_closing_gives_the_memory_back() -> None:
    before = bytes_of(jax.live_arrays())
    with LLM(GOLDENS / "llama", tp=2, max_model_len=64, max_slots=2) as llm:
        (one,) = llm.generate([[3, 4, 5]], max_tokens=4, ignore_eos=True)
        assert len(one.token_ids) == 4
        weights = bytes_of(llm.runner.weights)
        cache = (
            2 * llm.config.num_layers * llm.runner.limits.num_pages * 128 * llm.config.attention.head_dim * 4
        )
        assert weights > 0 and bytes_of(jax.live_arrays()) >= before + weights + cache
        state, programs = llm.runner.state, llm.runner.programs
    assert bytes_of(jax.live_arrays()) <= before
    assert all(buffer.is_deleted() for buffer in jax.tree.leaves(state)) and not programs.compiled
    for call in (
        lambda: llm.generate([[1]]),
        lambda: llm.stream([1]),
        lambda: llm.logits([1]),
        lambda: llm.prepare([1]),
        llm.warm_up,
        llm.explain,
    ):
        with pytest.raises(EngineError, match="the model is closed"):
            call()
    llm.close()  # once more does nothing
    with pytest.raises(EngineError), llm:
        llm.generate([[1]])


def test_closing_ends_the_requests_in_flight() -> None:
    llm = LLM(GOLDENS / "llama", tp=1, max_model_len=64, max_slots=1)
    running, unbegun = (llm.stream([n], greedy(40, ignore_eos=True)) for n in (1, 2))
    assert next(running).token_ids
    llm.engine.add(queued := llm.request([9], greedy(4)))
    llm._start(generation := Generation(llm.request([8], greedy(4)), None))
    llm.close()
    assert queued.finish_reason == generation.request.finish_reason == "error"
    *_, last = running
    assert last.finish_reason == "error" and last.error == "the model was closed while this request ran"
    with pytest.raises(EngineError, match="the model is closed"):
        next(unbegun)
    assert not llm.engine.busy


def test_logits_bounds(tiny: LLM) -> None:
    assert tiny.logits(list(range(64))).shape == (64, 131)
    assert tiny.logits(list(range(64))).dtype == np.float32
    with pytest.raises(RequestError, match="65 tokens are over max_model_len=64"):
        tiny.logits([1] * 65)
    with pytest.raises(RequestError, match="empty"):
        tiny.logits([])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        ({"tp": 17}, DeviceError, "tp=17 needs 17 devices, but JAX sees 16"),
        ({"tp": 0}, DeviceError, "tp=0"),
        ({"dtype": "int3"}, ConfigError, "dtype='int3'"),
        ({"max_model_len": 513}, ConfigError, "max_model_len=513 is not between 1 and the model's 512"),
        ({"max_slots": 0}, ConfigError, "max_slots=0"),
        ({"quantize": "int3"}, ConfigError, "quantize='int3' is not supported: use int8, fp8 or int4"),
        ({"seed": 2**63}, ConfigError, "seed=9223372036854775808"),
        (
            {"sequence_parallel": "rows"},
            ConfigError,
            "sequence_parallel='rows' is not supported: use auto, on or",
        ),
    ),
)
def test_bad_arguments(arguments: dict[str, object], error: type[TpjaxError], message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(GOLDENS / "llama", **arguments)


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("tpjax.llm.device_memory", lambda tp: DeviceMemory(1000, None))
    monkeypatch.setattr("tpjax.engine.loading.load_replicas", read)
    with pytest.raises(ConfigError, match=r"the model does not fit: at tp=2 .* and has 1000 B"):
        LLM(GOLDENS / "llama", tp=2)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_half_precision_on_a_cpu_is_said_to_be_slow(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    LLM(GOLDENS / "llama", tp=1, dtype=dtype, max_model_len=64, max_slots=1)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        f"dtype={dtype} is slow on a CPU: SmolLM2-135M takes 4 times as long per token as in float32"
    ] * (dtype != "float32")


def test_pickles_are_refused(tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "llama" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(CheckpointError, match="safetensors"):
        LLM(tmp_path)


def test_bfloat16_is_close_to_float32() -> None:
    """The accelerators' dtype, here for its maths: same shapes, sharding and paths."""
    prompt = np.load(GOLDENS / "llama" / "golden.npz")["prompt"]
    exact = np.load(GOLDENS / "llama" / "golden.npz")["logits"]
    rounded = LLM(GOLDENS / "llama", tp=3, dtype="bfloat16", max_model_len=64, max_slots=1).logits(prompt)
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.1


def test_streams_and_generate_do_not_disturb_each_other(tiny: LLM) -> None:
    """Whoever steps the engine, everybody gets their own tokens."""
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    wanted = [c.token_ids for c in tiny.generate(prompts, greedy(20, ignore_eos=True))]
    first, second = (tiny.stream(prompt, greedy(20, ignore_eos=True)) for prompt in prompts[:2])
    got: list[list[int]] = [list(next(first).token_ids), list(next(second).token_ids)]
    (between,) = tiny.generate(prompts[2:], greedy(20, ignore_eos=True))
    for stream, tokens in ((second, got[1]), (first, got[0])):
        for delta in stream:
            tokens += delta.token_ids
    assert [*got, between.token_ids] == wanted


def test_logits_that_are_not_numbers_fail_one_request(tiny: LLM) -> None:
    runner = tiny.runner
    weights, place = (
        runner.weights,
        next(i for i, w in enumerate(runner.weights) if w.shape[0] >= tiny.config.vocab_size),
    )
    poisoned = jax.device_put(weights[place].at[99].set(np.nan), weights[place].sharding)
    prompts = [[3, 4, 5], [6] * 40 + [99, 7]]
    (fine, _) = tiny.generate(prompts, greedy(8, ignore_eos=True))
    try:
        runner.weights = (*weights[:place], poisoned, *weights[place + 1 :])
        good, bad = tiny.generate(prompts, greedy(8, ignore_eos=True))
    finally:
        runner.weights = weights
    assert (good.token_ids, good.finish_reason, good.error) == (fine.token_ids, "length", None)
    assert (bad.token_ids, bad.finish_reason) == ([], "error")
    assert bad.error == "the model's logits are not numbers after 42 tokens"
    # the pages it leaves behind are full of what is not a number
    assert [c.token_ids for c in tiny.generate(prompts[:1] * 2, greedy(8, ignore_eos=True))] == [
        fine.token_ids
    ] * 2
