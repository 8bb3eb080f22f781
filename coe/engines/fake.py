"""FakeEngine: deterministic experts without weights, for tests, simulations and trial configurations.

The source selects the behaviour of an expert; a token is a run of non-whitespace with the whitespace before it:

    fake://echo                     repeats the last user message
    fake://upper                    repeats it in capitals
    fake://script?paris=France&...  the value of the first key that the prompt contains (ignoring case), else echo
    fake://script?default=no&...    `default` is the answer if no key is found
    fake://fail                     fails while generating; ?at=load fails on loading, ?after=N after N tokens

An answer of a script may reason and call tools (`coe.engines.fake_answers`). Results of calls are in the prompt, too:

    fake://script?21 degrees=It is warm.&weather=@think:Look it up. @call:get_weather:{"city":"Rome"}
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from coe.engines.base import Adapter, Capabilities, Expert
from coe.engines.fake_answers import Step, chunks_of, count, steps_of, tokenize
from coe.errors import EngineError, InvalidRequest, WeightsError
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec

__all__ = ["Behaviour", "FakeEngine", "FakeExpert", "Tally", "script_answer", "tokenize"]
_SCHEME = "fake"
_BEHAVIOURS = ("echo", "upper", "script", "fail")


@dataclass(frozen=True, slots=True)
class Behaviour:
    """A parsed `fake://` source."""

    name: str
    options: Mapping[str, str]

    @classmethod
    def of(cls, source: str) -> Behaviour:
        """Parse a source; one that is not `fake://...` (a stand-in for real weights) echoes.

        Raises:
            WeightsError: `fake://` with a behaviour that does not exist.
        """
        url = urlsplit(source)
        if url.scheme != _SCHEME:
            return cls("echo", {})
        if url.netloc not in _BEHAVIOURS:
            raise WeightsError(
                f"{source!r} is not a fake expert; there are: {', '.join(f'fake://{b}' for b in _BEHAVIOURS)}"
            )
        return cls(url.netloc, dict(parse_qsl(url.query, keep_blank_values=True)))

    def answer(self, prompt: str, question: str) -> str:
        """The answer to a prompt whose last user message is `question`."""
        if self.name == "script":
            return script_answer(self.options, prompt, self.options.get("default", question))
        return question.upper() if self.name == "upper" else question


def script_answer(script: Mapping[str, str], prompt: str, default: str) -> str:
    """The answer of the first key found in the prompt, ignoring case."""
    folded = prompt.casefold()
    return next((a for key, a in script.items() if key != "default" and key.casefold() in folded), default)


@dataclass(slots=True)
class Tally:
    """Counts of what a FakeEngine did, by expert name."""

    loads: Counter[str] = field(default_factory=Counter)
    unloads: Counter[str] = field(default_factory=Counter)
    generations: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[str] = field(default_factory=Counter)
    most_in_flight: Counter[str] = field(default_factory=Counter)

    def enter(self, name: str) -> None:
        """Count a generation that starts."""
        self.generations[name] += 1
        self.in_flight[name] += 1
        self.most_in_flight[name] = max(self.most_in_flight[name], self.in_flight[name])


class FakeExpert:
    """An expert with the behaviour of its source, one token per chunk.

    With an adapter, the answer starts with `[adapter's name] `; an adapter whose source is `fake://...` has its own
    behaviour.
    """

    def __init__(self, spec: ExpertSpec, engine: FakeEngine) -> None:
        self.spec = spec
        self.capacity = engine.capacity
        self._engine = engine
        self._behaviour = Behaviour.of(spec.source)
        self._places = asyncio.Semaphore(engine.capacity)
        self.generating = 0

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield the answer token by token; see `Expert.generate`. Usage counts whitespace tokens."""
        if self.spec.ref not in self._engine.resident:
            raise EngineError(f"{self.spec.name!r} is not loaded")
        name = adapter.spec.name if adapter else self.spec.name
        prompt_tokens = self._check(request, name)
        tally = self._engine.tally
        async with self._places:
            tally.enter(name)
            self.generating += 1
            done = False
            try:
                async for chunk in self._stream(request, adapter, prompt_tokens):
                    done = chunk.finish_reason is not None
                    yield chunk
            except EngineError:
                done = True
                raise
            finally:
                self.generating -= 1
                tally.in_flight[name] -= 1
                tally.cancelled[name] += not done

    def _check(self, request: GenerateRequest, name: str) -> int:
        n_tokens = len(_prompt(request).split())
        if self.spec.context_length is not None:
            request.token_limit(n_tokens, self.spec.context_length, expert=name)
        return n_tokens

    async def _stream(
        self, request: GenerateRequest, adapter: Adapter | None, prompt_tokens: int
    ) -> AsyncIterator[Chunk]:
        behaviour = self._behaviour
        if adapter and adapter.spec.source.startswith(f"{_SCHEME}://"):
            behaviour = Behaviour.of(adapter.spec.source)
        [*chunks, last] = chunks_of(self._say(behaviour, request, adapter), request)
        fail_after = int(behaviour.options.get("after", 0)) if behaviour.name == "fail" else None
        for i, chunk in enumerate(chunks):
            await self._engine.sleep(self._engine.token_delay_s)
            if i == fail_after:
                raise EngineError(
                    f"{self.spec.name!r} failed after {i} tokens, as its source {self.spec.source!r} specifies"
                )
            yield chunk
        if fail_after is not None:
            raise EngineError(f"{self.spec.name!r} failed at the end, as its source {self.spec.source!r} specifies")
        yield replace(last, usage=Usage(prompt_tokens, count(chunks)))

    def _say(self, behaviour: Behaviour, request: GenerateRequest, adapter: Adapter | None) -> list[Step]:
        prompt = _prompt(request)
        question = next((m.content for m in reversed(request.messages) if m.role == "user"), prompt)
        answer = behaviour.answer(prompt, question)
        if self._engine.answers:
            answer = script_answer(self._engine.answers, prompt, answer)
        scripted = behaviour.name == "script" or self._engine.answers
        steps = steps_of(answer, request, scripted=bool(scripted))
        if adapter and steps and steps[0].kind == "text":
            steps[0] = replace(steps[0], text=f"[{adapter.spec.name}] {steps[0].text}")
        return steps


