"""`coe router cv`: measure routers by cross-validation on one table."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from coe.cli.flags import Seed
from coe.cli.option_groups import with_option_groups
from coe.cli.router.auto_report import with_progress_lines
from coe.cli.router.options import (
    AnswerOptions,
    FoldOptions,
    LearningOptions,
    TableOptions,
    TargetOptions,
    encoder_of,
    tell_of_truncation,
    warn_of_few_rows,
)
from coe.cli.router.report import ReportOptions, parse_required, progress_bars, warnings_on_console
from coe.cli.router.signals import SignalOptions


@with_option_groups
def cv(
    tables: TableOptions,
    kind: Annotated[
        list[str], typer.Option("--kind", metavar="KIND", help="Router kind, or `module:Class`. Repeatable.")
    ],
    splits: FoldOptions,
    learning: LearningOptions,
    targets: TargetOptions,
    answers: AnswerOptions,
    output: ReportOptions,
    signals: SignalOptions,
    seed: Seed = 0,
) -> None:
    """Cross-validate routers: train on all folds but one, score on the one left out, pool all folds."""
    from routers.evaluation.cross_validation import BASELINE_KINDS, cross_validate_all, standard_baselines
    from routers.factory import build, reads_text

    required, target = parse_required(output.require or []), targets.target
    if target is not None and answers.cost_weight is not None:
        raise typer.BadParameter("the cost weight is either given or solved", param_hint="--cost-weight")
    chosen, plain = learning.settings_of(kind, seed), LearningOptions().settings_of(BASELINE_KINDS, seed)
    choosing, table = answers.choosing(), tables.read()
    warn_of_few_rows(table)
    assigned = splits.of(table, seed)
    with warnings_on_console(), progress_bars() as bar:
        encoder = None
        if learning.first_encoder or any(map(reads_text, kind)):
            encoder = encoder_of(learning.first_encoder, bar("encoding prompts"))
            encoder.encode(table.prompts)  # all folds at once: one bar, and the cache serves every fold
            tell_of_truncation(encoder, table.prompts)
        requires = {name for n in kind for name in build(n, encoder, chosen[n]).requires}
        table = signals.add_to(table, requires, bar("reading signals"))
        baselines = standard_baselines(encoder, seed=seed)
        # A kind at its default settings is the baseline of that name: it is trained once and reported twice.
        as_baseline = {name for name in baselines if chosen.get(name) == plain[name]}
        own = {n: with_progress_lines(partial(build, n, encoder, chosen[n])) for n in kind if n not in as_baseline}
        reports = cross_validate_all(
            {n: baselines[n] if n in as_baseline else own[n] for n in kind},
            table,
            assigned,
            baselines=baselines,
            choosing=choosing,
            target=target,
            seed=seed,
            on_progress=bar("training routers"),
        )
    output.write(reports, required, title=f"{tables.outcomes.name}, {len(set(assigned.tolist()))} folds")
