"""What is counted, against the published sizes of models and by hand."""

import pytest

from tpjax.planning.published import published_config, published_names
from tpjax.runtime.counts import Counts

# Elements of each model's files on Hugging Face, tied weights once; of Gemma 3 4B to 27B the text half.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200,
    "smollm2-135m": 134_515_008,
    "gemma3-270m": 268_098_176,
}


def published(name: str) -> Counts:
    return Counts(name, published_config(name))


def test_every_model_has_its_published_size():
    assert {name: published(name).parameters for name in published_names()} == PUBLISHED


@pytest.mark.parametrize(
    ("model", "billions"),
    # as their reports have it: Mixtral 12.9, Qwen3 3.3 and 22, gpt-oss 3.6 and 5.1, DeepSeek-V3 37
    [
        ("mixtral-8x7b", 12.9),
        ("qwen3-30b-a3b", 3.3),
        ("qwen3-235b-a22b", 22.0),
        ("gpt-oss-20b", 3.6),
        ("gpt-oss-120b", 5.1),
        ("deepseek-v3", 37.0),
    ],
)
def test_active_parameters_of_mixtures(model, billions):
    counts = published(model)
    one, moe = counts.on_device(1), counts.config.moe
    routed = one.experts * moe.experts_per_token / moe.num_experts
    embedding = one.embedding / 1e9
    active = (one.attention + one.mlp + one.routers + routed + (one.head or one.embedding)) / 1e9
    assert active - 0.05 <= billions <= active + embedding + 0.05  # some reports count the embedding


def test_a_device_holds_padded_heads_and_widths():
    counts = published("smollm2-135m")  # 9 heads in 3 groups, width 1536, vocabulary 49152
    three, two, five = (counts.on_device(tp) for tp in (3, 2, 5))
    assert three.attention == 30 * 576 * 64 * (2 * 3 + 2)
    assert two.attention == 30 * 576 * 64 * 2 * (2 * 3 + 2)  # two slots of three queries: one is padding
    assert five.mlp == 30 * 3 * 576 * 312  # 1536 / 5 = 307.2, to a multiple of 8
    assert five.embedding == 576 * 9831 and five.head == 0  # 49152 / 5 = 9830.4, tied
    assert five.vectors == (2 * 30 + 1) * 576
    assert counts.cache_elements(3) == 2 * 64
    assert counts.attention_flops(1) == 4 * 9 * 64 and counts.attention_flops(2) == 4 * 6 * 64


def test_experts_are_sharded_by_width_or_whole():
    counts = published("mixtral-8x7b")
    one = 3 * 4096 * 14_336
    assert counts.on_device(1).experts == 32 * 8 * one
    assert counts.on_device(4, "experts").experts == counts.on_device(4, "width").experts == 32 * 2 * one
    assert counts.on_device(3, "width").experts == 32 * 8 * 3 * 4096 * 4800  # 14336 / 3 = 4778.7
    assert counts.on_device(4).routers == 32 * 8 * 4096  # replicated


def test_a_latent_cache_is_replicated():
    counts = published("deepseek-v3")
    assert counts.cache_elements(1) == counts.cache_elements(16) == 512 + 64
    sixteenth, all_of_it = counts.on_device(16).attention, counts.on_device(1).attention
    assert all_of_it > sixteenth > all_of_it / 16
    assert sum(counts.config.sparse_layers) == 58
    assert counts.on_device(1).mlp == 3 * 7168 * (3 * 18_432 + 58 * 2048)
