"""`coe encoder`: distill a fast encoder from a good one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coe.cli.flags import out_option
from coe.cli.output import JsonTarget, console, emit_json, stdout_console

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Distill fast encoders for routers."""


@app.command()
def distill(
    out: Annotated[Path, out_option("Folder to write, for `--encoder`.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="NAME",
            help="Encoder to distill: minilm, or the folder of a sentence-transformers model.",
        ),
    ] = "minilm",
    dim: Annotated[int, typer.Option("--dim", metavar="N", help="Dimension of the new vectors.")] = 256,
    outcomes: Annotated[
        list[Path] | None,
        typer.Option(
            "--outcomes", metavar="FILE", help="Fit the vectors to the prompts of this outcome table. Repeatable."
        ),
    ] = None,
    json: JsonTarget = None,
) -> None:
    """Distill a static encoder: a text is the mean of its tokens' vectors, which takes a fraction of a millisecond.

    With --outcomes the vectors are fitted to those prompts: on similar prompts they are closer to the model in --from.
    Give the rows that routers are trained on, without the rows that they are evaluated on.
    """
    from coe.cli.router.report import encoding_progress
    from routers.encoders.build import CachedEncoder, SentenceTransformerEncoder, build_encoder
    from routers.encoders.distill import distill as distill_encoder
    from routers.errors import InvalidEncoder
    from routers.outcomes.table import OutcomeTable

    teacher = build_encoder(source)
    if not isinstance(teacher, SentenceTransformerEncoder):
        raise InvalidEncoder(f"encoder {source!r} is no sentence-transformers model: there is nothing to distill in it")
    texts = [prompt for path in outcomes or () for prompt in OutcomeTable.read(path).prompts]
    with encoding_progress() as on_progress:
        targets = CachedEncoder(teacher, on_progress=on_progress)
        made = distill_encoder(teacher, out, dim=dim, texts=texts, targets=targets, on_progress=on_progress)
    if json != "-":
        stdout_console().print(f"wrote {out}: {made.dim} dimensions, {made.digest[:19]}", highlight=False)
        console.print(f"use it: coe router train --encoder {out} ...", highlight=False)
    emit_json({"folder": str(out), "dim": made.dim, "digest": made.digest, "source": source, "texts": len(texts)}, json)
