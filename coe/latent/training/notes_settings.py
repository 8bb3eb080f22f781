"""Settings of the presets `notes` and `notes-prompt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from coe.engines.latent.reading import MOST_NOTES
from coe.engines.latent.settings import PeerQuestion
from coe.latent.config import LoraConfig
from coe.types import MOST_NOTE_LAYERS

_Depth = Annotated[int, Field(ge=1)]
_Layers = Annotated[tuple[_Depth, ...], Field(max_length=MOST_NOTE_LAYERS)]


class NotesSettings(BaseModel):
    """Settings of a composition that reads hidden states."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    places: Literal["speaking", "all"] = "speaking"
    """Tokens of a peer's prompt that notes are of: the last one, or all."""
    layers: Literal["deep", "same"] | Mapping[str, _Layers] = "deep"
    """`deep`: the last layers of a peer, all read by every interaction; `same`: the layers at the depths of the
    interactions, one for each. Or, of each peer, the layers from 1; [] is what its head reads."""
    depths: Annotated[int, Field(ge=1, le=4)] = 1
    """Of `deep`: number of layers of each peer: what the head reads, or 2 to 4 layers at 100, 83, 67 and 50%."""
    shared_width: Annotated[int, Field(ge=1, le=8192)] = 256
    """Width of a note after projection."""
    heads: Annotated[int, Field(ge=1, le=256)] = 8
    """Heads of each interaction; `shared_width` is a multiple of it."""
    interactions: Annotated[int, Field(ge=1, le=MOST_NOTE_LAYERS)] = 4
    """Layers of the primary that read."""
    null_note: bool = True
    """Whether a learned note without content competes with those of the peers."""
    spans: bool = True
    """Whether a learned bias favours notes on the characters that a token stands for."""
    order: bool = True
    """Whether notes carry where they stand in the answer of their peer; without it they are a set."""
    asks: Mapping[str, PeerQuestion] = {}
    """Of each peer, what it is asked; without an entry, the request as it is."""
    peer_deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds for each call to a peer when the composition is served."""
    max_answer_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """Most new tokens of a peer."""
    max_notes: Annotated[int, Field(ge=1, le=65_536)] = MOST_NOTES
    """Most places of one peer; the front of the prompt is cut first."""
    lora: LoraConfig | None = None
    """An adapter of the primary that is trained, too."""
