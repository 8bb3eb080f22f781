"""The batch of one expert: its prompts are read one after the other, between the tokens of its answers.

As in the hf engine (`coe.engines.hf.loop`): a step reads one token of every row, then up to `prefill_tokens` tokens of
the prompts that wait. So prompts take `share` of the time while answers are generated, with
`share = p / (p + t)` for the `p` seconds of that many tokens of prompts and the `t` seconds of a token; all of it while
none are. Tokens are not steps here but flow.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

_NEVER = float("inf")


class Batch:
    """The requests of one expert at work, on the clock of its compute.

    Args:
        at_s: the time on that clock.
        share: of the compute that prompts get while there are answers, in (0, 1).

    Attributes:
        step: number of the step that is planned; for the caller.
    """

    __slots__ = ("_answers", "_at_s", "_flow_s", "_left_s", "_prompts", "_share", "step")

    def __init__(self, at_s: float, share: float) -> None:
        self._at_s, self._share = at_s, share
        self._prompts: deque[tuple[int, float, float]] = deque()  # request, seconds of its prompt and of its answer
        self._left_s = 0.0  # of the first prompt
        self._answers: list[tuple[float, int]] = []  # end, request
        self._flow_s = 0.0  # the clock on which all answers progress at one rate
        self.step = 0

    @property
    def is_empty(self) -> bool:
        """Whether all requests have been answered."""
        return not self._prompts and not self._answers

    def add(self, at_s: float, request: int, prompt_s: float, answer_s: float) -> None:
        """A request joins: its prompt is read after those before it, each with the seconds it takes alone."""
        self._advance(at_s)
        if not self._prompts:
            self._left_s = prompt_s
        self._prompts.append((request, prompt_s, answer_s))

    def due_s(self) -> float:
        """When the next step is due, if none is added before: a prompt has been read, or an answer ends."""
        return self._at_s + max(0.0, min(self._due_in_s()))

    def take_step(self, at_s: float) -> tuple[int, bool]:
        """Take the step that is due now; returns the request, and whether its answer has ended."""
        read_s, end_s = self._due_in_s()
        self._advance(at_s)
        if end_s < read_s:
            self._flow_s, request = heappop(self._answers)
            return request, True
        request, _, answer_s = self._prompts.popleft()
        self._left_s = self._prompts[0][1] if self._prompts else 0.0
        heappush(self._answers, (self._flow_s + answer_s, request))
        return request, False

    def _due_in_s(self) -> tuple[float, float]:
        """Seconds until the first prompt has been read, and until the first answer ends."""
        if not self._prompts:
            return _NEVER, self._answers[0][0] - self._flow_s
        if not self._answers:
            return self._left_s, _NEVER
        return self._left_s / self._share, (self._answers[0][0] - self._flow_s) / (1 - self._share)

    def _advance(self, at_s: float) -> None:
        passed_s, self._at_s = at_s - self._at_s, at_s
        if not self._answers:
            self._left_s -= passed_s
        elif not self._prompts:
            self._flow_s += passed_s
        else:
            self._left_s -= passed_s * self._share
            self._flow_s += passed_s * (1 - self._share)
