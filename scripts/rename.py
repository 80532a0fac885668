#!/usr/bin/env python
"""Rewrites Python sources from the names tpjax had first to today's.

    python scripts/rename.py my_program.py tests/        # in place; folders are searched for .py files

What moved and what is called otherwise is in the tables below. `Shape`, `Latent` and `Experts` of `inspect`
have no successor: a model is a `ModelConfig` (`planning.published`), counted by `planning.counts.Counts`.
"""

from __future__ import annotations

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

# module as it was first -> its names that have moved to another module since
MOVED = {
    "tpjax.runner": {
        "Limits": "tpjax.runtime.limits",
        "NO_TOKEN": "tpjax.runtime.rows",
        "Residual": "tpjax.config",
        "Row": "tpjax.runtime.rows",
        "resolve_dtype": "tpjax.runtime.limits",
    },
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
    "SHARES": "PARTIAL_SUMS",
    "Stored": "TensorMapping",
    "add_up": "reduce_partials",
    "expert_sharding": "expert_parallel",
    "blocks._blank": "blocks._free_list",
    "head.launched": "head.dispatched_tokens",
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

# module -> {name that moved out of it: where to}; a name too common for NAMES keeps its old one as an alias
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
    "tpjax.text.tokenizer": {
        "IncrementalDetokenizer": "tpjax.text.detokenizer",
        "load_tokenizer": "tpjax.text.loading",
        "tokenizer_from_gguf": "tpjax.text.loading",
    },
}

# attributes whose names are too common to be replaced wherever they stand
PATTERNS = {
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
    for old, moved in MOVED.items():
        source = re.sub(
            rf"^(\s*)from {re.escape(old)} import ([\w, ]+)$",
            lambda match, old=old, moved=moved: split_import(match, old, moved),
            source,
            flags=re.MULTILINE,
        )
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
    return re.sub(rf"\b({names})\b", lambda match: NAMES[match[1]], source)


def split_import(match: re.Match[str], module: str, moved: dict[str, str]) -> str:
    """An import of names from a module as an import from each module that they are in now."""
    names: dict[str, list[str]] = {}
    for name in match[2].split(", "):
        names.setdefault(moved.get(name, module), []).append(name)
    return "\n".join(f"{match[1]}from {home} import {', '.join(some)}" for home, some in names.items())


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
