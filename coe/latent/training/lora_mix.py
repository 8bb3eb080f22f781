"""Preset `lora-mix`: the gate of adapters of one base that are mixed by token (`coe.engines.hf.lora.gates`).

    phatgoose, glider   each member's gate vectors, on its own rows (`member`), with the sigmoid gate of the paper
    trained             the routers, on all rows: cross-entropy + balance + entropy, as the settings state
    fixed               one weight for each member, by a search without gradients on `examples` rows; `training.steps`
                        is the number of evaluations

Base and adapters stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import torch
from pydantic import BaseModel, Field

from coe.engines.base import Adapter
from coe.engines.hf.composed.lora_mix import embed
from coe.engines.hf.lora.gates import new_gate
from coe.engines.hf.lora.gates.gate import AdaptedLayer, Gate
from coe.engines.hf.lora.gates.settings import MixSettings
from coe.engines.hf.lora.mixture import MixtureSlot, QueryMixture
from coe.engines.latent.artifact import Artifact
from coe.errors import ConfigError, TaskError, Unsupported
from coe.experts import locate
from coe.latent.training.batches import Batch, Predicted
from coe.latent.training.checks import check_members, check_one_base
from coe.latent.training.loop import OnStep, Outcome
from coe.latent.training.mot.routing_losses import RoutingLosses
from coe.latent.training.objective import composed_of, encoded_rows
from coe.latent.training.primary import Primary
from coe.latent.training.search import EVALUATIONS, Evaluations, minimise
from coe.latent.training.trainer import Group, Job, Losses, Step, Validation
from registry.spec import ExpertSpec, Kind

ARCHITECTURE: Final = "lora-mix"
_NAME: Final = "mixture"
_BOUND: Final = 1.5
"""Largest weight of the search, as in LoraHub."""


class MixTraining(MixSettings):
    """Settings of a mixture, and of its training."""

    gate: Literal["arrow", "phatgoose", "glider", "trained", "fixed"] = "trained"
    """What weighs the adapters; `arrow` is not trained."""
    examples: Annotated[int, Field(ge=1, le=10_000)] = 32
    """`fixed`: rows on which weights are evaluated, the first of `train`."""
    weight_penalty: Annotated[float, Field(ge=0, le=100)] = 0.05
    """`fixed`: weight of the mean absolute weight in what is minimised."""

    def served(self) -> dict[str, Any]:
        """What the artifact states."""
        stated = self.model_dump(mode="json", exclude=set(MixTraining.model_fields) - set(MixSettings.model_fields))
        default = MixSettings().model_dump(mode="json")
        return {name: value for name, value in stated.items() if name == "gate" or value != default[name]}


class LoraMixTrainer:
    """Preset `lora-mix`; see the module's docstring."""

    settings: ClassVar[type[BaseModel]] = MixTraining
    architecture: ClassVar[str] = ARCHITECTURE
    start: ClassVar[str] = "the mixture with its untrained gate"

    @classmethod
    def check(cls, job: Job) -> None:
        """Refuse what cannot be trained; see `coe.latent.training.trainer.Trainer`."""
        check_members(job, cls.architecture)
        place = job.file.document.place(("members",))
        if models := [spec.name for spec in job.members if spec.kind is not Kind.ADAPTER]:
            raise ConfigError(f"{place}: the preset 'lora-mix' mixes adapters, and {models[0]!r} is a model")
        check_one_base(job)
        settings: MixTraining = job.settings
        MixSettings.read(settings.served(), job.config.members, expert=str(job.config.out))
        if settings.gate == "arrow":
            raise ConfigError(
                f"{job.file.document.place(('settings', 'gate'))}: the gate 'arrow' is not trained: register a "
                "composed expert with `settings: {gate: arrow}`"
            )
        _check_rows(job, settings)

    @classmethod
    def prepare(cls, job: Job) -> MixObjective:
        """Load the base and its adapters."""
        first = job.members[0]
        n = len(job.members)
        job.on_loading(first.name)
        primary = Primary.open(first, job.snapshot, job.service.engines, n_slots=n, seed=job.config.training.seed)
        adapters = [Adapter(spec, locate(spec)) for spec in job.members]
        made = WeightSearch if job.settings.gate == "fixed" else MixObjective
        return made(job, primary, adapters)


