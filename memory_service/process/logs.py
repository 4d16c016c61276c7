"""The service's log: one line an event, as text or JSON. Never a token, a document's text, keys or values."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from typing import Any

LOG = logging.getLogger("memory_service")
_TOKEN = re.compile(r"fot_[A-Za-z0-9_-]{8,}")
_COLUMNS = 44


def configure(level: str, form: str) -> None:
    """Send the log to stderr, from `level` up, as "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    LOG.handlers[:] = [handler]
    LOG.setLevel(level.upper())
    LOG.propagate = False


def event(level: int, name: str, error: BaseException | None = None, **fields: Any) -> None:
    """Log one event: a short sentence and named values. Free if nobody listens at this level."""
    if LOG.isEnabledFor(level):
        LOG.log(level, name, exc_info=error, extra={"fields": fields})


def redacted(text: str) -> str:
    """The text with tokens cut out, for what comes from elsewhere."""
    return _TOKEN.sub("fot_…", text)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = "".join(traceback.format_exception(record.exc_info[1]))
        return redacted(json.dumps(fields, default=str, ensure_ascii=False))


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in getattr(record, "fields", {}).items())
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():<7} {record.getMessage()}"
        line = f"{line:<{_COLUMNS}}  {fields}".rstrip()
        if record.exc_info and record.exc_info[1] is not None:
            line += "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
        return redacted(line)
