"""A parsed request: what to generate, what a router may look at, and how the answer is sent."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from heapq import nsmallest

from coe.protocol.errors import MOST_COUNTED, FieldProblem, InvalidFields
from coe.protocol.problems import invalid, unknown_expert
from coe.types import GenerateRequest
from routers.base import Query


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed request.

    Attributes:
        model: `auto`, `coe/<policy>`, or an expert's name.
        request, query: of the (first) prompt: what to generate, and what a router may look at; the query is without
            `exclude`, see `query_among`.
        include_usage: a stream ends with a chunk that has the usage.
        ignored: given fields without effect, sorted.
        exclude: experts that may not answer.
        answers: also return the answer of each called expert.
        n: answers to each prompt.
        others: the requests of further prompts.
    """

    model: str
    request: GenerateRequest
    query: Query
    stream: bool = False
    include_usage: bool = False
    ignored: tuple[str, ...] = ()
    exclude: frozenset[str] = frozenset()
    answers: bool = False
    n: int = 1
    others: tuple[GenerateRequest, ...] = ()

    @property
    def requests(self) -> tuple[GenerateRequest, ...]:
        """The request of each prompt."""
        return (self.request, *self.others)

    @property
    def size(self) -> int:
        """The number of answers: `n` for each prompt."""
        return self.n * (1 + len(self.others))

    @property
    def runs_each(self) -> int:
        """How often each prompt is answered: greedy answers are all the same, so one is generated and repeated."""
        return self.n if self.request.temperature else 1

    @property
    def runs(self) -> Iterator[tuple[int, GenerateRequest]]:
        """The requests to answer, each with the position of its prompt; a seed counts up over those of a prompt."""
        for prompt, request in enumerate(self.requests):
            yield prompt, request
            for i in range(1, self.runs_each):
                yield prompt, request if request.seed is None else replace(request, seed=_shifted(request.seed, i))

    def query_among(self, experts: Collection[str], *, others: bool = False) -> Query:
        """The query, restricted to the registered `experts` that are allowed and not excluded.

        Args:
            experts: those that the caller may know.
            others: there are others, which may not answer.

        Raises:
            InvalidFields: an allowed or excluded expert, or that of the session, is not registered, or none is left.
        """
        previous = frozenset(() if self.query.previous is None else (self.query.previous,))
        if self.query.allowed is None and not self.exclude and not previous:
            return replace(self.query, allowed=frozenset(experts)) if others else self.query
        named = {
            "coe.experts": self.query.allowed or frozenset(),
            "coe.exclude": self.exclude,
            "coe.session.expert": previous,
        }
        unknown = [
            (param, name)
            for param, names in named.items()
            for name in nsmallest(MOST_COUNTED, names.difference(experts))
        ]
        if unknown:
            raise invalid([partial(unknown_expert, experts, *each) for each in unknown])
        if not self.exclude and not others:
            return self.query
        allowed = (self.query.allowed or frozenset(experts)) - self.exclude
        if not allowed:
            raise InvalidFields(FieldProblem("coe.exclude", "no_eligible_expert", "excludes every allowed expert"))
        return replace(self.query, allowed=allowed)

    def queries_among(self, experts: Collection[str], *, others: bool = False) -> list[Query]:
        """The query of each prompt, restricted like `query_among`."""
        first = self.query_among(experts, others=others)
        if not self.others:
            return [first]
        return [replace(first, id=f"prompt[{i}]", messages=one.read) for i, one in enumerate(self.requests)]


def _shifted(seed: int, i: int) -> int:
    return (seed + i + 2**63) % 2**64 - 2**63
