"""The notes of the peers, of every row, collected once through a host and kept on disk.

Peers are frozen, so their notes depend on the peer, the engine's settings and the request alone: they are kept under
`$COE_HOME/latent/notes` by these, and shared between trainings.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

from coe.config import Config
from coe.engines.latent.calls import PeerCall, peer_calls
from coe.engines.latent.notes import Notes
from coe.errors import ContextLengthExceeded, Rejected
from coe.host import Host
from coe.hosting import open_host
from coe.latent.training.answer_rows import AnswerRow
from coe.latent.training.trainer import OnLoading, OnProgress
from coe.types import GenerateRequest, PeerNotes
from registry.digest import identity
from registry.spec import ExpertSpec
from registry.storage import atomic_path, coe_home
from registry.store import Snapshot
from routers.base import Message

logger = logging.getLogger(__name__)
AT_ONCE: Final = 64
"""Most calls in flight."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A call and the file of its notes."""

    call: PeerCall
    path: Path

    @property
    def is_there(self) -> bool:
        """Whether the notes were collected."""
        return self.path.is_file()

    def read(self) -> PeerNotes:
        """The notes."""
        return PeerNotes(self.call.peer, self.path.read_bytes(), self.call.span)


@dataclass(frozen=True, slots=True)
class CollectedNotes:
    """The notes of rows; bytes stay on disk until they are read.

    Attributes:
        too_long: peer -> number of calls that exceeded its context, which leave no notes.
    """

    too_long: dict[str, int] = field(default_factory=dict)
    _rows: list[list[_Kept]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, row: int, peer: str) -> tuple[PeerNotes, ...]:
        """What a peer has left on a row; empty if nothing."""
        return tuple(kept.read() for kept in self._rows[row] if kept.call.peer == peer and kept.is_there)


def collect_notes(
    spec: ExpertSpec,
    service: Config,
    snapshot: Snapshot,
    rows: Sequence[AnswerRow],
    on_progress: OnProgress,
    on_loading: OnLoading = lambda name: None,
) -> CollectedNotes:
    """Ask every peer of a composed expert about every row, as the host does when it is served. Blocks.

    A resumed run asks only for what it lacks. A peer whose context is exceeded by a row leaves no notes on it.

    Args:
        spec: of the composed expert to be; it need not be registered.
        on_loading: called with the name of each peer before its first call, which loads it.

    Raises:
        CoeError: a peer failed otherwise.
    """
    engine = [service.engines.hf.device, service.engines.hf.dtype]
    found = CollectedNotes()
    for row in rows:
        request = GenerateRequest(messages=(Message("user", row.prompt),))
        found._rows.append(
            [_Kept(call, _path(call, snapshot, engine)) for call in peer_calls(spec, request, row.peers)]
        )
    absent = {kept.path: kept for row_calls in found._rows for kept in row_calls if not kept.is_there}
    if absent:
        asyncio.run(_collect(list(absent.values()), service, snapshot, found.too_long, on_progress, on_loading))
    for peer, n in found.too_long.items():
        if n:
            logger.warning("%d of the calls to %s exceed its context: it leaves no notes on these rows", n, peer)
    return found


def _path(call: PeerCall, snapshot: Snapshot, engine: list[str]) -> Path:
    request = {**asdict(call.request), "deadline_s": None, "id": ""}
    del request["origin"]  # it changes no notes
    peer = identity(snapshot.experts[call.peer], snapshot.experts)
    key = json.dumps([call.peer, peer, engine, request], sort_keys=True, default=str)  # notes hold the peer's name
    name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    folder = hashlib.sha256(peer.encode()).hexdigest()[:16]
    return coe_home() / "latent" / "notes" / folder / f"{name}.safetensors"


async def _collect(
    absent: Sequence[_Kept],
    service: Config,
    snapshot: Snapshot,
    too_long: dict[str, int],
    on_progress: OnProgress,
    on_loading: OnLoading,
) -> None:
    """One peer after the other, so that each is loaded once; similar lengths together, which a batch is faster with."""
    async with open_host(service, snapshot) as host:
        for peer in dict.fromkeys(kept.call.peer for kept in absent):
            own = sorted((kept for kept in absent if kept.call.peer == peer), key=lambda kept: _length(kept.call))
            on_loading(peer)
            what, done = f"notes of {peer}", 0
            on_progress(what, 0, len(own))
            async for has_notes in _asked(host, own):
                done += 1
                too_long[peer] = too_long.get(peer, 0) + (not has_notes)
                on_progress(what, done, len(own))


async def _asked(host: Host, calls: Sequence[_Kept]) -> AsyncIterator[bool]:
    """Make the calls, AT_ONCE at a time; yields for each whether it has left notes, as they end."""
    left = iter(calls)
    running = {asyncio.create_task(_ask(host, kept)) for kept in islice(left, AT_ONCE)}
    try:
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running |= {asyncio.create_task(_ask(host, kept)) for kept in islice(left, len(done))}
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _ask(host: Host, kept: _Kept) -> bool:
    """Collect the notes of one call; whether there are any."""
    data: bytes | None = None
    try:
        async with aclosing(host.ask(kept.call.peer, kept.call.request)) as chunks:
            async for chunk in chunks:
                data = chunk.value or data
    except ContextLengthExceeded:
        return False
    if data is None:
        raise Rejected(f"{kept.call.peer!r} has left no notes")
    Notes.unpack(data, peer=kept.call.peer)
    with atomic_path(kept.path) as staged:
        staged.write_bytes(data)
    return True


def _length(call: PeerCall) -> int:
    return sum(len(message.content) for message in call.request.messages)
