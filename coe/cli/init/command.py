"""`coe init`: an experts file and a configuration for models that exist, ready for `coe ask` and `coe chat`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.flags import CONFIG_FILE, ApiKeyEnv, out_option
from coe.cli.output import JsonTarget, console, emit_json
from coe.cli.progress import progress, status

if TYPE_CHECKING:
    from coe.cli.config.check import Findings
    from coe.cli.init.found import Found

EXPERTS_FILE = "experts.yaml"


def init(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER|GGUF|REPO|URL]...",
            help="Model folders, LoRA adapter folders, GGUF files, a folder of these, repositories on the Hugging Face "
            "hub (org/name), URLs of OpenAI-compatible endpoints. Without any, a template.",
        ),
    ] = None,
    out: Annotated[Path, out_option("Folder to write to.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    api_key_env: ApiKeyEnv = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Seconds to wait for each endpoint.")
    ] = 10.0,
    json: JsonTarget = None,
) -> None:
    """Write experts.yaml and coe.yaml for models that you have, with comments.

    Nothing is downloaded. The headers of local files are read, endpoints are asked for their models. The base of an
    adapter is found among the arguments, beside it, under $COE_HOME/models, or named as its repository.
    """
    from coe.cli.init.files import config_text, experts_text, template_texts
    from coe.cli.init.sources import inspect_sources

    files = [out / EXPERTS_FILE, out / CONFIG_FILE]
    with _os_errors_translated():
        existing = _existing(files, json)
    if existing and not force:
        raise typer.BadParameter(f"{' and '.join(existing)} exist: choose another --out, or give --force")
    found: list[Found] = []
    notes: list[str] = []
    with _os_errors_translated():
        if sources:
            with status("reading the models"):
                found, notes = inspect_sources(sources, api_key_env=api_key_env, timeout_s=timeout)
            texts = experts_text(found, out), config_text(found, EXPERTS_FILE)
        else:
            texts = template_texts(EXPERTS_FILE)
        _write(files, texts)
    checked = _check(out / CONFIG_FILE)
    for note in notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    _show(out, files, checked, template=not sources)
    emit_json(
        {"files": files, "experts": [one.entry for one in found], "notes": notes, "problems": checked.problems}, json
    )
    if checked.problems:
        raise typer.Exit(1)


def _existing(files: list[Path], json: str | None) -> list[str]:
    """Those of the files that exist. Refuses folders in their place, and JSON written over one of them."""
    if folders := [str(file) for file in files if file.is_dir()]:
        raise typer.BadParameter(f"{' and '.join(folders)} is a folder: choose another --out")
    if json not in (None, "-") and os.path.realpath(str(json)) in map(os.path.realpath, files):
        raise typer.BadParameter(f"{json} is one of the files to write: choose another path", param_hint="'--json'")
    return [str(file) for file in files if os.path.lexists(file)]


@contextmanager
def _os_errors_translated() -> Iterator[None]:
    from coe.errors import ConfigError

    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or "a file"
        raise ConfigError(f"{place} cannot be read or written: {error.strerror or error}") from error


def _write(files: list[Path], texts: tuple[str, str]) -> None:
    from registry.storage import atomic_path

    for file, text in zip(files, texts, strict=True):
        with atomic_path(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _check(config: Path) -> Findings:
    from coe.cli.config.check import check_config
    from coe.cli.registry import HashingProgress

    with progress(transient=True) as shown:
        hashing = HashingProgress(shown)
        return check_config(config, on_expert=hashing.expert, on_bytes=hashing.bytes)


def _show(out: Path, files: list[Path], checked: Findings, *, template: bool) -> None:
    from coe.cli.config.command import print_problem

    for file in files:
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
    for problem in checked.problems:
        print_problem(problem, "[bold red]wrong:[/]")
    for note in checked.notes:
        print_problem(note, "[yellow]note:[/]")
    if checked.problems:
        return
    config = shlex.quote(str(out / CONFIG_FILE))
    if template:
        text = f"The one expert so far repeats the question. Replace it in {files[0]}, then: coe config check {config}"
    else:
        text = f"{len(checked.experts)} experts. Try them: coe chat --config {config}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
