"""The API keys of a service in one gateway process: who may send a request, and what that key may be used for.

    access = await keyring.access(headers)      # raises Unauthorized; what the request may see and do

Keys are read from the registry's database when a request finds that the last look at it is over a second old, so a
revoked key stops within that second on every gateway. While the database cannot be read, the keys that are known go on
for `STALE_S`. Once a process has seen a key, it never serves requests without one, even if the database is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, TypeVar

from coe.errors import CoeError
from coe.orchestrator import Orchestrator
from coe.policy import address
from coe.serve.http.refusals import KeyNotAllowed, KeysUnavailable, Unauthorized
from registry.errors import RegistryError
from registry.keys import ApiKey, matches, read_key
from registry.priorities import NORMAL, RequestPriority, level_of
from registry.snapshot import expert_of
from registry.storage import coe_home
from registry.store import Registry, Snapshot

T = TypeVar("T")
REFRESH_S: Final = 1.0
"""Seconds after which the keys are looked at again."""
WAIT_S: Final = 2.0
"""Seconds that a request waits for the database; then the keys that are known decide."""
STALE_S: Final = 600.0
"""Seconds for which known keys are used while the database cannot be read."""
_NOBODY: Final = ApiKey("0" * 12, spec=None, digest="0" * 64, created_at=0.0)  # type: ignore[arg-type]
"""Compared with the secret of an unknown id, so that it takes the same time."""
logger = logging.getLogger(__name__)


class Access:
    """What a request may see and do.

    Args:
        key: None: everything, since the service has no keys.
    """

    def __init__(self, key: ApiKey | None = None) -> None:
        self.key = key
        self._experts: tuple[Snapshot, frozenset[str]] | None = None

    @property
    def id(self) -> str | None:
        """The id of the key."""
        return None if self.key is None else self.key.id

    @property
    def admin(self) -> bool:
        """Whether it may make admin calls."""
        return self.key is None or self.key.spec.admin

    @property
    def metrics(self) -> bool:
        """Whether it may read `/metrics`, and the hosts in `/health`."""
        return self.key is None or self.key.spec.metrics or self.key.spec.admin

    def experts(self, snapshot: Snapshot) -> frozenset[str] | None:
        """The names of the experts that may answer it; None: all."""
        if self.key is None or self.key.spec.experts is None:
            return None
        if self._experts is None or self._experts[0] is not snapshot:
            patterns = self.key.spec.experts
            self._experts = snapshot, frozenset(name for name in snapshot if matches(expert_of(name), patterns))
        return self._experts[1]

    def policies(self, policies: Mapping[str, T]) -> Mapping[str, T]:
        """Those of the policies that it may ask."""
        if self.key is None or self.key.spec.policies is None:
            return policies
        patterns = self.key.spec.policies
        return {name: policy for name, policy in policies.items() if matches(name, patterns)}

    def priority(self, stated: RequestPriority | None) -> RequestPriority:
        """The priority of a request: the stated one, else that of its key.

        Raises:
            KeyNotAllowed: it is higher than that of the key.
        """
        if self.key is None:
            return stated or NORMAL
        highest = self.key.spec.priority
        if stated is not None and level_of(stated) > level_of(highest):
            raise KeyNotAllowed(
                f'coe.priority: "{stated}" is more than the key {self.id} may ask for, which is "{highest}": leave the '
                "field out, or use another key"
            )
        return stated or highest

    def check(self, model: str, orchestrator: Orchestrator) -> None:
        """Check that it may ask the policy or the expert that `model` names.

        An alias may be asked by whoever may ask the expert behind it: its own name matches no pattern of a key.

        Raises:
            UnknownModel: it may not, or there is none: a key does not tell what other keys may use.
            KeyNotAllowed: none of the registered experts may answer it.
        """
        experts = self.experts(orchestrator.snapshot)
        if experts is not None and not experts:
            raise KeyNotAllowed(f"no registered expert is one that the key {self.id} may use (`coe keys list`)")
        snapshot = orchestrator.snapshot
        known = snapshot.experts if experts is None else experts
        if model in snapshot.aliases and snapshot.resolve(model) in known:
            return
        address(model, self.policies(orchestrator.policies), orchestrator.default_policy, known)


OPEN: Final = Access()
"""Of a service without keys."""


class Keys(Protocol):
    """Where keys are stored."""

    def changed(self) -> Sequence[ApiKey] | None:
        """All keys, revoked ones included, if they changed since the last call; blocks."""
        ...


class StoredKeys:
    """The keys in a registry's database. While there is no database, there are no keys.

    Args:
        url: of the registry; None: SQLite at `$COE_HOME/registry.db`, which is not created.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._registry: Registry | None = None
        self._revision: object = None

    def changed(self) -> Sequence[ApiKey] | None:
        """All keys, if they changed since the last call.

        Raises:
            StoreError: the database cannot be read now.
        """
        if self._registry is None:
            if self._url is None and not (coe_home() / "registry.db").exists():
                return None
            self._registry = Registry(self._url)
        revision = self._registry.api_keys_revision()
        if revision == self._revision:
            return None
        keys = self._registry.api_keys()
        self._revision = revision
        return keys


