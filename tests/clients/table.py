"""Run every client against a service, and print which features work: `python tests/clients/table.py --out table.md`.

Without `--url` it starts `coe serve` over the scripted endpoint and SmolLM2. Every cell is one run of one function of
the client's file. With COE_DATA_DIR it also compares log-likelihoods over the endpoint with those of lm-eval's own
backend. The exit status is 1 if a feature fails or a likelihood differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[2]))
from clients import CLIENTS, ENVIRONMENTS, HERE, Client, environment, outcomes
from service import LOCAL, MODEL, service

from examples.zoo.fetch import fetch

CELLS: Final = {"works": "works", "refused": "refused", "fails": "**fails**", None: "-"}
LONGEST_DETAIL: Final = 300
"""Characters of a refusal or failure below the table."""


@dataclass
class Column:
    """The outcomes of one client, by feature."""

    client: Client
    version: str = ""
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)


def run(clients: Sequence[Client], environments: Path, url: str, expert: str) -> list[Column]:
    """The outcomes of each client, in the order of the clients."""
    columns = []
    for client in clients:
        column = Column(client)
        for line in outcomes(client, environments, url, expert):
            column.version = line.get("version", column.version)
            if "feature" in line:
                column.outcomes[line["feature"]] = line
                print(f"{client.name}, {line['feature']}: {line['outcome']}", file=sys.stderr, flush=True)
                if line["outcome"] == "fails":
                    print(line["detail"], file=sys.stderr, flush=True)
        columns.append(column)
    return columns


def table(runs: Mapping[str, Sequence[Column]]) -> str:
    """Features as rows, clients as columns, and below it why something was refused or failed.

    Args:
        runs: the outcomes of the same clients, by the expert that answered. A row names it if it is the only one.
    """
    clients = [each for each in zip(*runs.values(), strict=True) if any(column.outcomes for column in each)]
    lines = ["| | " + " | ".join(f"{columns[0].client.name} {columns[0].version}" for columns in clients) + " |"]
    lines.append("|---" * (len(clients) + 1) + "|")
    for name in dict.fromkeys(name for columns in clients for column in columns for name in column.outcomes):
        tried = [any(columns[i].outcomes.get(name) for columns in clients) for i in range(len(runs))]
        experts = {expert: i for i, expert in enumerate(runs) if tried[i]}
        cells = [_cell({expert: columns[i].outcomes.get(name) for expert, i in experts.items()}) for columns in clients]
        title = name if len(experts) > 1 or len(runs) == 1 else f"{name} (`{next(iter(experts))}`)"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_reasons(runs)]) + "\n"


def _cell(outcomes: Mapping[str, Mapping[str, Any] | None]) -> str:
    """One word if all experts agree, else one for each that was tried."""
    words = {expert: CELLS[line["outcome"] if line else None] for expert, line in outcomes.items()}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return ", ".join(f"{word} (`{expert}`)" for expert, word in words.items() if word != CELLS[None])


def _reasons(runs: Mapping[str, Sequence[Column]]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for expert, columns in runs.items():
        for column in columns:
            for name, line in column.outcomes.items():
                if line["outcome"] != "works":
                    what = f"{name} (`{expert}`), {line['outcome']}: {_shown(line['detail'])}"
                    reasons.setdefault(what, []).append(column.client.name)
    return (f"- {what} ({', '.join(names)})" for what, names in reasons.items())


def parity(environments: Path, url: str) -> tuple[str, bool]:
    """A table of lm_eval_parity.py, and whether something differs."""
    command = [str(environments / "benchmarks" / "bin" / "python"), str(HERE / "lm_eval_parity.py")]
    done = subprocess.run(
        [*command, "--url", url, "--expert", LOCAL], env=environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    lines = ["### lm-eval: the endpoint and its own hf backend", ""]
    both_sides = [f"{what}: hf, endpoint" for what in ("acc", "acc_norm", "seconds")]
    titles = ["task", "prompts as", "questions, options", *both_sides, "same option", "largest difference"]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for line in map(json.loads, done.stdout.splitlines()):
        both = [", ".join(f"{value:.3f}" for value in line[metric]) for metric in ("acc,none", "acc_norm,none")]
        both.append(", ".join(str(value) for value in line["seconds"]))
        counts = f"{line['questions']}, {line['options']}"
        cells = [line["task"], line["over"], counts, *both, str(line["same_choice"]), f"{line['largest']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", done.returncode != 0


def _shown(detail: str) -> str:
    text = " ".join(detail.split())
    return text if len(text) <= LONGEST_DETAIL else "..." + text[-LONGEST_DETAIL:]


def main() -> None:
    """Run the clients, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", help="base URL of a running service, with /v1")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    parser.add_argument("--client", action="append", choices=[client.name for client in CLIENTS])
    parser.add_argument("--expert", action="append", help=f"default: {MODEL} and {LOCAL}")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    weights = fetch("smollm2")
    os.environ["COE_CLIENTS_TOKENIZER"] = str(weights)
    chosen = [client for client in CLIENTS if not options.client or client.name in options.client]
    clients = [client for client in chosen if client.is_installed(options.environments)]
    for client in (client for client in chosen if client not in clients):
        print(f"{client.name} is not installed; it is left out", file=sys.stderr)
    with nullcontext(options.url) if options.url else service(weights) as url:
        experts = options.expert or (MODEL, LOCAL)
        runs = {expert: run(clients, options.environments, url, expert) for expert in experts}
        lines = [line for columns in runs.values() for column in columns for line in column.outcomes.values()]
        text, failed = f"{table(runs)}\n", any(line["outcome"] == "fails" for line in lines)
        if any(client.name == "lm-eval" for client in clients) and os.environ.get("COE_DATA_DIR"):
            compared, unequal = parity(options.environments, url)
            text, failed = text + compared, failed or unequal
    print(text)
    if options.out:
        options.out.write_text(text)
    sys.exit(failed)


if __name__ == "__main__":
    main()
