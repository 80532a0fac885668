"""The ``tpjax`` command: one module per subcommand, on typer. JAX is imported inside the subcommands only."""
