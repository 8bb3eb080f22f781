"""The canary: a fixed prompt that is answered after each load, to notice weights that are not those of the expert.

Its tokens are kept on the first load. Other tokens later, on the same hardware with the same versions, mean that the
weights in memory, or what computes with them, are not what they were.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from coe.errors import WeightsError
from registry.spec import ExpertSpec
from registry.storage import atomic_path, coe_home

N_PROMPT: Final = 16
N_NEW: Final = 16
N_TOP: Final = 5
TOLERANCE: Final = 0.2
"""Difference of log-probabilities, in nats, up to which two tokens are a near-tie, which rounding may decide."""
_SALTS: Final = count()


@dataclass(frozen=True, slots=True)
class CanaryAnswer:
    """An answer to the canary's prompt.

    Attributes:
        tokens: (N_NEW,) the generated ids.
        top: for each of them, ids and log-probabilities of the most likely tokens.
    """

    tokens: tuple[int, ...]
    top: tuple[Mapping[int, float], ...]

    def document(self) -> dict[str, Any]:
        """As JSON; keys of `top` become text."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> CanaryAnswer:
        """The reverse. Raises KeyError, TypeError or ValueError for another document."""
        top = tuple({int(token): float(logprob) for token, logprob in each.items()} for each in document["top"])
        return cls(tuple(map(int, document["tokens"])), top)


def prompt(n_ids: int) -> list[int]:
    """The same ids for every model with such a vocabulary; no tokenizer is needed."""
    return [(7919 * (i + 1)) % n_ids for i in range(N_PROMPT)]


def salt(spec: ExpertSpec) -> str:
    """A cache salt that no other request has: a cached prefix would hide wrong weights."""
    return f"canary-{os.getpid()}-{next(_SALTS)}-{spec.digest}"


def difference(kept: CanaryAnswer, now: CanaryAnswer, *, tolerant: bool) -> str | None:
    """What differs between two answers; None if nothing does.

    Args:
        tolerant: a near-tie (TOLERANCE) may be decided otherwise, as on other hardware; what follows it then differs.
    """
    if len(kept.tokens) != len(now.tokens):
        return f"{len(now.tokens)} tokens instead of {len(kept.tokens)}"
    at = next((i for i, pair in enumerate(zip(kept.tokens, now.tokens, strict=True)) if pair[0] != pair[1]), None)
    if at is None or (tolerant and _is_near_tie(kept.tokens[at], now.tokens[at], now.top[at])):
        return None
    return f"token {at + 1} of {len(kept.tokens)} is {now.tokens[at]} instead of {kept.tokens[at]}"


def _is_near_tie(kept: int, now: int, top: Mapping[int, float]) -> bool:
    return kept in top and now in top and top[now] - top[kept] <= TOLERANCE


async def ask_canary(llm: Any, spec: ExpertSpec, n_ids: int) -> CanaryAnswer:
    """The answer of a running engine, greedy.

    Args:
        llm: vLLM's AsyncLLM. spec: the expert whose weights it has. n_ids: token ids of the model.
    """
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    own = salt(spec)
    params = SamplingParams(
        temperature=0.0,
        max_tokens=N_NEW,
        ignore_eos=True,
        logprobs=N_TOP,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    answer = None
    async for output in llm.generate(tokens_input(prompt(n_ids), cache_salt=own), params, own):
        [completion] = output.outputs
        top = tuple({token: found.logprob for token, found in place.items()} for place in completion.logprobs)
        answer = CanaryAnswer(tuple(completion.token_ids), top)
    assert answer is not None  # there is one output, the whole answer
    return answer


class Canaries:
    """The kept answers, one file for each expert and way of computing.

    Args:
        folder: of the files; None takes `canaries` under `$COE_HOME`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def check(self, spec: ExpertSpec, way: Sequence[str], now: CanaryAnswer, *, tolerant: bool) -> None:
        """Keep the first answer; compare later ones with it. Blocks.

        Args:
            way: what may change the answer of the same weights: versions, device, type of the weights.

        Raises:
            WeightsError: the answer is another one; the expert must not serve.
        """
        file = self._file(spec, () if tolerant else way)
        kept = _read(file)
        if kept is None:
            _write(file, now)
            return
        if (found := difference(kept, now, tolerant=tolerant)) is not None:
            raise WeightsError(
                f"{spec.name!r} is quarantined: after loading, its weights do not answer a fixed prompt as on their "
                f"first load ({found}); check memory and drivers of this machine, or delete {file} to accept the new "
                "answer",
                public=f"expert {spec.name!r} is quarantined: its weights do not answer as on their first load",
            )

    def _file(self, spec: ExpertSpec, way: Sequence[str]) -> Path:
        key = hashlib.sha256("\n".join((spec.digest or spec.ref, *way)).encode()).hexdigest()
        return (self._folder or coe_home() / "canaries") / f"{key}.json"


def _read(file: Path) -> CanaryAnswer | None:
    """The kept answer; None if there is none, or the file is damaged."""
    try:
        return CanaryAnswer.of(json.loads(file.read_text()))
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _write(file: Path, answer: CanaryAnswer) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(answer.document()))
