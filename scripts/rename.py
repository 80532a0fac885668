#!/usr/bin/env python
"""Rewrites Python sources from the names tpjax had first to today's.

    python scripts/rename.py my_program.py tests/        # in place; folders are searched for .py files

What moved and what is called otherwise is in the tables below. `Shape`, `Latent` and `Experts` of `inspect`
have no successor: a model is a `ModelConfig` (`planning.published`), counted by `planning.counts.Counts`.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

# old module -> new module
MODULES = {
    "tpjax.chat_template": "tpjax.text.chat_template",
    "tpjax.checkpoints.gguf_vocab": "tpjax.text.gguf_vocab",
    "tpjax.cli": "tpjax.cli.app",
    "tpjax.engine.text": "tpjax.text.stream",
    "tpjax.families": "tpjax.families.registry",
    "tpjax.inspect.bench": "tpjax.planning.step_benchmark",
    "tpjax.inspect.hardware": "tpjax.hardware",
    "tpjax.inspect.interconnect": "tpjax.interconnect",
    "tpjax.inspect.measure": "tpjax.planning.measure",
    "tpjax.inspect.plan": "tpjax.planning.plan",
    "tpjax.inspect.plan_report": "tpjax.planning.report",
    "tpjax.inspect.plots": "tpjax.planning.plots",
    "tpjax.inspect.published": "tpjax.planning.published",
    "tpjax.inspect.strategies": "tpjax.planning.strategies",
    "tpjax.mappings": "tpjax.families",
    "tpjax.memory": "tpjax.runtime.memory",
    "tpjax.runner": "tpjax.runtime.runner",
    "tpjax.server.answer_grammar": "tpjax.server.grammars.response_grammar",
    "tpjax.server.answers": "tpjax.server.responses",
    "tpjax.server.bench": "tpjax.cli.serving_benchmark",
    "tpjax.server.bodies": "tpjax.server.json_bodies",
    "tpjax.server.budget": "tpjax.server.admission_budget",
    "tpjax.server.call_formats": "tpjax.server.parsing.model_parsers",
    "tpjax.server.calls": "tpjax.server.parsing.tool_call_parser",
    "tpjax.server.dialect": "tpjax.server.chat_format",
    "tpjax.server.errors": "tpjax.server.error_responses",
    "tpjax.server.foreign": "tpjax.server.compatibility",
    "tpjax.server.grammar": "tpjax.server.grammars.compiler",
    "tpjax.server.grammar_check": "tpjax.server.grammars.checker",
    "tpjax.server.harmony": "tpjax.server.parsing.harmony",
    "tpjax.server.legacy": "tpjax.server.legacy_functions",
    "tpjax.server.reader": "tpjax.server.parsing.incremental",
    "tpjax.server.reasoning": "tpjax.server.parsing.reasoning",
    "tpjax.server.sandbox": "tpjax.server.worker_pools",
    "tpjax.server.schemas": "tpjax.server.grammars.json_schemas",
    "tpjax.server.structured": "tpjax.server.grammars.structured_outputs",
    "tpjax.server.texts": "tpjax.server.prompt_encoder",
    "tpjax.server.tool_formats": "tpjax.server.parsing.tool_call_formats",
    "tpjax.server.tools": "tpjax.server.parsing.tool_call_messages",
    "tpjax.terminal": "tpjax.cli.terminal",
    "tpjax.tokenizer": "tpjax.text.tokenizer",
}

# old identifier -> new identifier
NAMES = {
    "ColumnLinear": "Linear",
    "ExpertCut": "ExpertAxis",
    "ExpertSharding": "ExpertParallel",
    "INERT": "IGNORED_FIELDS",
    "Memory": "DeviceMemory",
    "NOTHING_ALLOWED": "ALL_MASKED_TOKEN",
    "POSITIONS": "SEQUENCE_PARALLEL",
    "Placement": "BatchMetadata",
    "Residual": "SequenceParallel",
    "ReplicatedLinear": "Linear",
    "Rotation": "RotaryEmbedding",
    "SHARES": "PARTIAL_SUMS",
    "Scores": "GateProjection",
    "Stored": "TensorMapping",
    "add_up": "reduce_partials",
    "expert_sharding": "expert_parallel",
    "blocks._blank": "blocks._free_list",
    "head.launched": "head.dispatched_tokens",
    "RopeConfig": "RopeParameters",
    "length_class": "rope_scaling_key",
    "num_slots": "num_head_slots",
    "losses": "state_resets",
    "most_tokens": "max_length",
    "of.launched": "of.dispatched",
    "one.launched": "one.dispatched_tokens",
    "output_ids": "output_token_ids",
    "prefill_ids": "prefill_token_ids",
    "prompt_ids": "prompt_token_ids",
    "residual_of": "programs.residual_spec",
    "runner._weights": "runner.weights",
    "runner.compiled": "runner.programs.compiled",
    "slots_per_device": "head_slots_per_device",
    "scheduler._slots": "scheduler._free_slots",
    "thirds_of_heads": "fused_qkv_by_head",
    "values_of": "project_values",
    "with_expert_sharding": "with_expert_parallel",
    "Traffic": "Workload",
    "narrow_compute": "low_precision_compute",
    "narrow_flops": "low_precision_flops",
    "narrow_weights": "low_precision_weights",
    "wide_bytes": "activation_bytes",
    "QuickModel": "FailFastModel",
    "JsonRequest": "StrictJsonRequest",
    "JsonRoute": "StrictJsonRoute",
    "ForeignToChat": "ChatCompatibilityFields",
    "ForeignToCompletions": "CompletionCompatibilityFields",
    "AnswerReader": "ResponseParser",
    "CallReader": "ToolCallParser",
    "HarmonyReader": "HarmonyParser",
    "ReasoningReader": "ReasoningParser",
    "ToolFormat": "ToolCallFormat",
    "tool_format": "tool_call_format",
    "ChatAnswer": "ChatResponse",
    "CompletionAnswer": "CompletionResponse",
    "PatientPool": "TieredWorkerPool",
    "PATIENCE_S": "IDLE_TIMEOUT_S",
    "also_ends": "add_stop_ids",
    "Dialect": "ChatFormat",
    "Wanted": "ResponseConstraints",
    "give_memory_back": "release_memory",
    "Budget": "AdmissionBudget",
    "Share": "Reservation",
    "answer_grammar": "response_grammar",
    "form_schema": "format_schema",
}

# group of ModelConfig -> its class, {name of a field before it was grouped: its name in the group}
CONFIG_GROUPS = {
    "attention": (
        "AttentionConfig",
        {
            "num_heads": "num_heads",
            "num_kv_heads": "num_kv_heads",
            "head_dim": "head_dim",
            "query_scale": "query_scale",
            "attn_softcap": "softcap",
            "attention_bias": "bias",
            "attention_out_bias": "out_bias",
            "qk_norm": "qk_norm",
            "attention_sinks": "sinks",
            "layer_types": "layer_types",
            "sliding_window": "sliding_window",
            "latent": "latent",
        },
    ),
    "rope": (
        "RopeConfig",
        {"rope": "full", "rope_sliding": "sliding", "rope_layers": "layers", "rotary_dim": "rotary_dim"},
    ),
    "mlp": (
        "MLPConfig",
        {
            "intermediate_size": "intermediate_size",
            "gated_mlp": "gated",
            "activation": "activation",
            "mlp_bias": "bias",
        },
    ),
    "norm": ("NormConfig", {"norm": "kind", "norm_eps": "eps", "norm_bias": "bias", "norm_offset": "offset"}),
}
ROPE_PARAMETERS = (
    *("theta", "kind", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *(
        "divisors",
        "long_divisors",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "follows_length",
    ),
)

# module, by its name of today -> {name that moved out of it: where to}; a name too common for NAMES keeps its
# old one as an alias
MOVED = {
    "tpjax.server.middleware": {"JsonLines": "tpjax.server.json_logging"},
    "tpjax.families.fields": {
        "Family": "tpjax.families.family",
        "Fields": "tpjax.families.config_reader",
        "GGUFArchitecture": "tpjax.families.family",
        "GGUFView": "tpjax.families.gguf_metadata",
        "Names": "tpjax.families.tensor_names: WeightMap as Names",
        "Stored": "tpjax.families.tensor_names",
        "rope_from": "tpjax.families.rope_variants",
    },
    "tpjax.inspect.program": {
        "Program": "tpjax.inspect.topology_report: ProgramReport as Program",
        "TopologyReport": "tpjax.inspect.topology_report",
        "whole_copies": "tpjax.inspect.copies: copied_arrays as whole_copies",
        "write_backs": "tpjax.inspect.copies",
    },
    "tpjax.planning.plan": {
        "Cost": "tpjax.planning.cost_model",
        "CostModel": "tpjax.planning.cost_model",
        "Traffic": "tpjax.planning.workload",
        "Workload": "tpjax.planning.workload",
        "busiest": "tpjax.planning.cost_model",
    },
    "tpjax.runtime.runner": {
        "Limits": "tpjax.runtime.limits",
        "NO_TOKEN": "tpjax.runtime.rows",
        "Residual": "tpjax.config",
        "Row": "tpjax.runtime.rows",
        "resolve_dtype": "tpjax.runtime.limits",
    },
    "tpjax.layers.attention": {
        "paged_attention": "tpjax.attention",
        "reference_attention": "tpjax.attention.reference",
        "soft_capped": "tpjax.activations",
        "_head_segments": "tpjax.sharding.projections: head_segments as _head_segments",
        "_qkv_segments": "tpjax.sharding.projections: qkv_segments as _qkv_segments",
    },
    "tpjax.layers.mlp": {"activate": "tpjax.activations"},
    "tpjax.layers.moe": {
        "ExpertWeights": "tpjax.layers.experts",
        "Routing": "tpjax.layers.experts",
        "gated_expert": "tpjax.layers.experts",
        "ragged_experts": "tpjax.layers.experts",
        "reference_experts": "tpjax.layers.experts",
        "routed_experts": "tpjax.layers.experts",
        "tiled_experts": "tpjax.layers.experts",
    },
    "tpjax.layers.rope": {
        "rotate": "tpjax.layers.rope: apply_rotary as rotate",
        "rotation": "tpjax.layers.rope: rotary_embedding as rotation",
    },
    "tpjax.sharding": {
        "columns": "tpjax.sharding: column_layout as columns",
        "rows": "tpjax.sharding: row_layout as rows",
        "whole": "tpjax.sharding: tensor_layout as whole",
    },
    "tpjax.text.tokenizer": {
        "IncrementalDetokenizer": "tpjax.text.detokenizer",
        "load_tokenizer": "tpjax.text.loading",
        "tokenizer_from_gguf": "tpjax.text.loading",
    },
}

# attributes whose names are too common to be replaced wherever they stand
PATTERNS = {
    r"(?m)^from tpjax\.layers import attention$": "from tpjax.attention import xla as attention",
    r"(?m)^from tpjax\.layers\.attention import _query_places\n": "",
    r"\b_query_places\(plan\)": "plan.stored_query_heads",
    r"\bplan\.slots\b": "plan.head_slots",
    r"\b(segment|s)\.at\b": r"\1.offset",
    r"\.reader\((?=\s*(?:tools|None)\b)": ".parser(",
    r"\b(\w+)\.calls, \1\.reasoning\b": r"\1.tool_calls, \1.reasoning",
    r"\bstate\.pools\.templates\b": "state.shared.chat_prompts",
}


def _moved(match: re.Match[str]) -> str:
    """The import statements for what one statement imports today."""
    indent, module, names = match[1], match[2], re.split(r"\s*,\s*", match[3].strip("()\n, "))
    homes: dict[str, list[str]] = {}
    for name in map(str.strip, names):
        home, _, alias = MOVED[module].get(name, module).partition(": ")
        homes.setdefault(home, []).append(alias or name)
    return "\n".join(f"{indent}from {home} import {', '.join(homes[home])}" for home in sorted(homes))


def renamed(source: str) -> str:
    """The source with today's names."""
    for old, new in MODULES.items():
        parent, _, name = old.rpartition(".")
        new_parent, _, new_name = new.rpartition(".")
        alias = new_name if new_name == name else f"{new_name} as {name}"
        source = re.sub(
            rf"^(\s*)from {re.escape(parent)} import {name}$",
            rf"\1from {new_parent} import {alias}",
            source,
            flags=re.MULTILINE,
        )
    longest_first = sorted(MODULES, key=len, reverse=True)
    # a module that was a file and is a folder now keeps the names of what is in the folder
    known = "|".join(re.escape(old) for old in longest_first)
    source = re.sub(rf"\b({known})\b(?!\.(?:app|registry)\b)", lambda match: MODULES[match[1]], source)
    modules = "|".join(map(re.escape, MOVED))
    statement = rf"^([ ]*)from ({modules}) import (\([^)]*\)|[\w, ]+)$"
    source = re.sub(statement, _moved, source, flags=re.MULTILINE)
    for old, new in PATTERNS.items():
        source = re.sub(old, new, source)
    names = "|".join(NAMES)
    source = re.sub(rf"\b({names})\b", lambda match: NAMES[match[1]], source)
    return _grouped_constructors(_grouped_fields(source))


