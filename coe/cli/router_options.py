"""What the router commands share: their flags, and how a table, settings and an encoder are read from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.output import console

if TYPE_CHECKING:
    from routers.encoders import Encoder
    from routers.outcomes import OutcomeTable

Outcomes = Annotated[Path, typer.Option("--outcomes", help="Outcome table: .parquet, .jsonl or .csv.")]
Experts = Annotated[str | None, typer.Option("--experts", metavar="A,B,C", help="Only these experts.")]
Prices = Annotated[Path | None, typer.Option("--prices", help="JSON with USD per million tokens of each expert.")]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="Column that holds the categories; by default `domain`.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
EncoderName = Annotated[str, typer.Option("--encoder", help="`minilm`, `hashing[:dim]`, or the folder of a model.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the router; may be repeated.")
]
Require = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="FIGURE:LOW", help="Exit with 1 unless FIGURE >= LOW; may be repeated."),
]
Dial = Annotated[float, typer.Option("--dial", min=0, help="Quality (0 to 1) given up per USD.")]


def table_of(path: Path, experts: str | None, prices: Path | None) -> OutcomeTable:
    """The outcome table of a file: these experts only, at these prices."""
    from routers.outcomes import OutcomeTable
    from routers.prices import read_prices

    table = OutcomeTable.read(path)
    names = names_of(experts)
    if names is not None:
        table = table.with_experts(names)
    return table if prices is None else table.with_prices(read_prices(prices))


def names_of(text: str | None) -> list[str] | None:
    """The names in a list that is separated by commas."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def settings_of_kinds(
    kinds: Sequence[str], given: Sequence[str], label_column: str | None, seed: int
) -> dict[str, dict[str, Any]]:
    """kind -> settings. A setting goes to the kinds that have it; where none has, all get it, and refuse it."""
    from routers.build import settings_of

    stated = dict(map(_setting, given))
    if label_column is not None:
        stated["label_column"] = label_column
    known = {kind: settings_of(kind) for kind in kinds}
    nowhere = {name for name in stated if not any(name in settings for settings in known.values())}
    return {
        kind: {
            **({"seed": seed} if "seed" in settings else {}),
            **{name: value for name, value in stated.items() if name in settings or name in nowhere},
        }
        for kind, settings in known.items()
    }


def _setting(text: str) -> tuple[str, Any]:
    import json

    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a bare word


def encoder_of(name: str, on_progress: Any) -> Encoder:
    """The encoder of that name, its vectors kept on disk."""
    from routers.encoders import CachedEncoder, build_encoder

    return CachedEncoder(build_encoder(name), on_progress=on_progress)


def tell_of_truncation(encoder: Encoder, texts: Sequence[str]) -> None:
    """Say on the console how many prompts the encoder does not read to their end."""
    cut = int(encoder.truncated(texts).sum())
    if cut:
        console.print(
            f"[yellow]note:[/] {cut:,} of {len(texts):,} prompts are longer than the {encoder.max_tokens} tokens that "
            f"encoder {encoder.name} reads; the router does not see their end"
        )
