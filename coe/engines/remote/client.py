"""The HTTP client of an endpoint: no redirects, no compressed bodies, and little of the body of an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

from openai import APIConnectionError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

from coe.engines.remote.events import MalformedStream
from coe.engines.remote.limits import MOST_ERROR_BYTES

_http: Any = import_module(DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
"""The HTTP library of the openai client: httpx or httpx2."""
_PLAIN: Final = {"Accept-Encoding": "identity"}
_NO_HEADERS: Final[Mapping[str, str]] = {}
_ERROR_BODY_S: Final = 10.0
"""Seconds to read the body of an error."""


class _BoundedClient(DefaultAsyncHttpxClient):
    """Reads at most MOST_ERROR_BYTES of the body of an error, a redirect included, whatever the endpoint sends."""

    async def send(self, request: Any, **options: Any) -> Any:
        response = await super().send(request, **options)
        if not response.is_success:
            return await _bounded(response, request)
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            await response.aclose()
            raise MalformedStream(f"it is compressed ({encoding!r:.40}), though the request excludes that")
        return response


async def _bounded(response: Any, request: Any) -> Any:
    """The response with the beginning of its body, which is read now."""
    body = b""
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(_ERROR_BODY_S):
                async for piece in response.aiter_raw():
                    body += piece
                    if len(body) >= MOST_ERROR_BYTES:
                        break
    finally:
        await response.aclose()
    headers = {name: value for name, value in response.headers.items() if name in ("retry-after", "location")}
    return type(response)(response.status_code, headers=headers, content=body[:MOST_ERROR_BYTES], request=request)


def open_client(base_url: str, key: str, *, timeout_s: float, connect_s: float) -> AsyncOpenAI:
    """A client for an endpoint; nothing is sent."""
    timeout = Timeout(timeout_s, connect=connect_s)
    return AsyncOpenAI(
        base_url=base_url,
        api_key=key,
        max_retries=0,  # retried by the expert, which knows whether text was streamed
        timeout=timeout,
        default_headers=_PLAIN,
        http_client=_BoundedClient(timeout=timeout, follow_redirects=False),
    )


async def whole_body(pieces: AsyncIterable[bytes], most_bytes: int) -> bytes:
    """A body as a whole. Raises MalformedStream beyond `most_bytes`; the rest is not read."""
    held: list[bytes] = []
    n_bytes = 0
    async for piece in pieces:
        held.append(piece)
        n_bytes += len(piece)
        if n_bytes > most_bytes:
            raise MalformedStream(f"it has more than {most_bytes // 2**20} MiB")
    return b"".join(held)


async def fetch(
    url: str, *, timeout_s: float, most_bytes: int, method: str = "GET", headers: Mapping[str, str] = _NO_HEADERS
) -> tuple[int, bytes]:
    """The status and body of a request without a body, within `timeout_s` seconds in all; proxies are not used.

    Of an error, the beginning of its body.

    Raises:
        TimeoutError: it takes longer.
        ConnectionError: nothing answers, or not in HTTP.
        MalformedStream: the body is longer, or compressed.
        ValueError: the URL is not one.
    """
    http = _BoundedClient(timeout=timeout_s, follow_redirects=False, trust_env=False)
    try:
        async with (
            asyncio.timeout(timeout_s),
            http,
            http.stream(method, url, headers={**_PLAIN, **headers}) as response,
        ):
            return response.status_code, await whole_body(response.aiter_bytes(), most_bytes)
    except _http.HTTPError as error:
        raise ConnectionError(str(error) or type(error).__name__) from error
    except _http.InvalidURL as error:
        raise ValueError(str(error)) from error


async def body_of(response: Any) -> AsyncGenerator[bytes, None]:
    """The pieces of a streamed body as they come. Raises APITimeoutError, APIConnectionError."""
    try:
        async for piece in response.iter_bytes():
            yield piece
    except _http.TimeoutException as error:
        raise APITimeoutError(request=response.http_request) from error
    except _http.HTTPError as error:
        raise APIConnectionError(request=response.http_request) from error
