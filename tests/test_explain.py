"""What ``explain`` reports: reasons, contents of slices, budgets, memory, pictures."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from huggingface_hub.errors import EntryNotFoundError
from rich.console import Console

from tpjax.checkpoints.opening import read_config
from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.cli import app as cli
from tpjax.hardware import HARDWARE
from tpjax.inspect.budget import measured
from tpjax.inspect.explain import explain_model
from tpjax.inspect.explain_report import Report
from tpjax.inspect.reasons import reason
from tpjax.inspect.tables import source_text
from tpjax.mesh import make_mesh
from tpjax.planning.cost_model import CostModel
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts
from tpjax.sharding import Content, HeadPlan, qkv_layout

F32 = jnp.dtype("float32")
FAMILIES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))


# --- reasons -----------------------------------------------------------------------------------------------


def reasons(name: str, tp: int) -> dict[str, str]:
    mesh = make_mesh(tp)
    model = abstract_decoder(read_config(GOLDENS / name), mesh, F32)
    return {one.name: reason(one, model, tp) for one in parameters(model, mesh)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_reason(name: str) -> None:
    """Of its own kind: no layer is passed over."""
    assert not {"sharded", "replicated"} & set(reasons(name, 4).values())


@pytest.mark.parametrize(
    ("name", "tp", "parameter", "expected"),
    [
        ("llama", 3, "norm.weight", "norm: every device normalises full rows"),
        ("llama", 1, "norm.weight", "one device holds everything"),
        (
            "mixtral",
            3,
            "layers.0.self_attn.qkv_proj.weight",
            "column-parallel: each device computes its own heads, and nothing moves; "
            "padded: 6 query and 2 KV heads → 9 and 3",
        ),
        (
            "mixtral",
            6,
            "layers.0.self_attn.qkv_proj.weight",
            "column-parallel: each device computes its own heads, and nothing moves; "
            "KV heads replicated, 2 → 6: tp=6 > 2",
        ),
        (
            "mixtral",
            3,
            "layers.0.mlp.experts.down_proj",
            "each device has a part of every expert's width: tp=3 does not divide 5 experts",
        ),
        (
            "gpt_oss",
            2,
            "layers.0.mlp.experts.down_proj",
            "each device has its own experts: tp=2 divides 6 experts",
        ),
        (
            "gpt_oss",
            4,
            "layers.0.mlp.experts.down_bias",
            "bias of a sum over the width: counted on the first device alone",
        ),
        (
            "mixtral",
            3,
            "lm_head.weight",
            "column-parallel: each device scores its own tokens, and logits stay sharded; "
            "padded: 131 tokens → 132",
        ),
        (
            "gpt2",
            4,
            "layers.0.mlp.down_proj.bias",
            "bias of a row-parallel product: added once, after the all-reduce",
        ),
        (
            "gpt_neox",
            4,
            "layers.0.mlp.down_proj.bias",
            "bias of a row-parallel product: added by the first device alone, before the all-reduce",
        ),
        (
            "deepseek_v3",
            4,
            "layers.0.self_attn.kv_b_proj.key",
            "each device expands the latent for its own heads, and nothing moves; padded: 5 heads → 8",
        ),
    ],
)
def test_reasons(name: str, tp: int, parameter: str, expected: str) -> None:
    assert reasons(name, tp)[parameter] == expected


# --- contents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(9, 3, 2), (9, 3, 4), (4, 1, 8), (8, 4, 4)])
def test_contents_are_what_is_read(heads: int, kv_heads: int, tp: int) -> None:
    """Each canonical element is a number of its own: zeros, first readings and repetitions are counted."""
    plan = HeadPlan(heads, kv_heads, tp)
    layout = qkv_layout(plan, 2, in_features=3)
    (width, _), sizes = layout.shape, dict(layout.sizes)
    starts = dict(zip(sizes, np.cumsum([1, *sizes.values()]) * 3, strict=False))

    def read(source: str, index: tuple[slice, ...]) -> np.ndarray:
        full = starts[source] + np.arange(sizes[source] * 3).reshape(sizes[source], 3)
        return full[index]

    seen: set[int] = set()
    for device in range(tp):
        share = width // tp
        index = (slice(device * share, (device + 1) * share), slice(None))
        stored = layout.read(read, index, np.dtype(np.int64))
        numbers = stored[stored > 0].tolist()
        new = set(numbers) - seen
        assert layout.content(index) == Content(len(new), len(numbers) - len(new), stored.size - len(numbers))
        seen |= new
    assert len(seen) == sum(sizes.values()) * 3


# --- reports -----------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[("llama", 3), ("olmo2", 4), ("cohere", 4), ("deepseek_v3", 4), ("mixtral", 3), ("gemma3", 1)],
    ids=lambda case: f"{case[0]}-tp{case[1]}",
)
def report(request: pytest.FixtureRequest) -> Report:
    name, tp = request.param
    return explain_model(str(GOLDENS / name), tp=tp, max_model_len=128)


def test_the_budget_is_what_the_compiled_steps_move(report: Report) -> None:
    assert [(step.name, step.tokens) for step in report.steps] == [("decode", 1), ("prefill", 128)]
    for step in report.steps:
        found = measured(step.collectives)
        assert found == {name: step.budget[name] for name in found}
        assert (found["all_reduces"] > 0) == (report.tp > 1)


def test_plan_counts_the_bytes_that_a_compiled_decode_step_moves(report: Report) -> None:
    """And those of weights and pages."""
    config, decode = read_config(GOLDENS / Path(report.model).name), measured(report.steps[0].collectives)
    axis = config.moe.sharded_axis(report.tp) if config.moe else "width"
    chip = replace(HARDWARE["h200"], shared=True)
    plan = CostModel(Counts("", config), chip, report.tp, Workload(dtype="float32"), axis)
    assert plan.reduced_bytes(1) == decode["all_reduce_bytes"] + decode["all_gather_bytes"]
    assert plan.memory(1, 128).weights == report.weight_bytes_per_device
    windows = tuple(group["window"] for group in report.cache["page_groups"])
    assert plan.page_bytes(windows) == report.cache["page_bytes_per_device"]


def test_memory_is_what_the_compiler_says(report: Report) -> None:
    updated = report.cache["bytes_per_device"] + report.state_bytes_per_device
    for step in report.steps:
        assert step.aliased_bytes == updated
        requests = step.argument_bytes - updated - report.weight_bytes_per_device
        assert 0 < requests < 4096  # one row's sampling parameters and pages, and a chunk's tokens


def test_contents_add_up(report: Report) -> None:
    for row in report.tensors:
        assert len(row.devices) == report.tp
        for content in row.devices:
            assert content.held + content.copied + content.zeros == row.bytes_per_device
        held = sum(content.held for content in row.devices)
        assert row.bytes_per_device * report.tp / held == pytest.approx(1 + row.padding + row.copies)
        if row.replicated:
            assert (row.padding, row.copies) == (0, report.tp - 1)
    for content in report.cache["devices"]:
        assert content.held + content.copied + content.zeros == report.cache["bytes_per_device"]
    assert report.cache["bytes"] == report.tp * report.cache["bytes_per_device"]
    positions = report.cache["num_pages"] * report.cache["page_size"]
    assert report.cache["bytes"] == report.cache["bytes_per_token"] * positions


def test_tables_fit_a_hundred_columns_and_html_says_the_same(report: Report) -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(replace(report, model="<b>&"))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for row in report.tensors:
        assert row.title.split(" ×")[0] in text
    html = replace(report, model="<b>&")._repr_html_()
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html
    assert "temporary bytes" in text and "temporary bytes" in html
    style = re.match(r'<pre style="([^"]*)">', html)  # with the table: an exported page has no other
    assert style and "white-space:pre;" in style[1] and "monospace" in style[1]
    if report.tp > 1:
        assert source_text(report.steps[0].collectives[0].source)[:12] in text
    json.dumps(report.to_dict())


def test_a_picture_has_a_row_for_each_tensor_and_a_column_for_each_device(report: Report) -> None:
    pytest.importorskip("matplotlib", reason="pip install -e '.[serve]'")
    figure = report.figure()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(n) for n in range(report.tp)]
    titles = [row.title for row in report.tensors]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*titles, "KV cache (own scale)"]
    kinds = [c for row in report.tensors for c in row.devices] + list(report.cache["devices"])
    parts = sum((c.held > 0) + (c.copied > 0) + (c.zeros > 0) for c in kinds)
    assert len(axes.collections) == len(kinds) + parts  # each on the grey of its column
    file = io.StringIO()
    figure.savefig(file, format="svg")
    assert file.getvalue().startswith("<?xml") and "font-family" not in file.getvalue()


def test_source_text() -> None:
    assert source_text("__init__.py:1").startswith('"""')
    lines = (Path(cli.__file__).parents[1] / "model.py").read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if "= constrain(self.embed_tokens" in line)
    assert source_text(f"model.py:{number}").startswith("constrain(self.embed_tokens(tokens)")
    assert source_text("") == ""


