"""Arrivals of a simulation: the Azure traces, a decision log, or a Poisson process; experts by Zipf's law."""

from __future__ import annotations

import csv
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from coe.errors import ConfigError
from coe.scheduler import Residency
from coe.simulation.workload import LONGEST_S, MOST_REQUESTS, MOST_TOKENS, Workload
from registry.json_text import loads

_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_LONGEST_LINE: Final = 1_000_000
"""Most bytes of a line of a decision log, which holds the text of a query at most."""
_MOST_FILES: Final = 64
"""Files of a decision log that are read, the newest first."""


@dataclass(slots=True)
class Arrivals:
    """Times in seconds, and tokens. experts: the expert of each; empty if the source names none."""

    at_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)

    def add(self, at_s: float, prompt_tokens: int, new_tokens: int) -> None:
        """One more request."""
        self.at_s.append(at_s)
        self.prompt_tokens.append(prompt_tokens)
        self.new_tokens.append(new_tokens)

    def of(self, experts: Container[str]) -> Arrivals:
        """The requests to these experts, from the first of them on."""
        kept = [i for i, name in enumerate(self.experts) if name in experts]
        start_s = self.at_s[kept[0]] if kept else 0.0
        return Arrivals(
            [self.at_s[i] - start_s for i in kept],
            [self.prompt_tokens[i] for i in kept],
            [self.new_tokens[i] for i in kept],
            [self.experts[i] for i in kept],
        )


def read_azure(path: Path, most: int = MOST_REQUESTS) -> Arrivals:
    """The requests of a trace in the format of Azure's LLM inference traces (2023 and 2024).

    A CSV file with the columns TIMESTAMP (ISO 8601), ContextTokens and GeneratedTokens, in order of time.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line is wrong; names file and line.
    """
    found = Arrivals()
    start: datetime | None = None
    last_s = 0.0
    for place, row in _rows(path):
        if len(found.at_s) >= most:
            break
        at = _time(row[0], place)
        start = at if start is None else start
        at_s = (at - start).total_seconds()
        if at_s < last_s:
            raise ConfigError(f"{place}: {row[0]!r} is before the line above it: sort the trace by time")
        if at_s > LONGEST_S:
            raise ConfigError(f"{place}: {row[0]!r} is more than {LONGEST_S:,.0f} s after the first line")
        last_s = at_s
        found.add(at_s, _tokens(row[1], place), _tokens(row[2], place))
    if not found.at_s:
        raise ConfigError(f"{path}: the trace has no requests")
    return found


def _rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if not header:
                raise ConfigError(f"{path}: the trace is empty: its first line must be {','.join(_COLUMNS)}")
            missing = [name for name in _COLUMNS if name not in header]
            if missing:
                raise ConfigError(f"{path}:1: no column {', '.join(missing)}; found {', '.join(header)[:200]}")
            columns = [header.index(name) for name in _COLUMNS]
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    raise ConfigError(f"{place}: {len(row)} fields, the header has {len(header)}")
                yield place, [row[column].strip() for column in columns]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except csv.Error as error:
        raise ConfigError(f"{path}: is not CSV: {error}") from error


def _time(text: str, place: str) -> datetime:
    try:
        at = datetime.fromisoformat(_six_decimals(text))
    except ValueError:
        raise ConfigError(f"{place}: {text[:60]!r} is no time such as 2023-11-16 18:15:46.680") from None
    return at.replace(tzinfo=None)


def _six_decimals(text: str) -> str:
    """Azure's times have seven decimals, of which Python reads six."""
    head, dot, decimals = text.partition(".")
    digits = len(decimals) - len(decimals.lstrip("0123456789"))
    return f"{head}{dot}{decimals[: min(digits, 6)]}{decimals[digits:]}"


def _tokens(text: str, place: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) > MOST_TOKENS:
        raise ConfigError(f"{place}: {text[:60]!r} is no number of tokens from 0 to {MOST_TOKENS:,}")
    return int(text)


def read_decision_log(path: Path, most: int = MOST_REQUESTS) -> Arrivals:
    """The answered requests of a decision log of `coe serve`, a file or a folder, as of `read_answered`.

    Raises:
        ConfigError: as for `read_answered`, or the log holds no answered request.
    """
    arrivals = read_answered(path, most)
    if not arrivals.at_s:
        raise ConfigError(f"{path}: no request in this decision log was answered")
    return arrivals


