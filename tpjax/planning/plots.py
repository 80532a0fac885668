"""Checks that a picture can be drawn before any work is done, and writes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tpjax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Checks that a picture can be drawn and written.

    Raises:
        ConfigError: the file's suffix is not supported, it cannot be written, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: use a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: {path.parent} is not a directory")
    if path.is_dir():
        raise ConfigError(f"--plot {path}: is a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--plot {path}: no permission to write it")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'tpjax[notebook]'") from error


def save(figure: Figure, path: Path) -> None:
    """Writes a picture in the format of the file's suffix.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror or error}") from error
