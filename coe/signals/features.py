"""Features that experts provide for routers.

    keywords/<expert>      words: the skills that the query needs, named by a chat expert (`coe.signals.keywords`)
    hidden/<expert>        (2 h,) hidden states of the prompt's last token, in the middle and in the last layer
    uncertainty/<expert>   (4,) of the next token: entropy in nats, probability of the likeliest; of the prompt: mean
                           log-likelihood of its tokens, log of their number

A router lists the names that it requires (`Router.requires`). `Signals.add_features` adds them to an outcome table, for
training and evaluation, and stores them on disk; `Filled` adds them to queries as they arrive. The expert is loaded in
the process that routes, like the router's encoder. `Filled` is itself a router, so the same code serves online, in
batches and in evaluation. Routers stay free of engines: they read `Query.features`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, TypeVar

import numpy as np

from coe.engine_config import EnginesConfig
from coe.engines import engine_kind
from coe.errors import CoeError, ConfigError
from coe.experts import locator
from coe.signals.hidden import N_UNCERTAINTY, SignalReader, Vectors
from coe.signals.keywords import KeywordReader
from registry.errors import UnknownExpert
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Estimate, Query, Router, Words
from routers.constraints import CHAT
from routers.encoders.store import Store
from routers.outcomes.table import OutcomeTable

HIDDEN, UNCERTAINTY, KEYWORDS = "hidden", "uncertainty", "keywords"

_log = logging.getLogger(__name__)
_V = TypeVar("_V")
Progress = Callable[[int, int], None]
"""Called with (prompts read, prompts in all)."""


class Signals:
    """The signals that experts of a snapshot can provide. Close it after use: it keeps experts loaded.

    Args:
        engines: settings of the engines.
        readers: creates the reader of a model. keywords: creates the reader of a keyword expert.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        engines: EnginesConfig | None = None,
        *,
        readers: Callable[[ExpertSpec], SignalReader] | None = None,
        keywords: Callable[[str, Snapshot, EnginesConfig], KeywordReader] = KeywordReader,
    ) -> None:
        self._snapshot, self._engines = snapshot, engines or EnginesConfig()
        self._make = readers or partial(SignalReader, find=locator(snapshot.experts), device=self._engines.hf.device)
        self._make_keywords = keywords
        self._readers: dict[str, SignalReader] = {}
        self._keywords: dict[str, KeywordReader] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unload the experts. Blocks until running calls end."""
        self._readers.clear()
        while self._keywords:
            self._keywords.popitem()[1].close()

    def check(self, names: Collection[str]) -> None:
        """Raises ConfigError for a name that is not a signal, or whose expert is missing or cannot provide it."""
        for name in sorted(names):
            kind, _, expert = name.partition("/")
            if kind not in (HIDDEN, UNCERTAINTY, KEYWORDS) or not expert:
                raise ConfigError(
                    f"no feature {name!r}: there are {HIDDEN}/<expert> and {UNCERTAINTY}/<expert> of registered "
                    f"models, and {KEYWORDS}/<expert> of registered chat experts"
                )
            if expert not in self._snapshot:
                raise ConfigError(f"feature {name!r}: {UnknownExpert(expert, self._snapshot.experts)}")
            if why := _unable(kind, self._snapshot.experts[expert]):
                raise ConfigError(f"feature {name!r}: {expert!r} {why}")

    def add_features(
        self, table: OutcomeTable, names: Collection[str], *, on_progress: Progress | None = None
    ) -> OutcomeTable:
        """The table with these features. Values are stored on disk as they are read, so an interrupted run resumes.

        Raises:
            ConfigError: see `check`. WeightsError, OutOfMemory, EngineError: see the `read` of the readers.
        """
        self.check(names)
        keys, features = _digests(table.prompts), dict(table.features)
        rows: dict[str, Vectors] = {}
        for expert in _experts(names, HIDDEN, UNCERTAINTY):
            reader = self._reader(expert)
            known = _stored(reader.store(), reader.read, reader.at_once, table.prompts, on_progress)
            rows[expert] = np.stack([known[key] for key in keys])
        features |= {name: _part(name, rows) for name in names if not _is_words(name)}
        for expert in _experts(names, KEYWORDS):
            words_of = self._keyword_reader(expert)
            words = _stored(words_of.store(), words_of.read_each, words_of.at_once, table.prompts, on_progress)
            features[f"{KEYWORDS}/{expert}"] = tuple(words[key] for key in keys)
        return replace(table, features=features)

    def fill(self, queries: Sequence[Query], names: Collection[str]) -> list[Query]:
        """The n queries with these features: vectors are computed, keywords read from disk after the first time.

        A query whose keywords cannot be read gets none, with a warning in the log.

        Raises:
            ConfigError: see `check`. WeightsError, OutOfMemory, EngineError: a model for hidden states failed.
        """
        self.check(names)
        texts = [query.text for query in queries]
        rows = {expert: self._reader(expert).read(texts) for expert in _experts(names, HIDDEN, UNCERTAINTY)}
        parts: dict[str, Vectors | list[Words]] = {name: _part(name, rows) for name in names if not _is_words(name)}
        for expert in _experts(names, KEYWORDS):
            reader = self._keyword_reader(expert)
            log = partial(_log_errors, expert)
            known = _stored(reader.store(), reader.read_each, reader.at_once, texts, on_errors=log)
            parts[f"{KEYWORDS}/{expert}"] = [known.get(key, ()) for key in _digests(texts)]
        return [
            replace(query, features={**query.features, **{name: part[i] for name, part in parts.items()}})
            for i, query in enumerate(queries)
        ]

    def _reader(self, expert: str) -> SignalReader:
        if expert not in self._readers:
            self._readers[expert] = self._make(self._snapshot.experts[expert])
        return self._readers[expert]

    def _keyword_reader(self, expert: str) -> KeywordReader:
        if expert not in self._keywords:
            self._keywords.setdefault(expert, self._make_keywords(expert, self._snapshot, self._engines))
        return self._keywords[expert]


@dataclass(slots=True)
class Filled:
    """A router that adds the required features to its queries; to its callers it requires none."""

    router: Router
    signals: Signals
    requires: frozenset[str] = frozenset()

    @property
    def experts(self) -> tuple[str, ...]:
        """Those of the router."""
        return tuple(getattr(self.router, "experts", ()))

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The router's estimate of the n queries, with the features that it requires."""
        return self.router.estimate(self.signals.fill(queries, self.router.requires))


