"""Which host answers which work item: a free host claims the next one, and reserves another to load it meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Claim(NamedTuple):
    """What a host gets: the number of its work item, and of the one that is reserved for it, if any."""

    item: int
    reserved: int | None


class Claims:
    """Assigns the work items of a stage to hosts; one object for all hosts.

    A claim is bound to a work item when a host makes it, so no host is idle while work is left. Work whose weights the
    host holds comes first, work whose weights another host holds last. Work reserved by another host is stolen last of
    all. A reserved item tells a host which expert to load next.

    Args:
        residencies: that of each work item, in the order in which to answer them.
        hosts: how many hosts may claim.
    """

    def __init__(self, residencies: Sequence[str], hosts: int) -> None:
        self._residencies, self._hosts = residencies, hosts
        self._left = list(range(len(residencies)))
        self._reserved: dict[str, int] = {}

    @property
    def left(self) -> bool:
        """Whether an item is unclaimed."""
        return bool(self._left or self._reserved)

    def claim(self, host: str, held: Collection[str] = (), elsewhere: Collection[str] = ()) -> Claim | None:
        """The next work item of a free host; None if nothing is left.

        Args:
            held: residencies in the host's memory. elsewhere: those in the memory of other hosts.
        """
        if host in self._reserved:
            item = self._reserved.pop(host)
        elif self._left:
            item = self._take(held, elsewhere)
        elif self._reserved:
            item = self._reserved.pop(max(self._reserved, key=self._reserved.__getitem__))
        else:
            return None
        return Claim(item, self._reserve(host, held, elsewhere))

    def give_back(self, host: str, item: int) -> None:
        """The host died while it answered the item: another one claims it next, and what was reserved after it."""
        lost = [item, *([self._reserved.pop(host)] if host in self._reserved else [])]
        self._left = [*lost, *self._left]

    def _take(self, held: Collection[str], elsewhere: Collection[str]) -> int:
        def rank(item: int) -> int:
            residency = self._residencies[item]
            return 0 if residency in held else 2 if residency in elsewhere else 1

        item = min(self._left, key=rank)  # the first of the lowest rank
        self._left.remove(item)
        return item

    def _reserve(self, host: str, held: Collection[str], elsewhere: Collection[str]) -> int | None:
        """Reserve only while at least as many items are left as there are hosts: every free host must find one."""
        if host not in self._reserved and len(self._left) >= self._hosts:
            self._reserved[host] = self._take(held, elsewhere)
        return self._reserved.get(host)
