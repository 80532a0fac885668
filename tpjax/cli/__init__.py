"""The ``tpjax`` command: one module per subcommand.

Bad input ends with exit status 2 and one line on stderr; ``--debug`` shows the traceback. Text goes to
stdout, figures and remarks to stderr. JAX is imported inside the subcommands only: ``--help`` stays quick,
and devices can still be faked.
"""

from tpjax.cli.app import main

__all__ = ["main"]
