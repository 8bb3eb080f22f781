"""The calls of a batch: sent to the hosts of the service, a few at a time, and charged to the batch's API key."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from coe.batch.answering import Answerer, OpenUnit, WorkReport
from coe.batch.records import plain
from coe.batch.stages import Unit
from coe.compose import ExpertCall
from coe.errors import CoeError, NotAllowed
from coe.orchestrator import AskExpert, query_of
from coe.protocol.errors import error_body, is_internal
from coe.runs.storage import Folder
from coe.seam import text_of
from coe.serve.batches.link import Worker
from coe.serve.batches.stopped import stopped
from coe.serve.http.keyring import Access
from coe.serve.http.ledger import Ledger
from coe.serve.http.refusals import KeysUnavailable, LimitReached
from coe.types import DEFAULT_MAX_TOKENS, Answer, Failure
from registry.store import Snapshot
from registry.usage import Amounts, Reserve
from routers.constraints import estimate_tokens

LIMIT_S: Final = 120.0
"""Seconds that a call waits for a limit of its key; then it fails."""
HOLD_S: Final = 3600.0
"""Seconds for which the reservation of a call holds; a gateway that ends settles it no more."""
SHARE: Final = 4
"""While the gateway has other requests, a batch has this part of its calls in flight."""
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Stop:
    """Whether a batch is to end before its last answer. code: that of the rows that are not answered."""

    code: str | None = None
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def set(self, code: str) -> None:
        """Stop; only the first reason counts."""
        if self.code is None:
            self.code = code
            self.event.set()


@dataclass(slots=True)
class ServiceHosts:
    """The hosts of a service, as a batch calls them (`coe.batch.answering.AnsweringHost`).

    Attributes:
        snapshot: the experts now.
        ask: calls one expert.
        most: calls in flight. is_busy: whether the gateway has other requests.
    """

    snapshot: Snapshot
    ask: AskExpert
    most: int
    is_busy: Callable[[], bool]

    def window(self) -> int:
        """Calls that may be in flight now."""
        return max(1, self.most // SHARE) if self.is_busy() else self.most

    def capacity(self, name: str) -> int | None:
        """Not known: it differs by host."""
        return None

    def is_resident(self, name: str) -> bool:
        """Not known: an expert whose loads fail on one host may answer on another."""
        return True

    def prefetch(self, *names: str, keep: Collection[str] = ()) -> bool:
        """Never: what is loaded is decided by the hosts, which have other requests."""
        return False


class NoLoads:
    """Counts none: the loads of the hosts are for all their requests."""

    def add_to(self, report: WorkReport) -> None:
        """Add nothing."""


@dataclass(frozen=True, slots=True)
class Account:
    """What the calls of a batch are charged to.

    Attributes:
        batch: its id. access: of its key, as it is now.
        ledger: None: there are no limits.
        wall: seconds since the epoch.
    """

    batch: str
    access: Callable[[], Access]
    ledger: Ledger | None
    wall: Callable[[], float] = time.time
    counted: set[tuple[int, int]] = field(default_factory=set)

    async def reserve(self, amounts: Amounts, stop: Stop) -> Reserve | None:
        """Reserve what a call may use, and wait for a limit that is reached.

        Raises:
            LimitReached, KeysUnavailable: there is no room for too long.
            InvalidRequest: the batch was stopped.
        """
        key = self.access().key
        if self.ledger is None or key is None:
            return None
        until = self.wall() + LIMIT_S
        while True:
            now = self.wall()
            try:
                return await self.ledger.reserve(key, f"{self.batch}-{uuid4().hex}", amounts, now + HOLD_S)
            except (LimitReached, KeysUnavailable) as error:
                wait_s = max(1.0, error.retry_after_s or 1.0)
                if now + wait_s > until:
                    raise
            try:
                async with asyncio.timeout(wait_s):
                    await stop.event.wait()
            except TimeoutError:
                continue
            assert stop.code is not None  # it was set
            raise stopped(stop.code)

    def settle(self, held: Reserve | None, outcome: Answer | Failure | None) -> None:
        """Replace what a call has reserved by what it has used; of an interrupted one (None) that is not known."""
        if held is None or self.ledger is None:
            return
        used: Amounts = {"tokens": held.amounts.get("tokens", 0.0), "usd": held.amounts.get("usd", 0.0)}
        if isinstance(outcome, Failure):
            used = {"tokens": 0.0, "usd": 0.0}
        elif outcome is not None:
            usage = outcome.usage
            used = {"tokens": float(usage.prompt_tokens + usage.completion_tokens), "usd": outcome.cost_usd or 0.0}
        self.ledger.settle(held, used)


class ChargedAnswerer(Answerer):
    """Answers units by the hosts of the service: within a window, within the rights and limits of a key.

    Arguments as `Answerer`, and the account and the stop of the batch.
    """

    def __init__(
        self,
        hosts: ServiceHosts,
        folder: Folder,
        stage: int,
        units: Sequence[Unit],
        report: Callable[[WorkReport], None],
        *,
        account: Account,
        stop: Stop,
    ) -> None:
        super().__init__(hosts, folder, stage, units, report, loads=NoLoads())
        self._hosts, self._account, self._stop = hosts, account, stop
        self._first: set[int] = set()  # calls that count as the request of their row

    def _window(self, unit: Unit) -> int:
        return self._hosts.window()

    async def _one(self, opened: OpenUnit, position: int, row: int, call: ExpertCall) -> None:
        place = (opened.unit.part, row)
        if self._stage == 0 and place not in self._account.counted:
            self._account.counted.add(place)
            self._first.add(id(call))
        await super()._one(opened, position, row, call)

    async def _answer(self, call: ExpertCall) -> Answer | Failure:
        try:
            self._check(call.expert)
            held = await self._account.reserve(self._expected(call), self._stop)
        except CoeError as error:
            return Failure(call.expert, self._for_client(error))
        outcome: Answer | Failure | None = None
        try:
            outcome = await self._unless_stopped(call)
        finally:
            self._account.settle(held, outcome)
        if outcome is not None:
            return outcome
        assert self._stop.code is not None  # it was set
        return Failure(call.expert, stopped(self._stop.code))

    async def _unless_stopped(self, call: ExpertCall) -> Answer | Failure | None:
        """The outcome; None for a call that runs when the batch is stopped, and is cancelled."""
        answering = asyncio.ensure_future(super()._answer(call))
        stopping = asyncio.ensure_future(self._stop.event.wait())
        try:
            await asyncio.wait((answering, stopping), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                outcome = answering.result()
                if isinstance(outcome, Failure):
                    return Failure(outcome.expert, self._for_client(outcome.error))
                return outcome
            return None
        finally:
            for task in (answering, stopping):
                task.cancel()
            await asyncio.gather(answering, stopping, return_exceptions=True)

    def _check(self, expert: str) -> None:
        """Raise the error of a call that is not made: the batch was stopped, or the key may not use the expert."""
        if self._stop.code is not None:
            raise stopped(self._stop.code)
        visible = self._account.access().experts(self._hosts.snapshot)
        if expert not in self._hosts.snapshot or (visible is not None and expert not in visible):
            raise NotAllowed("the expert that was to answer is no longer one that the key may use")

    def _expected(self, call: ExpertCall) -> Amounts:
        """What a call uses at most. The first call of a row counts as its request."""
        read = estimate_tokens(query_of(call.request))
        written = DEFAULT_MAX_TOKENS if call.request.max_tokens is None else call.request.max_tokens
        price = self._hosts.snapshot.experts[call.expert].price
        usd = 0.0 if price is None else price.cost_usd(read, written)
        return {"requests": float(id(call) in self._first), "tokens": float(read + written), "usd": usd}

    def _for_client(self, error: Exception) -> Exception:
        """The error with the text that a client may read: clients read the results."""
        if is_internal(error):
            logger.warning("a call of %s failed: %s", self._account.batch, text_of(error))
            error.args = (error_body(error, logged_as=self._account.batch)[1]["error"]["message"],)
        return error


async def answer_stage(
    worker: Worker,
    folder: Path,
    stage: int,
    items: Sequence[Sequence[Sequence[Any]]],
    answerer: Callable[..., Answerer],
) -> None:
    """Answer the work items of a stage, one after the other, so that each expert is loaded once; report to the child.

    Args:
        answerer: `(folder, stage, units, report) -> Answerer`.
    """
    reports: asyncio.Queue[WorkReport | None] = asyncio.Queue()

    async def answer() -> None:
        try:
            for item in items:
                units = [Unit(*fields) for fields in item]
                await answerer(Folder.of(str(folder)), stage, units, reports.put_nowait).run()
        finally:
            reports.put_nowait(None)

    answering = asyncio.ensure_future(answer())
    try:
        while (report := await reports.get()) is not None:
            await worker.send({"work": plain(report)})
        await answering
    finally:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
    await worker.send({"answered": stage})
