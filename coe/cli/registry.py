"""`coe registry`: apply a file of experts, add one, list, show, verify, compress, remove."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.compress.command import compress
from coe.cli.expert_profile import print_profile, profile_document
from coe.cli.flags import ApiKeyEnv
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.progress import Progress, Task, progress
from coe.cli.registry_url import RegistryUrl

if TYPE_CHECKING:
    from registry.reconcile import RegistryPlan
    from registry.spec import ExpertSpec
    from registry.store import Registry

app = typer.Typer(no_args_is_help=True)

_ACTION_STYLES = {"add": "[green]+ add[/]", "update": "[yellow]~ update[/]", "remove": "[red]- remove[/]"}


@app.command("apply")
def apply_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Experts file (YAML).")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file and print the plan; change nothing.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Also remove experts that are not in the file.")] = False,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Register the experts of a file: add, update, and with --prune remove; a second run changes nothing."""
    from registry.documents import load_document
    from registry.reconcile import apply, plan

    document = load_document(file)
    with _open(registry) as store:
        with _hashing() as bar:
            planned = plan(document, store, prune=prune, on_expert=bar.expert, on_bytes=bar.bytes)
        _print_plan(planned)
        applied = {} if dry_run else {spec.name: spec for spec in apply(planned, store)}
        version = store.snapshot().version
    if dry_run:
        console.print("dry run: nothing was changed")
    steps = [
        _step_row(step.action, step.name, applied.get(step.name, step.spec), step.changes) for step in planned.steps
    ]
    emit_json({"registry_version": version, "applied": not dry_run, "steps": steps, "warnings": planned.warnings}, json)


@app.command()
def add(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the expert.")],
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="SOURCE",
            help="Folder, GGUF file, home://..., hf://org/name[@revision], or https://.../v1.",
        ),
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="model, adapter, remote or embedding; for composed, use `coe registry apply`.",
        ),
    ] = "model",
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="NAME", help="Engine that serves it, where the source does not say."),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option("--tool-call-parser", metavar="NAME", help="vLLM's parser of its tool calls, such as hermes."),
    ] = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option("--reasoning-parser", metavar="NAME", help="vLLM's parser of its reasoning, such as qwen3."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="NAME", help="Base expert of an adapter.")] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of an hf:// source.")
    ] = None,
    delta_base: Annotated[
        str | None,
        typer.Option("--delta-base", metavar="NAME", help="Model that a delta is the difference from."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Name of the model at a remote endpoint.")
    ] = None,
    api_key_env: ApiKeyEnv = None,
    context_length: Annotated[
        int | None,
        typer.Option("--context-length", metavar="N", help="Tokens of context; required for remote experts."),
    ] = None,
    input_usd_per_mtok: Annotated[
        float | None, typer.Option("--input-usd-per-mtok", metavar="USD", help="Price per million prompt tokens.")
    ] = None,
    output_usd_per_mtok: Annotated[
        float | None, typer.Option("--output-usd-per-mtok", metavar="USD", help="Price per million generated tokens.")
    ] = None,
    description: Annotated[
        str, typer.Option("--description", metavar="TEXT", help="What it is good at, in a line.")
    ] = "",
    licence: Annotated[
        str | None, typer.Option("--licence", metavar="NAME", help="Licence, where the files state none.")
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option("--capability", metavar="NAME", help="What it can do beside chat, such as tools. Repeatable."),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", metavar="NAME", help="Tag to select it by. Repeatable.")
    ] = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Register one expert."""
    from registry.describe import describe
    from registry.sources import absolute_source

    prices = {"input_usd_per_mtok": input_usd_per_mtok, "output_usd_per_mtok": output_usd_per_mtok}
    stated = {key: value for key, value in prices.items() if value is not None}
    draft = _draft(
        name=name, kind=kind, source=absolute_source(source, Path.cwd()), engine=engine, base=base, revision=revision,
        delta_base=delta_base,
        tool_call_parser=tool_call_parser, reasoning_parser=reasoning_parser,
        model=model, api_key_env=api_key_env, context_length=context_length, price=stated or None,
        description=description, licence=licence, tags=tag or [], capabilities=capability or ["chat"],
    ).stated()  # fmt: skip
    with _open(registry) as store, _hashing() as bar:
        bar.expert(name)
        experts = store.snapshot().experts
        base_spec = store.get(draft.base) if draft.base else None
        spec = store.add(describe(draft, base_spec, experts=experts, on_bytes=bar.bytes))
    console.print(f"registered [bold]{spec.ref}[/]")
    emit_json(spec, json)


@app.command("list")
def list_experts(registry: RegistryUrl = None, json: JsonTarget = None) -> None:
    """List the experts."""
    with _open(registry) as store:
        specs = store.list()
    if json != "-":
        empty = "no expert is registered; `coe registry apply FILE` registers those of a file"
        stdout_console().print(_table(specs) if specs else empty)
    emit_json(specs, json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME or NAME@VERSION.")],
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Show an expert: the facts of its files, and its strengths and weaknesses where they were measured."""
    with _open(registry) as store:
        spec = store.get(name)
        profile = profile_document(spec, store)
    if json != "-":
        _print_spec(spec)
        print_profile(name, profile)
    emit_json({**spec.model_dump(mode="json"), "profile": profile}, json)


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Experts to check; by default all.")
    ] = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Hash the files of experts and compare them with the registered digests; exit status 1 if any differs."""
    with _open(registry) as store:
        specs = [store.get(name) for name in names] if names else store.list()
    results = [_result(spec, error) for spec, error in _verify(specs)]
    for result in results:
        said = {None: "[dim]no files here[/]", True: "[green]ok[/]", False: "[red]FAILED[/]"}[result["ok"]]
        console.print(f"{said} {result['expert']}" + (f": {_plain(result['error'])}" if result["error"] else ""))
    emit_json(results, json)
    if any(result["ok"] is False for result in results):
        raise typer.Exit(1)


app.command("compress")(compress)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Expert to remove.")],
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Remove an expert from the registry; its files stay."""
    with _open(registry) as store:
        store.remove(name)
        version = store.snapshot().version
    console.print(f"removed [bold]{name}[/]")
    emit_json({"removed": name, "registry_version": version}, json)


