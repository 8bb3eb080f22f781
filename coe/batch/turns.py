"""Who works on which shift: a host that is free takes the next one, and keeps another back to load it meanwhile."""

from __future__ import annotations


class Turns:
    """The shifts of a stage, handed out to hosts; one for all of them.

    Each shift is one turn. Which shift a turn gets is settled when a host takes it, so no host waits while there is
    work: what another one keeps back, and has not come to, is taken as the last.

    Args:
        shifts: how many, numbered from 0 in the order in which they should be taken.
        hosts: how many may take turns.
    """

    def __init__(self, shifts: int, hosts: int) -> None:
        self._left = list(range(shifts))
        self._hosts = hosts
        self._kept: dict[str, int] = {}
        self._given: dict[int, int] = {}

    def take(self, turn: int, host: str) -> tuple[int, int | None]:
        """The shift of a turn, and the one that the host should expect after it, if there is one to keep back.

        A turn that is taken again, because its host died, is for the same shift.
        """
        if turn not in self._given:
            self._given[turn] = self._next(host)
        return self._given[turn], self._keep(host)

    def _next(self, host: str) -> int:
        if host in self._kept:
            return self._kept.pop(host)
        if self._left:
            return self._left.pop(0)
        return self._kept.pop(max(self._kept, key=self._kept.__getitem__))

    def _keep(self, host: str) -> int | None:
        """Only while as many are left as there are hosts: none of those that are free should have to do without."""
        if host not in self._kept and len(self._left) >= self._hosts:
            self._kept[host] = self._left.pop(0)
        return self._kept.get(host)