def _check_rows(job: Job, settings: MixTraining) -> None:
    """Raises TaskError for rows without the field that the gate reads."""
    if settings.gate in ("phatgoose", "glider"):
        members = job.config.members
        if wrong := [row for row in job.train if row.member not in members]:
            raise TaskError(
                f"{wrong[0].place}: the gate {settings.gate!r} is trained on rows of its members: `member` must be one "
                f"of {', '.join(members)}, not {wrong[0].member!r}"
            )
        if idle := sorted({*members} - {row.member for row in job.train}):
            raise TaskError(f"{job.config.train} has no row of the member {idle[0]!r}")
    groups = set(settings.balance.groups.values()) if settings.balance else set()
    if groups and (wrong := [row for row in job.train if row.group not in groups]):
        raise TaskError(
            f"{wrong[0].place}: `group` must be one of balance.groups ({', '.join(sorted(groups))}), not "
            f"{wrong[0].group!r}"
        )


def _check_layers(layers: Sequence[AdaptedLayer], members: Sequence[str]) -> None:
    """Raises Unsupported for adapters of the head, which training computes for the answer's tokens alone."""
    if outside := [layer for layer in layers if not any(part.isdecimal() for part in layer.name.split("."))]:
        who = [name for name, pair in zip(members, outside[0].updates, strict=True) if pair is not None]
        raise Unsupported(
            f"{who[0]!r} adapts {outside[0].name}, which is in no decoder layer: gates are trained for adapters of "
            "decoder layers only; leave it out of `members`, or use a gate that is not trained"
        )


