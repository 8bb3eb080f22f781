"""Architecture `notes`: the first member answers, and reads hidden states that its peers have left.

Between its layers stand cross-attentions (`coe.engines.latent.interaction`), with hooks, for the rows that read: rows
with notes of several compositions, rows of ordinary requests and of adapters share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coe.engines.base import Adapter
from coe.engines.hf.composed.staged import StagedExpert, own_adapter
from coe.engines.hf.notes.row_prompt import PeerReading, RowPrompt, RowReads
from coe.engines.hf.notes.row_reading import RowNotes
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.received import Received
from coe.errors import Rejected, WeightsError
from coe.types import GenerateRequest

if TYPE_CHECKING:
    from coe.engines.latent.interaction import Interactions
    from coe.engines.latent.memory import Memory


@dataclass(frozen=True, eq=False, slots=True)
class _Loaded:
    """An artifact in memory: its interactions, on the device of the model, and its adapter if it has one."""

    interactions: Interactions
    adapter: Adapter | None


@dataclass(frozen=True, eq=False, slots=True)
class StatesReading:
    """The notes of one request; see `PeerReading`."""

    interactions: Interactions
    memory: Memory
    remarks: tuple[str, ...]
    peers: tuple[str, ...]
    styled_by: Adapter | None

    def prepare(self, prompt: RowPrompt) -> RowReads:
        """The notes, with the spans of the prompt's tokens."""
        if not len(self.memory):
            return RowReads(remarks=self.remarks)
        spans = prompt.spans() if self.interactions.shape.spans else None
        return RowReads(RowNotes(self.interactions, self.memory, spans), remarks=self.remarks, peers=self.peers)


class NotesExpert(StagedExpert):
    """A composed expert of the architecture `notes`."""

    def read(self, request: GenerateRequest) -> tuple[Adapter | None, PeerReading]:
        """The adapter, and the notes of the request: their keys and values are computed here, once."""
        import torch

        loaded = self.kept(self._load)
        received = Received.read(self.spec, request.notes or (), "states")
        shape = loaded.interactions.shape
        states = received.states()
        for peer, each in states.items():
            wanted, found = (shape.depths, shape.peers[peer]), (each.states.shape[0], each.states.shape[2])
            if found != wanted:
                about = f"the notes of {peer!r} for {self.spec.name!r}"
                raise Rejected(f"{about} have (layers, width) {found}; expected {wanted}")
        with torch.inference_mode():
            memory = loaded.interactions.memory(states)
        reading = StatesReading(loaded.interactions, memory, received.remarks, tuple(states), self.primary.adapter)
        return loaded.adapter or self.primary.adapter, reading

    def _load(self, artifact: Artifact) -> _Loaded:
        decoder = self.model.decoder()
        interactions = artifact.interactions()
        shape = interactions.shape
        if (shape.width, shape.n_layers) != (decoder.width, decoder.n_layers):
            raise WeightsError(
                f"{artifact.path} was trained for a first member of (width, layers) {(shape.width, shape.n_layers)}; "
                f"{self.spec.members[0]!r} has {(decoder.width, decoder.n_layers)}"
            )
        adapter = own_adapter(artifact, self.spec, self.primary.spec, self.model.spec)
        return _Loaded(interactions.to(decoder.device), adapter)
