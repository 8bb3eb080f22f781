"""Preset `cache`: a primary that reads key-value entries of its peers' answers (channel `cache`).

Peers are adapters of the primary's base, or the base itself, so the heads of the primary read their entries without a
projection (`coe.engines.latent.cache_channel`). Trained is a LoRA adapter of the primary alone, with the loss of
`notes`. C2C (arXiv 2510.03215) projects and fuses the caches of different models instead, with trained projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from coe.engines.latent.artifact import Artifact
from coe.engines.latent.cache_channel import Columns, lay_out, put, suffix_of
from coe.engines.latent.notes import Notes
from coe.engines.latent.reading import MOST_NOTES
from coe.engines.latent.received import Received
from coe.engines.latent.settings import PeerQuestion
from coe.errors import TaskError
from coe.latent.config import LoraConfig
from coe.latent.training.batches import EncodedRow, Predicted
from coe.latent.training.checks import check_members, check_one_base
from coe.latent.training.encoder import RowEncoder
from coe.latent.training.exposure import Source
from coe.latent.training.lora import check_lora
from coe.latent.training.objective import AnswerLoss, Sources, composed_of, draft_spec, encoded_rows, lora_group
from coe.latent.training.peers import CollectedNotes, collect_notes
from coe.latent.training.primary import Primary
from coe.latent.training.trainer import Group, Job, Losses, Step, Validation

ARCHITECTURE: Final = "cache"


class CacheSettings(BaseModel):
    """Settings of a composition that reads key-value entries."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    asks: dict[str, PeerQuestion] = {}
    """Of each peer, what it is asked; without an entry, the request as it is."""
    peer_deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds for each call to a peer when the composition is served."""
    max_answer_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """Most new tokens of a peer."""
    max_notes: Annotated[int, Field(ge=1, le=65_536)] = MOST_NOTES
    """Most entries of one peer; the first ones are cut."""
    lora: LoraConfig = LoraConfig()
    """The adapter of the primary that learns to read them."""


class CacheTrainer:
    """Preset `cache`; see the module's docstring."""

    settings: ClassVar[type[BaseModel]] = CacheSettings
    architecture: ClassVar[str] = ARCHITECTURE
    start: ClassVar[str] = "the primary, which reads the entries of its peers untrained"

    @classmethod
    def check(cls, job: Job) -> None:
        """Refuse what cannot be trained; see `coe.latent.training.trainer.Trainer`."""
        check_members(job, cls.architecture)
        check_one_base(job)
        check_lora(job.members[0], job.settings.lora, job.snapshot)

    @classmethod
    def prepare(cls, job: Job) -> CacheObjective:
        """Collect the entries, and load the primary."""
        own: CacheSettings = job.settings
        settings = {"reads": "answer", **own.model_dump(mode="json", exclude={"lora"})}
        spec, every = draft_spec(job, ARCHITECTURE, settings), [*job.train, *job.valid]
        encoder, rows = encoded_rows(job)  # before the peers are asked: a row that is too long is refused at once
        notes = collect_notes(spec, job.service, job.snapshot, every, job.on_progress, job.on_loading)
        seed = job.config.training.seed
        job.on_loading(job.config.members[0])
        primary = Primary.open(job.members[0], job.snapshot, job.service.engines, lora=own.lora, seed=seed)
        return CacheObjective(job, settings, primary, encoder, rows, notes)


