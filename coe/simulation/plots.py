"""A plot of policies over numbers of experts. No display is needed.

Curves differ by dash and marker as well as by colour, so that a greyscale print is readable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from routers.evaluation.plots import STYLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS: Final = (
    ("ttft_p95_s", "time to the first token, 95th percentile (s)"),
    ("loads", "loads per request"),
    ("goodput_per_s", "requests within the limit per second"),
)


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG, atomically: a panel for each figure, a curve for each policy.

    Args:
        records: rows with their number of `experts`.
    """
    from registry.storage import atomic_path

    with atomic_path(path) as staged:
        figure(records).savefig(staged, format="png", dpi=150)


def figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The plot as a matplotlib figure."""
    from matplotlib.figure import Figure

    found = Figure(figsize=(15, 4.5), layout="constrained")
    for axes, (field, label) in zip(found.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for number, policy in enumerate(dict.fromkeys(record["policy"] for record in records)):
            rows = sorted((r for r in records if r["policy"] == policy), key=lambda r: r["experts"])
            values = [r[field] / r["requests"] if field == "loads" else r[field] for r in rows]
            colour, dash, marker = STYLES[number % len(STYLES)]
            axes.plot(
                [r["experts"] for r in rows], values, color=colour, linestyle=dash, marker=marker, ms=5, label=policy
            )
        axes.set(xscale="log", xlabel="experts", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    found.axes[0].legend()
    return found
