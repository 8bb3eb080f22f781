"""Write the families as tasks for `coe eval`: `python -m examples.zoo.tasks --split valid --n 40 --out DIR`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from examples.zoo.families import FAMILIES, Family, Row, Split
from registry.files import atomic_path


def write_task(family: Family, rows: Sequence[Row], folder: Path, *, prefix: str) -> Path:
    """Write `<family>.yaml` and `<family>.jsonl` into `folder`; ids begin with `prefix`. Returns the YAML."""
    data = [
        {"id": f"{prefix}-{family.name}-{i:03d}", "prompt": row.prompt, "answer": row.answer, **row.extras}
        for i, row in enumerate(rows)
    ]
    task = {
        "name": family.name,
        "description": family.about,
        "data": f"{family.name}.jsonl",
        "grader": family.grader,
        "grader_options": dict(family.grader_options),
        "domain": family.name,
        "max_tokens": family.max_tokens,
    }
    with atomic_path(folder / f"{family.name}.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    with atomic_path(folder / f"{family.name}.yaml") as path:
        path.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return folder / f"{family.name}.yaml"


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    split: Annotated[Split, typer.Option(help="Which templates and words.")] = Split.TEST,
    seed: Annotated[int, typer.Option()] = 1,
    n: Annotated[int, typer.Option(min=1, help="Rows a family.")] = 40,
) -> None:
    """Write one task a family."""
    for family in FAMILIES.values():
        typer.echo(write_task(family, family.rows(split, n, seed=seed), out, prefix=f"{split}-{seed}"))


if __name__ == "__main__":
    typer.run(main)
