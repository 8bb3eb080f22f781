"""Presets `notes` and `notes-prompt`: a primary that reads the hidden states of its peers (channel `cross`).

    L = CE(answer tokens) + keep * KL(bare primary || composition) on rows that the bare primary answers right

Trained are the interactions (`coe.engines.latent.interaction`) and, with `lora`, an adapter of the primary. CALM (arXiv
2401.02412) trains the same kind of cross-attention with the cross-entropy alone; the divergence, which keeps what
works, and missing and wrong peers (`exposure`) are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import BaseModel
from torch import Tensor

from coe.engines.latent.artifact import INTERACTION, Artifact
from coe.engines.latent.interaction import Interactions
from coe.engines.latent.memory import Memories, PeerStates
from coe.engines.latent.received import Received
from coe.engines.latent.shape import InteractionShape, deep_layers, same_layers
from coe.errors import ConfigError, TaskError
from coe.latent.training.batches import EncodedRow, Predicted
from coe.latent.training.checks import check_members, sizes_of
from coe.latent.training.exposure import Source
from coe.latent.training.lora import check_lora
from coe.latent.training.notes_settings import NotesSettings
from coe.latent.training.objective import AnswerLoss, Sources, composed_of, draft_spec, encoded_rows, lora_group
from coe.latent.training.peers import CollectedNotes, collect_notes
from coe.latent.training.primary import Primary
from coe.latent.training.trainer import Group, Job, Losses, Step, Validation

ARCHITECTURE: Final = "notes"
_CALLS: Final = {"places", "asks", "peer_deadline_s", "max_answer_tokens", "max_notes"}
"""Settings of the artifact that are those of the file."""
BETA_RATE: Final = 1e-2
"""Learning rate of beta: its few weights must move further than those of a projection."""


class NotesTrainer:
    """Preset `notes`: each peer answers, and leaves notes of its answer."""

    settings: ClassVar[type[BaseModel]] = NotesSettings
    architecture: ClassVar[str] = ARCHITECTURE
    start: ClassVar[str] = "the untouched primary"
    reads: ClassVar[str] = "answer"

    @classmethod
    def check(cls, job: Job) -> None:
        """Refuse what cannot be trained; see `coe.latent.training.trainer.Trainer`."""
        check_members(job, cls.architecture)
        check_lora(job.members[0], job.settings.lora, job.snapshot)
        cls._shape(job, cls._layers(job))

    @classmethod
    def prepare(cls, job: Job) -> NotesObjective:
        """Collect the notes, measure the bare primary, and load it."""
        layers = cls._layers(job)
        shape = cls._shape(job, layers)
        settings = cls.call_settings(job, layers)
        spec, every = draft_spec(job, ARCHITECTURE, settings), [*job.train, *job.valid]
        _, rows = encoded_rows(job)  # before the peers are asked: a row that is too long is refused at once
        notes = collect_notes(spec, job.service, job.snapshot, every, job.on_progress, job.on_loading)
        config, own = job.config, job.settings
        job.on_loading(config.members[0])
        primary = Primary.open(
            job.members[0], job.snapshot, job.service.engines, lora=own.lora, seed=config.training.seed
        )
        interactions = Interactions(shape, seed=config.training.seed)
        return NotesObjective(job, settings, primary, interactions.to(primary.device), rows, notes)

    @classmethod
    def call_settings(cls, job: Job, layers: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The settings of the artifact that state how peers are called (`coe.engines.latent.settings`)."""
        own: NotesSettings = job.settings
        stated = own.model_dump(mode="json", include=_CALLS)
        return {"reads": cls.reads, **stated, "layers": {peer: list(each) for peer, each in layers.items()}}

    @staticmethod
    def _layers(job: Job) -> dict[str, tuple[int, ...]]:
        """Of each peer, the layers whose states are notes."""
        own: NotesSettings = job.settings
        peers = job.members[1:]
        if isinstance(own.layers, Mapping):
            if wrong := sorted(own.layers.keys() ^ {spec.name for spec in peers}):
                place = job.file.document.place(("settings", "layers"))
                raise ConfigError(f"{place}: states the layers of each peer, and of no other expert: {wrong[0]!r}")
            return {spec.name: own.layers[spec.name] for spec in peers}
        sizes = {spec.name: sizes_of(spec, job.snapshot)[1] for spec in peers}
        if own.layers == "same":
            return {peer: same_layers(n_layers, own.interactions) for peer, n_layers in sizes.items()}
        if own.depths == 1:
            return dict.fromkeys(sizes, ())
        return {peer: deep_layers(n_layers, own.depths) for peer, n_layers in sizes.items()}

    @staticmethod
    def _shape(job: Job, layers: Mapping[str, tuple[int, ...]]) -> InteractionShape:
        own: NotesSettings = job.settings
        depths = {max(1, len(each)) for each in layers.values()}
        if len(depths) > 1:
            raise ConfigError(
                f"{job.file.document.place(('settings', 'layers'))}: every peer has the same number of layers; stated "
                f"are {', '.join(f'{len(each)} of {peer}' for peer, each in layers.items())}"
            )
        width, n_layers = sizes_of(job.members[0], job.snapshot)
        for spec in job.members[1:]:
            if (most := max(layers[spec.name], default=0)) > (there := sizes_of(spec, job.snapshot)[1]):
                raise ConfigError(f"settings.layers: {spec.name!r} has {there} layers, not {most}")
        return InteractionShape(
            width=width,
            n_layers=n_layers,
            peers={spec.name: sizes_of(spec, job.snapshot)[0] for spec in job.members[1:]},
            shared_width=own.shared_width,
            heads=own.heads,
            interactions=own.interactions,
            depths=depths.pop(),
            layers="same" if own.layers == "same" else "deep",
            null_note=own.null_note,
            spans=own.spans,
            order=own.order,
        )


