"""Clients that send requests without a pause, retry as OpenAI's clients do, and check every answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import aiohttp

RETRY_S: Final = 0.2
RETRIED: Final = frozenset({408, 409, 429, 500, 502, 503, 504})
"""What OpenAI's clients send again."""


@dataclass(frozen=True, slots=True)
class Ended:
    """One request of a client, with its retries.

    Attributes:
        began, ended: monotonic seconds.
        retries: times that it was sent again, after a broken connection or an error that clients retry.
        wrong: what was wrong with it, if it was not answered as it should be.
    """

    began: float
    ended: float
    retries: int
    wrong: str = ""


@dataclass
class Clients:
    """Clients that send requests without a pause, each with its own text."""

    url: str
    more: str = ""
    ended: list[Ended] = field(default_factory=list)
    over: bool = False

    async def one(self, session: aiohttp.ClientSession, name: str, most_s: float = 90.0) -> None:
        """Send requests until the end."""
        turn = 0
        while not self.over:
            turn += 1
            self.ended.append(await self.ask(session, f"{name} in turn {turn}{self.more}", most_s))

    async def ask(self, session: aiohttp.ClientSession, text: str, most_s: float) -> Ended:
        """One request, sent again as OpenAI's clients do, until it is answered or `most_s` have passed."""
        began, retries, wrong = time.monotonic(), 0, ""
        body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
        while time.monotonic() - began < most_s:
            try:
                async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                    said = await response.json()
                if response.status == 200:
                    right = said["choices"][0]["message"]["content"] == text.upper()
                    return Ended(began, time.monotonic(), retries, "" if right else f"another answer: {said}")
                wrong = f"{response.status} {said['error']['code']}"
                if response.status not in RETRIED:
                    break
            except (aiohttp.ClientError, OSError, ValueError) as error:
                wrong = f"{type(error).__name__}"
            retries += 1
            await asyncio.sleep(RETRY_S)
        return Ended(began, time.monotonic(), retries, wrong or "no answer in time")


@asynccontextmanager
async def loaded(url: str, n_clients: int, more: str = "") -> AsyncIterator[Clients]:
    """Clients that send while the block runs; at the end their last requests are waited for.

    Args:
        more: what each request says after its own text.
    """
    clients = Clients(url, more)
    timeout = aiohttp.ClientTimeout(total=60.0, sock_connect=5.0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        tasks = [asyncio.ensure_future(clients.one(session, f"client {i}")) for i in range(n_clients)]
        try:
            yield clients
        finally:
            clients.over = True
            await asyncio.gather(*tasks)
