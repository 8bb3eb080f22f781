"""Staged composed experts inside any composition: their peers leave notes first, on any host, then they answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from coe.compose.base import Composition, Done, ExpertCall, ExpertCalls, next_step
from coe.compose.base import Final as FinalAnswer
from coe.engines.latent.calls import PeerCall, left_notes, notes_digest, peer_calls
from coe.errors import CoeError
from coe.seam import public_text
from coe.types import Answer, Failure, GenerateRequest, Usage
from registry.spec import ExpertSpec
from routers.base import RoutingDecision

_MARK: Final = ".peer."
"""In the id of a call to a peer: `<id of the composed expert's call>.peer.<number>`."""


class WithPeers:
    """`composition`, whose calls to staged composed experts (`ExpertSpec.is_staged`) become calls to their peers, which
    want notes, and then the call itself with these notes.

    The calls of a round still run side by side, and the last call streams. A peer that fails, is late or leaves nothing
    is left out and named in `Answer.notes`, with the digests of the notes that were read. Usage and cost of a composed
    expert's answer include those of its peers.

    Args:
        experts: by name: all that the composition may call.
    """

    def __init__(self, composition: Composition, experts: Mapping[str, ExpertSpec]) -> None:
        self.composition, self._experts = composition, experts

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | FinalAnswer:
        """The next calls of the composition that are not done, or the calls to peers that they need before.

        The composition sees whole rounds only, so its rounds so far are stepped through again.
        """
        known: dict[str, Answer | Failure] = {}
        notes: tuple[str, ...] = ()
        while True:
            following = next_step(self.composition, request, decision, known)
            if isinstance(following, FinalAnswer):
                return FinalAnswer(replace(following.answer, notes=(*notes, *following.answer.notes)))
            staged = [self._staged(call, done) for call in following.calls]
            waiting = tuple(call for each in staged for call in each.waiting)
            if waiting:
                last = following.last and all(not each.peers_wait for each in staged)
                of_peers = [line for each in staged if last for line in each.notes]
                return replace(following, calls=waiting, last=last, held=following.held and last,
                               notes=(*notes, *of_peers, *following.notes))  # fmt: skip
            notes = (*notes, *(line for each in staged for line in each.notes))
            known |= {each.call.id: each.outcome(done) for each in staged}

    def _staged(self, call: ExpertCall, done: Done) -> _Staged:
        spec = self._experts.get(call.expert)
        if spec is None or not spec.is_staged or call.request.notes is not None:
            return _Staged(call, None, done)
        try:
            return _Staged(call, tuple(peer_calls(spec, call.request, call.peers)), done)
        except CoeError as error:
            return _Staged(call, None, {call.id: Failure(call.expert, error)})


@dataclass(frozen=True, slots=True)
class _Staged:
    """A call of the composition, with the calls to peers that come before it; `None` for one that reads no notes."""

    call: ExpertCall
    peers: tuple[PeerCall, ...] | None
    done: Done

    def _of_peers(self) -> Iterator[tuple[ExpertCall, Answer | Failure | None]]:
        for number, peer in enumerate(self.peers or ()):
            call = ExpertCall(f"{self.call.id}{_MARK}{number}", peer.peer, peer.request, "latent")
            yield call, self.done.get(call.id)

    @property
    def peers_wait(self) -> bool:
        """Whether a peer is yet to be called."""
        return any(outcome is None for _, outcome in self._of_peers())

    @property
    def waiting(self) -> list[ExpertCall]:
        """The calls that can run now."""
        if self.call.id in self.done:
            return []
        if peers := [call for call, outcome in self._of_peers() if outcome is None]:
            return peers
        if self.peers is None:
            return [self.call]
        request = replace(self.call.request, notes=left_notes(self.peers, [_value(o) for _, o in self._of_peers()]))
        return [replace(self.call, request=request)]

    @property
    def notes(self) -> list[str]:
        """What is to be known of the peers: who left notes, and who did not."""
        lines = [f"{outcome.expert} {_left(outcome)}" for _, outcome in self._of_peers() if outcome is not None]
        return list(dict.fromkeys(lines))

    def outcome(self, done: Done) -> Answer | Failure:
        """The outcome of the call, with what its peers cost."""
        outcome = self.done.get(self.call.id) or done[self.call.id]
        answers = [each for _, each in self._of_peers() if isinstance(each, Answer)]
        return with_peers_usage(outcome, answers) if isinstance(outcome, Answer) else outcome


def with_peers(composition: Composition, experts: Mapping[str, ExpertSpec]) -> Composition:
    """The composition, with the calls to peers of staged composed experts where there are such experts."""
    if not any(spec.is_staged for spec in experts.values()):
        return composition
    return WithPeers(composition, experts)


def with_peers_usage(answer: Answer, peers: list[Answer]) -> Answer:
    """An answer with the tokens and cost of the peers whose notes it read."""
    if not peers:
        return answer
    costs = [each.cost_usd for each in (answer, *peers)]
    known = [cost for cost in costs if cost is not None]
    return replace(
        answer,
        usage=Usage.total(each.usage for each in (answer, *peers)),
        cost_usd=sum(known) if len(known) == len(costs) else None,
    )


def _value(outcome: Answer | Failure | None) -> bytes | None:
    return outcome.value if isinstance(outcome, Answer) else None


def _left(outcome: Answer | Failure) -> str:
    if isinstance(outcome, Failure):
        return f"left no notes: {public_text(outcome.error)}"
    if outcome.value is None:
        return "left no notes: its engine returned none"
    return f"left notes ({notes_digest(outcome.value)}, {len(outcome.value):,} bytes)"