def _grouped_fields(source: str) -> str:
    """``config.num_heads`` as ``config.attention.num_heads``, whatever ends in ``config``."""
    homes = {"rope_of": "rope.parameters_of", "window_of": "attention.window_of"}
    homes |= {"rope_scaling_key": "rope.scaling_key"}
    for group, (_, fields) in CONFIG_GROUPS.items():
        homes |= {old: f"{group}.{new}" for old, new in fields.items()}
    parameters = "|".join(ROPE_PARAMETERS)
    source = re.sub(rf"(\w*config)\.rope(_sliding)?\.({parameters})\b", _rope_parameter, source)
    for name in ("rope", "norm"):  # groups by the name of a field that they hold now
        del homes[name]
    names = "|".join(homes)
    return re.sub(rf"(\w*config)\.({names})\b", lambda match: f"{match[1]}.{homes[match[2]]}", source)


def _rope_parameter(match: re.Match[str]) -> str:
    return f"{match[1]}.rope.{'sliding' if match[2] else 'full'}.{match[3]}"


def _grouped_constructors(source: str) -> str:
    """Calls of ``ModelConfig`` with the groups built from the fields they own."""
    if "ModelConfig(" not in source:
        return source
    used, encoded = set(), source.encode()
    starts = [0]
    for line in encoded.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.expr) -> slice:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return slice(
            starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        )

    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: -node.lineno):
        old = {keyword.arg: encoded[span(keyword.value)].decode() for keyword in call.keywords}
        if getattr(call.func, "id", None) != "ModelConfig" or None in old or "attention" in old:
            continue
        arguments = []
        for group, (kind, fields) in CONFIG_GROUPS.items():
            if inside := [f"{new}={old.pop(name)}" for name, new in fields.items() if name in old]:
                arguments.append(f"{group}={kind}({', '.join(inside)})")
                used.add(kind)
        arguments = [f"{name}={value}" for name, value in old.items()] + arguments
        where = span(call)
        encoded = (
            encoded[: where.start] + f"ModelConfig({', '.join(arguments)})".encode() + encoded[where.stop :]
        )
    imports = f"from tpjax.config import {', '.join(sorted(used))}\n" if used else ""
    return re.sub(r"^(?=from tpjax\.config import )", imports, encoded.decode(), count=1, flags=re.MULTILINE)


def main() -> int:
    changed = 0
    for place in map(Path, sys.argv[1:]):
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            before = file.read_text()
            if (after := renamed(before)) != before:
                file.write_text(after)
                changed += 1
    print(f"{changed} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
