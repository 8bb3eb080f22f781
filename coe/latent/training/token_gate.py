"""Training of the token gate of `mode: gate` (`coe.engines.latent.token_gate`), the preset `logits`.

    L = -log softmax(sum_m softmax(g)_m log p_m)[the right token]      mean over the answer tokens that are combined

Members are frozen and of one vocabulary, so they read all rows once; the steps train 257 weights on what that left.
DLLG (arXiv 2606.04378) trains on rewards of sampled answers, too; here it is the right tokens alone. The sum over the
vocabulary in the softmax is that over the tokens that one of the members has among its most likely ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from coe.engines.hf.load import translate
from coe.engines.hf.members import check_same_vocabulary
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.token_gate import TokenGate, token_features
from coe.errors import CoeError, ConfigError, EngineError
from coe.latent.by_length import batches
from coe.latent.training.answer_rows import AnswerRow
from coe.latent.training.checks import check_members
from coe.latent.training.members import Member, Members, Reading
from coe.latent.training.objective import composed_of
from coe.latent.training.trainer import Group, Job, Losses, Step, Validation

_ROWS_AT_ONCE: Final = 8
_MOST_BYTES: Final = 2 * 2**30
"""Most bytes of the log-probabilities that are kept."""
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class GateSettings(BaseModel):
    """How scores of tokens are combined."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    certain: _Share = 0.95
    """Scores are combined only where the most likely tokens differ and no member gives its own more than this."""
    quality: Mapping[str, _Share] = {}
    """A feature of each member; without an entry, the share of training rows whose answer it predicts."""
    candidates: Annotated[int, Field(ge=2, le=1024)] = 32
    """Most likely tokens of each member that enter the softmax."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenRows:
    """The answer tokens of R rows, N in all, as M members predict them; C candidates, the right token first.

    Attributes:
        logprobs: (N, M, C) of the candidates; a repeated candidate has -inf.
        features: (N, M, 6) of the gate, whose last one is set with the qualities.
        rows: (N,) the row of each token.
        right: (R, M) whether a member predicts all tokens of a row.
    """

    logprobs: Tensor
    features: Tensor
    rows: Tensor
    right: Tensor

    @classmethod
    def read(cls, members: Sequence[Member], rows: Sequence[AnswerRow], n_candidates: int, on_rows: Any) -> Self:
        """Let all members read all rows.

        Raises:
            CoeError: a member cannot read a row, with its place; EngineError, OutOfMemory: a member failed.
        """
        readings = [[_reading(member, row) for row in rows] for member in members]
        parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for batch in batches([len(each.ids) for each in readings[0]], _ROWS_AT_ONCE):
            parts |= zip(batch, _measured(members, readings, batch, n_candidates), strict=True)
            on_rows(len(parts), len(rows))
        in_order = [parts[row] for row in range(len(rows))]
        counts = torch.tensor([len(part[0]) for part in in_order])
        return cls(
            logprobs=torch.cat([part[0] for part in in_order]),
            features=torch.cat([part[1] for part in in_order]),
            rows=torch.repeat_interleave(torch.arange(len(rows)), counts),
            right=torch.stack([part[2] for part in in_order]),
        )

    def scored(self, gate: TokenGate, certain: float, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the candidates (n, C) of these tokens, and whether each token is combined (n,)."""
        logprobs, features = self.logprobs[tokens], self.features[tokens]
        largest, best = features[..., 1].max(dim=1)
        combined = (features[..., 4] < 1).any(dim=1) & (largest <= certain)
        weights = gate(features).exp()
        real = logprobs[:, 0].isfinite()
        mixed = torch.einsum("nm,nmc->nc", weights, logprobs.masked_fill(~real[:, None], 0.0))
        mixed = mixed.masked_fill(~real, -torch.inf).log_softmax(dim=-1)
        alone = logprobs[torch.arange(len(tokens)), best]
        return torch.where(combined[:, None], mixed, alone), combined


class LogitsTrainer:
    """See `coe.latent.training.trainer.Trainer`."""

    settings: ClassVar[type[BaseModel]] = GateSettings
    architecture: ClassVar[str] = "logits"
    start: ClassVar[str] = "the mean of the members' log-probabilities, where they are combined"

    @classmethod
    def check(cls, job: Job) -> None:
        """Refuse what cannot be trained; see `coe.latent.training.trainer.Trainer`."""
        check_members(job, cls.architecture)
        if unknown := sorted(job.settings.quality.keys() - {*job.config.members}):
            place = job.file.document.place(("settings", "quality"))
            raise ConfigError(f"{place}: {unknown[0]!r} is not one of the members")

    @classmethod
    def prepare(cls, job: Job) -> GateObjective:
        """Load the members, let them read all rows, and free them.

        Raises:
            Unsupported: the members have different vocabularies.
            ConfigError: too many tokens, or none that would be combined.
        """
        settings: GateSettings = job.settings
        with Members(job.config.members, job.snapshot, job.service.engines, on_loading=job.on_loading) as members:
            check_same_vocabulary("logits", {member.name: member.tokenizer for member in members})
            _check_size(members, [*job.train, *job.valid], settings)
            train, valid = (
                TokenRows.read(
                    list(members), rows, settings.candidates, lambda n, of, what=what: job.on_progress(what, n, of)
                )
                for what, rows in (("training rows", job.train), ("validation rows", job.valid))
            )
        measured = dict(zip(job.config.members, train.right.float().mean(0).tolist(), strict=True))
        return GateObjective(job, train, valid, {**measured, **settings.quality})


