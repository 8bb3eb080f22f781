"""Composed experts of architecture `mot`: a Mixture of Thoughts (arXiv 2509.21164), served as it was trained.

A router chooses the active members of each prompt and the one that writes. The others read the prompt in their own
wording and the answer while it grows, and the primary reads their hidden states (`coe.engines.hf.in_step.together`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from coe.engines.base import Adapter, Member
from coe.engines.hf.in_step.lockstep import check_text
from coe.engines.hf.in_step.reading_peer import Prompt, ReadingPeer, Spans
from coe.engines.hf.in_step.together import Together
from coe.engines.hf.in_step.writing_primary import WritingPrimary
from coe.engines.hf.members import HFMember, artifact_folder, hf_members
from coe.engines.hf.notes.row_prompt import RowPrompt, RowReads
from coe.engines.latent.decoders import Decoder
from coe.errors import CoeError, InvalidRequest, WeightsError
from coe.seam import expert_error
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec

if TYPE_CHECKING:
    from coe.engines.latent.artifact import Artifact
    from coe.engines.latent.mot import MotInteractions
    from coe.engines.latent.mot_router import Chosen, MemberChooser

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class Composition:
    """What an artifact holds, in memory.

    Attributes:
        interactions: of every primary, on the device of the members.
        chooser: chooses the members of a prompt.
        layers: of each member, those whose states others read.
    """

    interactions: MotInteractions
    chooser: MemberChooser
    layers: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, artifact: Artifact, members: Mapping[str, HFMember]) -> Composition:
        """The composition of an artifact. Blocks.

        Raises:
            WeightsError: it was trained with other members, or does not fit them.
            ConfigError: damaged settings, or K above the number of members.
        """
        from coe.engines.latent.mot import MotInteractions
        from coe.engines.latent.mot_router import read_chooser

        _check_members(artifact, members)
        names, settings, tensors = tuple(members), artifact.composed.settings, artifact.tensors()
        interactions = MotInteractions.of_tensors(names, settings, tensors)
        layers = {name: _layers(artifact, member, interactions) for name, member in members.items()}
        device = next(iter(members.values())).expert.loaded.model.device
        return cls(interactions.to(device), read_chooser(names, settings, tensors), layers)


class Mot:
    """Answers with the members that the router of the artifact chooses; all members are resident.

    The answer has the chat template and the end tokens of the primary. A peer that cannot read, or fails, is left out
    and named in the notes; without peers the bare primary answers.

    Raises:
        Unsupported: a member is on another engine.
        WeightsError: there is no artifact.
    """

    def __init__(self, spec: ExpertSpec, members: Mapping[str, Member], path: Path | None) -> None:
        self.spec, self._path = spec, artifact_folder(spec, path)
        self._members = {member.name: member for member in hf_members(spec, members)}
        self.capacity = min(member.expert.capacity for member in self._members.values())

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is generated; see `Expert.generate`. Usage counts the tokens of all active members.

        Raises:
            Unsupported: the request wants something else than text, or a member's architecture is not supported.
            WeightsError: the artifact does not fit the members.
        """
        check_text(request, self.spec.name)
        if request.prompt_ids:
            raise InvalidRequest(f"{self.spec.name!r} combines experts: token ids are of one tokenizer; send text")
        text = _question(request)
        composition = await asyncio.to_thread(self._composition)
        chosen = await asyncio.to_thread(composition.chooser.choose, text)
        together = await self._together(composition, chosen, request, len(text))
        async with aclosing(cast("AsyncGenerator[Chunk, None]", together.answer())) as chunks:
            async for chunk in chunks:
                yield chunk

    def _composition(self) -> Composition:
        """Read on first use, and kept with the first member."""
        from coe.engines.latent.artifact import Artifact

        first = next(iter(self._members.values())).expert
        # Another version of a member has other digests, and may have been loaded beside this one.
        of_members = [(id(member.expert), member.adapter and member.adapter.key()) for member in self._members.values()]
        key = "mot", Adapter(self.spec, self._path).key(), *of_members
        return first.artifacts.get(key, lambda: Composition.read(Artifact.read(self._path), self._members))

    async def _together(
        self, composition: Composition, chosen: Chosen, request: GenerateRequest, n_user: int
    ) -> Together:
        interactions = composition.interactions.of(chosen.primary)
        names = (chosen.primary, *chosen.peers)
        prompts = await asyncio.gather(*(self._prompt(name, request, chosen.primary) for name in names))
        peers, notes = [], []
        for name, weight, prompt in zip(chosen.peers, chosen.weights, prompts[1:], strict=True):
            try:
                if isinstance(prompt, Exception):
                    raise prompt
                peers.append(
                    ReadingPeer(
                        self._members[name],
                        prompt,
                        composition.layers[name],
                        interactions,
                        n_user=n_user,
                        weight=weight,
                        among=self._beside(name, names),
                    )
                )
            except Exception as error:
                notes.append(self._left_out(name, error))
        primary = self._members[chosen.primary]
        if isinstance(prompts[0], Exception):
            raise prompts[0]
        among = self._beside(primary.name, names)
        writing = WritingPrimary(primary, prompts[0], interactions, n_user=n_user, among=among)
        together = Together(writing, peers, self._left_out)
        read = f", and reads {', '.join(peer.name for peer in peers)}" if peers else " alone"
        together.notes += [f"{primary.name} answers{read}", *notes]
        return together

    async def _prompt(self, name: str, request: GenerateRequest, primary: str) -> Prompt | Exception:
        member, seen = self._members[name], _Spans(self._members[name].adapter)
        try:
            row = await member.expert.prepare(request, member.adapter, chooses=name == primary, reading=seen)
        except Exception as error:
            return error
        return Prompt(row, seen.spans)

    def _beside(self, name: str, names: Sequence[str]) -> list[Adapter | None]:
        """Adapters of the other active members on the model of this one."""
        model = self._members[name].expert
        return [self._members[each].adapter for each in names if each != name and self._members[each].expert is model]

    def _left_out(self, name: str, error: Exception) -> str:
        """A note for the reader of the answer; the log has the whole error."""
        found = error if isinstance(error, CoeError) else expert_error(name, error)
        logger.warning("%s goes on without %s: %s", self.spec.name, name, found)
        return f"{name} was left out: {found.client_text or 'it failed'}"


