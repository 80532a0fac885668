#!/usr/bin/env python
"""Rewrites Python sources from the names tpjax had first to today's.

    python scripts/rename.py my_program.py tests/        # in place; folders are searched for .py files

Run it once on a source: `RopeConfig`, for one, is `RopeParameters` today, and another class has that name.
What moved and what is called otherwise is in the tables below. `Shape`, `Latent` and `Experts` of `inspect`
have no successor: a model is a `ModelConfig` (`planning.published`), counted by `runtime.counts.Counts`. Nor
have `Decode` and the chunk sizes and budget of a `Scheduler`: one `Step` has decode rows and prompt chunks,
`Runner.prefill` is a `Runner.step` without decode rows, and `Limits` takes `chunk_shapes`.

The tests of commit 956abda, from before the renaming, run on today's package:

    mkdir old && git archive 956abda tests | tar x -C old && cp pyproject.toml old
    for name in tpjax scripts notebooks *.md LICENSE constraints.txt; do ln -s $PWD/$name old; done
    python scripts/rename.py old/tests
    cd old && PYTHONPATH=$PWD python -m pytest -q -p no:cacheprovider

Without the slow ones they are 4058 tests in 66 files; all files import. Of the 3721 in the 60 files that were
run so, in whole or in part, 3389 passed, 283 were skipped and 49 failed:

    21  test_layering: the old list of modules and their ranks, which lacks the new ones
    14  reworded texts: test_explain 10, test_moe 2, test_fit 1, test_safetensors 1
     9  removed: Counts.active_parameters (test_counts 6), WorkerPool.running and `with` a reservation
        (test_hostile 2), runner.DTYPES (test_cli 1)
     4  keys in JSON: model_config.json is of format 2 (test_orbax 2), experts["sharded_by"] (test_moe 2)
     1  test_latent_attention: the signature of layers.linear.dot, checked in tests, rejects NumPy weights

Not run: test_bfloat16, test_notebooks, test_parity, test_readme, test_server_clients, test_server_faults,
43 of test_server_api, 63 of test_agreement.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "tpjax"

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
    "tpjax.planning.bench": "tpjax.planning.step_benchmark",
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
    "length_class": "scaling_key",
    "num_slots": "num_head_slots",
    "losses": "state_resets",
    "most_tokens": "max_length",
    "of.launched": "of.dispatched",
    "one.launched": "one.dispatched_tokens",
    "output_ids": "output_token_ids",
    "Prefill": "PromptChunk",
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

# of these names: replaced only in sources that import them or read attributes of that name
COMMON_WORDS = (
    *("Budget", "Memory", "POSITIONS", "Prefill", "SHARES", "Scores", "Share", "Stored", "Wanted", "losses"),
)

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
# a group's name that was a field's: the fields of the group
GROUP_FIELDS = {
    "rope": ("full", "sliding", "layers", "rotary_dim", "parameters_of", "scaling_key"),
    "norm": ("kind", "eps", "bias", "offset"),
}
# functions whose result is a ModelConfig
MAKE_CONFIGS = (
    *("config", "config_from_gguf", "config_from_hf", "model_config", "published_config"),
    *("with_expert_parallel", "with_expert_sharding", "ModelConfig"),
)

# keyword argument of public functions -> its name of today, and {old value: new value}
OPTIONS = {
    "expert_sharding": ("expert_parallel", {"experts": "on", "width": "off"}),
    "prefill_budget": ("max_num_batched_tokens", {}),
    "residual": ("sequence_parallel", {"positions": "on", "replicated": "off"}),
}

# for fields whose names stand in dictionaries
HELPERS = """

def _in_groups(config, fields):
    import dataclasses

    import tpjax.config as kinds

    for group, (kind, names) in {groups}.items():
        inside = {{new: fields.pop(old) for old, new in names.items() if old in fields}}
        if config is None:
            fields[group] = getattr(kinds, kind)(**inside)
        elif inside:
            fields[group] = dataclasses.replace(getattr(config, group), **inside)
    return fields


def _model_config(**fields):
    from tpjax.config import ModelConfig

    return ModelConfig(**_in_groups(None, fields))


