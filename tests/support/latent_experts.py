"""What the tests of notes in the engine hf share: experts on tiny models, their notes, and compositions of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from engine_models import Said

from coe.engines.base import Adapter, Expert, Member
from coe.engines.hf.batch import BatchRow
from coe.engines.hf.composed import compose
from coe.engines.hf.decoding import Decoding
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.loop import padded, prepared
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.interaction import Interactions
from coe.engines.latent.notes import Notes
from coe.engines.latent.shape import InteractionShape
from coe.types import GenerateRequest, NotesWanted, PeerNotes
from registry.composed import Composed
from registry.spec import ExpertSpec, Kind
from routers.base import Message

BOTH = ["LlamaForCausalLM", "Gemma3ForCausalLM"]
"""Two architectures; the second one has layers with a sliding window and without."""
WIDTH, LAYERS = 32, 4


def asked(text: str, n: int = 8, **fields: Any) -> GenerateRequest:
    """A conversation of one message."""
    return GenerateRequest(messages=(Message("user", text),), max_tokens=n, **fields)


async def said(chunks: AsyncIterator[Any]) -> Said:
    """A whole answer."""
    got = [chunk async for chunk in chunks]
    return Said("".join(chunk.text for chunk in got), got[-1].finish_reason, got[-1].usage, tuple(got))


async def noted(
    expert: HFExpert, request: GenerateRequest, adapter: Adapter | None = None, **wanted: Any
) -> tuple[Said, Notes]:
    """The answer of an expert, and the notes that it leaves."""
    request = replace(request, wants="latent", notes_wanted=NotesWanted(**wanted))
    answer = await said(expert.generate(request, adapter))
    value = answer.chunks[-1].value
    assert value is not None
    return answer, Notes.unpack(value)


@asynccontextmanager
async def loaded(
    folder: Path, *, dtype: str = "float32", name: str = "tiny", **settings: Any
) -> AsyncIterator[HFExpert]:
    """The expert in a folder."""
    engine = HFEngine(device="cpu", dtype=dtype, **settings)
    expert = await engine.load(ExpertSpec(name=name, kind=Kind.MODEL, source=str(folder)), folder)
    assert isinstance(expert, HFExpert)
    try:
        yield expert
    finally:
        await engine.unload(expert)


def interactions(peers: Sequence[str], *, seed: int = 1, reads: bool = True, **shape: Any) -> Interactions:
    """Random interactions; with `reads`, Wo is random too, so that notes change the answer."""
    sizes: dict[str, Any] = {"shared_width": 16, "heads": 2, "interactions": 2} | shape
    module = Interactions(InteractionShape(WIDTH, LAYERS, dict.fromkeys(peers, WIDTH), **sizes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for each in module.interactions if reads else ():
        torch.nn.init.normal_(each.output, std=0.5, generator=generator)
    return module


@dataclass(frozen=True)
class Composition:
    """A composed expert on disk: its spec and the folder of its artifact."""

    spec: ExpertSpec
    folder: Path

    def on(self, model: Expert, adapter: Adapter | None = None) -> Any:
        """It, for one request, with this first member."""
        return compose(self.spec, {self.spec.members[0]: Member(model, adapter)}, self.folder)


def composition(
    folder: Path,
    peers: Sequence[str],
    module: Interactions | None = None,
    *,
    architecture: str = "notes",
    primary: str = "tiny",
    adapter: Path | None = None,
    name: str = "both",
    settings: Mapping[str, Any] | None = None,
) -> Composition:
    """Write an artifact; `adapter` is copied into it."""
    own = dict(settings or {})
    if module is not None:
        own["interaction"] = module.shape.document()
    members = dict.fromkeys([primary, *peers], "")
    Artifact.write(
        folder,
        Composed(architecture, members, own),
        tensors={} if module is None else module.state_dict(),
        adapter=None if adapter is None else lambda target: _copy(adapter, target),
        card="",
    )
    spec = ExpertSpec(
        name=name,
        kind=Kind.COMPOSED,
        architecture=architecture,
        members=(primary, *peers),
        source=str(folder),
        settings=own,
    )
    return Composition(spec, folder)


def _copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())


def left(notes: Notes, peer: str | None = None, span: tuple[int, int] | None = None) -> PeerNotes:
    """Notes as a request carries them, under the name of a peer."""
    named = notes if peer is None else replace(notes, peer=peer)
    return PeerNotes(named.peer, named.pack(), span)


async def row_of(expert: HFExpert, request: GenerateRequest, composed: Any = None, adapter: Any = None) -> BatchRow:
    """A row of the expert's batch; with a composed expert, one that reads the notes of the request."""
    if composed is None:
        return await expert.prepare(request, adapter)
    own, reading = composed.read(request)
    row = await expert._preparation.row(replace(request, notes=None), own, None, reading)
    row.adapter = None  # these forwards apply none
    return row


def scores_of(expert: HFExpert, rows: Sequence[BatchRow], n_steps: int = 4, n_prefill: int | None = None) -> Any:
    """The scores (n_steps, n_rows, n_vocabulary) that the model gives to the tokens of one batch of rows."""
    model, steps = expert.loaded.model, []
    with torch.inference_mode():
        ids, inputs = prepared(model, *padded(rows, 0, model.device))
        decoding = Decoding(model, rows, ids, inputs)
        while not decoding.prefill(n_prefill):
            pass
        for step in range(n_steps):
            if step:
                decoding.decode()
            assert decoding._scores is not None
            steps.append(decoding._scores.clone())
            decoding.advance()
    return torch.stack(steps)