def _open(url: str | None) -> Registry:
    from registry.store import Registry

    return Registry(url)


def _draft(**fields: Any) -> ExpertSpec:
    """A spec from flags; every wrong flag is reported at once."""
    from pydantic import ValidationError

    from registry.documents import message_of
    from registry.errors import InvalidSpec, Problem
    from registry.spec import ExpertSpec

    try:
        return ExpertSpec.model_validate(fields)
    except ValidationError as error:
        raise InvalidSpec(
            [
                Problem(
                    "--" + str(detail["loc"][-1]).replace("_", "-") if detail["loc"] else "flags", message_of(detail)
                )
                for detail in error.errors(include_url=False)
            ]
        ) from None


class HashingProgress:
    """Progress of the expert whose files are downloaded or hashed."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._task: Task | None = None

    def expert(self, name: str, total: int = 1) -> None:
        """The next expert begins."""
        if self._task is not None:
            self._task.remove()
        self._task = self._shown.add(f"reading {name}", in_bytes=True)
        self._task.advance(0)

    def bytes(self, done: int, total: int) -> None:
        """`done` of `total` bytes of its files are hashed."""
        assert self._task is not None  # `expert` comes first
        self._task.update(completed=done, total=total)


@contextmanager
def _hashing() -> Iterator[HashingProgress]:
    with progress(transient=True) as shown:
        yield HashingProgress(shown)


def _verify(specs: Sequence[ExpertSpec]) -> Iterable[tuple[ExpertSpec, Exception | None]]:
    from registry.command_files import check_command
    from registry.digest import check_files
    from registry.errors import RegistryError
    from registry.sources import has_files, resolve

    with progress(transient=True) as shown:
        total = sum(record.size_bytes for spec in specs for record in spec.files)
        task = shown.add("verify", total, in_bytes=True)
        for spec in specs:
            task.update(name=f"verify {spec.ref}")
            try:
                if spec.server is not None:
                    check_command(spec, fresh=True, on_bytes=task.advance)
                elif has_files(spec):
                    check_files(spec, resolve(spec), fresh=True, on_bytes=task.advance)
            except RegistryError as error:
                yield spec, error
            else:
                yield spec, None


def _result(spec: ExpertSpec, error: Exception | None) -> dict[str, Any]:
    from registry.sources import has_files

    ok = (error is None) if has_files(spec) or spec.server is not None else None
    return {"expert": spec.ref, "ok": ok, "digest": spec.digest, "error": None if error is None else str(error)}


def _print_plan(planned: RegistryPlan) -> None:
    for step in planned.steps:
        if step.action != "unchanged":
            changed = [field for field in step.changes if field != "files"]
            console.print(
                f"{_ACTION_STYLES[step.action]} {step.name}" + (f" ({', '.join(changed)})" if changed else "")
            )
    for warning in planned.warnings:
        console.print(f"[yellow]warning:[/] {_plain(warning)}")
    counts = {action: sum(step.action == action for step in planned.steps) for action in (*_ACTION_STYLES, "unchanged")}
    console.print(
        f"{counts['add']} to add, {counts['update']} to update, {counts['remove']} to remove, "
        f"{counts['unchanged']} unchanged"
    )


def _step_row(action: str, name: str, spec: ExpertSpec | None, changes: Sequence[str]) -> dict[str, Any]:
    version, digest = (None, None) if spec is None else (spec.version, spec.digest)
    return {"action": action, "name": name, "version": version, "digest": digest, "changes": list(changes)}


def _table(specs: Iterable[ExpertSpec]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("expert", "kind", "base"):
        table.add_column(column, no_wrap=True)
    for column in ("params", "size", "context", "$/M in", "$/M out"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("also")
    for spec in specs:
        prices = (None, None) if spec.price is None else (spec.price.input_usd_per_mtok, spec.price.output_usd_per_mtok)
        table.add_row(
            spec.ref,
            spec.kind.value,
            spec.base or "",
            _short(spec.parameters_total),
            _short(spec.size_bytes, "B"),
            str(spec.context_length or ""),
            *("" if price is None else f"{price:.3g}" for price in prices),
            " ".join(sorted(spec.capabilities - {"chat"})),
        )
    return table


def _print_spec(spec: ExpertSpec) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for field, value in spec.model_dump(mode="json").items():
        if field == "files":
            value = "\n".join(f"{record['name']}  {record['size_bytes']:,} bytes" for record in value)
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(sorted(value))
        if value not in (None, ""):
            table.add_row(field, _plain(f"{value:,}" if isinstance(value, int) else str(value)))
    stdout_console().print(table)


def _short(count: int | None, unit: str = "") -> str:
    """`134,515,008` as `135M`, for tables."""
    if count is None:
        return ""
    for factor, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g}{letter}{unit}"
    return f"{count}{unit}"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