def _replace_fields(config, **fields):
    import dataclasses

    from tpjax.config import ModelConfig

    if isinstance(config, ModelConfig):
        fields = _in_groups(config, fields)
    return dataclasses.replace(config, **fields)


"""

# module, by its name of today -> {name that moved out of it: where to}; a name too common for NAMES keeps its
# old one as an alias
MOVED = {
    "tpjax.server.middleware": {"JsonLines": "tpjax.server.logs"},
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
    "tpjax.planning": {"bench": "tpjax.planning: step_benchmark as bench"},
    "tpjax.planning.plan": {
        "Cost": "tpjax.step_time",
        "CostModel": "tpjax.planning.cost_model",
        "Traffic": "tpjax.planning.workload",
        "Workload": "tpjax.planning.workload",
        "busiest": "tpjax.step_time",
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
    r"\brow\.reach\b": "row.max_length",
    r"\.model\.cut\b": ".model.expert_axis",
    r"\)\.cut\((?=\d)": ").sharded_axis(",
    r"@staticmethod\n    def length_class\(": (
        "@property\n    def rope(self):\n        return self\n\n    @staticmethod\n    def scaling_key("
    ),
    # values of options
    r"--expert-sharding([ =]|\", \")width\b": r"--expert-parallel\1off",
    r"--expert-sharding([ =]|\", \")experts\b": r"--expert-parallel\1on",
    r"--expert-sharding\b": "--expert-parallel",
    r"\bwith_expert_sharding\(\"width\"\)": 'with_expert_parallel("off")',
    r"\bexpert_sharding(\": \"|=')width\b": r"expert_parallel\1off",
    r"\bexpert_sharding(\": \"|=')experts\b": r"expert_parallel\1on",
    r"\buse auto, experts or width\b": "use auto, on or off",
    r"\buse auto or width\b": "use auto or off",
    r"\bresidual(\": \"|=')": r"sequence_parallel\1",
    r"\buse auto, replicated or\b": "use auto, on or",
    r"\brunner\(\"positions\"\)": 'runner("on")',
    r"\brunner\(\"replicated\"\)": 'runner("off")',
}


def _moved(match: re.Match[str]) -> str:
    """The import statements for what one statement imports today."""
    indent, module, names = match[1], match[2], re.split(r"\s*,\s*", match[3].strip("()\n, "))
    homes: dict[str, list[str]] = {}
    for name in map(str.strip, names):
        home, _, alias = MOVED[module].get(name, module).partition(": ")
        homes.setdefault(home, []).append(alias or name)
    return "\n".join(f"{indent}from {home} import {', '.join(homes[home])}" for home in sorted(homes))


def _is_used(name: str, source: str) -> bool:
    """Returns whether a source imports a name, or reads an attribute of that name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return True
        if isinstance(node, ast.Attribute) and node.attr == name:
            return True
    return False


def _module_pattern(old: str) -> str:
    """Returns a pattern for a module's old name; what a folder of that name holds today is no match."""
    folder = PACKAGE.joinpath(*old.split(".")[1:])
    if not folder.is_dir():
        return rf"\b{re.escape(old)}\b"
    inside = {file.stem for file in folder.iterdir()} - {"__init__", "__pycache__"}
    inside |= {module.removeprefix(f"{old}.") for module in MOVED if module.startswith(f"{old}.")}
    names = "|".join(sorted(inside))
    return rf"(?<!-m )(?<!-m\", \")\b{re.escape(old)}\b(?!\.(?:{names})\b| import (?:{names})\b)"


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
    for old in sorted(MODULES, key=len, reverse=True):
        source = re.sub(_module_pattern(old), MODULES[old], source)
    modules = "|".join(map(re.escape, MOVED))
    statement = rf"^([ ]*)from ({modules}) import (\([^)]*\)|[\w, ]+)$"
    source = re.sub(statement, _moved, source, flags=re.MULTILINE)
    for old, new in PATTERNS.items():
        source = re.sub(old, new, source)
    source = _grouped_fields(_renamed_options(source))
    names = "|".join(old for old in NAMES if old not in COMMON_WORDS or _is_used(old, source))
    source = re.sub(rf"\b({names})\b", lambda match: NAMES[match[1]], source)
    return _with_helpers(_prompt_chunks(_grouped_constructors(source)))


