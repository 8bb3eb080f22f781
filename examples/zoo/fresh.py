"""Score the shipped adapters on the split that was not used for any choice: `python -m examples.zoo.fresh`.

Prints a markdown table: each adapter on its own family, and the rival, one adapter for all, on every family.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer

from examples.zoo.families import FAMILIES, Family, Row, Split
from examples.zoo.plan import ADAPTERS, GENERALIST, RIVAL
from examples.zoo.scoring import answers, grades
from examples.zoo.train import folder_of, load_base

_SEED: Final = 9001


def main(
    rows: Annotated[int, typer.Option(min=1, help="Rows per family.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the rows.")] = _SEED,
    bare: Annotated[bool, typer.Option("--base", help="Score each adapter's base too.")] = False,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Score adapters and rival, greedy, on rows of the split FRESH, and print a table."""
    import torch

    torch.set_num_threads(threads)
    asked = {family.name: family.rows(Split.FRESH, rows, seed=seed) for family in FAMILIES.values()}
    shares: dict[str, list[float]] = {name: [] for name in asked}
    rival, tokenizer = _load(GENERALIST.base, RIVAL)
    for name, family in FAMILIES.items():
        typer.echo(f"scoring {name}", err=True)
        model, own_tokenizer = _load(ADAPTERS[name].base, name)
        shares[name].append(_share(model, own_tokenizer, family, asked[name]))
        if bare:
            with model.disable_adapter():
                shares[name].append(_share(model, own_tokenizer, family, asked[name]))
        shares[name].append(_share(rival, tokenizer, family, asked[name]))
    typer.echo(table(shares, ("adapter", "base", "rival") if bare else ("adapter", "rival")))


def table(shares: dict[str, list[float]], columns: Sequence[str]) -> str:
    """A markdown table of shares in [0, 1], one line per family, with their means at the end."""
    means = [sum(column) / len(shares) for column in zip(*shares.values(), strict=True)]
    head = [f"| family | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    body = [f"| {name} | {' | '.join(f'{x:.1%}' for x in row)} |" for name, row in {**shares, "mean": means}.items()]
    return "\n".join(head + body)


def _load(base: str, adapter: str) -> tuple[Any, Any]:
    """A base with a shipped adapter on it, and its tokenizer."""
    from peft import PeftModel

    model, tokenizer = load_base(base)
    return PeftModel.from_pretrained(model, str(folder_of(adapter))).eval(), tokenizer


def _share(model: Any, tokenizer: Any, family: Family, rows: Sequence[Row]) -> float:
    said = answers(model, tokenizer, rows, max_tokens=family.max_tokens)
    return sum(grades(family, rows, said)) / len(rows)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