class Keyring:
    """The keys as this process knows them. Use inside one event loop.

    Args:
        stored: None: there are none.
        required: requests need a key even if none was ever created.
        clock: monotonic seconds; wall: seconds since the epoch.
    """

    def __init__(
        self,
        stored: Keys | None = None,
        *,
        required: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._stored, self._required, self._clock, self._wall = stored, required, clock, wall
        self._keys: dict[str, Access] = {}
        self._looked_at = self._read_at = -float("inf")
        self._looking: asyncio.Task[None] | None = None
        self._began = 0.0  # of that look

    async def required(self) -> bool:
        """Whether requests need a key now."""
        await self._look()
        return self._required

    async def access(self, headers: Mapping[str, str]) -> Access:
        """What a request with these headers may do.

        Args:
            headers: by lower-case name.

        Raises:
            Unauthorized: it needs a key, and has none that is valid.
            KeysUnavailable: the keys could not be read for too long.
        """
        if self._stored is None and not self._required:
            return OPEN
        await self._look()
        if not self._required:
            return OPEN
        scheme, _, text = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise Unauthorized("requests need an API key of this service, as `Authorization: Bearer KEY`")
        identity, secret = read_key(text.strip()) or ("", "")
        found = self._keys.get(identity)
        known = _NOBODY if found is None or found.key is None else found.key
        if (why := known.why_invalid(secret, self._wall())) is not None:
            raise Unauthorized(f"the API key is refused: {why}")
        assert found is not None
        return found

    async def access_of(self, identity: str | None) -> Access:
        """What work that goes on after its request may do, by the id of the key of the request; None: it had none.

        Raises:
            Unauthorized: the key was revoked or has expired, or the service requires keys by now.
        """
        if self._stored is None and not self._required:
            return OPEN
        await self._look()
        if not self._required:
            return OPEN
        found = None if identity is None else self._keys.get(identity)
        if found is None or found.key is None:
            raise Unauthorized("it was made without a key of this service")
        if (state := found.key.state(self._wall())) != "active":
            raise Unauthorized(f"the API key {identity} is {state}")
        return found

    async def _look(self) -> None:
        """Look at the stored keys again, if the last look is too old."""
        now = self._clock()
        if self._stored is None or now - self._looked_at < REFRESH_S:
            return
        if self._looking is None:
            self._looking, self._began = asyncio.ensure_future(self._read(self._stored, now)), now
        left_s = self._began + WAIT_S - now  # of a database that hangs, later requests wait no more
        try:
            await asyncio.wait_for(asyncio.shield(self._looking), max(0.0, left_s))
        except TimeoutError:
            self._check_age()

    async def _read(self, stored: Keys, began: float) -> None:
        try:
            keys = await asyncio.to_thread(stored.changed)
        except (RegistryError, CoeError) as error:
            logger.warning("the API keys cannot be read: %s", error)
            self._looked_at = began
            self._check_age()
        else:
            self._looked_at = self._read_at = began
            if keys is not None:
                self._keys = {key.id: Access(key) for key in keys}
                self._required = self._required or bool(keys)
        finally:
            self._looking = None

    def _check_age(self) -> None:
        if self._clock() - self._read_at > STALE_S:
            raise KeysUnavailable("the API keys of this service cannot be read now; try again later")


async def keyed(keyring: Keyring, headers: Mapping[str, str]) -> Access:
    """The access of a request that needs a key which may make admin calls.

    Raises:
        KeyNotAllowed: its key may not.
    """
    access = await keyring.access(headers)
    if not access.admin:
        raise KeyNotAllowed(f"the key {access.id} may not make admin calls (`coe keys create NAME --admin`)")
    return access
