"""`coe outcomes check | import | prior`: check and import outcome tables, learn a prior of answer options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from coe.cli.flags import out_option
from coe.cli.output import JsonTarget, console, emit_json, stdout_console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table as RichTable

    from routers.outcomes.table import OutcomeTable

app = typer.Typer(no_args_is_help=True)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Outcome table: .parquet, .jsonl or .csv.")],
    json: JsonTarget = None,
) -> None:
    """Print a summary of an outcome table, or all its problems; exit status 1 if it is invalid."""
    from routers.errors import InvalidOutcomes
    from routers.outcomes.table import OutcomeTable

    try:
        table = OutcomeTable.read(file)
    except InvalidOutcomes as error:
        emit_json({"file": str(file), "valid": False, "problems": list(error.problems)}, json)
        raise
    document = _summary(table)
    if json != "-":
        _print_summary(file, document)
    emit_json({"file": str(file), "valid": True, "problems": [], **document}, json)


@app.command("import")
def import_file(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV file with one row per query, or one per query and expert.")
    ],
    out: Annotated[Path, out_option("Outcome table to write: .parquet or .jsonl.", metavar="FILE")],
    columns: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="THEIRS=OURS", help="Rename a column, e.g. question=prompt. Repeatable."),
    ] = None,
    score_columns: Annotated[
        str | None,
        typer.Option("--score-columns", metavar="A,B", help="Columns of scores, named after their experts."),
    ] = None,
    scale: Annotated[float, typer.Option("--scale", metavar="X", help="The full score in the file, e.g. 100.")] = 1.0,
    json: JsonTarget = None,
) -> None:
    """Import a CSV file as an outcome table.

    Known columns: query_id, prompt, domain, dataset, fold, and either score::EXPERT (cost::, tokens::, answer::) or
    expert, score (cost, tokens, answer) with one row per query and expert.
    """
    from routers.outcomes.csv_import import import_csv

    names = [name.strip() for name in (score_columns or "").split(",") if name.strip()]
    table = import_csv(file, columns=_renames(columns or []), score_columns=names, scale=scale)
    table.write(out)
    console.print(f"wrote {out}", highlight=False)
    document = _summary(table)
    if json != "-":
        _print_summary(out, document)
    emit_json({"file": str(out), **document}, json)


@app.command()
def prior(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Outcome table of multiple-choice questions with right answers.")
    ],
    out: Annotated[Path, out_option("JSON file to write, the setting `prior` of a vote or cascade.", metavar="FILE")],
    column: Annotated[
        str, typer.Option("--answer-column", metavar="NAME", help="Column with the letter of the right option.")
    ] = "answer",
    json: JsonTarget = None,
) -> None:
    """Learn how likely each option of a question is a priori, for votes on questions of the same source.

    The prior depends on the wording of options and not on the subject, so it applies to questions of that source only.
    """
    from coe.compose.option_prior import OptionPrior
    from routers.outcomes.table import OutcomeTable

    table = OutcomeTable.read(file)
    learned = OptionPrior.fit(table, column=column)
    learned.write(out)
    priors = [learned.log_prior(prompt) for prompt in table.prompts]
    right = table.labels(column)
    listed = [(options, letter) for options, letter in zip(priors, right, strict=True) if letter in options]
    first = sum(max(options, key=options.__getitem__) == letter for options, letter in listed) / len(listed)
    chance = sum(1 / len(options) for options, _ in listed) / len(listed)
    if json != "-":
        stdout_console().print(
            f"{out}: learned from {len(listed):,} of {len(table):,} questions. Alone it finds the right option of "
            f"{100 * first:.1f}% of these; chance is {100 * chance:.1f}%",
            highlight=False,
            soft_wrap=True,
        )
    emit_json({"prior": str(out), "n_questions": len(listed), "accuracy": first, "chance": chance}, json)


def _renames(texts: list[str]) -> dict[str, str]:
    renames = {}
    for text in texts:
        theirs, separator, ours = text.rpartition("=")
        if not separator or not theirs or not ours:
            raise typer.BadParameter(f"{text!r} is not THEIRS=OURS", param_hint="--map")
        renames[theirs] = ours
    return renames


def _summary(table: OutcomeTable) -> dict[str, Any]:
    costs = None if table.costs_usd is None else table.costs_usd.mean(axis=0).tolist()
    return {
        "n_queries": len(table),
        "n_experts": len(table.experts),
        "conversations": sum(map(bool, table.conversations or ())),
        "mean_score": dict(zip(table.experts, table.scores.mean(axis=0).tolist(), strict=True)),
        "mean_cost_usd": None if costs is None else dict(zip(table.experts, costs, strict=True)),
        "domains": None if table.domains is None else len(set(table.domains)),
        "mean_score_by_domain": _by_domain(table),
        "folds": None if table.folds is None else len(set(table.folds.tolist())),
        "tokens": table.tokens is not None,
        "answers": sorted(table.answers or {}),
        "refusal_share": _refusal_share(table),
        "oracle": float(table.scores.max(axis=1).mean()),
        "digest": table.training_ids_digest(),
    }


def _refusal_share(table: OutcomeTable) -> dict[str, float] | None:
    """expert -> share of its recorded answers that refuse or do not know; `None` without answers."""
    from coe.answers.refusals import refuses
    from coe.answers.thinking import without_thoughts

    if not table.answers:
        return None
    return {
        name: sum(refuses(without_thoughts(text)) for text in texts) / max(1, len(texts))
        for name, texts in table.answers.items()
    }


def _by_domain(table: OutcomeTable) -> dict[str, dict[str, Any]] | None:
    """domain -> number of queries, and mean score of each expert, largest domain first; `None` without domains."""
    import numpy as np

    if table.domains is None:
        return None
    names, domain_of, counts = np.unique(np.array(table.domains, dtype=object), return_inverse=True, return_counts=True)
    found = {}
    for number in np.argsort(-counts, kind="stable"):
        means = table.scores[domain_of == number].mean(axis=0).tolist()
        found[str(names[number])] = {
            "n_queries": int(counts[number]),
            "mean_score": dict(zip(table.experts, means, strict=True)),
        }
    return found


def _print_summary(file: Path, summary: dict[str, Any]) -> None:
    from rich.table import Table

    out = stdout_console()
    known = {"domains": summary["domains"], "folds": summary["folds"], "answers": len(summary["answers"]) or None}
    facts = [f"{summary['n_queries']:,} queries"]
    facts += [f"{summary['conversations']:,} of them conversations"] if summary["conversations"] else []
    facts += [f"{summary['n_experts']} experts"]
    facts += [f"{count} {name}" if count else f"no {name}" for name, count in known.items()]
    facts += ["costs known" if summary["mean_cost_usd"] else "no costs (add them with `--prices` in `coe router`)"]
    out.print(f"{file}: {', '.join(facts)}", highlight=False, markup=False, soft_wrap=True)
    table = Table()
    table.add_column("expert", overflow="fold")
    refusals = summary["refusal_share"] or {}
    shown = any(refusals.values())
    for heading in ("mean score", "USD / 1k", *(["refusals"] if shown else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, score in sorted(summary["mean_score"].items(), key=lambda item: -item[1]):
        cost = f"{1e3 * summary['mean_cost_usd'][name]:.4f}" if summary["mean_cost_usd"] else "-"
        share = [f"{refusals[name]:.1%}" if name in refusals else "-"] if shown else []
        table.add_row(escape(name), f"{score:.4f}", cost, *share)
    table.add_section()
    table.add_row("best expert of each query", f"{summary['oracle']:.4f}", "", style="dim")
    out.print(table)
    if summary["mean_score_by_domain"]:
        out.print(_domain_table(summary["mean_score_by_domain"]))


def _domain_table(domains: Mapping[str, Mapping[str, Any]]) -> RichTable:
    """A row for each domain: every expert with its mean score, best first. Long lists wrap, and no name is cut."""
    from rich.table import Table

    table = Table(show_lines=True)
    table.add_column("domain", overflow="fold", max_width=24)
    table.add_column("queries", justify="right", no_wrap=True)
    table.add_column("mean scores, best first", overflow="fold", ratio=1)
    for name, facts in domains.items():
        ranked = sorted(facts["mean_score"].items(), key=lambda item: -item[1])
        shown = "  ".join(f"{expert}={score:.3f}" for expert, score in ranked)
        table.add_row(escape(name), f"{facts['n_queries']:,}", escape(shown))
    return table