# --- the command -------------------------------------------------------------------------------------------


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    jax.devices()  # started here, not by the command, which would say that it fakes devices
    try:
        status = cli.main(["explain", *arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


def write_config(folder: Path, **changes: Any) -> str:
    raw = json.loads((GOLDENS / "llama" / "config.json").read_text())
    raw = {name: value for name, value in (raw | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder / "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_a_configuration_that_will_not_do_is_one_line(
    changes: dict[str, Any], message: str, capsys: Any, tmp_path: Path
) -> None:
    status, out, err = run(capsys, "--config", write_config(tmp_path, **changes), "--tp", "2")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "'nope' is neither a checkpoint nor a built-in model"),
        (["none/config.json"], "none/config.json: no such file or directory"),
        (["--config", "none.json"], "none.json: no such file or directory"),
        (["{model}", "--tp", "65"], "tp=65"),
        (["{model}", "--plot", "a.txt"], "--plot a.txt: use a name that ends in .png, .svg, .pdf"),
        (["{model}", "--plot", "none/a.svg"], "--plot none/a.svg: none is not a directory"),
        (["{model}", "--plot", "{folder}/a.svg"], "a.svg: is a directory"),
        (["{model}", "--plot", "a.svg", "--topology", "v5e:2x4"], "--plot draws what --topology does not"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install -e '.[serve]'")
    (tmp_path / "a.svg").mkdir()
    model = GOLDENS / "llama"
    status, out, err = run(capsys, *(word.format(model=model, folder=tmp_path) for word in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install -e '.[serve]'")
    from matplotlib.figure import Figure

    from tpjax.errors import ConfigError
    from tpjax.planning.plots import save

    with pytest.raises(ConfigError, match=r"^--plot .*x\.svg: No such file or directory$"):
        save(Figure(), tmp_path / "gone" / "x.svg")


def test_a_bare_file_of_any_name_and_its_picture(capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install -e '.[serve]'")
    file, picture = tmp_path / "small.json", tmp_path / "shards.svg"
    file.write_text(Path(write_config(tmp_path)).read_text())
    status, out, _ = run(
        capsys, "--config", str(file), "--tp", "16", "--max-model-len", "64", "--json", "--plot", str(picture)
    )
    assert status == 0
    assert json.loads(out)["tp"] == 16
    assert picture.read_text().startswith("<?xml")


def test_of_a_hub_id_nothing_but_its_configuration_is_fetched(capsys: Any, monkeypatch: Any) -> None:
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        if file != "config.json":
            raise EntryNotFoundError(f"404: {file}")
        return str(GOLDENS / "llama" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    status, out, _ = run(capsys, "org/explained", "--tp", "2", "--max-model-len", "64", "--json")
    assert (status, json.loads(out)["model_type"]) == (0, "llama")
    assert cli.main(["plan", "org/planned", "--hardware", "h100:2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tp"] in (1, 2)
    files = ("config.json", "hf_quant_config.json")  # the latter says how some checkpoints are quantised
    assert asked == [(repo, file) for repo in ("org/explained", "org/planned") for file in files]