class MixObjective:
    """The gate of a mixture on the rows of a job.

    Args:
        job: rows and settings.
        primary: the first member, whose base carries all of them.
        adapters: the members.
    """

    def __init__(self, job: Job, primary: Primary, adapters: Sequence[Adapter]) -> None:
        self._job, self._primary, self._config = job, primary, job.config.training
        self._settings: MixTraining = job.settings
        self.members = [adapter.spec.name for adapter in adapters]
        names, layers = primary.slots.layers(adapters, expert=str(job.config.out))
        _check_layers(layers, self.members)
        self.gate: Gate = new_gate(layers, self.members, self._settings).to(primary.device)
        self._mixture = MixtureSlot(_NAME, tuple(names), self.gate)
        self._rows = [*job.train, *job.valid]
        _, self._encoded = encoded_rows(job)
        self._queries = self._embedded(job.members)
        balance = self._settings.balance
        self._routing = RoutingLosses(self.gate.settings, self.members) if balance or self._settings.entropy else None

    def groups(self) -> Sequence[Group]:
        """The trained tensors of the gate."""
        return [Group(dict(self.gate.named_parameters()))]

    def loss(self, rows: Sequence[int], step: Step) -> Losses:
        """The loss of training rows."""
        self.gate.train()
        device = self._primary.device
        self.gate.chance = torch.Generator(device).manual_seed(step.chance.getrandbits(32))
        batch = self._batch(rows)
        with self._observed() as routing:
            found = self._predict(batch, [self._shares(row) for row in rows])
        total = found.loss()
        parts = {"cross_entropy": total.item()}
        if routing is not None:
            total, more = routing.added_to(total, batch.mask, [self._rows[row].group for row in rows])
            parts |= more
        return Losses(total, parts)

    @torch.no_grad()
    def validate(self) -> Validation:
        """The validation rows, mixed as in serving."""
        first = len(self._job.train)
        return self.measure(range(first, len(self._rows)))

    @torch.no_grad()
    def measure(self, rows: Sequence[int]) -> Validation:
        """Loss and accuracy of rows, by position, mixed as in serving."""
        self.gate.eval()
        loss = n_tokens = n_right = 0.0
        for start in range(0, len(rows), self._config.batch):
            some = rows[start : start + self._config.batch]
            found = self._predict(self._batch(some), [self._query(row) for row in some])
            loss += found.loss().item() * len(found.targets)
            n_tokens += len(found.targets)
            n_right += int(found.right(len(some)).sum())
        return Validation(loss / n_tokens, n_right / len(rows))

    def save(self, path: Path, card: str) -> Artifact:
        """Write the artifact of the gate as it is now."""
        composed = composed_of(self._job, ARCHITECTURE, self._settings.served())
        return Artifact.write(path, composed, tensors=self.gate.weights(), card=card)

    def _batch(self, rows: Sequence[int]) -> Batch:
        return Batch.of([self._encoded[row] for row in rows], self._primary.device)

    def _predict(self, batch: Batch, queries: Sequence[torch.Tensor | None]) -> Predicted:
        with self._primary.slots.mixing(self._mixture) as weights:
            weights.select([QueryMixture(_NAME, query) for query in queries])
            return self._primary.predict(batch)

    def _shares(self, row: int) -> torch.Tensor | None:
        """What the gate reads of a training row beside its tokens."""
        if self._settings.gate not in ("phatgoose", "glider"):
            return None
        here = [float(name == self._rows[row].member) for name in self.members]
        return torch.tensor(here, device=self._primary.device)

    def _query(self, row: int) -> torch.Tensor | None:
        if self._queries is None:
            return None
        logits = self.gate.query_logits(self._queries[row : row + 1])
        return None if logits is None else logits[0]

    def _embedded(self, members: Sequence[ExpertSpec]) -> torch.Tensor | None:
        """Embeddings of all rows, for a gate that reads them; those of the instructions are put into the gate."""
        if not self.gate.needs_query:
            return None
        instructions = [self._settings.instructions.get(spec.name) or spec.description for spec in members]
        if missing := [spec.name for spec, text in zip(members, instructions, strict=True) if not text]:
            raise ConfigError(
                f"the gate 'glider' reads what its members do, and {missing[0]!r} has no description: state it in "
                f"settings.instructions"
            )
        device = self._primary.device
        vectors = torch.from_numpy(embed(self._settings.encoder, instructions)).to(device)
        self.gate.instructions = vectors
        return torch.from_numpy(embed(self._settings.encoder, [row.prompt for row in self._rows])).to(device)

    @contextmanager
    def _observed(self) -> Iterator[RoutingLosses | None]:
        if self._routing is not None:
            self._routing.begin()
            self.gate.observer = self._routing.observe
        try:
            yield self._routing
        finally:
            self.gate.observer = None


class WeightSearch(MixObjective):
    """One weight for each member, found without gradients."""

    def search(self, on_step: OnStep) -> Outcome:
        """Minimise the loss of the examples, plus the penalty; the start is the bare base."""
        rows = range(min(self._settings.examples, len(self._job.train)))
        start = [float(self._settings.weights.get(name, 0.0)) for name in self.members]
        before = self._at(start, None)

        def loss(point: Sequence[float]) -> float:
            penalty = self._settings.weight_penalty * sum(map(abs, point)) / len(point)
            return self._at(point, rows).loss + penalty

        values = Evaluations(self._job.work / EVALUATIONS, loss, lambda number, value: on_step(number, {"loss": value}))
        best = minimise(values, start, bound=_BOUND, most=self._config.steps)
        after = self._at(best, None)
        is_better = after.loss < before.loss
        if not is_better:
            after = self._at(start, None)
        figures: Mapping[str, float] = {"valid_loss": after.loss, "valid_accuracy": after.accuracy}
        on_step(len(values), figures)
        return Outcome(len(values), len(values) if is_better else 0, before, after, values.seconds)

    def _at(self, weights: Sequence[float], rows: Sequence[int] | None) -> Validation:
        """Loss and accuracy of rows with these weights; None: of the validation rows."""
        with torch.no_grad():
            self.gate.weights()["w"].copy_(torch.tensor(list(weights)))
        return self.validate() if rows is None else self.measure(rows)
