"""A rendered prompt on its way into a batch: what leaves notes of it, or reads those of peers with it, starts here."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from coe.engines.base import Adapter
from coe.engines.chat import ChatStyle
from coe.engines.hf.notes.capture import Capture, check_wanted
from coe.engines.hf.notes.row_reading import RowNotes
from coe.engines.latent.cache_channel import Columns
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.spans import Turns, UserText
from coe.engines.render import Renderer
from coe.errors import Rejected, TemplateError
from coe.types import GenerateRequest, NotesWanted

_MOST_TEMPLATES: Final = 64


class TemplateTurns:
    """What the chat templates of one model and its adapters write around texts; each is rendered once."""

    def __init__(self, tokenizer: Any, renderer: Renderer) -> None:
        self._tokenizer, self._renderer = tokenizer, renderer
        self._known: OrderedDict[str, Turns] = OrderedDict()

    def of(self, request: GenerateRequest, style: ChatStyle, *, expert: str) -> Turns:
        """The turns of the template that renders this request. Blocks while it renders; see `Turns.read`."""
        template = style.on(self._tokenizer, expert).template_for(request)
        assert template is not None  # as `ChatStyle.on` ensures
        choices = repr((request.reasoning_effort, sorted(request.template_kwargs.items())))
        key = hashlib.sha256(f"{template}\0{choices}".encode(errors="replace")).hexdigest()
        if (found := self._known.get(key)) is None:
            special = self._tokenizer.special_tokens_map
            found = Turns.read(template, request, special, self._renderer, expert=expert)
            self._known[key] = found
            if len(self._known) > _MOST_TEMPLATES:
                self._known.popitem(last=False)
        return found


@dataclass(frozen=True, eq=False, slots=True)
class RowPrompt:
    """A prompt as text and tokens, with the model that reads it.

    Attributes:
        text: as rendered. ids: its tokens, or the ids that the request gives.
        style: prompt settings of the adapter, if there is one.
        context_length: tokens of prompt and answer together.
        expert: name for error messages.
    """

    request: GenerateRequest
    text: str
    ids: list[int]
    style: ChatStyle
    model: Any
    tokenizer: Any
    templates: TemplateTurns
    context_length: int
    expert: str

    def decoder(self) -> Decoder:
        """The parts of the model. Raises Unsupported for an unsupported architecture."""
        return Decoder.of(self.model, expert=self.expert)

    def turns(self) -> Turns | None:
        """What the chat template writes around texts; `None` for a plain prompt. See `Turns.read`."""
        if self.request.prompt is not None:
            return None
        return self.templates.of(self.request, self.style, expert=self.expert)

    def spans(self) -> NDArray[np.int32] | None:
        """Characters of the user's text of each token, (n_tokens, 2); `None` if no token has any."""
        if self.request.prompt_ids:
            return None
        try:
            turns = self.turns()
        except (Rejected, TemplateError):  # of the template's own texts: the user's text is looked for without them
            turns = None
        found = UserText.find(self.text, self.request, turns)
        return None if found is None else found.spans(self.tokenizer, self.text, len(self.ids))

    def capture(self, digest: str | None, max_tokens: int) -> Capture:
        """What keeps the notes that the request wants.

        Raises:
            Rejected: layers that the model does not have, or notes above the limit of their size.
            Unsupported: the architecture.
        """
        wanted = self.request.notes_wanted or NotesWanted()
        check_wanted(wanted, self.decoder(), len(self.ids), max_tokens, expert=self.expert)
        spans = None if wanted.channel == "cache" else self.spans()
        return Capture(wanted, self.expert, digest, len(self.ids), spans)


@dataclass(frozen=True, eq=False, slots=True)
class RowReads:
    """What a row reads of its peers: their hidden states, or their key-value entries.

    remarks: for the reader of the answer. peers: whose notes these are.
    """

    notes: RowNotes | None = None
    columns: Columns | None = None
    remarks: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


class PeerReading(Protocol):
    """The notes of one request, before its prompt is known."""

    @property
    def styled_by(self) -> Adapter | None:
        """The adapter whose folder has the prompt settings; `None` takes those of the model."""
        ...

    def prepare(self, prompt: RowPrompt) -> RowReads:
        """What a row with this prompt reads. Called in a thread of its own; may block.

        Raises:
            Rejected: the notes do not fit the model.
            ContextLengthExceeded: prompt and answer do not fit the context.
        """
        ...
