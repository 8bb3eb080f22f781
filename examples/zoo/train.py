"""Train the zoo's adapters on CPU: `python -m examples.zoo.train --all`, or `--adapter sql --adapter dates`.

The same command resumes an interrupted run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from coe.engines.hf.load import choose_dtype
from examples.zoo.card import Score, write_card
from examples.zoo.families import Family, Row, Split
from examples.zoo.fetch import BASES, fetch
from examples.zoo.plan import (
    ADAPTERS,
    GENERALIST,
    KNOWLEDGE,
    RIVAL,
    RIVALS,
    SCORE_SEED,
    TRAIN_SEED,
    Adapter,
    stages,
)
from examples.zoo.scoring import answers, grades
from examples.zoo.training import Progress, Recipe, forget, train
from registry.storage import atomic_directory, atomic_path, coe_home

ZOO: Final = Path(__file__).parent
_ALL: Final = {**ADAPTERS, RIVAL: GENERALIST}
_KNOWN: Final = {**_ALL, KNOWLEDGE.name: KNOWLEDGE}


def folder_of(name: str) -> Path:
    """The folder an adapter is shipped in; rivals have their own, since no router may choose them."""
    return ZOO / ("rival" if name in RIVALS else "adapters") / name


def train_adapter(adapter: Adapter, *, steps: int, seed: int, n_score: int, out: Path) -> list[Score]:
    """Train one adapter, score it and its base on the test split, and write its folder."""
    recipe = adapter.recipe(steps, seed)
    model, tokenizer, seconds = fit_stages(adapter, stages(adapter, steps=steps, seed=seed))
    scores = score(model, tokenizer, adapter, n_score)
    with atomic_directory(out) as folder:
        save(model, adapter, folder)
        write_card(folder, adapter, recipe, seconds, scores)
    for i in range(2):
        forget(_checkpoints(adapter, i))
    return scores


def fit(adapter: Adapter, rows: Sequence[Row], recipe: Recipe) -> tuple[Any, Any, float]:
    """A new adapter trained on `rows`: the peft model as shipped, its tokenizer, the seconds of training."""
    return fit_stages(adapter, [(recipe, rows)])


def fit_stages(adapter: Adapter, stages: Sequence[tuple[Recipe, Sequence[Row]]]) -> tuple[Any, Any, float]:
    """The same, trained in stages one after the other."""
    model, tokenizer = trainable(adapter.base, stages[0][0])
    seconds = 0.0
    for i, (recipe, rows) in enumerate(stages):
        with Bar(f"{adapter.name}: training", recipe.steps) as bar:
            seconds += train(model, tokenizer, rows, recipe, checkpoints=_checkpoints(adapter, i), report=bar.step)
    round_to_bf16(model)
    return model, tokenizer, seconds


def trainable(base: str, recipe: Recipe, *, start: Path | None = None) -> tuple[Any, Any]:
    """A base with an adapter to train, and its tokenizer.

    Args:
        start: folder of the adapter to train further, with its own rank; by default a new one with the recipe's.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(recipe.seed)
    model, tokenizer = load_base(base)
    if start is not None:
        return PeftModel.from_pretrained(model, str(start), is_trainable=True), tokenizer
    n_layers = model.config.num_hidden_layers
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        layers_to_transform=list(range(recipe.first_layer, n_layers)) if recipe.first_layer else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config), tokenizer


