"""Write the families as tasks for `coe eval`: `python -m examples.zoo.tasks`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml

from examples.zoo.families import FAMILIES, Family, Row, Split
from registry.storage import atomic_path


def write_task(family: Family, rows: Mapping[str, Row], folder: Path) -> Path:
    """Write `<family>.yaml` and `<family>.jsonl` into `folder`; ids are prefixed by the family. Returns the YAML."""
    data = [
        {"id": f"{family.name}-{name}", "prompt": row.prompt, "answer": row.answer, **row.extras}
        for name, row in rows.items()
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
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(__file__).parent / "tasks",
    split: Annotated[list[Split], typer.Option(help="Split of templates and words; repeatable.")] = [  # noqa: B006
        Split.TRAIN,
        Split.VALID,
    ],
    seed: Annotated[int, typer.Option(help="Seed of the rows; the adapters were trained on another.")] = 1,
    n: Annotated[int, typer.Option(min=1, help="Rows per family and split.")] = 20,
) -> None:
    """Write one task per family; the defaults give the tasks that the shipped outcomes were measured on."""
    for family in FAMILIES.values():
        rows = {
            f"{which}-{seed}-{i:03d}": row for which in split for i, row in enumerate(family.rows(which, n, seed=seed))
        }
        typer.echo(write_task(family, rows, out))


if __name__ == "__main__":
    typer.run(main)
