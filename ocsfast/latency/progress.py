"""One line on a terminal that says how far a measurement is."""

from __future__ import annotations

import sys


class Progress:
    """Rewrites a line of stderr, where that is a terminal.

    Args:
        shown: whether it says anything.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._said = -1

    def show(self, done: int, of: int) -> None:
        """So many of all points are done."""
        percent = 100 * done // max(1, of)
        if self._shown and percent != self._said:
            self._said = percent
            sys.stderr.write(f"\rocsfast: measuring latency {percent:3d} %")
            sys.stderr.flush()

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self._shown and self._said >= 0:
            sys.stderr.write("\r" + " " * 40 + "\r")
            sys.stderr.flush()
            self._said = -1
