"""The YAML file of `coe latent train`.

    preset: notes                        # what is trained: TRAINERS
    config: service.yaml                 # whose experts
    members: [smollm2, fields, dates]    # the primary, which answers, then its peers
    train: train.jsonl                   # {"id": ..., "prompt": ..., "answer": ...}, one a line
    valid: valid.jsonl
    out: bookings                        # the folder of the artifact
    settings: {interactions: 4}          # of the composition
    training: {steps: 240}

Relative paths are relative to the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from registry.documents import Document, load_document, validate
from registry.sources import local_path
from registry.spelling import did_you_mean

TRAINERS: Final[Mapping[str, str]] = {
    "notes": "coe.latent.training.notes:NotesTrainer",
    "notes-prompt": "coe.latent.training.notes:NotesPromptTrainer",
    "cache": "coe.latent.training.cache:CacheTrainer",
    "mot": "coe.latent.training.mot.trainer:MotTrainer",
    "lora-mix": "coe.latent.training.lora_mix:LoraMixTrainer",
    "logits": "coe.latent.training.token_gate:LogitsTrainer",
}
"""preset -> `module:Class` of a `coe.latent.training.trainer.Trainer`, imported when it is used."""
MOST_MEMBERS: Final = 33


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class TrainingConfig(_Section):
    """How it is trained. A step reads `batch` x `accumulate` rows."""

    steps: Annotated[int, Field(ge=1, le=100_000)] = 240
    """Steps of the optimiser, unless validation stops improving before."""
    batch: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rows of one forward."""
    accumulate: Annotated[int, Field(ge=1, le=1024)] = 2
    """Forwards of one step, whose gradients are added."""
    learning_rate: _Rate = 3e-3
    """Highest learning rate of AdamW."""
    weight_decay: _Share = 0.01
    """Weight decay of AdamW."""
    warmup: _Share = 0.06
    """Share of the steps in which the learning rate rises from 0."""
    final_rate: _Share = 0.05
    """Share of the highest learning rate that a half cosine falls to."""
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Largest norm of the gradient."""
    keep: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.1
    """Weight of the divergence KL(bare primary || composition) on rows that the bare primary answers right."""
    drop_peer: _Share = 0.15
    """Probability that a peer of a row is missing."""
    drop_all: _Share = 0.05
    """Probability that a row has no peer at all."""
    wrong_peer: _Share = 0.0
    """Probability that one peer of a row leaves the notes of another row, or of another member of its width."""
    validate_every: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Steps between two validations, each of which writes a checkpoint."""
    patience: Annotated[int, Field(ge=1, le=100_000)] = 4
    """Validations without a lower loss after which training stops."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the first tensors, the order of the rows, and what is dropped."""


class LoraConfig(_Section):
    """A LoRA adapter of the primary that is trained with the composition. Of an adapter, its own one goes on."""

    rank: Annotated[int, Field(ge=1, le=512)] | None = None
    """Rank; null is that of the primary's own adapter, or 8."""
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Alpha; null is that of the primary's own adapter, or twice the rank."""
    targets: Annotated[tuple[_Name, ...], Field(min_length=1, max_length=64)] | None = None
    """Names of linear layers; null are those of the primary's own adapter, or q_proj and v_proj."""
    learning_rate: _Rate | None = None
    """Its highest learning rate; null is that of the training."""


class TrainConfig(_Section):
    """What is trained, on what, and where it is written."""

    preset: str
    """What is trained: `notes`, `notes-prompt`, `cache`, ..."""
    config: Path
    """Configuration of the service whose experts are the members."""
    members: Annotated[tuple[str, ...], Field(min_length=2, max_length=MOST_MEMBERS)]
    """Names of experts: the primary, which answers, then its peers."""
    train: Path
    """JSON lines with `id`, `prompt` and `answer`."""
    valid: Path
    """The same, for early stopping; no row of `train`."""
    out: Path
    """Folder to write, which does not exist yet."""
    settings: Mapping[str, Any] = {}
    """Settings of the composition, as the preset reads them."""
    training: TrainingConfig = TrainingConfig()
    """How it is trained."""

    @field_validator("preset")
    @classmethod
    def _is_known(cls, preset: str) -> str:
        if preset not in TRAINERS:
            hint = did_you_mean(preset, TRAINERS)
            raise ValueError(f"{preset!r} is no preset{hint or '; there are: ' + ', '.join(TRAINERS)}")
        return preset

    @field_validator("members")
    @classmethod
    def _are_different(cls, members: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in members if members.count(name) > 1}):
            raise ValueError(f"members are different experts; given twice: {', '.join(twice)}")
        return members

    @field_validator("config", "train", "valid", "out", mode="before")
    @classmethod
    def _paths_start_at_the_file(cls, path: object, info: ValidationInfo) -> object:
        folder = (info.context or {}).get("folder", Path.cwd())
        return local_path(str(path), folder) if isinstance(path, str | Path) and str(path) else path


@dataclass(frozen=True, slots=True)
class TrainFile:
    """A file that was read: its fields, and the settings as the preset's own model has them."""

    document: Document
    config: TrainConfig
    settings: Any

    @property
    def path(self) -> Path:
        """The file, as the caller named it."""
        return self.document.path


def read_train_file(path: Path) -> TrainFile:
    """Read a file of `coe latent train`.

    Raises:
        InvalidSpec: every problem, each with its line.
    """
    document = load_document(path)
    config = validate(document, TrainConfig)
    model: type[BaseModel] = trainer_class(config.preset).settings
    stated = isinstance(document.value, dict) and document.value.get("settings") is not None
    return TrainFile(document, config, validate(document, model, ("settings",)) if stated else model())


def trainer_class(preset: str) -> Any:
    """The class of TRAINERS that trains a preset: a `coe.latent.training.trainer.Trainer`."""
    module, _, name = TRAINERS[preset].partition(":")
    return getattr(import_module(module), name)
