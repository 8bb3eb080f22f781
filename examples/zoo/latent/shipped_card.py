"""The card of a shipped composition: README.md with the facts as YAML front matter, as those of the zoo's adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, Final

import yaml

from coe.engines.latent.artifact import CARD, Artifact
from examples.zoo.fetch import BASES
from examples.zoo.latent.benches import base_of
from examples.zoo.latent.plan import Run
from examples.zoo.latent.results import Result

_GEMMA: Final = "gemma3-270m"
_ABOUT: Final[Mapping[str, str]] = {
    "notes": "{first} answers, and reads the hidden states of {others}.",
    "cache": "{first} answers, and reads the key-value entries of the answers of {others}.",
    "mot": "A Mixture of Thoughts of {all}: one of them answers, and reads the hidden states of others meanwhile.",
    "lora-mix": "Every token mixes the adapters {all}.",
    "logits": "The scores of the next token are those of {all}, weighed by a gate.",
}
_GEMMA_TERMS: Final = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. A member of this
composition is Gemma 3 270M or made from it, and so its use is restricted as those terms say: see NOTICE and
GEMMA_TERMS.txt in the folder of the zoo."""
_APACHE: Final = """\
All members are SmolLM2-135M-Instruct (Copyright Hugging Face, Apache License 2.0) or adapters of it: see NOTICE in
the folder of the zoo."""


def about(architecture: str, members: Iterable[str]) -> str:
    """One line for the registry."""
    first, *others = members
    text = _ABOUT[architecture].format(first=first, others=_listed(others), all=_listed([first, *others]))
    return text[0].upper() + text[1:] if architecture in ("mot", "lora-mix", "logits") else text


def licence_of(members: Iterable[str]) -> str:
    """`gemma` if a member is made from Gemma, else `apache-2.0`; as cards of models state it."""
    return "gemma" if _GEMMA in {base_of(member) for member in members} else "apache-2.0"


def card_of(name: str, run: Run, result: Result, artifact: Artifact, *, rounded: bool) -> str:
    """Members, data, steps and licence of an artifact, and the figures of its run.

    Args:
        rounded: whether matrices were rounded to bfloat16 after they were measured.
    """
    members = tuple(artifact.composed.members)
    _, _, trained = (artifact.path / CARD).read_text(encoding="utf-8").partition("\n")
    front = yaml.safe_dump(_facts(run, result, artifact), sort_keys=False, allow_unicode=True)
    licence = _GEMMA_TERMS if licence_of(members) == "gemma" else _APACHE
    return f"""---
{front}---

# {name}

{about(artifact.composed.architecture, members)}

Trained by `coe latent train` with the settings below, on the training rows of the bench `{run.bench.name}` of
`examples/zoo/latent` with the seed {run.seed}; `examples/zoo/families` generates them.

## Right answers

{_table(result)}

{_measured(run, result, rounded)}

## Licence

{licence}

## Training
{trained.rstrip()}
"""


def _facts(run: Run, result: Result, artifact: Artifact) -> dict[str, Any]:
    members = tuple(artifact.composed.members)
    bases = dict.fromkeys(BASES[base_of(member)].hub.removeprefix("hf://") for member in members)
    training: dict[str, Any] = {
        "bench": run.bench.name,
        "families": [family.name for family in run.bench.families],
        "method": run.method.name,
        "seed": run.seed,
        "steps": run.bench.steps,
        "batch": run.bench.batch,
    }
    if result.training is not None:
        training |= {"parameters": result.training.parameters, "seconds": round(result.training.seconds)}
    return {
        "license": licence_of(members),
        "base_model": [*bases] if len(bases) > 1 else next(iter(bases)),
        "tags": [artifact.composed.architecture, "composition-of-experts"],
        "members": [*members],
        "training": training,
        "scores": {
            split: {family: {"n": len(rows), "right": round(fmean(rows), 4)} for family, rows in found.items()}
            for split, found in result.scores.items()
        },
    }


def _table(result: Result) -> str:
    lines = ["| split | family | rows | right |", "|---|---|---:|---:|"]
    for split, found in result.scores.items():
        lines += [f"| {split} | {family} | {len(rows)} | {fmean(rows):.1%} |" for family, rows in found.items()]
    return "\n".join(lines)


def _measured(run: Run, result: Result, rounded: bool) -> str:
    given = "; each query has the right peers" if run.bench.right else ""
    command = f"run --bench {run.bench.name} --method {run.method.name} --seed {run.seed}"
    return f"""Greedy{given}. Templates and words of `test` and `fresh` are in no training row.
All expert calls of a query take {result.prompt_tokens:.0f} tokens in and {result.completion_tokens:.1f} out on average.
{"Measured before the matrices were rounded to bfloat16." if rounded else "These are the weights that were measured."}
`python -m examples.zoo.latent {command}` trains and measures the method."""


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