@dataclass
class _Edits:
    """Replacements of parts of a source, by what its syntax tree says of their places."""

    source: bytes
    spans: dict[tuple[int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.starts = [0, *itertools.accumulate(map(len, self.source.splitlines(keepends=True)))]

    def span(self, node: ast.expr | ast.keyword) -> tuple[int, int]:
        """Returns the offsets of the first byte of a node and of the one after it."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, node: ast.expr) -> str:
        """Returns a node as it stands in the source."""
        return self.source[slice(*self.span(node))].decode()

    def applied(self) -> str:
        """Returns the source with all replacements."""
        result = self.source
        for (first, end), text in sorted(self.spans.items(), reverse=True):
            result = result[:first] + text.encode() + result[end:]
        return result.decode()


def _called(node: ast.expr) -> str:
    """Returns the name of the function that a node calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", getattr(function, "attr", ""))


def _is_config(node: ast.expr, names: set[str]) -> bool:
    """Returns whether a node is a ``ModelConfig``: by its name, or by the function that returns it."""
    match node:
        case ast.Name(id=name):
            return name in names or name.lower().endswith("config")
        case ast.Attribute(attr=name):
            return name.lower().endswith("config")
        case ast.Call(args=[first, *_]) if _called(node) == "replace":
            return _is_config(first, names)
        case ast.Call():
            return _called(node) in MAKE_CONFIGS or _called(node) in names
    return False


def _configs_of(scope: ast.AST, known: set[str]) -> set[str]:
    """Returns the variables to which a scope assigns a ``ModelConfig``, and the parameters that are one."""
    found = set(known)
    for node in ast.walk(scope):
        if isinstance(node, ast.arg) and "ModelConfig" in ast.unparse(node.annotation or ast.Constant("")):
            found.add(node.arg)
        match node:
            case ast.For(target=ast.Name(id=name), iter=ast.Tuple(elts=[first, *_])):
                found |= {name} if _is_config(first, found) else set()
            case ast.comprehension(target=ast.Name(id=name), iter=ast.Tuple(elts=[first, *_])):
                found |= {name} if _is_config(first, found) else set()
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.GeneratorExp):
                    pairs = [(element, node.value.elt) for element in target.elts]
                found |= {
                    name.id
                    for name, value in pairs
                    if isinstance(name, ast.Name) and _is_config(value, found)
                }
    return found


def _grouped_fields(source: str) -> str:
    """``config.num_heads`` as ``config.attention.num_heads``, and the fields given to ``replace`` grouped."""
    edits, tree = _Edits(source.encode()), ast.parse(source)
    homes = {"rope_of": "rope.parameters_of", "window_of": "attention.window_of"}
    homes |= {"length_class": "rope.scaling_key"}
    for group, (_, fields) in CONFIG_GROUPS.items():
        homes |= {old: f"{group}.{new}" for old, new in fields.items()}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    others = ast.Module([node for node in tree.body if node not in functions], [])
    makers = {node.name for node in functions if node.returns and ast.unparse(node.returns) == "ModelConfig"}
    everywhere = _configs_of(others, makers)
    grouped = {
        id(node.value): node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }  # an attribute -> the one read of it
    for scope in (*functions, others):
        names = _configs_of(scope, everywhere)
        for node in ast.walk(scope):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in homes
                and _is_config(node.value, names)
                and grouped.get(id(node)) not in GROUP_FIELDS.get(node.attr, ())
            ):
                _, end = edits.span(node)
                edits.spans[end - len(node.attr), end] = homes[node.attr]
            if isinstance(node, ast.Call) and _called(node) == "replace" and node.args:
                given = {keyword.arg for keyword in node.keywords}
                if given & (homes.keys() - GROUP_FIELDS.keys() | {None}) or (
                    given & homes.keys() and _is_config(node.args[0], names)
                ):
                    edits.spans[edits.span(node.func)] = "_replace_fields"
    return edits.applied()