class GateObjective:
    """Trains the gate on what the members left of the rows.

    Args:
        quality: of each member, in their order.
    """

    def __init__(self, job: Job, train: TokenRows, valid: TokenRows, quality: Mapping[str, float]) -> None:
        self._job, self._train, self._valid, self._quality = job, train, valid, dict(quality)
        self._gate = TokenGate(job.config.training.seed)
        for rows in (train, valid):
            rows.features[..., 5] = torch.tensor(list(quality.values()))
        every = torch.arange(len(train.rows))
        with torch.no_grad():
            _, combined = train.scored(self._gate, job.settings.certain, every)
        by_row = [every[combined & (train.rows == row)] for row in range(len(job.train))]
        self._tokens = by_row
        if not any(map(len, by_row)):
            raise ConfigError(
                f"{job.config.train}: the members agree on all answer tokens, or one of them is certain, so there is "
                "nothing to combine: raise settings.certain, or use other rows"
            )

    def groups(self) -> Sequence[Group]:
        """The weights of the gate."""
        return [Group(dict(self._gate.named_parameters()))]

    def loss(self, rows: Sequence[int], step: Step) -> Losses:
        """Cross-entropy of the combined tokens of these rows; zero if they have none."""
        tokens = torch.cat([self._tokens[row] for row in rows])
        if not len(tokens):
            return Losses(sum(parameter.sum() for parameter in self._gate.parameters()) * torch.zeros(()))
        scores, _ = self._train.scored(self._gate, self._job.settings.certain, tokens)
        total = -scores[:, 0].mean()
        return Losses(total, {"cross_entropy": total.item(), "combined_tokens": float(len(tokens))})

    @torch.no_grad()
    def validate(self) -> Validation:
        """All answer tokens of the validation rows, combined or not."""
        every = torch.arange(len(self._valid.rows))
        scores, _ = self._valid.scored(self._gate, self._job.settings.certain, every)
        wrong = torch.zeros(len(self._job.valid)).index_add(0, self._valid.rows, (scores.argmax(1) != 0).float())
        return Validation(float(-scores[:, 0].mean()), float((wrong == 0).float().mean()))

    def save(self, path: Path, card: str) -> Artifact:
        """Write the artifact."""
        settings = {"mode": "gate", "certain": self._job.settings.certain, "quality": self._quality}
        return Artifact.write(path, composed_of(self._job, "logits", settings), tensors=self._gate.tensors(), card=card)


def _reading(member: Member, row: AnswerRow) -> Reading:
    try:
        return member.reading(row.prompt, row.answer)
    except CoeError as error:
        error.args = (f"{row.place}: {error}",)
        raise


def _measured(
    members: Sequence[Member], readings: Sequence[Sequence[Reading]], rows: Sequence[int], n_candidates: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Log-probabilities of candidates (n, M, C), features (n, M, 6) and right members (M,) of each row."""
    counts = [len(readings[0][row].targets) for row in rows]
    scores = []
    for member, own in zip(members, readings, strict=True):
        with torch.no_grad(), translate(f"{member.name!r} failed while reading the rows", EngineError):
            scores.append(member.logits([own[row] for row in rows]).float().log_softmax(-1).cpu())
    width = min(each.shape[-1] for each in scores)  # models of one vocabulary may pad it differently
    together = torch.stack([each[:, :width] for each in scores], 1)  # (N, M, V)
    for row, logprobs in zip(rows, torch.split(together, counts), strict=True):
        right = torch.tensor(readings[0][row].targets)
        top = logprobs.topk(min(n_candidates, width), dim=-1).indices.flatten(1)
        candidates = torch.cat([right[:, None], top], 1)
        again = (candidates[:, :, None] == candidates[:, None]).tril(-1).any(-1)
        of_candidates = logprobs.gather(-1, candidates[:, None].expand(-1, len(members), -1))
        is_right = (logprobs.argmax(-1) == right[:, None]).all(0)
        features = token_features(logprobs, torch.zeros(len(members)))
        yield of_candidates.masked_fill(again[:, None], -torch.inf), features, is_right


def _check_size(members: Members, rows: Sequence[AnswerRow], settings: GateSettings) -> None:
    """Refuse rows whose log-probabilities would not fit, before any of them is read."""
    n_bytes = sum(len(row.answer) + 1 for row in rows) * len(members) * (settings.candidates * len(members) + 1) * 4
    if n_bytes > 4 * _MOST_BYTES:  # an answer has some 3 to 4 characters a token
        raise ConfigError(
            f"the log-probabilities of {len(rows):,} rows would take about {n_bytes / 2**32:.1f} GiB, and the most is "
            f"{_MOST_BYTES // 2**30}: use fewer rows, or lower settings.candidates"
        )
