#!/usr/bin/env python
"""Rewrites Python sources from the names of 0.1.0's first months to today's.

    python scripts/rename.py tests/ my_program.py      # in place; --check only counts

What moved and what is called otherwise is in the two tables below: code written
against the old names runs after one pass. Words of prose are not touched.
"""

from __future__ import annotations

# old module -> new module, the longest first
MODULES = {
    "tpjax.inspect.plan_report": "tpjax.planning.report",
    "tpjax.inspect.plan": "tpjax.planning.plan",
    "tpjax.inspect.strategies": "tpjax.planning.strategies",
    "tpjax.inspect.measure": "tpjax.planning.measure",
    "tpjax.inspect.bench": "tpjax.planning.bench",
    "tpjax.inspect.published": "tpjax.planning.published",
    "tpjax.inspect.plots": "tpjax.planning.plots",
    "tpjax.inspect.hardware": "tpjax.hardware",
    "tpjax.inspect.interconnect": "tpjax.interconnect",
}

# old identifier -> new identifier, everywhere
NAMES = {
    # sharding
    "SHARES": "PARTIALS",
    "add_up": "reduce_partials",
    "POSITIONS": "SEQUENCE",
    # sequence and expert parallelism
    "residual_of": "residual_spec",
    "ExpertSharding": "ExpertParallel",
    "expert_sharding": "expert_parallel",
    "with_expert_sharding": "with_expert_parallel",
    # a batch's metadata
    "Placement": "BatchMetadata",
    "length_class": "rope_cache_key",
    # planning
    "Traffic": "Workload",
    "narrow_flops": "low_precision_flops",
    "narrow_weights": "low_precision_weights",
    "narrow_compute": "low_precision_compute",
}
