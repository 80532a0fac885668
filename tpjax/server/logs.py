"""The server's logs on stderr: plain lines on a terminal, JSON lines anywhere else.

Both have the id of the request that is being served, and nothing that a client sends can start a line of its
own.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar

# Id of the request that is being served.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a record."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "request_id": request_id.get(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value is not None})


class PlainLines(logging.Formatter):
    """Formats a record as a line to read, with the trace of an exception below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a record: time, level if not info, message, and what belongs to it."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        fields = {"request_id": request_id.get(), **getattr(record, "fields", {})}
        said = [f"{name}={value}" for name, value in fields.items() if value is not None]
        line = _printable(" ".join([f"{level}{record.getMessage()}", *said]))
        line = f"{self.formatTime(record, '%H:%M:%S')} {line}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _printable(text: str) -> str:
    """Returns a text with what is not printable escaped: a terminal obeys control characters."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def log_to_stderr() -> None:
    """Makes tpjax and uvicorn log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainLines() if sys.stderr.isatty() else JsonLines())
    for name, level in (("tpjax", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
