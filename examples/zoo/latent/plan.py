"""The runs of `make latent` and `make latent-ablations`: benches x methods x seeds, in the order of their worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from examples.zoo.latent.benches import ALL_BENCHES, BENCHES, CODES_BENCH, Bench
from examples.zoo.latent.methods import ABLATIONS, METHODS, Method, Trains
from registry.storage import coe_home

SEEDS: Final = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Run:
    """One method on one bench with one seed, of the training rows and of the first weights."""

    bench: Bench
    method: Method
    seed: int

    @property
    def id(self) -> str:
        """`bench/method/seed`: the folder of the run."""
        return f"{self.bench.name}/{self.method.name}/{self.seed}"


def runs_folder() -> Path:
    """Where runs are kept by default."""
    return coe_home() / "zoo" / "latent"


def plan(
    benches: Sequence[str] = (), methods: Sequence[str] = (), seeds: Sequence[int] = (), *, ablations: bool = False
) -> list[Run]:
    """The chosen runs; all of a kind if none is named. First all methods with the first seed, bench by bench.

    A method that trains nothing runs with the first seed only: its answers are the same with every seed.
    """
    known = ABLATIONS if ablations else METHODS
    chosen = [known[name] for name in methods or known]
    on = [ALL_BENCHES[name] for name in benches or ([CODES_BENCH.name] if ablations else BENCHES)]
    wanted = tuple(seeds) or (SEEDS[:1] if ablations else SEEDS)
    return [run for seed in wanted for run in _of_seed(on, chosen, seed, first=seed == wanted[0])]


def _of_seed(benches: Sequence[Bench], methods: Sequence[Method], seed: int, *, first: bool) -> Iterator[Run]:
    for bench in benches:
        for method in methods:
            if (first or method.trains is not Trains.NOTHING) and method.suits(bench):
                yield Run(bench, method, seed)
