"""``python -m tpjax.cli``."""

import sys

from tpjax.cli.app import main

sys.exit(main())
