"""The tables of the runs: accuracy by family and split, loss, tokens, seconds, operations, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Final

import numpy as np
import numpy.typing as npt

from examples.zoo.families import Split
from examples.zoo.latent.benches import ALL_BENCHES
from examples.zoo.latent.methods import ABLATIONS, AGGREGATE_TRAINED, METHODS
from examples.zoo.latent.results import Result

_DRAWS: Final = 4000
_ORDER: Final = [*METHODS, *ABLATIONS]
_COSTS: Final = ("loss", "tokens in", "out", "GFLOP", "seconds", "trained", "minutes of training")

Floats = npt.NDArray[np.float64]


def report(results: Sequence[Result], *, against: str | None = None) -> str:
    """A table of each bench, with the difference of every method to the method `against` below it.

    Args:
        against: by default the trained aggregator, where it was run, else the first method of the bench.
    """
    parts = []
    for bench in dict.fromkeys(result.bench for result in results):
        by_method = grouped(result for result in results if result.bench == bench)
        reference = _reference(by_method, against)
        lines = list(differences(by_method, reference)) if reference else []
        parts.append("\n".join([f"### {bench}", "", about(bench, by_method), "", table(by_method), "", *lines]))
    return "\n".join(parts).rstrip()


def grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by method, in the order of the methods; those of one method by seed."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda each: (_ORDER.index(each.method), each.seed)):
        found.setdefault(result.method, []).append(result)
    return found


def about(bench: str, by_method: Mapping[str, Sequence[Result]]) -> str:
    """One line with members, rows and seeds."""
    planned, some = ALL_BENCHES[bench], next(iter(by_method.values()))[0]
    rows = ", ".join(f"{n} {split}" for split, n in _rows(some).items())
    seeds = sorted({result.seed for found in by_method.values() for result in found})
    return (
        f"Members {', '.join(planned.members)}; {planned.steps} steps of {planned.batch} rows; scored rows: {rows}; "
        f"seeds {', '.join(map(str, seeds))}. Accuracy in percent, means over seeds."
    )


def table(by_method: Mapping[str, Sequence[Result]]) -> str:
    """A markdown table; a method that trains nothing has one seed."""
    some = next(iter(by_method.values()))[0]
    families = list(some.scores[str(Split.TEST)])
    splits = [split for split in (Split.TEST, Split.FRESH) if str(split) in some.scores]
    columns = [f"{family}, {split}" for split in splits for family in families]
    columns += [f"all, {split}" for split in splits if len(families) > 1]
    head = ["method", "seeds", *columns, *_COSTS]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for method, found in by_method.items():
        cells = [_percent(r.accuracy(split, family) for r in found) for split in splits for family in families]
        cells += [_percent(r.accuracy(split) for r in found) for split in splits if len(families) > 1]
        lines.append(f"| {' | '.join([method, str(len(found)), *cells, *_costs(found)])} |")
    return "\n".join(lines)


def differences(by_method: Mapping[str, Sequence[Result]], reference: str) -> Iterator[str]:
    """Difference of every method to `reference` in points, with the 95% interval, on each held-out split."""
    ours = by_method[reference]
    for method, found in by_method.items():
        parts = []
        for split in (Split.TEST, Split.FRESH):
            if method != reference and str(split) in ours[0].scores:
                pairs = paired(found, ours, split)
                low, high = interval(pairs)
                parts.append(f"{split} {100 * pairs.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        if parts:
            yield f"- {method} less {reference}: {', '.join(parts)}"


def paired(ours: Sequence[Result], theirs: Sequence[Result], split: Split) -> Floats:
    """(n_seeds, n_rows) differences in score, row by row of the split, of the seeds that both have.

    A method with one seed trains nothing: it is compared with every seed of the other.
    """
    a, b = _by_seed(ours, split), _by_seed(theirs, split)
    if len(a) == 1:
        a = dict.fromkeys(b, next(iter(a.values())))
    elif len(b) == 1:
        b = dict.fromkeys(a, next(iter(b.values())))
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError(f"{ours[0].method} and {theirs[0].method} have no seed in common")
    return np.stack([a[seed] - b[seed] for seed in seeds])


def interval(pairs: Floats, *, draws: int = _DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the mean of (n_seeds, n_rows) differences: seeds and rows are both resampled."""
    rng = np.random.default_rng(seed)
    n_seeds, n_rows = pairs.shape
    means = np.empty(draws)
    for i in range(draws):
        some = pairs[rng.integers(n_seeds, size=n_seeds)].mean(axis=0)
        means[i] = some[rng.integers(n_rows, size=n_rows)].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _by_seed(results: Sequence[Result], split: Split) -> dict[int, Floats]:
    return {
        result.seed: np.array([score for scores in result.scores[str(split)].values() for score in scores])
        for result in results
    }


def _reference(by_method: Mapping[str, Sequence[Result]], against: str | None) -> str | None:
    wanted = [AGGREGATE_TRAINED, next(iter(ABLATIONS))] if against is None else [against]
    return next((name for name in wanted if name in by_method), None if against else next(iter(by_method)))


def _rows(result: Result) -> dict[str, int]:
    return {split: sum(map(len, found.values())) for split, found in result.scores.items()}


def _costs(found: Sequence[Result]) -> list[str]:
    trained = [result.training for result in found if result.training is not None]
    losses = [training.loss for training in trained if training.loss is not None]
    seconds = [result.seconds for result in found if result.seconds is not None]
    return [
        f"{fmean(losses):.3f}" if losses else "",
        f"{fmean(result.prompt_tokens for result in found):.0f}",
        f"{fmean(result.completion_tokens for result in found):.1f}",
        f"{fmean(result.flops for result in found) / 1e9:.1f}",
        f"{fmean(seconds):.2f}" if seconds else "",
        f"{trained[0].parameters / 1e6:.2f}M" if trained else "",
        f"{fmean(training.seconds for training in trained) / 60:.1f}" if trained else "",
    ]


def _percent(shares: Iterable[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{100 * fmean(known):.1f}" if known else ""
