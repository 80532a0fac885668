"""Options under their old names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpjax import LLM
from tpjax.cli.app import main
from tpjax.inspect.explain import explain_model
from tpjax.old_spellings import translate_arguments
from tpjax.runtime.limits import ChunkShape
from tpjax.runtime.programs import ProgramSpec
from tpjax.sharding import SEQUENCE_PARALLEL

GOLDENS = Path(__file__).parent / "goldens"


def test_keywords_work_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="expert_sharding='width' is now expert_parallel='off'"):
        old = explain_model(str(GOLDENS / "mixtral"), tp=1, expert_sharding="width")  # type: ignore[call-arg]
    assert old.experts == explain_model(str(GOLDENS / "mixtral"), tp=1, expert_parallel="off").experts
    with pytest.warns(FutureWarning, match="residual='positions' is now sequence_parallel='on'"):
        llm = LLM(GOLDENS / "llama", tp=2, residual="positions")  # type: ignore[call-arg]
    assert llm.runner.programs.residual_spec(ProgramSpec("step", 0, ChunkShape(1, 32))) == SEQUENCE_PARALLEL


def test_a_keyword_under_both_names_is_an_error() -> None:
    with pytest.raises(TypeError, match="expert_parallel is given twice: expert_sharding is its old name"):
        explain_model("x", expert_sharding="width", expert_parallel="off")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        explain_model("x", expert_shardings="width")  # type: ignore[call-arg]


def test_command_line_options_work_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    words, messages = translate_arguments(
        ["a", "--expert-sharding=experts", "--expert-sharding", "width", "b"]
    )
    assert words == ["a", "--expert-parallel", "on", "--expert-parallel", "off", "b"]
    assert len(messages) == 2
    assert translate_arguments(["--residual", "on"]) == (["--residual", "on"], [])  # of Python alone
    assert main(["explain", str(GOLDENS / "mixtral"), "--json", "--expert-sharding", "rows"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("tpjax: warning: --expert-sharding rows is now --expert-parallel rows; ")
    assert "'rows' is not one of 'auto', 'on', 'off'" in shown
