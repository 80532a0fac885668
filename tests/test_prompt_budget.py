"""The prompt tokens of a step, by hand and on real chips."""

import pytest

from tpjax.engine.prompt_budget import PromptBudget
from tpjax.engine.request import Request
from tpjax.hardware import HARDWARE
from tpjax.planning.published import published_config
from tpjax.runtime.counts import Counts
from tpjax.sampling_params import SamplingParams
from tpjax.step_time import Itemsizes, StepTime


def decoding(rows: int, context: int = 1000) -> list[Request]:
    """Requests whose next step feeds the token at position ``context - 1``."""
    return [
        Request([0] * context, SamplingParams(max_tokens=9), seed=0, dispatched_tokens=0) for _ in range(rows)
    ]


def by_hand(decode_rows: int, context_tokens: int, prompt_tokens: int = 0, prompt_context: int = 0) -> float:
    return 10.0 + 0.001 * context_tokens + 0.02 * prompt_tokens


def test_a_step_with_prompts_takes_at_most_twice_as_long():
    budget = PromptBudget(by_hand, page_size=128, most=2048)
    # decoding alone takes 10 + 4 * 1024 / 1000 = 14.1: prompts may take as long again, 704 tokens, 5 pages
    assert budget(decoding(4, 1024)) == 5 * 128
    assert budget([]) == 2048
    assert PromptBudget(by_hand, 128, 384)(decoding(4, 1024)) == 384


def test_a_page_runs_even_if_it_takes_longer():
    assert PromptBudget(lambda *tokens: 1.0 + (len(tokens) > 2) * 9, 128, 2048)(decoding(4)) == 128


def test_a_given_maximum_counts_decoded_tokens_too():
    assert PromptBudget(by_hand, 128, 2048, max_num_batched_tokens=512)(decoding(4)) == 508
    assert PromptBudget(by_hand, 128, 2048, max_num_batched_tokens=512)([]) == 512
    assert PromptBudget(by_hand, 128, 2048, max_num_batched_tokens=2)(decoding(4)) == 0


@pytest.mark.parametrize("chip", ["v5e", "v6e", "h100-sxm"])
def test_the_prediction_holds_on_chips(chip):
    share = Counts("", published_config("llama-3-8b")).share(8)
    times = StepTime(share, HARDWARE[chip].device, Itemsizes(2, 2, 2))
    tokens = PromptBudget(times.seconds, 128, 8192)(decoding(64, 1024))
    alone = times.seconds(64, 64 * 1024)
    assert times.seconds(64, 64 * 1024, tokens) <= 2 * alone < times.seconds(64, 64 * 1024, tokens + 128)
    assert tokens == {"v5e": 128, "v6e": 640, "h100-sxm": 640}[chip]