class NotesPromptTrainer(NotesTrainer):
    """Preset `notes-prompt`: each peer reads the prompt only."""

    reads: ClassVar[str] = "prompt"


class NotesObjective:
    """Trains the interactions, and an adapter of the primary if one is configured.

    Args:
        job: rows and settings.
        settings: of the artifact, without the shape of the interactions.
        primary, interactions: on one device.
        rows, notes: of the training rows, then of the validation rows.
    """

    def __init__(
        self,
        job: Job,
        settings: Mapping[str, Any],
        primary: Primary,
        interactions: Interactions,
        rows: Sequence[EncodedRow],
        notes: CollectedNotes,
    ) -> None:
        self._job, self._settings = job, settings
        self._spec = draft_spec(job, ARCHITECTURE, settings)
        self._primary, self._interactions, self._notes = primary, interactions, notes
        self._standardise()
        self._loss = AnswerLoss(job, primary, rows, self, interactions.shape.peers)

    def groups(self) -> list[Group]:
        """The interactions, their betas with a rate of their own, and the adapter."""
        own = dict(self._interactions.named_parameters())
        betas = {name: tensor for name, tensor in own.items() if name.endswith(".beta")}
        rest = {name: tensor for name, tensor in own.items() if name not in betas}
        groups = [Group(rest), Group(betas, BETA_RATE)] if betas else [Group(rest)]
        return [*groups, *lora_group(self._primary, self._job.settings.lora)]

    def loss(self, rows: Sequence[int], step: Step) -> Losses:
        """See `AnswerLoss`."""
        return self._loss.loss(rows, step)

    def validate(self) -> Validation:
        """See `AnswerLoss`."""
        return self._loss.validate()

    def predict(self, rows: Sequence[int], sources: Sequence[Sources]) -> Predicted:
        """The answer tokens of rows that read these notes."""
        batch = self._loss.batch(rows)
        memories = Memories.stacked([self._interactions.memory(self._read(each)) for each in sources])
        if memories is None:
            return self._primary.predict(batch)

        def update(q: int, hidden: Tensor) -> Tensor:
            return self._interactions.read(q, hidden, memories, spans=batch.spans)

        return self._primary.predict(batch, self._interactions.where(), update)

    def save(self, path: Path, card: str) -> Artifact:
        """Write the interactions, and the adapter if one was trained."""
        shape = self._interactions.shape.document()
        settings = {**self._settings, INTERACTION: shape}
        lora = self._primary.lora
        return Artifact.write(
            path,
            composed_of(self._job, ARCHITECTURE, settings),
            tensors=self._interactions.state_dict(),
            adapter=None if lora is None else lora.write,
            card=card,
        )

    def _read(self, sources: Sources) -> dict[str, PeerStates]:
        """The notes of one row; those of another peer stand for the one in whose place they are."""
        found = {peer: self._states(source) for peer, source in sources.items()}
        return {peer: states for peer, states in found.items() if states is not None}

    def _states(self, source: Source) -> PeerStates | None:
        left = self._notes.of(source.row, source.peer)
        return Received.read(self._spec, left, "states").states().get(source.peer)

    def _standardise(self) -> None:
        """Set mu and sigma of every peer from its notes on the training rows."""
        for name in self._interactions.shape.peers:
            states = (self._states(Source(name, row)) for row in range(len(self._job.train)))
            found = moments(each.states for each in states if each is not None)
            if found is None:
                raise TaskError(f"{name!r} has left no notes on any of the training rows: remove it from `members`")
            self._interactions.peer(name).standardise(*(each.to(self._primary.device) for each in found))


def moments(states: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation (J, d) of states (J, T, d) over all T of all rows; None if there are none."""
    sums, n_places = list[tuple[Tensor, Tensor]](), 0
    for each in states:
        wide = each.double()
        now = (wide.sum(1), wide.square().sum(1))
        sums = [(sums[0][0] + now[0], sums[0][1] + now[1])] if sums else [now]
        n_places += wide.shape[1]
    if not n_places:
        return None
    mean = sums[0][0] / n_places
    deviation = (sums[0][1] / n_places - mean.square()).clamp(min=0).sqrt()
    return mean.float(), deviation.float()
