"""Built-in models against their published sizes, and shapes of checkpoints against the real layers."""

import json

import pytest

from tpjax.errors import CheckpointError, ConfigError
from tpjax.families import config_from_hf
from tpjax.inspect.shapes import SHAPES, Shape, find_shape

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


def test_every_model_has_its_published_size():
    counted = {name: shape.parameters for name, shape in SHAPES.items()}
    counted["deepseek-v3"] += 58 * 256  # the router's correction bias, which costs nothing
    assert counted == PUBLISHED


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
    shape = SHAPES[model]
    embedding = shape.vocab_weights(1) / 1e9
    active = shape.active_parameters / 1e9
    assert active - 0.05 <= billions <= active + embedding + 0.05  # some reports count the embedding


def test_a_device_holds_padded_heads_and_widths():
    shape = SHAPES["smollm2-135m"]  # 9 heads in 3 groups, width 1536, vocabulary 49152
    assert shape.attention_weights(3) == 576 * 64 * (2 * 3 + 2)
    assert shape.attention_weights(2) == 576 * 64 * 2 * (
        2 * 3 + 2
    )  # two slots of three queries: one is padding
    assert shape.mlp_weights(5, 1536) == 3 * 576 * 308  # 1536 / 5 = 307.2
    assert shape.vocab_weights(5) == 576 * 9831  # 49152 / 5 = 9830.4
    assert shape.cache_elements(3) == 2 * 64


def test_a_latent_cache_is_whole_on_every_device():
    shape = SHAPES["deepseek-v3"]
    assert shape.cache_elements(1) == shape.cache_elements(16) == 512 + 64
    assert shape.attention_weights(1) > shape.attention_weights(16) > shape.attention_weights(1) / 16


def test_shape_of_a_configuration(tmp_path):
    raw = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    expected = Shape.from_config(config_from_hf(raw), "config.json")
    assert find_shape(str(file)) == expected
    assert expected.parameters == PUBLISHED["smollm2-135m"]
    del raw["hidden_size"]
    file.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="'hidden_size' is missing"):
        find_shape(str(file))


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(CheckpointError, match=r"'llama-3-8' is neither .* did you mean llama-3-8b"):
        find_shape("llama-3-8")
    with pytest.raises(CheckpointError, match=r"the built-in ones are llama-2-7b, .*deepseek-v3"):
        find_shape("zzz")