@dataclass(slots=True)
class _Spans:
    """Takes the spans of a prompt's tokens while it is prepared; see `PeerReading`."""

    styled_by: Adapter | None
    spans: Spans = ()

    def prepare(self, prompt: RowPrompt) -> RowReads:
        found = prompt.spans()
        self.spans = [(-1, -1)] * len(prompt.ids) if found is None else [(int(a), int(b)) for a, b in found]
        return RowReads()


def _question(request: GenerateRequest) -> str:
    """What the router reads, and what spans are of: the last user message, or the raw prompt."""
    if request.prompt is not None:
        return request.prompt
    return next((message.content for message in reversed(request.messages) if message.role == "user"), "")


def _check_members(artifact: Artifact, members: Mapping[str, HFMember]) -> None:
    """Raises WeightsError unless the artifact was trained with these members, in this order."""
    if (trained := tuple(artifact.composed.members)) != tuple(members):
        raise WeightsError(
            f"{artifact.path} was trained with the members {', '.join(trained)}, in this order, and not with "
            f"{', '.join(members)}"
        )
    specs = [member.expert.spec for member in members.values()]
    specs += [member.adapter.spec for member in members.values() if member.adapter]
    artifact.check_members({spec.name: spec for spec in specs})


def _layers(artifact: Artifact, member: HFMember, interactions: MotInteractions) -> tuple[int, ...]:
    """The layers of a member that others read. Raises WeightsError if the artifact does not fit the member."""
    decoder = Decoder.of(member.expert.loaded.model, expert=member.name)
    problem = partial(_problem, artifact, member.name)
    for primary, shape in interactions.shapes.items():
        width = shape.width if primary == member.name else shape.peers[member.name]
        if width != decoder.width:
            raise problem(f"states of width {width}, and the expert has {decoder.width}")
        if primary == member.name and shape.n_layers != decoder.n_layers:
            raise problem(f"{shape.n_layers} layers, and the expert has {decoder.n_layers}")
    depths = next(iter(interactions.shapes.values())).depths
    stated: Any = artifact.composed.settings.get("layers")
    found = stated.get(member.name) if isinstance(stated, Mapping) else None
    if not isinstance(found, list) or len(found) != depths or not all(_is_layer(n, decoder) for n in found):
        raise problem(f"`layers` {found!s:.80}; {depths} numbers from 1 to {decoder.n_layers} are needed")
    return tuple(found)


def _is_layer(value: Any, decoder: Decoder) -> bool:
    return type(value) is int and 1 <= value <= decoder.n_layers


def _problem(artifact: Artifact, member: str, what: str) -> WeightsError:
    return WeightsError(f"{artifact.path} states for {member!r} {what}: train it again")
