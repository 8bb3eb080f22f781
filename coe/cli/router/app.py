"""`coe router train | update | cv | eval | compare`: train routers and measure them."""

from __future__ import annotations

import typer

from coe.cli.router.compare import compare
from coe.cli.router.cv import cv
from coe.cli.router.eval import evaluate
from coe.cli.router.train import train
from coe.cli.router.update import update

app = typer.Typer(no_args_is_help=True)
app.command("train")(train)
app.command("cv")(cv)
app.command("eval")(evaluate)
app.command("update")(update)
app.command("compare")(compare)
