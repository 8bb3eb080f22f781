"""Prompt tokens by the experts' own tokenizers, for the context constraint.

    count = TokenCounter(snapshot, Tokenizers()).of(query)
    check(query, snapshot.experts, count=count)         # routers.constraints calls it only near a limit

A tokenizer is the `tokenizer.json` of an expert's files, where they are on this machine. It reads the messages, each
one alone; what the chat template adds is a bound, since templates are code of a model and run in expert hosts only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

from coe.engines import engine_kind
from coe.experts import tokenizer_file
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Query
from routers.constraints import LEAST_ROOM, Count, context_length
from routers.tokens import TokenRange, longest_input, most_tokens

MOST_LOADED: Final = 4
"""Tokenizers kept in memory; one of 262,000 tokens takes 320 MB, one of 49,000 takes 40 MB."""
MOST_FILE_BYTES: Final = 128 * 2**20
"""Size above which a tokenizer.json is not read."""
COUNT_S: Final = 5.0
"""Seconds after which a count is given up: the pattern of a tokenizer may take endless time on some texts."""
RETRY_S: Final = 60.0
"""Seconds until a tokenizer is tried again after it failed, and a missing file is looked for again."""
_SLICE: Final = 65_536
"""Characters read at once, so that counting can end as soon as a context is exceeded."""
_THINKING: Final = "</think>"
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Loaded:
    """A tokenizer, loaded on its first use."""

    file: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    tokenizer: Any = None

    def count(self, texts: Sequence[str], enough: int) -> list[int]:
        """Tokens of each text, without special tokens; ends with the text at which more than `enough` are counted."""
        with self.lock:
            if self.tokenizer is None:
                self.tokenizer = _load(self.file)
        counts: list[int] = []
        for text in texts:
            counts.append(len(self.tokenizer.encode(text, add_special_tokens=False).ids))
            if sum(counts) > enough:
                break
        return counts


class Tokenizers:
    """Tokenizers in memory: loaded on first use, the least recently used one is dropped. Safe across threads.

    A file that changes is loaded again. One that cannot be read, or that does not finish in time, is left alone for
    RETRY_S.
    """

    def __init__(
        self, *, most: int = MOST_LOADED, count_s: float = COUNT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._count_s, self._clock = most, count_s, clock
        self._loaded: OrderedDict[tuple[Path, int, int], _Loaded] = OrderedDict()
        self._failed: dict[Path, float] = {}
        self._lock = threading.Lock()

    def count(self, file: Path, texts: Sequence[str], enough: int) -> list[int] | None:
        """Tokens of each text; None if the tokenizer cannot be used. Blocks for at most `count_s` seconds.

        Args:
            file: a `tokenizer.json`.
            enough: the count ends after the text at which the sum exceeds this.
        """
        if self._failed.get(file, -RETRY_S) + RETRY_S > self._clock():
            return None
        done: SimpleQueue[list[int] | Exception] = SimpleQueue()
        threading.Thread(target=self._work, args=(file, texts, enough, done), name="tokenizer", daemon=True).start()
        try:
            counts = done.get(timeout=self._count_s)
        except Empty:
            counts = TimeoutError(f"not finished within {self._count_s:g} s")
        if isinstance(counts, Exception):
            self._failed[file] = self._clock()
            logger.warning("%s cannot be used; prompt tokens are estimated: %s", file, counts)
            return None
        return counts

    def _work(self, file: Path, texts: Sequence[str], enough: int, done: SimpleQueue[list[int] | Exception]) -> None:
        try:
            done.put(self._get(file).count(texts, enough))
        except Exception as error:  # of the tokenizers library, which has no class of its own for errors
            done.put(error)

    def _get(self, file: Path) -> _Loaded:
        about = file.stat()
        if about.st_size > MOST_FILE_BYTES:
            raise ValueError(f"it has {about.st_size:,} bytes, more than {MOST_FILE_BYTES:,}")
        key = file.resolve(), about.st_size, about.st_mtime_ns
        with self._lock:
            loaded = self._loaded.pop(key, None) or _Loaded(file)
            self._loaded[key] = loaded
            while len(self._loaded) > self._most:
                self._loaded.popitem(last=False)
        return loaded


class TokenCounter:
    """Counts the prompt tokens of queries for the experts of a snapshot.

    Args:
        tokenizers: kept by the caller across snapshots.
    """

    def __init__(self, snapshot: Snapshot, tokenizers: Tokenizers) -> None:
        self._experts, self._tokenizers = snapshot.experts, tokenizers
        self._files: dict[str, tuple[Path | None, float]] = {}
        lengths = [(spec, context_length(spec, self._experts)) for spec in self._experts.values()]
        self._longest = max((length for _, length in lengths if length is not None), default=0)
        countable = {length for spec, length in lengths if length and self._weights(spec).kind is not Kind.REMOTE}
        self._lengths = sorted(countable)

    def may_count(self, query: Query) -> bool:
        """Whether the constraints may have to count this query, which can take a second. Costs microseconds."""
        query, answer = longest_input(query), query.max_tokens or 0
        shortest = next((length for length in self._lengths if length > answer), None)
        return shortest is not None and most_tokens(query) + (answer or min(LEAST_ROOM, shortest // 4)) > shortest

    def of(self, query: Query) -> Count:
        """Expert -> tokens of the query; each tokenizer reads it once."""
        known: dict[Path, TokenRange | None] = {}
        query = longest_input(query)

        def count(expert: str) -> TokenRange | None:
            spec = self._weights(self._experts[expert])
            if engine_kind(spec) == "fake":
                return _words(query)
            file = self._file(spec)
            if file is not None and file not in known:
                known[file] = self._count(file, query)
            return None if file is None else known[file]

        return count

    def _weights(self, spec: ExpertSpec) -> ExpertSpec:
        """Whose tokenizer reads the prompt: the base of an adapter, or of the first member of a composed expert."""
        first = self._experts.get(spec.members[0], spec) if spec.members else spec
        return self._experts.get(first.base or "", first)

    def _file(self, spec: ExpertSpec) -> Path | None:
        file, found_at = self._files.get(spec.ref, (None, -RETRY_S))
        if file is None and time.monotonic() - found_at >= RETRY_S:
            file = tokenizer_file(spec)
            self._files[spec.ref] = file, time.monotonic()
        return file

    def _count(self, file: Path, query: Query) -> TokenRange | None:
        texts = list(_slices(query))
        counts = self._tokenizers.count(file, texts, enough=self._longest)
        if counts is None:
            return None
        # A template may trim a message and join its ends with its own text: at most a token of each piece.
        total, least = sum(counts), sum(max(0, n - 1) for n in counts)
        return TokenRange(least, total, total).framed(query)


def _slices(query: Query) -> Iterator[str]:
    """The text of the messages that every template renders: without the thinking in earlier answers."""
    for message in query.messages:
        content = message.content
        if message.role == "assistant":
            content = content.rpartition(_THINKING)[2]
        if not query.raw:
            content = content.strip()
        for start in range(0, len(content), _SLICE):
            yield content[start : start + _SLICE]


def _words(query: Query) -> TokenRange:
    """The tokens of a fake expert, which has no template."""
    n = sum(len(message.content.split()) for message in query.messages)
    return TokenRange(n, n, n)


def _load(file: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