def _renamed_options(source: str) -> str:
    """The keyword arguments of :data:`OPTIONS`, names and values, in calls of what comes from tpjax."""
    edits, tree = _Edits(source.encode()), ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("tpjax", "dataclasses"))
        for alias in node.names
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or _called(call) not in imported:
            continue
        for keyword in call.keywords:
            if keyword.arg not in OPTIONS:
                continue
            new, values = OPTIONS[keyword.arg]
            start, _ = edits.span(keyword)
            edits.spans[start, start + len(keyword.arg)] = new
            constants = [node for node in ast.walk(keyword.value) if isinstance(node, ast.Constant)]
            for constant in constants:
                if constant.value in values:
                    edits.spans[edits.span(constant)] = repr(values[constant.value])
            if values and not constants:
                text = edits.text(keyword.value)
                edits.spans[edits.span(keyword.value)] = f"{values}.get({text}, {text})"
    return edits.applied()


def _grouped_constructors(source: str) -> str:
    """Calls of ``ModelConfig`` with the groups built from the fields they own."""
    if "ModelConfig(" not in source:
        return source
    used: set[str] = set()
    edits = _Edits(source.encode())
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != "ModelConfig":
            continue
        old = {keyword.arg: edits.text(keyword.value) for keyword in call.keywords}
        if "attention" in old:
            continue
        if None in old:
            edits.spans[edits.span(call.func)] = "_model_config"
            continue
        arguments = []
        for group, (kind, fields) in CONFIG_GROUPS.items():
            if inside := [f"{new}={old.pop(name)}" for name, new in fields.items() if name in old]:
                arguments.append(f"{group}={kind}({', '.join(inside)})")
                used.add(kind)
        arguments = [f"{name}={value}" for name, value in old.items()] + arguments
        edits.spans[edits.span(call)] = f"ModelConfig({', '.join(arguments)})"
    imports = f"from tpjax.config import {', '.join(sorted(used))}\n" if used else ""
    return re.sub(r"^(?=from tpjax\.config import )", imports, edits.applied(), count=1, flags=re.MULTILINE)


# method of a Runner that took a row and tokens -> the call of today, of the runner and its chunk
RUNNER_CALLS = {
    "prefill": "{runner}.step([], [{chunk}]).sampled",
    "prefill_and_score": "{runner}.step([], [{chunk}])[::2]",
    "score": "{runner}.score({chunk})",
}


def _prompt_chunks(source: str) -> str:
    """A runner's calls with a ``Chunk``, and ``Limits`` with shapes of one chunk a step."""
    edits, used = _Edits(source.encode()), set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(
                func=ast.Attribute(value=runner, attr=("prefill" | "prefill_and_score" | "score") as method),
                args=[_, _, *_] as arguments,
            ) if edits.text(runner).endswith("runner"):
                chunk = f"Chunk({', '.join(map(edits.text, arguments))})"
                edits.spans[edits.span(node)] = RUNNER_CALLS[method].format(
                    runner=edits.text(runner), chunk=chunk
                )
                used.add("from tpjax.runtime.rows import Chunk\n")
            case ast.Call(func=ast.Name("Limits"), keywords=keywords):
                for keyword in keywords:
                    if keyword.arg == "chunk_sizes":
                        shapes = f"tuple(ChunkShape(1, size) for size in {edits.text(keyword.value)})"
                        edits.spans[edits.span(keyword)] = f"chunk_shapes={shapes}"
                        used.add("from tpjax.runtime.limits import ChunkShape\n")
    imports = "".join(sorted(used))
    return re.sub(r"^(?=from tpjax\b)", imports, edits.applied(), count=1, flags=re.MULTILINE)


def _with_helpers(source: str) -> str:
    """The source with the functions it calls for fields that are known only when it runs."""
    if "_replace_fields(" not in source and "_model_config(" not in source:
        return source
    body = ast.parse(source).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = source.splitlines(keepends=True)
    after = imports[-1].end_lineno
    return "".join([*lines[:after], HELPERS.format(groups=CONFIG_GROUPS), *lines[after:]])


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
