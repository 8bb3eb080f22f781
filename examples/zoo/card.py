"""The model card of an adapter: README.md with the facts as YAML front matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.zoo.fetch import BASES
from examples.zoo.plan import KNOWLEDGE, SCORE_SEED, Adapter, Stage
from examples.zoo.training import Recipe
from registry.documents import parse_document

_LICENCES = {"smollm2": "apache-2.0", "gemma3-270m": "gemma"}


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of right answers on `n` fresh rows of a family's test split, greedy; `base` is None if not measured."""

    family: str
    n: int
    adapter: float
    base: float | None


def write_card(
    folder: Path, adapter: Adapter, recipe: Recipe, seconds: float, scores: list[Score], *, trained: str | None = None
) -> None:
    """Write README.md into the adapter's folder.

    Args:
        scores: none if it was measured elsewhere.
        trained: how it was trained, if not by `python -m examples.zoo.train`.
    """
    facts = {
        "license": _LICENCES[adapter.base],
        "base_model": BASES[adapter.base].hub.removeprefix("hf://"),
        "library_name": "peft",
        "tags": ["lora", "composition-of-experts"],
        "training": {
            "families": [family.name for family in adapter.families],
            "seed": recipe.seed,
            "steps": recipe.steps,
            "batch": recipe.batch,
            "seconds": round(seconds),
            "hardware": hardware(),
        },
        "scores": {
            s.family: {"n": s.n, "adapter": round(s.adapter, 4), "base": s.base and round(s.base, 4)} for s in scores
        },
    }
    front = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    body = _body(adapter, recipe, scores, trained or _trained(adapter, recipe))
    (folder / "README.md").write_text(f"---\n{front}---\n\n{body}", encoding="utf-8")


def read_card(folder: Path) -> Mapping[str, Any]:
    """The facts of a card."""
    _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts: Mapping[str, Any] = parse_document(front, folder / "README.md").value
    return facts


def hardware() -> str:
    """The machine's processor and memory, without any host name."""
    import platform

    import torch

    threads = torch.get_num_threads()
    cpu = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    return f"{threads} thread{'s' if threads > 1 else ''}, {cpu}, no GPU"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _trained(adapter: Adapter, recipe: Recipe) -> str:
    rows = -(-recipe.steps * recipe.batch // adapter.epochs)
    times = f", {adapter.epochs} times each" if adapter.epochs > 1 else ""
    loss = "loss on the answer only." + ("" if adapter.then is None else f"\n{_more(adapter.then, recipe)}")
    return f"""Trained on {rows} rows{times} that `examples/zoo/families` generates from seed {recipe.seed} (split
`train`): {recipe.steps} steps of {recipe.batch}, peak learning rate {recipe.learning_rate:g}, {loss}
`python -m examples.zoo.train --adapter {adapter.name}` does it again."""


def _more(then: Stage, recipe: Recipe) -> str:
    rows = -(-then.steps * recipe.batch // then.epochs)
    return (
        f"Then {then.steps} steps on {rows} other rows (seed {recipe.seed + 1}), {then.epochs} times each, at "
        f"{then.learning_rate:g}."
    )


def _body(adapter: Adapter, recipe: Recipe, scores: list[Score], trained: str) -> str:
    about = "; ".join(f"**{family.name}**: {family.about}" for family in adapter.families)
    layers = f" of layer {recipe.first_layer} and those above" if recipe.first_layer else ""
    text = f"""# {adapter.name}

A LoRA adapter of rank {recipe.rank} on {" and ".join(recipe.targets)}{layers}, in bf16, on {BASES[adapter.base].hub.removeprefix("hf://")}.

{about}.

{trained}
"""
    held_out = (
        "templates than in training, all the words" if adapter is KNOWLEDGE else "templates and words than in\ntraining"
    )
    return text + _table(scores, held_out) if scores else text


def _table(scores: list[Score], held_out: str) -> str:
    rows = "\n".join(f"| {s.family} | {s.n} | {s.adapter:.1%} | {_percent(s.base)} |" for s in scores)
    return f"""
Share of right answers on fresh rows (split `test`, seed {SCORE_SEED}: other {held_out}; greedy):

| family | rows | this adapter | its base alone |
|---|---|---|---|
{rows}
"""