def read_answered(path: Path, most: int = MOST_REQUESTS) -> Arrivals:
    """The answered requests of a decision log, perhaps none, in order of time; each with the expert that answered.

    An incomplete last line of a file is skipped: the service is writing it, or was killed.

    Raises:
        ConfigError: the log cannot be read, or another line is damaged; names file and line.
    """
    found: list[tuple[datetime, int, int, str]] = []
    for place, line in lines_of(path):
        try:
            request = _logged(line, place)
        except ConfigError:
            if line.endswith(b"\n"):
                raise
            continue
        if request is not None:
            found.append(request)
        if len(found) >= most:
            break
    found.sort(key=lambda each: each[0])
    arrivals = Arrivals(experts=[expert for *_, expert in found])
    for at, prompt_tokens, new_tokens, _ in found:
        arrivals.add((at - found[0][0]).total_seconds(), prompt_tokens, new_tokens)
    return arrivals


def log_files(log: Path) -> list[Path]:
    """The file, or the newest ones of a folder that `coe serve` logs to; none where nothing is there."""
    if not log.is_dir():
        return [log] if log.exists() else []
    return sorted(log.glob("decisions-*.jsonl"), reverse=True)[:_MOST_FILES]


def lines_of(log: Path) -> Iterator[tuple[str, bytes]]:
    """File and number of each line of a decision log, a file or a folder, and the line.

    Raises:
        ConfigError: it cannot be read, or has no file.
    """
    files = log_files(log)
    if not files:
        missing = "this folder has no file decisions-*.jsonl" if log.is_dir() else "no such file or folder"
        raise ConfigError(f"{log}: cannot be read: {missing}; give `serve.log.folder` of coe serve, or a file in it")
    for file in files:
        yield from _lines_of_file(file)


def _lines_of_file(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), start=1):
                if len(line) > _LONGEST_LINE:
                    raise ConfigError(f"{path}:{number}: longer than {_LONGEST_LINE:,} bytes")
                yield f"{path}:{number}", line
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _logged(line: bytes, place: str) -> tuple[datetime, int, int, str] | None:
    """The time, tokens and expert of a line; None if the request was not answered."""
    try:
        document: Any = loads(line)
        if not str(document["format"]).startswith("coe-decision/"):
            raise ValueError("its format is not that of a decision log")
        usage, expert = document["usage"], document["expert"]
        if usage is None or not expert:
            return None
        tokens = [usage["prompt_tokens"], usage["completion_tokens"]]
        if not all(isinstance(count, int) and 0 <= count <= MOST_TOKENS for count in tokens):
            raise ValueError(f"its tokens are not numbers from 0 to {MOST_TOKENS:,}")
        return datetime.fromisoformat(document["time"]).replace(tzinfo=None), tokens[0], tokens[1], str(expert)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{place}: not a line of a decision log: {what}") from error


def poisson(count: int, per_s: float, prompt_tokens: int, new_tokens: int, seed: int) -> Arrivals:
    """A Poisson process; tokens follow geometric distributions with these means."""
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(1 / per_s, count))
    return Arrivals(
        (at_s - at_s[0]).tolist(),
        rng.geometric(1 / max(1, prompt_tokens), count).tolist(),
        rng.geometric(1 / max(1, new_tokens), count).tolist(),
    )


def by_zipf(
    arrivals: Arrivals, residencies: Sequence[Residency], bytes_of: Mapping[str, int], exponent: float, seed: int
) -> Workload:
    """Each request wants an expert at random: the r-th with a probability proportional to 1 / r ** exponent."""
    weights = np.arange(1, len(residencies) + 1, dtype=float) ** -exponent
    rng = np.random.default_rng(seed)
    wants = rng.choice(len(residencies), size=len(arrivals.at_s), p=weights / weights.sum())
    return _workload(arrivals, residencies, bytes_of, wants.tolist())


def by_name(arrivals: Arrivals, residency_of: Callable[[str], Residency], bytes_of: Mapping[str, int]) -> Workload:
    """Each request wants the expert that the log names."""
    index: dict[Residency, int] = {}
    wants = [index.setdefault(residency_of(expert), len(index)) for expert in arrivals.experts]
    return _workload(arrivals, list(index), bytes_of, wants)


def _workload(
    arrivals: Arrivals, residencies: Sequence[Residency], bytes_of: Mapping[str, int], wants: Sequence[int]
) -> Workload:
    return Workload(residencies, bytes_of, arrivals.at_s, wants, arrivals.prompt_tokens, arrivals.new_tokens)
