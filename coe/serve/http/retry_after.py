"""When clients that a full gateway refuses may come back: spread over the time in which places become free."""

from __future__ import annotations

from typing import Final

RECENT: Final = 0.1
"""Weight of the latest request in the running mean of seconds per request."""
_ROUNDS: Final = 2.0
"""Most times that all places are expected to become free before the last refused client may return."""


class RetryAfter:
    """Predicts when refused clients find a place.

    With `most` requests in flight that take s seconds each, a place becomes free every s / most seconds. Each refused
    client is given the next of these times, so that they do not all return at once to be refused again.

    Args:
        most: requests that may be in flight.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._mean_s = 0.0
        self._given_s = float("-inf")  # the last time that was given

    def ended(self, seconds: float) -> None:
        """A request has been answered in so many seconds."""
        self._mean_s += RECENT * (seconds - self._mean_s)

    def seconds(self, places: int, now_s: float, wait_s: float) -> float:
        """Seconds after which a client that needs so many places may return.

        Args:
            wait_s: what a new request is predicted to wait on the hosts: more than the mean when a queue grows.
        """
        request_s = max(self._mean_s, wait_s)
        self._given_s = max(self._given_s, now_s) + places * request_s / self._most
        self._given_s = min(self._given_s, now_s + _ROUNDS * max(request_s, places * request_s / self._most))
        return self._given_s - now_s
