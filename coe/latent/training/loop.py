"""The loop of every preset: AdamW with warm-up and a cosine, early stopping, checkpoints that resume exactly.

Step k reads the same rows, and draws the same chances, in a resumed run as in an uninterrupted one: both are functions
of the seed and k. So a checkpoint holds tensors, moments and what validation has found, and no state of a generator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from coe.errors import EngineError
from coe.latent.config import TrainingConfig
from coe.latent.training.checkpoint import Checkpoint, State
from coe.latent.training.trainer import Losses, Objective, Step, Validation

OnStep = Callable[[int, Mapping[str, float]], None]
"""Called after a step with its number, from 1, and the figures of the step or of a validation, by name."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished training, whose best tensors are in place.

    Attributes:
        steps: done. best_step: after which the validation loss was lowest; 0 is the untouched start.
        before, after: validation of the start and of the best step.
        seconds: spent in steps and validations, interruptions left out.
    """

    steps: int
    best_step: int
    before: Validation
    after: Validation
    seconds: float


def train(
    objective: Objective,
    n_rows: int,
    config: TrainingConfig,
    checkpoint: Checkpoint,
    *,
    on_step: OnStep = lambda step, figures: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Train the tensors of an objective in place; resumes from `checkpoint`, if it holds one.

    Args:
        n_rows: of training.
        checkpoint: written at every validation, and when the process is interrupted.

    Raises:
        EngineError: the loss is not a finite number.
    """
    run = _Run(objective, config, checkpoint, clock)
    with run.saved_on_interrupt():
        if run.state is None:
            run.start(objective.validate())
            on_step(0, run.figures())
        while True:
            if run.is_due:
                run.judge(objective.validate())
                on_step(run.now.step, run.figures())
            if run.is_over:
                break
            figures = run.step(n_rows)
            on_step(run.now.step, figures)
    return run.finish()


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Share of the highest rate at a step, from 0: linear warm-up, then half a cosine down to `final_rate`."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, config.steps - warm)
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def rows_of(step: int, n_rows: int, n: int, seed: int) -> list[int]:
    """The `n` rows of a step: all rows in a random order, then all of them in another one, and so on."""
    order: dict[int, list[int]] = {}
    rows = []
    for position in range(step * n, (step + 1) * n):
        epoch, place = divmod(position, n_rows)
        if epoch not in order:
            order[epoch] = list(range(n_rows))
            Random(f"order/{seed}/{epoch}").shuffle(order[epoch])
        rows.append(order[epoch][place])
    return rows


class _Run:
    """A training at some step."""

    def __init__(
        self, objective: Objective, config: TrainingConfig, checkpoint: Checkpoint, clock: Callable[[], float]
    ) -> None:
        self._objective, self._config, self._checkpoint, self._clock = objective, config, checkpoint, clock
        groups = objective.groups()
        self._tensors: dict[str, Parameter] = {name: p for group in groups for name, p in group.tensors.items()}
        self._rates = [group.learning_rate or config.learning_rate for group in groups]
        self._optimizer = torch.optim.AdamW(
            [{"params": list(group.tensors.values())} for group in groups],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self._began = clock()
        self.state: State | None = checkpoint.load(self._tensors, self._optimizer)
        self._best: dict[str, Tensor] = checkpoint.best() if self.state else {}
        self._is_whole = self.state is not None  # not amid a change of tensors and state

    @property
    def now(self) -> State:
        """The state, once there is one."""
        assert self.state is not None
        return self.state

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or validation has stopped improving."""
        return self.now.step >= self._config.steps or self.now.n_worse >= self._config.patience

    @property
    def is_due(self) -> bool:
        """Whether it is time to validate."""
        step, config = self.now.step, self._config
        return step > self.now.validated and (step % config.validate_every == 0 or step == config.steps)

    def start(self, before: Validation) -> None:
        """The untouched start is the first best."""
        self.state = State(before=before, best=before, last=before)
        self._best = self._copy()
        self._is_whole = True
        self._save()

    def step(self, n_rows: int) -> dict[str, float]:
        """One step of the optimiser."""
        config, number = self._config, self.now.step
        share = learning_rate(number, config)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        rows = rows_of(number, n_rows, config.batch * config.accumulate, config.seed)
        figures: dict[str, float] = {}
        for part in range(config.accumulate):
            chance = Random(f"step/{config.seed}/{number}/{part}")
            batch = rows[part * config.batch : (part + 1) * config.batch]
            losses = self._objective.loss(batch, Step(number, config.steps, chance))
            self._backward(losses)
            for name, value in {"loss": losses.total.item(), **losses.parts}.items():
                figures[name] = figures.get(name, 0.0) + value / config.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self._tensors.values(), config.clip)
        self._is_whole = False
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._tick()
        self.now.step += 1
        self._is_whole = True
        return figures | {"gradient_norm": float(norm), "learning_rate": config.learning_rate * share}

    def judge(self, found: Validation) -> None:
        """Keep the tensors if they are the best so far."""
        self._is_whole = False
        self.now.last, self.now.validated = found, self.now.step
        if found.loss < self.now.best.loss:
            self.now.best, self.now.best_step, self.now.n_worse = found, self.now.step, 0
            self._best = self._copy()
        else:
            self.now.n_worse += 1
        self._is_whole = True
        self._save()

    def figures(self) -> dict[str, float]:
        """The last validation."""
        return {"valid_loss": self.now.last.loss, "valid_accuracy": self.now.last.accuracy}

    def finish(self) -> Outcome:
        """Put the best tensors in place."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self._best[name])
        state = self.now
        return Outcome(state.step, state.best_step, state.before, state.best, state.seconds)

    @contextmanager
    def saved_on_interrupt(self) -> Iterator[None]:
        """Keep the steps that are done when the process is interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            if self._is_whole:
                self._save()
            raise

    def _backward(self, losses: Losses) -> None:
        if not bool(losses.total.isfinite()):
            raise EngineError(
                f"the loss of step {self.now.step + 1} is {losses.total.item()}: lower training.learning_rate, and "
                "start again"
            )
        total: Any = losses.total / self._config.accumulate
        if total.requires_grad:  # it is a constant if every row has drawn to have no peer
            total.backward()

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self._tensors.items()}

    def _tick(self) -> None:
        now = self._clock()
        self.now.seconds += now - self._began
        self._began = now

    def _save(self) -> None:
        self._tick()
        self._checkpoint.save(self.now, self._tensors, self._optimizer, self._best)
