"""What Orbax and TensorStore print of an error that `SaveError` tells in one line."""

from __future__ import annotations

import logging
import sys


class OrbaxFilter:
    """Keeps Orbax's background threads from printing the tracebacks of an error that `SaveError` tells in one line.

    With --verbose (INFO and below shown) they are printed.
    """

    def __init__(self) -> None:
        self._hook = sys.unraisablehook

    def install(self) -> None:
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        logging.getLogger("absl").addFilter(self._record)

    def remove(self) -> None:
        logging.getLogger("absl").removeFilter(self._record)
        if sys.unraisablehook == self._unraisable:
            sys.unraisablehook = self._hook

    def _record(self, record: logging.LogRecord) -> bool:
        return not record.exc_info or logging.getLogger().isEnabledFor(logging.INFO)

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        # What TensorStore says, from C++, of the writes that end after the first that failed.
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)
