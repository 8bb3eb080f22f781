"""`coe latent probe | train`: compositions that exchange hidden states."""

from __future__ import annotations

import typer

from coe.cli.latent.probe import probe
from coe.cli.latent.train import train

app = typer.Typer(no_args_is_help=True)
app.command("probe")(probe)
app.command("train")(train)


@app.callback()
def _group() -> None:
    """Find what experts' hidden states hold, and train compositions that exchange them."""