def _unable(kind: str, spec: ExpertSpec) -> str:
    """Why an expert cannot provide signals of a kind; empty if it can."""
    if kind == KEYWORDS:
        chats = spec.kind in (Kind.MODEL, Kind.ADAPTER, Kind.REMOTE) and CHAT in spec.capabilities
        return "" if chats else f"is not a chat expert (kind {spec.kind.value!r}), so it cannot name keywords"
    has_weights = spec.kind is Kind.MODEL and engine_kind(spec) == "hf"
    return "" if has_weights else "is not a model with local weights"


def _is_words(name: str) -> bool:
    return name.startswith(f"{KEYWORDS}/")


def _experts(names: Collection[str], *kinds: str) -> list[str]:
    """The experts that provide signals of these kinds."""
    return sorted({expert for kind, _, expert in (name.partition("/") for name in names) if kind in kinds})


def _digests(texts: Sequence[str]) -> list[bytes]:
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]


def _stored(
    store: Store[_V],
    read: Callable[[list[str]], Iterable[_V | CoeError]],
    at_once: int,
    texts: Sequence[str],
    on_progress: Progress | None = None,
    on_errors: Callable[[list[CoeError]], None] | None = None,
) -> dict[bytes, _V]:
    """Digest of a text -> value, from the store or read in groups of `at_once`; no entry for a text that failed.

    Raises:
        CoeError: the first error of a group, after its other values were stored, unless `on_errors` is given.
    """
    keys = _digests(texts)
    known = store.get(keys)
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    todo = sorted(missing, key=lambda key: -len(missing[key]))  # texts of similar length share a batch
    for start in range(0, len(todo), at_once):
        some = todo[start : start + at_once]
        found = dict(zip(some, read([missing[key] for key in some]), strict=True))
        fresh = {key: value for key, value in found.items() if not isinstance(value, CoeError)}
        store.put(fresh)
        known |= fresh
        if errors := [value for value in found.values() if isinstance(value, CoeError)]:
            if on_errors is None:
                raise errors[0]
            on_errors(errors)
        if on_progress is not None:
            on_progress(min(start + at_once, len(todo)), len(todo))
    return known


def _log_errors(expert: str, errors: list[CoeError]) -> None:
    _log.warning(
        "%r could not name the keywords of %d queries, which are routed without them; %s: %s",
        expert,
        len(errors),
        type(errors[0]).__name__,
        errors[0],
    )


def _part(name: str, rows: dict[str, Vectors]) -> Vectors:
    """The columns of a feature."""
    kind, _, expert = name.partition("/")
    return rows[expert][:, :-N_UNCERTAINTY] if kind == HIDDEN else rows[expert][:, -N_UNCERTAINTY:]