class CacheObjective:
    """Trains an adapter of the primary to read the entries of its peers.

    Args:
        job: rows and settings.
        settings: of the artifact.
        primary: with a trained adapter.
        encoder: of the primary's prompts.
        rows, notes: of the training rows, then of the validation rows.
    """

    def __init__(
        self,
        job: Job,
        settings: Mapping[str, Any],
        primary: Primary,
        encoder: RowEncoder,
        rows: Sequence[EncodedRow],
        notes: CollectedNotes,
    ) -> None:
        self._job, self._settings = job, settings
        self._primary, self._encoder, self._notes = primary, encoder, notes
        self._spec = draft_spec(job, ARCHITECTURE, settings)
        self._loss = AnswerLoss(job, primary, rows, self, dict.fromkeys(job.config.members[1:], 1))

    def groups(self) -> list[Group]:
        """The adapter."""
        return lora_group(self._primary, self._job.settings.lora)

    def loss(self, rows: Sequence[int], step: Step) -> Losses:
        """See `AnswerLoss`."""
        return self._loss.loss(rows, step)

    def validate(self) -> Validation:
        """See `AnswerLoss`."""
        return self._loss.validate()

    def predict(self, rows: Sequence[int], sources: Sequence[Sources]) -> Predicted:
        """The answer tokens of rows that read these entries.

        Columns of prompt and entries are read first, then what is between two answers and the right answer; rows of
        different lengths end their first part in one column.
        """
        encoded = self._loss.encoded(rows)
        columns = [self._columns(row, each) for row, each in zip(rows, sources, strict=True)]
        first, then = zip(*(_parts(each) for each in columns), strict=True)
        begin, n_first = _left_padded(first, self._primary.device)
        cache = self._new_cache()
        positions = (begin >= 0).cumsum(-1) - 1
        self._read(begin.clamp(min=0), begin >= 0, positions.clamp(min=0), cache)
        for number, each in enumerate(columns):
            for entries in each.entries:
                put(cache, number, entries, padding=n_first - len(first[number]))
        rest = [[*tail, *row.answer[:-1]] for tail, row in zip(then, encoded, strict=True)]
        end = _right_padded(rest, self._primary.device)
        mask = torch.cat([begin >= 0, end >= 0], 1)
        lengths = torch.tensor([len(each) for each in first], device=end.device)
        hidden = self._read(end.clamp(min=0), mask, lengths[:, None] + torch.arange(end.shape[1]).to(end), cache)
        predicts = torch.zeros_like(end, dtype=torch.bool)
        for number, (tail, row) in enumerate(zip(then, encoded, strict=True)):
            predicts[number, len(tail) - 1 : len(tail) - 1 + len(row.answer)] = True
        batch = self._loss.batch(rows)
        return Predicted(self._primary.head(hidden[predicts]), batch.targets, batch.owners)

    def save(self, path: Path, card: str) -> Artifact:
        """Write the adapter."""
        assert self._primary.lora is not None  # as `prepare` opens it
        composed = composed_of(self._job, ARCHITECTURE, self._settings)
        return Artifact.write(path, composed, tensors={}, adapter=self._primary.lora.write, card=card)

    def _columns(self, row: int, sources: Sources) -> Columns:
        """Prompt, entries and suffix of one row.

        Raises:
            TaskError: they exceed the context with the right answer.
        """
        encoded = self._loss.encoded([row])[0]
        notes = [each for peer in self._job.config.members[1:] if peer in sources for each in self._left(sources[peer])]
        like = self._primary.decoder.head.weight
        suffix = suffix_of(self._encoder.tokenizer, encoded.prompt, self._encoder.turns)
        columns = lay_out(self._primary.decoder, encoded.prompt, notes, suffix, like=like)
        n_all, most = len(columns.ids) + len(encoded.answer), self._primary.context_length
        if n_all > most:
            place = [*self._job.train, *self._job.valid][row].place
            raise TaskError(
                f"{place}: prompt, answers of the peers and right answer have {n_all} tokens, and the context of "
                f"{self._primary.spec.name!r} has {most}: lower settings.max_answer_tokens, or remove the row"
            )
        return columns

    def _left(self, source: Source) -> Sequence[Notes]:
        left = self._notes.of(source.row, source.peer)
        return Received.read(self._spec, left, "cache").notes.get(source.peer, ())

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._primary.model.config)

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Hidden states (B, T, d) after the final norm; keys and values are appended to the cache."""
        hidden: Tensor = self._primary.model.base_model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden


def _parts(columns: Columns) -> tuple[list[int], list[int]]:
    """What is read before the entries are put into the cache, and what is read after it: at least one token."""
    n_read = min(columns.n_read, len(columns.ids) - 1)
    return columns.ids[:n_read], columns.ids[n_read:]


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, int]:
    """Token ids (B, T) with -1 for padding before them, and T."""
    width = max(map(len, rows))
    return torch.tensor([[*[-1] * (width - len(row)), *row] for row in rows], device=device), width


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids (B, T) with -1 for padding behind them."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], device=device)
