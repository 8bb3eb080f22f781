"""How each row chooses its next token, whatever else is in its batch: temperature, cut-offs and seed, penalties."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from coe.sampling import SamplingOptions

if TYPE_CHECKING:
    from torch import Tensor

_CANDIDATES: Final = 512
"""Best tokens considered before all are sorted: sorting a vocabulary can cost more than a small model's forward."""


@dataclass(slots=True)
class Sampling:
    """How one row samples: one draw per token, from the row's seed alone. For `top_k`, `min_p` see SamplingOptions."""

    temperature: float
    top_p: float
    rng: random.Random = field(default_factory=random.Random)
    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def of(
        cls, temperature: float, top_p: float, seed: int | None, options: SamplingOptions | None = None
    ) -> Sampling | None:
        """`None` for greedy; no seed draws one from the system."""
        options = options or SamplingOptions()
        rng = random.Random(seed)
        return None if temperature == 0 else cls(temperature, top_p, rng, options.top_k, options.min_p)


class RowSampler:
    """A transformers logits processor that leaves greedy rows alone and decides the others.

    A sampled row gets its token forced (all other scores -inf), so `generate` runs with `do_sample=False` and its
    process-wide generator plays no part. Sampling inverts the cumulative distribution of the tokens, best first, at the
    row's own draw: nearly equal logits (another batch shape) give the same token.

    Args:
        rows: (n_rows,) how each row of the batch samples; `None` is greedy.
    """

    def __init__(self, rows: Sequence[Sampling | None]) -> None:
        self._sampled = [(i, row) for i, row in enumerate(rows) if row is not None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (n_rows, n_vocabulary) -> scores whose argmax is each row's token. `input_ids` is not used."""
        if not self._sampled:
            return scores
        import torch

        where = torch.tensor([i for i, _ in self._sampled], device=scores.device)
        tokens = pick(scores[where], [row for _, row in self._sampled])
        scores[where] = float("-inf")
        scores[where, tokens] = 0.0
        return scores


def pick(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """One token a row, (n_rows,), from logits (n_rows, n_vocabulary) by temperature and cut-offs."""
    import torch

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    # The best logit becomes 0 before dividing, so that a tiny temperature cannot overflow.
    scaled = (logits.float() - logits.max(dim=-1, keepdim=True).values) / column([r.temperature for r in rows])
    mass, draws = torch.logsumexp(scaled, dim=-1, keepdim=True), column([r.rng.random() for r in rows])
    cuts = _CutOffs(*(column([getattr(r, name) for r in rows]) for name in ("top_k", "top_p", "min_p")))
    best = _Best.of(scaled, mass, max(_CANDIDATES, *(r.top_k for r in rows)))
    reached = (cuts.top_p == 1) & (best.cumulative[:, -1:] > draws)
    if not bool((reached | cuts.are_within(best)).all()):
        best = _Best.of(scaled, mass, scaled.shape[-1])
    last = cuts.last(best)
    kept = best.cumulative.gather(1, last).where(cuts.narrow(), 1.0)
    chosen = (best.cumulative <= draws * kept).sum(dim=-1, keepdim=True).minimum(last)
    tokens: Tensor = best.ids.gather(1, chosen).squeeze(1)
    return tokens


@dataclass(frozen=True, slots=True)
class _Best:
    """The n most probable tokens, best first: ids, logits (0 for the best), cumulative probabilities: (n_rows, n)."""

    ids: Tensor
    logits: Tensor
    cumulative: Tensor

    @classmethod
    def of(cls, scaled: Tensor, mass: Tensor, n: int) -> _Best:
        best = scaled.topk(min(n, scaled.shape[-1]), dim=-1)
        return cls(best.indices, best.values, (best.values - mass).exp().cumsum(dim=-1))


@dataclass(frozen=True, slots=True)
class _CutOffs:
    """Which tokens may be drawn, (n_rows, 1) each, with the meaning and in the order of transformers.

    `top_k` tokens; of these the nucleus (arXiv 1904.09751), the smallest set of best tokens whose mass reaches `top_p`;
    of these the tokens with `min_p` of the best one's probability (arXiv 2407.01082). At least one token is left. Each
    leaves a number of tokens, best first.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def narrow(self) -> Tensor:
        """The rows that have one."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)

    def are_within(self, best: _Best) -> Tensor:
        """The rows that leave no token beyond these, of which there are at least `top_k`."""
        return (self.top_k > 0) | (best.cumulative[:, -1:] >= self.top_p) | (best.logits[:, -1:] < self.min_p.log())

    def last(self, best: _Best) -> Tensor:
        """Position of the last token that is left, (n_rows, 1)."""
        n = best.cumulative.shape[-1]
        by_k = (self.top_k - 1).where((self.top_k > 0) & (self.top_k < n), n - 1).long()
        share = best.cumulative / best.cumulative.gather(1, by_k).where(self.top_k > 0, 1.0)
        by_p = (share < self.top_p).sum(dim=-1, keepdim=True)
        by_min = (best.logits >= self.min_p.log()).sum(dim=-1, keepdim=True) - 1
        return by_k.minimum(by_p).minimum(by_min).clamp(min=0)


def processors(options: SamplingOptions, n_prompt: int, eos: Collection[int], device: Any = "cpu") -> Any:
    """What changes the scores of a row before its token is chosen: a LogitsProcessorList; `None` for no change.

    Args:
        n_prompt: tokens of the row's prompt.
        eos: tokens that end the answer.
        device: of the scores.
    """
    changes = list(_processors(options, n_prompt, eos, device))
    if not changes:
        return None
    from transformers import LogitsProcessorList

    return LogitsProcessorList(changes)


def _processors(options: SamplingOptions, n_prompt: int, eos: Collection[int], device: Any) -> Iterator[Any]:
    if options.logit_bias:
        from transformers import SequenceBiasLogitsProcessor

        yield SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in options.logit_bias.items()])
    if options.repetition_penalty != 1:
        from transformers import RepetitionPenaltyLogitsProcessor

        yield RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))
    if options.frequency_penalty or options.presence_penalty:
        yield OccurrencePenalty(options.frequency_penalty, options.presence_penalty, n_prompt)
    if options.min_tokens and eos:
        from transformers import MinNewTokensLengthLogitsProcessor

        yield MinNewTokensLengthLogitsProcessor(n_prompt, options.min_tokens, sorted(eos), device=device)


class OccurrencePenalty:
    """OpenAI's penalties of generated tokens, which transformers lacks: score - frequency * count - presence."""

    def __init__(self, frequency: float, presence: float, n_prompt: int) -> None:
        self._frequency, self._presence, self._n_prompt = frequency, presence, n_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, n_vocabulary) after `input_ids` (1, n_tokens), prompt and answer."""
        answer: Any = input_ids[0, self._n_prompt :]
        tokens, counts = answer.unique(return_counts=True)
        scores = scores.clone()
        scores[0, tokens] -= self._frequency * counts + self._presence
        return scores