def load_base(base: str) -> tuple[Any, Any]:
    """A base of the zoo, in a type that the CPU multiplies, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch(base, progress=lambda line: typer.echo(line, err=True))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    # bfloat16 where the CPU multiplies it: elsewhere float32 is many times as fast.
    dtype = choose_dtype("auto", "cpu")
    # Eager attention: at some 70 tokens its backward pass costs a third less than the fused one.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager"), tokenizer


def score(model: Any, tokenizer: Any, adapter: Adapter, n: int) -> list[Score]:
    """Score an adapter, and its base, on `n` fresh rows of each of its families; the rival's base is the experts'."""

    def share(family: Family, title: str) -> float:
        rows = family.rows(Split.TEST, n, seed=SCORE_SEED)
        with Bar(f"{title} on {family.name}", n) as bar:
            said = answers(model, tokenizer, rows, max_tokens=family.max_tokens, report=bar.at)
        return sum(grades(family, rows, said)) / n

    scores = []
    for family in adapter.families:
        ours, bare = share(family, adapter.name), None
        if adapter.name != RIVAL:
            with model.disable_adapter():
                bare = share(family, adapter.base)
        scores.append(Score(family.name, n, ours, bare))
    return scores


def save(model: Any, adapter: Adapter, folder: Path) -> None:
    """Write the weights in bf16, the config without local paths, and the chat template the base lacks."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = {name: tensor.to(torch.bfloat16) for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = BASES[adapter.base].hub.removeprefix("hf://")
    config["inference_mode"] = True
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
    if (template := BASES[adapter.base].chat_template) is not None:
        (folder / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


def round_to_bf16(model: Any) -> None:
    """Round the weights to bf16, so that the shipped weights are scored."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())


def checkpoints_of(adapter: Adapter) -> Path:
    """The folder of an interrupted training's checkpoints."""
    return _runs() / adapter.name


def _checkpoints(adapter: Adapter, stage: int) -> Path:
    folder = checkpoints_of(adapter)
    return folder.with_name(f"{folder.name}-{stage + 1}") if stage else folder


def _runs() -> Path:
    return coe_home() / "zoo-train"


class Bar:
    """A progress bar with loss and time left."""

    def __init__(self, title: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, speed_estimate_period=120)
        self._title, self._task = title, self._bars.add_task(title, total=total)

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, progress: Progress) -> None:
        """Called after each training step."""
        title = f"{self._title} (loss {progress.loss:.3f})"
        self._bars.update(self._task, completed=progress.step, description=title)

    def at(self, done: int) -> None:
        """Called with the number of rows done."""
        self._bars.update(self._task, completed=done)


def main(
    adapter: Annotated[list[str], typer.Option(help="Adapter to train; repeatable.")] = [],  # noqa: B006
    all_: Annotated[bool, typer.Option("--all", help="Train every adapter, the rival included.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, instead of the planned number.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data and weights.")] = TRAIN_SEED,
    rows: Annotated[int, typer.Option(min=1, help="Fresh rows per family to score on.")] = 120,
    out: Annotated[
        Path | None, typer.Option(help="Write the adapters under this folder instead of the shipped ones.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train adapters on CPU, score them on held-out rows, and write their folders and cards."""
    import torch

    names = list(_ALL) if all_ else adapter
    if unknown := [name for name in names if name not in _KNOWN]:
        raise typer.BadParameter(f"no such adapter: {', '.join(unknown)}; there are {', '.join(_KNOWN)}")
    if not names:
        raise typer.BadParameter("name adapters with --adapter, or give --all")
    torch.set_num_threads(threads)
    key = json.dumps([names, steps, seed, rows])
    done = _finished(key)
    try:
        for name in (name for name in names if name not in done):
            plan = _KNOWN[name]
            target = out / name if out else folder_of(name)
            for s in train_adapter(plan, steps=steps or plan.steps, seed=seed, n_score=rows, out=target):
                base = "" if s.base is None else f", base {s.base:.1%}"
                typer.echo(f"{name}: {s.family} {s.adapter:.1%}{base} ({s.n} rows)")
            done.append(name)
            _remember(key, done)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    _progress_file(key).unlink(missing_ok=True)


def _progress_file(key: str) -> Path:
    import hashlib

    return _runs() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _finished(key: str) -> list[str]:
    """The adapters that an interrupted run of the same command finished."""
    file = _progress_file(key)
    return list(json.loads(file.read_text())) if file.is_file() else []


def _remember(key: str, done: list[str]) -> None:
    with atomic_path(_progress_file(key)) as path:
        path.write_text(json.dumps(done))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
