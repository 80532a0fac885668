"""The report of a model whose layers are split over the stages of a pipeline."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpjax.inspect.explain_report import Report
from tpjax.inspect.tables import as_html
from tpjax.mesh import describe_layout
from tpjax.planning.plain_table import plain_table
from tpjax.runtime.memory import human_bytes


@dataclass(frozen=True, repr=False)
class PipelineReport:
    """A model in stages. Rich renders it in a terminal, ``_repr_html_`` in a notebook.

    Attributes:
        model: name of the model.
        tp: devices of each of the stages.
        pp: number of stages.
        dp: number of replicas; all else is that of one.
        layers: first layer of each stage, and one past its last.
        stages: report of each stage.
        rows: rows of a group, at most: those that a decode step runs while other stages run others.
        chunk_tokens: tokens of the longest prompt chunk.
        hidden_bytes: bytes that a token takes from a stage to the next: its hidden states.
        token_bytes: bytes that go back to the first stage after a step: the last token of each slot.
    """

    model: str
    tp: list[int]
    pp: int
    dp: int
    layers: list[tuple[int, int]]
    stages: list[Report]
    rows: int
    chunk_tokens: int
    hidden_bytes: int
    token_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<PipelineReport: {self.model} at {describe_layout(self.tp, self.dp, self.pp)}>"

    def __rich__(self) -> RenderableType:
        decode, prefill = (human_bytes(n * self.hidden_bytes) for n in (self.rows, self.chunk_tokens))
        return Group(
            Text(f"{self.model} at {describe_layout(self.tp, self.dp, self.pp)}", style="bold"),
            Text(
                f"{self.pp} stages work at once, each on a group of up to {self.rows} decoded rows or on a "
                f"prompt chunk. Between stages move {human_bytes(self.hidden_bytes)} a token: up to {decode} "
                f"a decode step, {prefill} with a chunk of {self.chunk_tokens}. "
                f"{human_bytes(self.token_bytes)} go back to the first: the last token of each slot.\n"
            ),
            self._stage_table(),
            *(part for report in self.stages for part in (report, Text())),
        )

    def _repr_html_(self) -> str:
        return as_html(self)

    def _stage_table(self) -> Table:
        numbers = ("stage", "layers", "weights", "KV cache", "temporaries", "all-reduces a decode step")
        table = plain_table("stages; bytes of a device", numbers=numbers)
        for number, ((start, stop), report) in enumerate(zip(self.layers, self.stages, strict=True), 1):
            decode, prefill = report.steps
            reduces = sum(one.count for one in decode.collectives if one.kind == "all-reduce")
            table.add_row(
                str(number),
                f"{start} to {stop - 1}",
                human_bytes(report.weight_bytes_per_device),
                human_bytes(report.cache["bytes_per_device"]),
                human_bytes(prefill.temporary_bytes),
                str(reduces),
            )
        return table
