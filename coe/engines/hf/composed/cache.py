"""Architecture `cache`: the first member answers, with key-value entries of its peers' answers among its own.

Its peers are experts on the same base (`coe.engines.latent.cache_channel`); what was trained is an adapter that reads
the entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coe.engines.base import Adapter
from coe.engines.hf.composed.staged import StagedExpert, own_adapter
from coe.engines.hf.notes.row_prompt import PeerReading, RowPrompt, RowReads
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.cache_channel import check_fits, lay_out, suffix_of
from coe.engines.latent.notes import Notes
from coe.engines.latent.received import Received
from coe.types import GenerateRequest


@dataclass(frozen=True, eq=False, slots=True)
class EntriesReading:
    """The notes of one request; see `PeerReading`."""

    notes: Sequence[Notes]
    remarks: tuple[str, ...]
    styled_by: Adapter | None

    def prepare(self, prompt: RowPrompt) -> RowReads:
        """The columns of prompt, entries and suffix. Peers whose entries exceed the context are left out."""
        import torch

        decoder = prompt.decoder()
        for notes in self.notes:
            check_fits(decoder, notes)
        if not self.notes:
            return RowReads(remarks=self.remarks)
        suffix = suffix_of(prompt.tokenizer, prompt.ids, prompt.turns())
        fitting, remarks = self._fitting(prompt, len(suffix))
        like = torch.empty(0, dtype=prompt.model.dtype, device=prompt.model.device)
        with torch.inference_mode():
            columns = lay_out(decoder, prompt.ids, fitting, suffix, like=like)
        peers = tuple(dict.fromkeys(each.peer for each in fitting))
        return RowReads(columns=columns, remarks=(*self.remarks, *remarks), peers=peers)

    def _fitting(self, prompt: RowPrompt, n_suffix: int) -> tuple[list[Notes], list[str]]:
        """The notes that fit the context with prompt, suffix and answer, in order, and remarks on the others."""
        n_answer = prompt.request.max_tokens or 1
        n_left = prompt.context_length - len(prompt.ids) - n_suffix - n_answer
        fitting, remarks = [], []
        for each in self.notes:
            if len(each) <= n_left:
                fitting.append(each)
                n_left -= len(each)
            else:
                remarks.append(
                    f"{each.peer} was left out: its {len(each)} entries do not fit the context of "
                    f"{prompt.context_length} tokens beside the prompt and the answer"
                )
        return fitting, remarks


class CacheExpert(StagedExpert):
    """A composed expert of the architecture `cache`."""

    def read(self, request: GenerateRequest) -> tuple[Adapter | None, PeerReading]:
        """The adapter, and the notes of the request."""
        adapter = self.kept(self._adapter) or self.primary.adapter
        received = Received.read(self.spec, request.notes or (), "cache")
        notes = [each for calls in received.notes.values() for each in calls]
        return adapter, EntriesReading(notes, received.remarks, self.primary.adapter)

    def _adapter(self, artifact: Artifact) -> Adapter | None:
        return own_adapter(artifact, self.spec, self.primary.spec, self.model.spec)
