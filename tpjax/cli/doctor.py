"""``tpjax doctor``."""

from __future__ import annotations

import json

from tpjax.cli.console import show
from tpjax.cli.options import Json

EXAMPLES = """
  tpjax doctor
  tpjax doctor --json
"""


def run(as_json: Json = False) -> None:
    """Show the devices, versions, settings and caches tpjax sees, and what looks wrong."""
    from tpjax.inspect import doctor

    facts = doctor.examine()
    show(json.dumps(facts, indent=2) if as_json else doctor.render(facts))
