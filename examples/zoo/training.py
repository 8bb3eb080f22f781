"""LoRA training on CPU: frozen base, fp32 adapter, loss on the answer only, interruptible at any step.

An adapter of one megabyte has rank 8 on the query and value projections; the head is computed on answer
positions only, which saves most of the cost of a large vocabulary.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coe.engines.chat import encode_messages
from coe.engines.render import Renderer
from examples.zoo.families import Row
from examples.zoo.lower_layers import LowerLayers
from registry.storage import atomic_directory
from routers.base import Message

if TYPE_CHECKING:
    import torch

TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The training settings that, with the data, determine an adapter's weights."""

    steps: int
    seed: int
    batch: int = 8
    learning_rate: float = 2e-3
    warmup: float = 0.06  # of all steps
    rank: int = 8
    alpha: int = 16
    max_grad_norm: float = 1.0
    targets: tuple[str, ...] = TARGETS
    first_layer: int = 0  # that has an adapter; what is below is computed once for each row


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a training run after a step."""

    step: int
    steps: int
    loss: float
    seconds: float  # spent training so far, interruptions left out
    seconds_left: float


@cache
def _renderer() -> Renderer:
    return Renderer()


def encode(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of the rendered prompt, as the engines render it, and of the target, with its end token."""
    prompt_ids = encode_messages(tokenizer, (Message("user", prompt),), _renderer())
    return prompt_ids, [*tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    recipe: Recipe,
    *,
    checkpoints: Path,
    report: Callable[[Progress], None],
    checkpoint_every: int = 20,
) -> float:
    """Train the LoRA weights of a peft model in place; return the seconds spent.

    Step k always sees rows k * batch to (k + 1) * batch, so a resumed run sees the
    same rows. The last checkpoint is the end; `forget` removes it once the adapter is written.

    Raises:
        ValueError: fewer rows than steps * batch.
    """
    import torch

    if len(rows) < recipe.steps * recipe.batch:
        raise ValueError(
            f"{recipe.steps} steps of {recipe.batch} need {recipe.steps * recipe.batch} rows, not {len(rows)}"
        )
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, weight_decay=0.0)
    run = _Run(weights, optimizer, recipe, checkpoints)
    first, spent = run.resume()
    model.train()
    lower = lower_layers(model, recipe, checkpoints) if recipe.first_layer else None
    for step in range(first, recipe.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        batch = rows[step * recipe.batch : (step + 1) * recipe.batch]
        with lower.removed() if lower else nullcontext():
            loss = _loss(model, tokenizer, [encode(tokenizer, row.prompt, row.target) for row in batch], lower)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent += time.perf_counter() - began
        done = step + 1
        report(Progress(done, recipe.steps, loss.item(), spent, spent / done * (recipe.steps - done)))
        if done % checkpoint_every == 0 or done == recipe.steps:
            run.save(done, spent)
            if lower:
                lower.save()
    model.eval()
    return spent


def held_out_loss(model: Any, tokenizer: Any, rows: Sequence[Row], *, batch: int = 8) -> float:
    """Mean cross-entropy of the answer tokens of rows, in nats a token; the model is not changed."""
    import torch

    total, n_tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        encoded = [encode(tokenizer, row.prompt, row.target) for row in rows[start : start + batch]]
        tokens = sum(len(answer) for _, answer in encoded)
        with torch.inference_mode():
            total += tokens * _loss(model, tokenizer, encoded).item()
        n_tokens += tokens
    return total / n_tokens


def forget(checkpoints: Path) -> None:
    """Remove the checkpoint of a run, and what it computed once."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    for file in checkpoints.parent.glob(f"{checkpoints.name}.lower-*.safetensors"):
        file.unlink()


def lower_layers(model: Any, recipe: Recipe, checkpoints: Path) -> LowerLayers:
    """The layers of a peft model below the first trained one, with a file beside the checkpoint."""
    file = checkpoints.with_name(f"{checkpoints.name}.lower-{recipe.first_layer}.safetensors")
    return LowerLayers(model.get_base_model().model, recipe.first_layer, file)


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


def _loss(
    model: Any, tokenizer: Any, encoded: Sequence[tuple[list[int], list[int]]], lower: LowerLayers | None = None
) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens of a batch; `lower` has been removed from the model.

    The common prefix of all prompts (the template's system message) is computed once and its keys and values are
    shared: the same loss and gradients with a third less work.
    """
    import torch

    shared = _shared_prefix([prompt for prompt, _ in encoded])
    width = max(len(prompt) + len(answer) for prompt, answer in encoded)
    ids = torch.full((len(encoded), width), tokenizer.pad_token_id)  # (B, T), right-padded
    mask = torch.zeros_like(ids)  # (B, T)
    predicts = torch.zeros_like(ids, dtype=torch.bool)  # (B, T): the next token belongs to the answer
    for i, (prompt, answer) in enumerate(encoded):
        whole = prompt + answer
        ids[i, : len(whole)] = torch.tensor(whole)
        mask[i, : len(whole)] = 1
        predicts[i, len(prompt) - 1 : len(whole) - 1] = True
    inner = model.get_base_model()
    name, inputs = "input_ids", ids
    if lower is not None:
        name, inputs = "inputs_embeds", lower.states([prompt + answer for prompt, answer in encoded], width)
    past = None
    if shared:
        past = inner.model(**{name: inputs[:1, :shared]}, use_cache=True).past_key_values
        past.batch_repeat_interleave(len(encoded))
    output = inner.model(
        **{name: inputs[:, shared:]}, attention_mask=mask, past_key_values=past, use_cache=bool(shared)
    )
    targets = ids.roll(-1, dims=1)[predicts]  # (N,)
    logits = inner.lm_head(output.last_hidden_state[predicts[:, shared:]]).float()  # (N, V)
    return torch.nn.functional.cross_entropy(logits, targets)


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with; the last of each is left out, for it predicts the answer."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), max(shortest, 0))


@dataclass(frozen=True, slots=True)
class _Run:
    """The state of a run on disk: safetensors and JSON, whole or absent."""

    weights: dict[str, Any]
    optimizer: Any
    recipe: Recipe
    folder: Path

    def save(self, step: int, seconds: float) -> None:
        from safetensors.torch import save_file

        tensors = {}
        for name, weight in self.weights.items():
            state = self.optimizer.state[weight]
            tensors |= {name: weight.detach(), f"{name}.m": state["exp_avg"], f"{name}.v": state["exp_avg_sq"]}
        with atomic_directory(self.folder) as folder:
            save_file(tensors, folder / "state.safetensors")
            state = {"step": step, "seconds": seconds, "recipe": asdict(self.recipe)}
            (folder / "state.json").write_text(json.dumps(state))

    def resume(self) -> tuple[int, float]:
        """Load the last checkpoint of the same recipe; return its step and the seconds spent so far."""
        import torch
        from safetensors.torch import load_file

        if not (self.folder / "state.json").is_file():
            return 0, 0.0
        state = json.loads((self.folder / "state.json").read_text())
        if state["recipe"] != json.loads(json.dumps(asdict(self.recipe))):
            return 0, 0.0
        tensors = load_file(self.folder / "state.safetensors")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[name])
                self.optimizer.state[weight] = {
                    "step": torch.tensor(float(state["step"])),
                    "exp_avg": tensors[f"{name}.m"],
                    "exp_avg_sq": tensors[f"{name}.v"],
                }
        return int(state["step"]), float(state["seconds"])
