"""The figures of `examples.zoo.two_skills`: shares with their intervals, tokens, seconds, differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from examples.zoo.families import Row
from registry.profiles import Measure
from registry.strengths import wilson
from routers.evaluation.metrics import paired_bootstrap


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer of a method.

    Attributes:
        score: in [0, 1].
        experts: of the decision.
        prompt_tokens, completion_tokens: of all expert calls; 0 for a method that makes no calls of its own.
    """

    text: str
    score: float
    experts: tuple[str, ...]
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Method:
    """A method's answers by family; `seconds` is the median of a query asked alone."""

    name: str
    by_family: dict[str, list[Answered]] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def everything(self) -> list[Answered]:
        """The answers of all families."""
        return [answered for found in self.by_family.values() for answered in found]

    @property
    def tokens(self) -> tuple[float, float]:
        """Mean prompt and completion tokens per query."""
        everything = self.everything
        read, written = sum(a.prompt_tokens for a in everything), sum(a.completion_tokens for a in everything)
        return read / len(everything), written / len(everything)

    def share(self, family: str | None = None) -> tuple[float, float, float]:
        """Share of right answers and its 95% Wilson interval, of one family or of all."""
        scores = [a.score for a in (self.everything if family is None else self.by_family[family])]
        measure = Measure(sum(scores), len(scores))
        return measure.accuracy, *wilson(measure)

    def wrong(self, asked: Mapping[str, Sequence[Row]], n: int) -> Iterator[str]:
        """The first `n` wrong answers of each family, as text."""
        for family, found in self.by_family.items():
            pairs = [(row, a) for row, a in zip(asked[family], found, strict=True) if a.score < 1]
            for row, a in pairs[:n]:
                yield f"  {family} ({', '.join(a.experts)}): {row.prompt}"
                yield f"    right: {row.answer}\n    said:  {a.text!r}"


def table(methods: Mapping[str, Method]) -> str:
    """A markdown table of shares in percent, tokens and seconds."""
    families = list(next(iter(methods.values())).by_family)
    columns = ["method", *families, "all (95%)", "tokens in", "out", "seconds"]
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for name, method in methods.items():
        share, low, high = method.share()
        read, written = method.tokens
        cells = [f"{method.share(family)[0]:.1%}" for family in families]
        cells += [f"{share:.1%} ({low:.1%}-{high:.1%})"]
        cells += [f"{read:.0f}", f"{written:.1f}"] if read else ["", ""]
        cells += ["" if method.seconds is None else f"{method.seconds:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def contrasts(methods: Mapping[str, Method], ours: str) -> list[str]:
    """Difference in accuracy between `ours` and each of the others, with the 95% paired bootstrap interval."""
    scores = {name: np.array([a.score for a in method.everything]) for name, method in methods.items()}
    lines = []
    for other in scores if ours in scores else ():
        if other != ours:
            low, high = paired_bootstrap(scores[ours], scores[other])
            gain = 100 * float((scores[ours] - scores[other]).mean())
            lines.append(f"{ours} less {other}: {gain:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")
    return lines


def summary(methods: Mapping[str, Method], asked: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The figures as JSON values, with every row and its answer."""
    return {
        name: {
            "share": dict(zip(("all", "low", "high"), method.share(), strict=True)),
            "by_family": {
                family: dict(zip(("share", "low", "high"), method.share(family), strict=True))
                for family in method.by_family
            },
            "tokens": dict(zip(("prompt", "completion"), method.tokens, strict=True)),
            "seconds": method.seconds,
            "experts": {
                family: {" + ".join(experts): n for experts, n in Counter(a.experts for a in found).most_common()}
                for family, found in method.by_family.items()
            },
            "answers": {
                family: [
                    {"prompt": row.prompt, "right": row.answer, **asdict(a)}
                    for row, a in zip(asked[family], found, strict=True)
                ]
                for family, found in method.by_family.items()
            },
        }
        for name, method in methods.items()
    }
