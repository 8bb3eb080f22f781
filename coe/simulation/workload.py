"""What is simulated: experts with their sizes, and requests with their times and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from coe.errors import ConfigError
from coe.scheduler import Residency

MOST_REQUESTS: Final = 10_000_000
MOST_TOKENS: Final = 10_000_000
"""Most tokens of a prompt or of an answer."""
MOST_EXPERTS: Final = 100_000
MOST_BYTES: Final = 2**60
"""Most bytes of an expert or a device, and most bytes per second."""
LONGEST_S: Final = 1e9
"""Largest time of a request, in seconds from the first."""


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival.

    Attributes:
        residencies: the residencies that requests need.
        bytes_of: weights -> their bytes.
        at_s: when each request arrives, from 0 on, never decreasing.
        wants: the index in `residencies` of each request.
        prompt_tokens, new_tokens: of each request.
    """

    residencies: Sequence[Residency]
    bytes_of: Mapping[str, int]
    at_s: Sequence[float]
    wants: Sequence[int]
    prompt_tokens: Sequence[int]
    new_tokens: Sequence[int]

    def __len__(self) -> int:
        """Requests."""
        return len(self.at_s)

    @cached_property
    def shares(self) -> dict[str, float]:
        """Weights -> the share of the requests that need them."""
        counts = dict.fromkeys(self.bytes_of, 0)
        for index in self.wants:
            for name in self.residencies[index]:
                counts[name] += 1
        return {name: count / len(self) for name, count in counts.items()}

    def at_rate(self, per_s: float) -> Workload:
        """The same requests, arriving `per_s` a second on average."""
        span_s = self.at_s[-1] - self.at_s[0]
        if span_s <= 0:
            raise ConfigError("all requests arrive at the same time: their rate cannot be changed")
        factor = len(self) / span_s / per_s
        return Workload(
            self.residencies,
            self.bytes_of,
            [at_s * factor for at_s in self.at_s],
            self.wants,
            self.prompt_tokens,
            self.new_tokens,
        )

    def of(self, names: frozenset[str]) -> Workload:
        """The requests whose residency is one of `names`, by its first weights."""
        kept = [i for i, index in enumerate(self.wants) if self.residencies[index][0] in names]
        return Workload(
            self.residencies,
            self.bytes_of,
            [self.at_s[i] for i in kept],
            [self.wants[i] for i in kept],
            [self.prompt_tokens[i] for i in kept],
            [self.new_tokens[i] for i in kept],
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """A device and what its copies and answers take.

    Attributes:
        device_bytes: bytes for weights.
        bytes_per_s: bandwidth of loads from host memory, one at a time.
        load_fixed_s: seconds of each load beside its bytes.
        prompt_tokens_per_s: of the prompts of one expert, which it reads one after the other.
        new_tokens_per_s: of one request, alone or in a batch.
        places: requests that one expert runs at once.
        shared: experts at work at the same time share the compute equally; else each has all of it.
        prefill_tokens: tokens of prompts that an expert reads between two tokens of its answers.
        host_bytes: for copies of weights in host memory, where none is at first; None: all weights are there.
        disk_bytes_per_s: bandwidth of reads into host memory, one at a time.
    """

    device_bytes: int
    bytes_per_s: float
    load_fixed_s: float = 0.0
    prompt_tokens_per_s: float = 10_000.0
    new_tokens_per_s: float = 100.0
    places: int = 32
    shared: bool = True
    prefill_tokens: int = 256
    host_bytes: int | None = None
    disk_bytes_per_s: float = 3e9

    def __post_init__(self) -> None:
        _within("device bytes", self.device_bytes, 1, MOST_BYTES)
        _within("bandwidth (bytes per second)", self.bytes_per_s, 1, MOST_BYTES)
        _within("fixed seconds of a load", self.load_fixed_s, 0, 1e6)
        _within("prompt tokens per second", self.prompt_tokens_per_s, 1e-3, 1e9)
        _within("new tokens per second", self.new_tokens_per_s, 1e-3, 1e9)
        _within("places of an expert", self.places, 1, 1_000_000)
        _within("prompt tokens between two new ones", self.prefill_tokens, 1, MOST_TOKENS)
        if self.host_bytes is not None:
            _within("host bytes", self.host_bytes, 1, MOST_BYTES)
        _within("disk bandwidth (bytes per second)", self.disk_bytes_per_s, 1, MOST_BYTES)

    def load_s(self, size_bytes: int) -> float:
        """Seconds of a load."""
        return size_bytes / self.bytes_per_s + self.load_fixed_s

    @property
    def reading_share(self) -> float:
        """Share of its compute that an expert reads prompts with, while there are some and answers too."""
        read_s = self.prefill_tokens / self.prompt_tokens_per_s
        return min(1 - 1e-9, max(1e-9, read_s / (read_s + 1 / self.new_tokens_per_s)))

    def prompt_s(self, tokens: int) -> float:
        """Seconds of reading a prompt, with all of the compute."""
        return tokens / self.prompt_tokens_per_s

    def new_s(self, tokens: int) -> float:
        """Seconds of the answer after the first token, with all of the compute."""
        return tokens / self.new_tokens_per_s

    def check(self, workload: Workload) -> None:
        """Raises ConfigError if a residency does not fit the device."""
        for residency in workload.residencies:
            size_bytes = sum(workload.bytes_of[name] for name in residency)
            if size_bytes > self.device_bytes:
                raise ConfigError(
                    f"{' + '.join(residency)} has {size_bytes:,} bytes, more than the device ({self.device_bytes:,}): "
                    "raise --device-bytes, or choose smaller experts"
                )


def synthetic_experts(count: int, size_bytes: int) -> tuple[list[Residency], dict[str, int]]:
    """`count` experts of one size, each its own residency."""
    _within("number of experts", count, 1, MOST_EXPERTS)
    _within("bytes of an expert", size_bytes, 1, MOST_BYTES)
    width = len(str(count - 1))
    names = [f"expert-{number:0{width}}" for number in range(count)]
    return [(name,) for name in names], dict.fromkeys(names, size_bytes)


def _within(what: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{what}: {value:,} is not between {low:,} and {high:,}")
