"""Which host answers which work item: a free host claims the next one, and reserves another to load it meanwhile."""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """What a host gets: the number of its work item, and of the one that is reserved for it, if any."""

    item: int
    reserved: int | None


class Claims:
    """Assigns the work items of a stage to hosts; one object for all hosts.

    A claim is bound to a work item when a host makes it, so no host is idle while work is left. Work reserved by
    another host is stolen last.

    A reserved item tells a host which expert to load next. Two tasks in flight for each of Ray Data's actors would do
    so too, but then the first actor that is up takes the work of those that still start.

    Args:
        items: how many work items there are, numbered from 0 in the order in which to answer them.
        hosts: how many hosts may claim.
    """

    def __init__(self, items: int, hosts: int) -> None:
        self._left = list(range(items))
        self._hosts = hosts
        self._reserved: dict[str, int] = {}
        self._claimed: dict[int, int] = {}

    def claim(self, number: int, host: str) -> Claim:
        """The work item of claim `number`. A claim that is repeated, since its host died, gets the same item."""
        if number not in self._claimed:
            self._claimed[number] = self._next(host)
        return Claim(self._claimed[number], self._reserve(host))

    def _next(self, host: str) -> int:
        if host in self._reserved:
            return self._reserved.pop(host)
        if self._left:
            return self._left.pop(0)
        return self._reserved.pop(max(self._reserved, key=self._reserved.__getitem__))

    def _reserve(self, host: str) -> int | None:
        """Reserve only while at least as many items are left as there are hosts: every free host must find one."""
        if host not in self._reserved and len(self._left) >= self._hosts:
            self._reserved[host] = self._left.pop(0)
        return self._reserved.get(host)
