r"""Names of modules against the patterns of an adapter's config, in bounded time.

peft matches these patterns with `re`, which may backtrack for hours on a hostile one, such as `(\w+\.?)+x`, and holds
the interpreter lock meanwhile. `regex` has the same syntax and a timeout, and releases the lock.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from registry.errors import SourceError

MOST_CHARACTERS = 2_000  # of one pattern; those of adapters on the hub have less than 500
MOST_SECONDS = 1.0  # for all matches of one adapter
MOST_REPEATS = 100  # product of the counts of a pattern, `a{3}` has 3: counted repeats are unrolled when compiled
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_PLAIN = re.compile(r"[\w.]+")
_WHOLE, _END, _LAYER = "{}", r"(?:.*\.)?(?:{})", r"(?:.*?\.)?(?:{})\.(?P<idx>\d+)\..*"


@dataclass(slots=True)
class PatternMatcher:
    """Matches the patterns of one adapter; all matches together take at most `most_s` seconds.

    Every method raises SourceError if a pattern is not a regular expression, is too long, or takes too much time.
    """

    where: str
    most_s: float = MOST_SECONDS
    clock: Callable[[], float] = time.monotonic
    _used_s: float = field(default=0.0, init=False)

    def whole(self, pattern: str, name: str) -> bool:
        """Whether the pattern matches the whole name (`target_modules` and `exclude_modules` as a string)."""
        return self._match(_WHOLE, pattern, name) is not None

    def end(self, pattern: str, name: str) -> bool:
        """Whether the pattern matches the last parts of a name (keys of `rank_pattern` and `alpha_pattern`)."""
        if _PLAIN.fullmatch(pattern):
            return ends_with(name, {pattern})
        return self._match(_END, pattern, name) is not None

    def layer(self, pattern: str, name: str) -> int | None:
        """The number after a layer list's name (`layers_pattern`), or `None`."""
        found = self._match(_LAYER, pattern, name)
        return None if found is None else int(found)

    def _match(self, form: str, pattern: str, name: str) -> str | None:
        """The layer number of a match, or "" without one; `None` if the pattern does not match."""
        import regex  # type: ignore[import-untyped]  # has no stubs of its own

        if len(pattern) > MOST_CHARACTERS:
            raise SourceError(f"{self.where}: a pattern has {len(pattern):,} characters; the most: {MOST_CHARACTERS:,}")
        counts = [max(int(n or 1) for n in found.groups()) for found in _COUNT.finditer(pattern)]
        if math.prod(max(count, 1) for count in counts) > MOST_REPEATS:
            raise SourceError(f"{self.where}: {_short(pattern)} repeats more than {MOST_REPEATS} times: use + or *")
        began = self.clock()
        try:
            compiled = regex.compile(form.format(pattern) if form is not _WHOLE else pattern)
            found = compiled.fullmatch(name, timeout=max(self.most_s - self._used_s, 1e-3), concurrent=True)
        except TimeoutError:
            raise SourceError(
                f"{self.where}: matching the pattern {_short(pattern)} takes longer than {self.most_s:g} s: "
                "name the modules in a list instead"
            ) from None
        except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
            raise SourceError(f"{self.where}: {_short(pattern)} is not a regular expression: {error}") from error
        self._used_s += self.clock() - began
        return None if found is None else found.groupdict().get("idx", "")


def ends_with(name: str, ends: Iterable[str]) -> bool:
    """Whether a name, or the name after one of its dots, is among `ends`."""
    parts = name.split(".")
    return not {".".join(parts[n:]) for n in range(len(parts))}.isdisjoint(ends)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:60] + "...")
