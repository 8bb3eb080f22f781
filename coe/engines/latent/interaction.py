"""Interactions: cross-attentions by which a frozen primary reads the notes of frozen peers.

Shapes: primary of width d and L layers, h (T, d) its hidden states after a layer; peer m of width d_m, S_m (J, T_m,
d_m) its states at J depths; shared width d_s, H heads of width d_h = d_s / H, Q interactions. For interaction q, after
layer round(q L / (Q + 1)) of the primary:

    s_mj     = (S_mj - mu_mj) / (sigma_mj + 1e-4)         per dimension, over the training rows: kept as buffers
    N        = concat over m, j, tokens t of s_mj P_m + e_m + f(t) F  (n, d_s) the notes; depths are separate notes
    score_ij = LN(h_i) Wq . N_j Wk / sqrt(d_h) + beta O_ij + log w_m(j)      for each of H heads
    c_i      = concat_h softmax_j(score_ij) (N_j Wv)      (T, d_s); j runs over the notes and one null note
    h_i     += c_i Wo                                     Wo (d_s, d) starts at zero: the untouched primary

O_ij is 1 where token i and note j are on overlapping characters of the user's text. f(t) are sines and cosines of where
the note stands in its peer's answer (`PeerStates.order`), F (16, d_s) is learned: without it notes are a set, and of
two values in an answer the primary cannot tell which is the first. The null note n_0 is learned, its value is zero. The
weight w_m of a peer is 1 unless a router sets it.

The form follows Mixture of Thoughts (arXiv 2509.21164: projections to a shared width, cross-attention of the primary
over the active experts' states after Q stacks) and CALM (arXiv 2401.02412: an anchor model attends to an augmenting
one). What differs: only the primary reads, so that peers need not run in step with it; one projection a peer rather
than one per interaction; states are standardised; overlapping characters take the place of token alignment; text that
the primary writes is masked by characters, so that a token never sees what comes after it; the order of the notes; the
null note; Wo alone starts at zero and there is no gate, for with two zeros no gradient passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from coe.engines.latent.memory import Memories, Memory, PeerStates
from coe.engines.latent.shape import InteractionShape
from coe.errors import EngineError

EPSILON: Final = 1e-4
"""Added to sigma, for dimensions that never change."""
FIRST_BETA: Final = 4.0
"""beta of the first half of the heads at the start; it is 0 for the others."""
_WAVES: Final = 2 * math.pi / torch.logspace(math.log10(3), math.log10(300), 8)
"""Angles a token of the sines and cosines of the order: 3 to 300 tokens a turn."""


class Peer(nn.Module):
    """P_m and e_m of one peer, and mu and sigma of its states.

    Args:
        width: d_m.
        depths: J.
        shared_width: d_s.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, depths: int, shared_width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.project = nn.Parameter(_normal(width, shared_width, generator=generator))  # P_m
        self.bias = nn.Parameter(_normal(1, shared_width, generator=generator)[0] * 0.1)  # e_m
        self.register_buffer("mean", torch.zeros(depths, width))
        self.register_buffer("deviation", torch.ones(depths, width))

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Set mu and sigma (J, d_m), measured on the training rows."""
        if mean.shape != self.mean.shape or deviation.shape != self.deviation.shape:
            raise ValueError(f"mean and deviation have the shape {tuple(self.mean.shape)}, got {tuple(mean.shape)}")
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def forward(self, states: Tensor) -> Tensor:
        """(J, T, d_m) states -> (J, T, d_s) notes."""
        standard = (states.float() - self.mean[:, None]) / (self.deviation[:, None] + EPSILON)
        return standard @ self.project + self.bias


class Interaction(nn.Module):
    """One cross-attention: LN, Wq, Wk, Wv, Wo, beta."""

    def __init__(self, shape: InteractionShape, generator: torch.Generator) -> None:
        super().__init__()
        d, d_s = shape.width, shape.shared_width
        self.norm = nn.LayerNorm(d)
        self.query = nn.Parameter(_normal(d, d_s, generator=generator))
        self.key = nn.Parameter(_normal(d_s, d_s, generator=generator))
        self.value = nn.Parameter(_normal(d_s, d_s, generator=generator))
        self.output = nn.Parameter(torch.zeros(d_s, d))
        first = torch.zeros(shape.heads)
        first[: shape.heads // 2] = FIRST_BETA
        self.beta = nn.Parameter(first) if shape.spans else None


class Interactions(nn.Module):
    """All trained tensors of a composition over the channel `cross`, in float32.

    Args:
        shape: determines the tensors.
        seed: of the random ones; Wo is zero.
    """

    def __init__(self, shape: InteractionShape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        self.peers = nn.ModuleList(
            Peer(width, shape.depths, shape.shared_width, generator) for width in shape.peers.values()
        )
        self.interactions = nn.ModuleList(Interaction(shape, generator) for _ in range(shape.interactions))
        null = _normal(1, shape.shared_width, generator=generator)[0]
        self.null = nn.Parameter(null) if shape.null_note else None
        n_features = 2 * len(_WAVES)
        order = _normal(n_features, shape.shared_width, generator=generator) if shape.order else None
        self.order = None if order is None else nn.Parameter(order)

    def where(self) -> tuple[int, ...]:
        """(Q,) after which layer of the primary each interaction stands, counted from 1."""
        return self.shape.where()

    def peer(self, name: str) -> Peer:
        """The projection of a peer. Raises EngineError if the composition was trained without it."""
        names = list(self.shape.peers)
        if name not in names:
            raise EngineError(f"the composition was not trained with the peer {name!r}; its peers: {', '.join(names)}")
        peer = self.peers[names.index(name)]
        assert isinstance(peer, Peer)
        return peer

    def memory(self, notes: Mapping[str, PeerStates]) -> Memory:
        """Keys and values of a request's notes, computed once per request.

        Args:
            notes: by the peer's name; missing peers are left out, and the order does not matter.

        Raises:
            EngineError: an unknown peer, or states of another shape than trained with.
        """
        names = [name for name in self.shape.peers if name in notes]
        if unknown := [name for name in notes if name not in self.shape.peers]:
            self.peer(unknown[0])
        projected = [self._project(name, notes[name]) for name in names]
        repeats = 1 if self.shape.layers == "same" else self.shape.depths
        keys, values = zip(*(self._keys_and_values(q, projected) for q in range(len(self.interactions))), strict=True)
        like = self._like()
        return Memory(
            keys=keys,
            values=values,
            spans=_concat([_spans(notes[name]).repeat(repeats, 1) for name in names], (0, 2), like),
            ends=_concat([_ends(notes[name]).repeat(repeats) for name in names], (0,), like),
            log_weights=_concat([_log_weights(notes[name]).repeat(repeats) for name in names], (0,), like).float(),
        )

    def read(
        self,
        q: int,
        hidden: Tensor,
        memories: Memories,
        *,
        spans: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        """c Wo (rows, T, d) in float32: what interaction q (from 0) adds to the hidden states after its layer.

        Zero for rows without notes. Tokens with `ends` read only notes of text up to there (`Memories.visible`).

        Args:
            hidden: (rows, T, d) hidden states of the primary, of any float type.
            memories: the notes of the same rows.
            spans: (rows, T, 2) characters of the user's text of each token, -1 for none; None: no token has any.
            ends: (rows, T) for `reads: together`.
        """
        this = self.interactions[q]
        assert isinstance(this, Interaction)
        rows, n_tokens, _ = hidden.shape
        queries = (this.norm(hidden.float()) @ this.query).view(rows, n_tokens, self.shape.heads, -1)
        scale = 1 / math.sqrt(queries.shape[-1])
        scores = torch.einsum("rthc,rnhc->rhtn", queries, memories.keys[q]) * scale
        if this.beta is not None and spans is not None:
            scores = scores + this.beta[:, None, None] * memories.overlaps(spans)[:, None]
        scores = scores + memories.log_weights[:, None, None]
        visible = memories.visible(ends)[:, None]
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = self._weights(this, scores, queries, scale) * visible
        context = torch.einsum("rhtn,rnhc->rthc", weights, memories.values[q])
        return context.flatten(2) @ this.output

    def _weights(self, this: Interaction, scores: Tensor, queries: Tensor, scale: float) -> Tensor:
        """(rows, H, T, n) softmax of the scores; the null note takes its share and has no column."""
        if self.null is None:
            return scores.softmax(-1)
        null = (self.null @ this.key).view(self.shape.heads, -1)
        null_scores = torch.einsum("rthc,hc->rht", queries, null)[..., None] * scale
        return torch.cat([null_scores, scores], -1).softmax(-1)[..., 1:]

    def _project(self, name: str, notes: PeerStates) -> Tensor:
        """(J, T, d_s) notes of a peer."""
        wanted, states = (self.shape.depths, self.shape.peers[name]), notes.states
        if states.ndim != 3 or (states.shape[0], states.shape[2]) != wanted:
            raise EngineError(
                f"the notes of peer {name!r} have the shape {tuple(states.shape)}; the composition was trained with "
                f"{wanted[0]} depths of width {wanted[1]}"
            )
        projected: Tensor = self.peer(name)(states.to(self._like().device))
        if self.order is not None and notes.order is not None:
            projected = projected + _features(notes.order.to(projected.device)) @ self.order
        return projected

    def _keys_and_values(self, q: int, projected: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(n, H, d_h) twice: of the notes that interaction q reads."""
        this, same = self.interactions[q], self.shape.layers == "same"
        assert isinstance(this, Interaction)
        parts = [notes[q] if same else notes.flatten(0, 1) for notes in projected]
        notes = torch.cat(parts) if parts else self._like().new_zeros(0, self.shape.shared_width)
        heads = (len(notes), self.shape.heads, self.shape.shared_width // self.shape.heads)
        return (notes @ this.key).view(heads), (notes @ this.value).view(heads)

    def _like(self) -> Tensor:
        """A tensor on the module's device."""
        first = self.interactions[0]
        assert isinstance(first, Interaction)
        return first.output


def _normal(n_in: int, n_out: int, *, generator: torch.Generator) -> Tensor:
    """(n_in, n_out) that keeps the variance of what it multiplies."""
    return torch.randn(n_in, n_out, generator=generator) / math.sqrt(n_in)


def _features(order: Tensor) -> Tensor:
    """(T,) numbers -> (T, 16) sines and cosines."""
    angles = order.float()[:, None] * _WAVES.to(order.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


def _spans(notes: PeerStates) -> Tensor:
    n_tokens = notes.states.shape[1]
    return torch.full((n_tokens, 2), -1) if notes.spans is None else notes.spans


def _ends(notes: PeerStates) -> Tensor:
    n_tokens = notes.states.shape[1]
    return torch.full((n_tokens,), -1) if notes.ends is None else notes.ends


def _log_weights(notes: PeerStates) -> Tensor:
    n_tokens = notes.states.shape[1]
    if notes.weight is None:
        return torch.zeros(n_tokens)
    return notes.weight.log().expand(n_tokens)


def _concat(parts: list[Tensor], empty: tuple[int, ...], like: Tensor) -> Tensor:
    """The parts, one after the other, on the device of `like`."""
    if not parts:
        return torch.zeros(empty, dtype=torch.long, device=like.device)
    return torch.cat([part.to(like.device) for part in parts])
