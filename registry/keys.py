"""API keys: 256-bit random secrets, of which only a hash is stored, and what each may be used for.

A key is `coe-ID-SECRET`. The id finds it, and is no secret: lists, logs and errors show it. The secret is shown once,
when the key is created, and compared by its SHA-256: a random secret of that length needs no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import func, insert, select, update
from sqlalchemy.engine import Connection

from registry.errors import RegistryError
from registry.priorities import NORMAL, RequestPriority
from registry.spelling import did_you_mean
from registry.tables import api_keys as _keys
from registry.tables import state as _state

MOST_KEYS: Final = 100_000
"""Most keys of a registry, revoked ones included: a gateway holds all of them in memory."""
MOST_PATTERNS: Final = 256
"""Most patterns of a key for experts, and as many for policies."""
MOST_LIMITS: Final = 9
"""Most limits of a key: one for each thing that is counted, and each time."""
_TEXT: Final = re.compile(r"coe-(?P<id>[0-9a-f]{12})-(?P<secret>[A-Za-z0-9_-]{43})")

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\s,\[\]?]+$")]


What = Literal["requests", "tokens", "usd"]
Per = Literal["minute", "day", "month"]


class Limit(BaseModel):
    """Most requests, tokens (read and generated) or USD of a key in a minute, a day or a month, of UTC."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: What
    per: Per
    most: Annotated[float, Field(gt=0, lt=1e15, allow_inf_nan=False)]

    def __str__(self) -> str:
        return f"{self.what}={self.most:,.10g}/{self.per}"


class KeySpec(BaseModel):
    """What a key may be used for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$")]
    """Of its user or purpose; no two keys in use have the same."""
    experts: Annotated[tuple[Pattern, ...], Field(max_length=MOST_PATTERNS)] | None = None
    """Names of the experts that may answer, `*` for any characters; null: all."""
    policies: Annotated[tuple[Pattern, ...], Field(max_length=MOST_PATTERNS)] | None = None
    """Names of the policies that may be asked, `*` for any characters; null: all."""
    admin: bool = False
    """It may make admin calls."""
    metrics: bool = False
    """It may read `/metrics`, and the hosts in `/health`."""
    expires_at: float | None = None
    """Seconds since the epoch at which it ends; null: never."""
    limits: Annotated[tuple[Limit, ...], Field(max_length=MOST_LIMITS)] = ()
    """What it may use; without any, all it can."""
    priority: RequestPriority = NORMAL
    """The highest priority of its requests, and that of requests that state none (`low`, `normal`, `high`)."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A stored key.

    Attributes:
        id: the 12 characters by which it is found.
        digest: SHA-256 of its secret, in hexadecimal.
        created_at, revoked_at: seconds since the epoch; a revoked key is never valid again.
    """

    id: str
    spec: KeySpec
    digest: str = field(repr=False)
    created_at: float
    revoked_at: float | None = None

    @classmethod
    def made(cls, spec: KeySpec, now: float) -> tuple[Self, str]:
        """A new key, and its text, which nothing else holds."""
        identity, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        return cls(identity, spec, _digest(secret), now), f"coe-{identity}-{secret}"

    def why_invalid(self, secret: str, now: float) -> str | None:
        """Why a request with that secret is refused at that time; None if it is valid. Takes the same time for all."""
        if not hmac.compare_digest(_digest(secret), self.digest):
            return "it is not a key of this service"
        if self.revoked_at is not None:
            return "the key was revoked"
        if self.spec.expires_at is not None and now >= self.spec.expires_at:
            return f"the key expired at {shown_time(self.spec.expires_at)}"
        return None

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.spec.expires_at is not None and now >= self.spec.expires_at else "active"


def read_key(text: str) -> tuple[str, str] | None:
    """Id and secret of the text of a key; None if it has another form."""
    found = _TEXT.fullmatch(text)
    return None if found is None else (found["id"], found["secret"])


def matches(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether a name is among the patterns of a key."""
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def shown_time(seconds: float) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", "Z")


def create(connection: Connection, key: ApiKey) -> None:
    """Store a key. See `Registry.create_api_key`."""
    change = _next_change(connection)
    count = connection.execute(select(func.count()).select_from(_keys)).scalar_one()
    if count >= MOST_KEYS:
        raise RegistryError(f"the registry holds {count:,} keys, and no more than {MOST_KEYS:,}")
    taken = [each for each in read(connection) if each.spec.name == key.spec.name and each.revoked_at is None]
    if taken:
        raise RegistryError(
            f"the key {taken[0].id} has the name {key.spec.name!r}: choose another one, or revoke that key first"
        )
    values = {"id": key.id, "digest": key.digest, "created_at": key.created_at, "revoked_at": None}
    spec = key.spec.model_dump_json(exclude={"priority"})
    connection.execute(insert(_keys).values(**values, spec=spec, priority=key.spec.priority, change=change))


def revoke(connection: Connection, name: str, now: float) -> ApiKey:
    """Revoke the key with that id, or that name. See `Registry.revoke_api_key`."""
    change = _next_change(connection)
    keys = [key for key in read(connection) if key.revoked_at is None]
    found = next((key for key in keys if name in (key.id, key.spec.name)), None)
    if found is None:
        hint = did_you_mean(name, [key.spec.name for key in keys])
        raise RegistryError(f"no key in use has the id or the name {name!r}{hint}: `coe keys list` shows all")
    connection.execute(update(_keys).where(_keys.c.id == found.id).values(revoked_at=now, change=change))
    return ApiKey(found.id, found.spec, found.digest, found.created_at, now)


def read(connection: Connection) -> list[ApiKey]:
    """All keys, in the order of their creation."""
    columns = (_keys.c.id, _keys.c.spec, _keys.c.priority, _keys.c.digest, _keys.c.created_at, _keys.c.revoked_at)
    rows = connection.execute(select(*columns).order_by(_keys.c.created_at, _keys.c.id)).all()
    return [ApiKey(row[0], _spec(*row[1:3]), *row[3:]) for row in rows]


def _spec(text: str, priority: str) -> KeySpec:
    return KeySpec.model_validate({**json.loads(text), "priority": priority})


def revision(connection: Connection) -> int:
    """A number that grows with every change of the keys; 0 if there never was one."""
    return int(connection.execute(select(func.coalesce(func.max(_keys.c.change), 0))).scalar_one())


def _next_change(connection: Connection) -> int:
    connection.execute(select(_state.c.version).with_for_update())  # serializes writers
    return revision(connection) + 1


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