class FakeEngine:
    """Engine of experts without weights.

    Args:
        answers: {prompt substring: answer} for every expert; takes precedence over its behaviour.
        token_delay_s: seconds before each token.
        load_delay_s: seconds of each load.
        capacity: requests that one expert runs at once; more wait.
        sleep: a simulation passes that of its own clock.

    Attributes:
        tally: counts of loads, unloads, generations, cancellations, by expert (an adapter counts under its own name).
        resident: the experts that are loaded, as `name@version` (or the bare name before registration).
    """

    capabilities: Final = Capabilities(streaming=True, adapters=True, tools=True)
    weights: Final = False

    def __init__(
        self,
        answers: Mapping[str, str] | None = None,
        *,
        token_delay_s: float = 0.0,
        load_delay_s: float = 0.0,
        capacity: int = 8,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if capacity < 1:
            raise InvalidRequest(f"capacity must be at least 1, got {capacity}")
        self.answers = dict(answers or {})
        self.token_delay_s = token_delay_s
        self.load_delay_s = load_delay_s
        self.capacity = capacity
        self.sleep = sleep
        self.tally = Tally()
        self.resident: set[str] = set()

    def footprint(self, spec: ExpertSpec) -> int:
        """The spec's `size_bytes`, 0 by default."""
        return spec.size_bytes or 0

    async def load(self, spec: ExpertSpec, path: Path) -> FakeExpert:
        """Count a load; `path` is not read. Raises WeightsError for `fake://fail?at=load`."""
        await self.sleep(self.load_delay_s)
        expert = FakeExpert(spec, self)
        if expert._behaviour.options.get("at") == "load":
            raise WeightsError(f"{spec.name!r} failed to load, as its source {spec.source!r} specifies")
        self.tally.loads[spec.name] += 1
        self.resident.add(spec.ref)
        return expert

    async def unload(self, expert: Expert) -> None:
        """Count an unload. Raises EngineError if the expert generates, or is not loaded."""
        name = expert.spec.name
        if expert.spec.ref not in self.resident:
            raise EngineError(f"{name!r} is not loaded")
        if isinstance(expert, FakeExpert) and expert.generating:
            raise EngineError(f"{name!r} is generating and cannot be unloaded")
        self.resident.discard(expert.spec.ref)
        self.tally.unloads[name] += 1


def _prompt(request: GenerateRequest) -> str:
    return "\n".join(m.content for m in request.messages) if request.prompt is None else request.prompt
