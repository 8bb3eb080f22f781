"""What a preset brings: its settings, and the objective that the loop minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel

from coe.config import Config
from coe.engines.latent.artifact import Artifact
from coe.latent.config import TrainConfig, TrainFile
from coe.latent.training.answer_rows import AnswerRow
from registry.spec import ExpertSpec
from registry.store import Snapshot

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

OnProgress = Callable[[str, int, int], None]
"""Called with (what is done, done, total) while a trainer prepares."""
OnLoading = Callable[[str], None]
"""Called with the name of a member before it is loaded, which may take minutes."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained, on what.

    Attributes:
        file: the file of `coe latent train`.
        service: the configuration of the experts; its `engines.hf` determines device and dtype.
        snapshot: the experts.
        train, valid: the rows.
        work: a folder for what a resumed run needs not compute again.
        on_progress: shows the progress of what comes before the first step.
        on_loading: shows which member is loaded.
    """

    file: TrainFile
    service: Config
    snapshot: Snapshot
    train: tuple[AnswerRow, ...]
    valid: tuple[AnswerRow, ...]
    work: Path
    on_progress: OnProgress
    on_loading: OnLoading = lambda name: None

    @property
    def config(self) -> TrainConfig:
        """The fields of the file."""
        return self.file.config

    @property
    def settings(self) -> Any:
        """Settings of the composition, of the trainer's own model."""
        return self.file.settings

    @property
    def members(self) -> tuple[ExpertSpec, ...]:
        """The primary, then its peers."""
        return tuple(self.snapshot.experts[name] for name in self.config.members)


@dataclass(frozen=True, slots=True)
class Group:
    """Trained tensors, float32, with one learning rate.

    Attributes:
        tensors: by names that are the same in every run. learning_rate: None is that of the training.
    """

    tensors: Mapping[str, Parameter]
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """Where a training is.

    Attributes:
        number: of the step, from 0. of: how many there are.
        chance: of this step and micro-batch alone, so that a resumed run draws the same.
    """

    number: int
    of: int
    chance: Random


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss of a micro-batch. parts: its terms before weighting and other figures, for the metrics."""

    total: Tensor
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Validation:
    """Held-out rows: mean cross-entropy of an answer token, and the share of rows whose answer is right.

    An answer counts as right if each of its tokens is the most likely one after the right tokens before it, which is
    when a greedy answer is exactly this text.
    """

    loss: float
    accuracy: float


class Objective(Protocol):
    """What the loop trains."""

    def groups(self) -> Sequence[Group]:
        """The trained tensors."""
        ...

    def loss(self, rows: Sequence[int], step: Step) -> Losses:
        """The loss of training rows, by position; the loop calls `backward` on its total."""
        ...

    def validate(self) -> Validation:
        """The validation rows, without gradients and without anything random."""
        ...

    def save(self, path: Path, card: str) -> Artifact:
        """Write the artifact of the tensors as they are now."""
        ...


class Trainer(Protocol):
    """A preset.

    settings: the model of the file's `settings`; every field has a default. architecture: of the composed expert.
    start: what the composition is before the first step, for the card.

    `check` raises ConfigError or Unsupported for members and rows that cannot be trained, before any weights are
    loaded; `prepare` computes what the steps need, and loads the primary.
    """

    settings: ClassVar[type[BaseModel]]
    architecture: ClassVar[str]
    start: ClassVar[str]

    @classmethod
    def check(cls, job: Job) -> None:
        """Refuse what cannot be trained. Reads no weights."""
        ...

    @classmethod
    def prepare(cls, job: Job) -> Objective:
        """The objective. Blocks; `job.on_progress` is called, and `job.on_loading` before each member is loaded."""
        ...
