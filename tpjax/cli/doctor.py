"""``tpjax doctor``."""

from __future__ import annotations

import json
from typing import Annotated

from tpjax.cli.console import note, show, show_report
from tpjax.cli.options import Json, option

EXAMPLES = """
  tpjax doctor
  tpjax doctor --json
  tpjax doctor --measure --json
"""


def run(
    measure: Annotated[
        bool,
        option(
            "--measure",
            help="Measure the devices, beside their data sheet and what plan predicts: up to three minutes.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the devices, versions, settings and caches tpjax sees, and what looks wrong."""
    if measure:
        from tpjax.inspect import chip_benchmark

        # figures as they come: a kernel or a collective that hangs keeps the report from its end
        report = chip_benchmark.measure(found=lambda figure: note(str(figure)))
        show_report(report, as_json=as_json)
        return
    from tpjax.inspect import doctor

    facts = doctor.examine()
    show(json.dumps(facts, indent=2) if as_json else doctor.render(facts))
