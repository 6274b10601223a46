"""A limit to the time that grouping may take."""

from __future__ import annotations

import time

from ocsfast.core.errors import GroupingTimeout


class TimeLimit:
    """A moment so many seconds after this was made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self, where: str) -> None:
        """Do nothing before the deadline.

        Args:
            where: how far grouping has come, as the end of "and was ...", for the message.

        Raises:
            GroupingTimeout: after it.
        """
        if time.monotonic() > self._end:
            raise GroupingTimeout(
                f"grouping has taken more than time_limit={self.seconds:g} s, and was {where}. Raise "
                "time_limit=, pass a smaller batch or image as example_inputs=, or go without the "
                "proof (verify=False)"
            )
