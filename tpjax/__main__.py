"""``python -m tpjax``: the same as the ``tpjax`` command."""

from __future__ import annotations

import sys

from tpjax.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
