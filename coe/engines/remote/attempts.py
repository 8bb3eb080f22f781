"""The attempts to start one answer: at which endpoint, how often, and what the failed ones have used.

This is the only place that repeats calls to endpoints. Nothing is repeated once an answer has text, reasoning or a tool
call. A failure goes on at an endpoint where the request has not been, at once; where there is none, and the failure may
pass, after a wait: the endpoint's Retry-After, else a growing one. The deadline counts over all attempts.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from coe.engines.remote.answer import EndpointAnswer
from coe.engines.remote.body import arguments
from coe.engines.remote.endpoints import AllOpen, Endpoint, EndpointPool, Pass
from coe.engines.remote.errors import translate
from coe.engines.remote.events import read_events
from coe.engines.remote.limits import Limits
from coe.errors import CoeError, DeadlineExceeded, RemoteError
from coe.types import GenerateRequest, Usage
from registry.retries import are_logged
from registry.spec import ExpertSpec

_SILENCE: Final = 10
"""An answer without an event for this multiple of `timeout_s` is lost, though other bytes come."""
_SHORT_WAIT_S: Final = 2.0
"""The longest Retry-After that is waited for while a client waits: beyond it, another expert may answer."""
_LONG_WAIT_S: Final = 60.0
"""The same for requests for which no client waits."""


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """Timeouts and retries of calls to an endpoint.

    Attributes:
        timeout_s: seconds without any byte after which an answer counts as lost.
        connect_s: seconds to connect.
        retries: retries of a call that failed before its first text; streamed text is never requested again. Of several
            endpoints each is tried, however few these are.
        backoff_s: mean wait before the first retry; it doubles. An endpoint's Retry-After takes precedence.
    """

    timeout_s: float
    connect_s: float
    retries: int
    backoff_s: float


@dataclass(frozen=True, slots=True)
class Opened:
    """An answer in progress, its HTTP response, and its place at an endpoint."""

    answer: EndpointAnswer
    events: AsyncGenerator[dict[str, Any], None]
    response: Any
    place: Pass

    @property
    def endpoint(self) -> Endpoint:
        """Where it comes from."""
        return self.place.endpoint

    async def close(self) -> None:
        """Close the response, and give the place back."""
        try:
            async with aclosing(self.events):
                await self.response.__aexit__(None, None, None)
        finally:
            self.place.release()


class Attempts:
    """The attempts to start the answer to one request.

    Attributes:
        spec: the expert.
        used: tokens that endpoints have counted for attempts that failed. tried: where they failed.
    """

    def __init__(self, pool: EndpointPool, spec: ExpertSpec, request: GenerateRequest, settings: RetrySettings) -> None:
        self.used: Usage | None = None
        self.tried: list[Endpoint] = []
        self.spec = spec
        self._pool, self._request, self._settings = pool, request, settings
        self._most_wait_s = _LONG_WAIT_S if request.patient else _SHORT_WAIT_S
        self._began_s = time.monotonic()

    async def start(self) -> Opened:
        """The answer with its first piece.

        Raises:
            RemoteError, Rejected: the error of the last attempt, with the tokens that all of them used.
            DeadlineExceeded: the deadline of the request passed.
        """
        from stamina import AsyncRetryingCaller

        are_logged()
        settings = self._settings
        retry = AsyncRetryingCaller(
            attempts=max(settings.retries + 1, len(self._pool.endpoints)),
            timeout=self._request.deadline_s,
            wait_initial=settings.backoff_s,
            wait_jitter=settings.backoff_s,
        )
        try:
            return await retry(self._wait_before_next, self._attempt)
        except CoeError as error:
            self.charge(error)
            raise

    def count(self, reported: tuple[int, int] | None) -> None:
        """Add the tokens that an endpoint has counted for an attempt that failed."""
        if reported is not None:
            self.used = Usage.total(each for each in (self.used, Usage(*reported)) if each is not None)

    def charge(self, error: CoeError) -> None:
        """State on the error of the request what its attempts have used."""
        if self.used is not None:
            error.used_tokens = (self.used.prompt_tokens, self.used.completion_tokens)

    async def _attempt(self) -> Opened:
        try:
            place = await self._pool.acquire(self.tried, min(self._most_wait_s, self._left_s))
        except AllOpen as error:
            raise _avoided(self.spec, error) from error.last
        try:
            opened = await self._first_piece(place)
        except CoeError as error:
            self._note_failure(place, error)
            raise
        except BaseException:
            place.release()
            raise
        place.succeeded()
        return opened

    async def _first_piece(self, place: Pass) -> Opened:
        endpoint = place.endpoint
        with translate(endpoint.spec, shown=False, secrets=endpoint.secrets):
            opened = await self._open(place)
            try:
                await opened.answer.read()
            except BaseException:
                self.count(opened.answer.reported)
                await opened.close()
                raise
            return opened

    async def _open(self, place: Pass) -> Opened:
        """Send the request; the answer before its first event."""
        from openai import Timeout

        from coe.engines.remote.client import body_of

        request, settings, endpoint = self._request, self._settings, place.endpoint
        limits = Limits.of_request(request, silence_s=_SILENCE * settings.timeout_s)
        options = arguments(endpoint.spec, request)
        left_s = self._left_s
        if left_s <= 0:
            raise DeadlineExceeded(f"{self.spec.name!r} did not start within {request.deadline_s:g} s")
        if left_s < settings.timeout_s:
            options["timeout"] = Timeout(left_s, connect=min(settings.connect_s, left_s))
        client = endpoint.client
        api: Any = client.chat.completions if request.messages else client.completions
        sent = api.with_streaming_response.create(**options)
        events = read_events(body_of(await sent.__aenter__()), limits)
        return Opened(EndpointAnswer(events, request, limits), events, sent, place)

    def _note_failure(self, place: Pass, error: CoeError) -> None:
        """Blame the endpoint, unless the request was at fault, or its deadline; once for each request."""
        endpoint = place.endpoint
        stated_s = error.retry_after_s
        if isinstance(error, RemoteError) and self._left_s > 0 and (stated_s or endpoint not in self.tried):
            place.failed(error, stated_s)
        elif not isinstance(error, RemoteError | DeadlineExceeded):
            place.succeeded()  # it has answered: with a rejection
        place.release()
        self.tried.append(endpoint)

    def _wait_before_next(self, error: Exception) -> bool | float:
        """For stamina: whether to try again, or after how many seconds."""
        if not isinstance(error, RemoteError):
            return False
        if self._pool.has_untried(self.tried):
            return 0.0
        if not error.retryable:
            return False
        if error.retry_after_s is None:
            return True
        if error.retry_after_s > _SHORT_WAIT_S and not self._request.patient:
            return False
        return min(error.retry_after_s, _LONG_WAIT_S)

    @property
    def _left_s(self) -> float:
        """Seconds until the deadline."""
        if self._request.deadline_s is None:
            return float("inf")
        return self._request.deadline_s - (time.monotonic() - self._began_s)


def _avoided(spec: ExpertSpec, error: AllOpen) -> RemoteError:
    """The error of a request that no endpoint takes now: that of the last failure, and until when none is tried."""
    last, wait_s = error.last, error.wait_s
    status = last.status if isinstance(last, RemoteError) else None
    until = f"{spec.name!r} gets no requests for another {wait_s:.1f} s"
    said = "" if last is None else f"; the last error: {last}"
    public = f"the endpoint of {spec.name!r} has failed, and gets no requests for another {wait_s:.1f} s"
    return RemoteError(f"{until}{said}", retryable=True, status=status, retry_after_s=wait_s, public=public)
