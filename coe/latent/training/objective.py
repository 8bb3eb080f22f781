"""What the presets `notes` and `cache` share: the loss, the validation, and rows whose peers are missing or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from coe.latent.config import LoraConfig, TrainingConfig
from coe.latent.training.bare import rows_right_bare
from coe.latent.training.batches import Batch, EncodedRow, Predicted, divergence
from coe.latent.training.encoder import RowEncoder
from coe.latent.training.exposure import Source, exposure
from coe.latent.training.primary import Primary
from coe.latent.training.trainer import Group, Job, Losses, Step, Validation
from registry.composed import Composed
from registry.digest import identity
from registry.spec import ExpertSpec, Kind

Sources = Mapping[str, Source]
"""Peer -> whose notes a row reads in its place."""


class Reader(Protocol):
    """How rows are read with the notes of their peers."""

    def predict(self, rows: Sequence[int], sources: Sequence[Sources]) -> Predicted:
        """The answer tokens of rows, by position among the training rows and, after them, the validation rows."""
        ...


class AnswerLoss:
    """Cross-entropy of the answer tokens, and the divergence from the bare primary where it is right.

    Args:
        job: rows and settings.
        primary: the frozen expert that answers.
        rows: the training rows, then the validation rows.
        reader: the composition.
        widths: peer -> what notes must have in common to stand for each other's.
    """

    def __init__(
        self, job: Job, primary: Primary, rows: Sequence[EncodedRow], reader: Reader, widths: Mapping[str, int]
    ) -> None:
        self._job, self._primary, self._reader = job, primary, reader
        self._config: TrainingConfig = job.config.training
        self._peers = list(widths)
        self._alike = alike(widths)
        self._rows = rows
        self._right = rows_right_bare(primary, rows[: len(job.train)], job) if self._config.keep else set[int]()

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows, padded."""
        return Batch.of(self.encoded(rows), self._primary.device)

    def encoded(self, rows: Sequence[int]) -> list[EncodedRow]:
        """These rows."""
        return [self._rows[row] for row in rows]

    def loss(self, rows: Sequence[int], step: Step) -> Losses:
        """The loss of training rows."""
        drawn = [
            exposure(row, len(self._job.train), self._peers_of(row), self._alike, self._config, step.chance)
            for row in rows
        ]
        found = self._reader.predict(rows, drawn)
        total = found.loss()
        parts = {"cross_entropy": total.item(), "peers": sum(map(len, drawn)) / len(rows)}
        kept = [place for place, row in enumerate(rows) if row in self._right]
        if kept:
            with self._primary.bare():
                bare = self._primary.predict(self.batch([rows[place] for place in kept]))
            kl = divergence(bare.logits, found.of(kept))
            total, parts = total + self._config.keep * kl, {**parts, "divergence": kl.item()}
        return Losses(total, parts)

    def _peers_of(self, row: int) -> list[str]:
        """The peers that leave notes on a row."""
        return [*self._job.train, *self._job.valid][row].among(self._peers)

    @torch.no_grad()
    def validate(self) -> Validation:
        """The validation rows, with the notes of all peers."""
        first, n_rows = len(self._job.train), len(self._job.valid)
        loss = n_tokens = n_right = 0.0
        for start in range(0, n_rows, self._config.batch):
            rows = range(first + start, first + min(n_rows, start + self._config.batch))
            found = self._reader.predict(
                rows, [{peer: Source(peer, row) for peer in self._peers_of(row)} for row in rows]
            )
            loss += found.loss().item() * len(found.targets)
            n_tokens += len(found.targets)
            n_right += int(found.right(len(rows)).sum())
        return Validation(loss / n_tokens, n_right / n_rows)


def alike(widths: Mapping[str, int]) -> dict[str, list[str]]:
    """For each peer, the other peers of its width."""
    return {
        peer: [other for other, same in widths.items() if same == width and other != peer]
        for peer, width in widths.items()
    }


def lora_group(primary: Primary, config: LoraConfig | None) -> list[Group]:
    """The group of the trained adapter; none without one."""
    return [] if config is None else [Group(primary.trained(), config.learning_rate)]


def encoded_rows(job: Job) -> tuple[RowEncoder, list[EncodedRow]]:
    """The training rows, then the validation rows, as the primary reads them, and what encoded them, closed.

    Raises:
        TaskError, WeightsError, TemplateError, Rejected: see `RowEncoder`.
    """
    encoder = RowEncoder.open(job.members[0], job.snapshot)
    try:
        return encoder, encoder.encode([*job.train, *job.valid])
    finally:
        encoder.close()


def draft_spec(job: Job, architecture: str, settings: Mapping[str, Any]) -> ExpertSpec:
    """The expert that the training makes, as far as its calls to the peers are determined by it."""
    return ExpertSpec(
        name="composition",
        kind=Kind.COMPOSED,
        members=job.config.members,
        architecture=architecture,
        source=str(job.config.out),
        settings=settings,
    )


def composed_of(job: Job, architecture: str, settings: Mapping[str, Any]) -> Composed:
    """What `composed.json` states: the members by their identities."""
    experts = job.snapshot.experts
    return Composed(architecture, {name: identity(experts[name], experts) for name in job.config.members}, settings)
