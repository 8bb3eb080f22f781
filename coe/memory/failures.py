"""Experts whose loads fail again and again: they are not tried for a while, so that their neighbours are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from coe.errors import CoeError, LoadFailing
from coe.seam import one_line

IN_A_ROW: Final = 3
"""Failed loads after which an expert is not tried for a while."""
FIRST_S: Final = 30.0
"""Seconds of the first while; each further failure doubles them."""
MOST_S: Final = 600.0
_MOST_CHARACTERS: Final = 500


@dataclass(frozen=True, slots=True)
class Failing:
    """An expert that is not loaded for a while.

    Attributes:
        count: failed loads in a row.
        reason: the last error; it may name files of this machine.
        public: what clients may read of it; None: nothing.
        retry_in_s: seconds until the next request loads it again.
        last: the last error, without the frames that it was raised in; None if it is of a third party.
    """

    count: int
    reason: str
    public: str | None
    retry_in_s: float
    last: CoeError | None = None

    def error(self, name: str) -> LoadFailing:
        """What requests for it get."""
        text = f"{name!r} cannot be loaded: {self.count} loads in a row failed; "
        when = f"the next one is tried in {self.retry_in_s:.0f} s"
        shown = "" if self.public is None else f": {self.public}"
        return LoadFailing(
            f"{text}{when}, or by `coe load`. The last error: {self.reason}",
            public=f"{text}{when}{shown}",
            retry_after_s=self.retry_in_s,
            last=self.last,
        )


@dataclass(slots=True)
class _Record:
    count: int
    reason: str
    public: str | None
    until_s: float
    last: CoeError | None


class Failures:
    """Failed loads in a row, by expert."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def note(self, name: str, error: Exception) -> None:
        """Count a load that failed."""
        count = 1 + (self._records[name].count if name in self._records else 0)
        wait_s = 0.0 if count < IN_A_ROW else min(MOST_S, FIRST_S * 2.0 ** min(count - IN_A_ROW, 32))
        reason = one_line(str(error) or type(error).__name__, _MOST_CHARACTERS)
        # A copy has no traceback, whose frames would keep what they loaded in memory.
        last = copy.copy(error) if isinstance(error, CoeError) else None
        public = None if last is None else last.client_text
        self._records[name] = _Record(count, reason, public, self._clock() + wait_s, last)

    def clear(self, *names: str) -> None:
        """Forget failures: a load succeeded, or someone asks for another try."""
        for name in names:
            self._records.pop(name, None)

    def of(self, name: str) -> Failing | None:
        """Why an expert is not loaded now; None if it may be."""
        record = self._records.get(name)
        left_s = 0.0 if record is None else record.until_s - self._clock()
        if record is None or left_s <= 0:
            return None
        return Failing(record.count, record.reason, record.public, left_s, record.last)

    def now(self) -> dict[str, Failing]:
        """All experts that are not loaded now, by name."""
        found = {name: self.of(name) for name in sorted(self._records)}
        return {name: failing for name, failing in found.items() if failing is not None}
