"""An end to a search that would not end by itself."""

from __future__ import annotations

import time

from ocsfast.core.errors import GroupingTimeout


class Deadline:
    """Seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self, where: str) -> None:
        """Go on, or end with an error that says how far it came.

        Raises:
            GroupingTimeout: the time is over.
        """
        if time.monotonic() > self._end:
            raise GroupingTimeout(
                f"grouping has taken more than time_limit={self.seconds:g} s, and was {where}. Raise "
                "time_limit=, pass a smaller batch or image as example_inputs=, or go without the "
                "proof (verify=False)"
            )
