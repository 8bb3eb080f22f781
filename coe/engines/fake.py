"""FakeEngine: deterministic experts without weights, for tests, simulations and trial configurations.

The source selects the behaviour of an expert; a token is a run of non-whitespace with the whitespace before it:

    fake://echo                     repeats the last user message
    fake://upper                    repeats it in capitals
    fake://script?paris=France&...  the value of the first key that the prompt contains (ignoring case), else echo
    fake://script?default=no&...    `default` is the answer if no key is found
    fake://fail                     fails while generating; ?at=load fails on loading, ?at=switch as it replaces another
                                    expert in a slot, ?after=N after N tokens

An expert of kind `embedding` returns 16 numbers for each text, which follow from it.

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

from coe.engines.base import Adapter, Capabilities, Expert, ShapeKey, Slot
from coe.engines.embedding import vectors_chunk
from coe.engines.fake_answers import (
    SCHEME,
    Behaviour,
    Step,
    chunks_of,
    count,
    script_answer,
    steps_of,
    tokenize,
    vectors_of,
)
from coe.engines.slots import LoadingSlot
from coe.errors import ConfigError, EngineError, InvalidRequest, WeightsError
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec

__all__ = ["Behaviour", "FakeEngine", "FakeExpert", "Tally", "script_answer", "tokenize"]


@dataclass(slots=True)
class Tally:
    """Counts of what a FakeEngine did, by expert name."""

    loads: Counter[str] = field(default_factory=Counter)
    unloads: Counter[str] = field(default_factory=Counter)
    generations: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[str] = field(default_factory=Counter)
    most_in_flight: Counter[str] = field(default_factory=Counter)
    drains: Counter[str] = field(default_factory=Counter)
    """Switches that had to wait for generations of the expert in the slot."""

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
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def fails_at(self) -> str | None:
        """The step of loading at which it fails."""
        return self._behaviour.options.get("at") if self._behaviour.name == "fail" else None

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
            self.idle.clear()
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
                if not self.generating:
                    self.idle.set()
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
        if request.inputs:
            await self._engine.sleep(self._engine.token_delay_s)
            if self._behaviour.name == "fail":
                raise EngineError(f"{self.spec.name!r} failed, as its source {self.spec.source!r} specifies")
            yield self._vectors(request)
            return
        behaviour = self._behaviour
        if adapter and adapter.spec.source.startswith(f"{SCHEME}://"):
            behaviour = Behaviour.of(adapter.spec.source)
        [*chunks, last] = chunks_of(self._say(behaviour, request, adapter), request)
        fail_after = int(behaviour.options.get("after", 0)) if behaviour.name == "fail" else None
        echo = request.prompt or "" if request.echo else ""
        clock = asyncio.get_running_loop().time
        late_s, came = 0.0, clock()
        for i, chunk in enumerate(chunks):
            # A late timer shortens the next delay, so that the rate is as configured on a busy machine too.
            await self._engine.sleep(max(self._engine.token_delay_s - late_s, 0.0))
            before, came = came, clock()
            late_s = max(late_s + came - before - self._engine.token_delay_s, 0.0)
            if i == fail_after:
                raise EngineError(
                    f"{self.spec.name!r} failed after {i} tokens, as its source {self.spec.source!r} specifies"
                )
            yield replace(chunk, text=echo + chunk.text) if echo else chunk
            echo = ""
        if fail_after is not None:
            raise EngineError(f"{self.spec.name!r} failed at the end, as its source {self.spec.source!r} specifies")
        yield replace(last, text=echo, usage=Usage(prompt_tokens, count(chunks)))

    def _vectors(self, request: GenerateRequest) -> Chunk:
        n_tokens = sum(len(each.split()) if isinstance(each, str) else len(each) for each in request.inputs)
        return vectors_chunk(vectors_of(request.inputs), n_tokens)

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


class FakeSlot:
    """A slot that experts of one shape take turns in, as in the process of a real engine: replaced in place.

    A switch waits for running generations, which `Tally.drains` counts.
    """

    def __init__(self, shape: ShapeKey, engine: FakeEngine) -> None:
        self.shape = shape
        self.expert: FakeExpert | None = None
        self._engine = engine
        self._staged: set[str] = set()
        self._closed = False
        self.is_parked = False
        engine.open_slots.append(self)

    async def switch(self, spec: ExpertSpec, path: Path) -> FakeExpert:
        """Replace the expert; `path` is not read. A prefetched one takes no time.

        `fake://fail?at=load` fails before anything is replaced, so the former expert goes on; `?at=switch` fails
        half-way, so the slot is empty.

        Raises:
            WeightsError: the expert is of another shape, or fails as its source specifies.
            EngineError: the slot is closed.
        """
        if self._closed:
            raise EngineError(f"a slot of {self.shape} is closed")
        if (shape := self._engine.shape(spec)) != self.shape:
            raise WeightsError(f"{spec.name!r} has the shape {shape}, the slot {self.shape}")
        await self._drain()
        await self.unpark()
        expert = self._engine.made(spec, fails_at="load")
        if spec.ref not in self._staged and spec.ref not in self._engine.copies:
            await self._engine.sleep(self._engine.load_delay_s)
        self._staged.discard(spec.ref)
        self._leave()
        self._engine.made(spec, fails_at="switch")
        self._engine.enter(expert)
        self.expert = expert
        return expert

    async def prefetch(self, spec: ExpertSpec, path: Path) -> int:
        """The next switch to `spec` takes no time: from a copy if one fits; else only the latest one is staged.

        Returns:
            The bytes of the copy.
        """
        if spec.ref not in self._engine.copies:
            await self._engine.sleep(self._engine.load_delay_s)
        n_bytes = self._engine.keep_copy(spec)
        self._staged = set() if n_bytes else {spec.ref}
        return n_bytes

    async def park(self) -> bool:
        """Drop the expert, once it generates nothing; the slot stays if the engine can sleep."""
        await self._drain()
        self._leave()
        if self._engine.capabilities.sleep and not self._closed:
            self.is_parked = True
            return True
        await self.close()
        return False

    async def unpark(self) -> None:
        """The slot is empty."""
        self.is_parked = False

    async def close(self) -> None:
        """Drop the expert, once it generates nothing."""
        await self._drain()
        self._leave()
        if not self._closed:
            self._closed = True
            self._engine.open_slots.remove(self)

    async def _drain(self) -> None:
        if self.expert is not None and not self.expert.idle.is_set():
            self._engine.tally.drains[self.expert.spec.name] += 1
            await self.expert.idle.wait()

    def _leave(self) -> None:
        if self.expert is not None:
            self._engine.leave(self.expert)
            self.expert = None


class FakeEngine:
    """Engine of experts without weights.

    Args:
        answers: {prompt substring: answer} for every expert; takes precedence over its behaviour.
        token_delay_s: seconds before each token.
        load_delay_s: seconds of each load.
        capacity: requests that one expert runs at once; more wait.
        slots: slots that the experts of one architecture take turns in; None: each expert has one of its own.
        slot_bytes: bytes of an open slot beside the expert's.
        parked_bytes: bytes of a parked slot; None: slots cannot be parked.
        host_bytes: most bytes of copies in host memory; a copy takes the `size_bytes` of its expert.
        sleep: a simulation passes that of its own clock.

    Attributes:
        tally: counts of loads, unloads, generations, cancellations, by expert (an adapter counts under its own name).
        resident: the experts that are loaded, as `name@version` (or the bare name before registration).
        open_slots: the slots that are open and that experts take turns in.
        copies: bytes of the copies in host memory, by `name@version`.
    """

    capabilities = Capabilities(streaming=True, adapters=True, tools=True, embeddings=True)
    weights: Final = False

    def __init__(
        self,
        answers: Mapping[str, str] | None = None,
        *,
        token_delay_s: float = 0.0,
        load_delay_s: float = 0.0,
        capacity: int = 8,
        slots: int | None = None,
        slot_bytes: int = 0,
        parked_bytes: int | None = None,
        host_bytes: int = 0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if capacity < 1:
            raise InvalidRequest(f"capacity must be at least 1, got {capacity}")
        if (slots is not None and slots < 1) or min(slot_bytes, parked_bytes or 0, host_bytes) < 0:
            sizes = f"{slot_bytes}, {parked_bytes} and {host_bytes}"
            raise InvalidRequest(f"slots must be at least 1, and no bytes negative, got {slots} and {sizes}")
        self.answers = dict(answers or {})
        self.token_delay_s = token_delay_s
        self.load_delay_s = load_delay_s
        self.capacity = capacity
        self.sleep = sleep
        self.slots_per_shape = slots or 1
        self.tally = Tally()
        self.resident: set[str] = set()
        self.open_slots: list[FakeSlot] = []
        self.copies: dict[str, int] = {}
        self._shared, self._slot_bytes, self._host_bytes = slots is not None, slot_bytes, host_bytes
        self._parked_bytes = parked_bytes or 0
        if parked_bytes is not None:
            self.capabilities = replace(self.capabilities, sleep=True)

    def check_expert(self, spec: ExpertSpec) -> None:
        """Raise ConfigError for a source whose behaviour or settings do not exist."""
        try:
            Behaviour.of(spec.source)
        except WeightsError as error:
            raise ConfigError(f"{spec.name!r} cannot be loaded: {error}") from error

    def footprint(self, spec: ExpertSpec) -> int:
        """The spec's `size_bytes`, 0 by default."""
        return spec.size_bytes or 0

    def shape(self, spec: ExpertSpec) -> ShapeKey:
        """The expert's architecture if experts share slots, else the expert itself."""
        return ShapeKey(spec.architecture or "fake") if self._shared else ShapeKey.only(spec)

    def slot_bytes(self, shape: ShapeKey) -> int:
        """The constructor's `slot_bytes`."""
        return self._slot_bytes

    def parked_bytes(self, shape: ShapeKey) -> int:
        """The constructor's `parked_bytes`."""
        return self._parked_bytes

    def copy_budget_bytes(self) -> int:
        """The constructor's `host_bytes`."""
        return self._host_bytes

    def copy_bytes(self, spec: ExpertSpec) -> int:
        """The spec's `size_bytes`, of experts that share slots."""
        return (spec.size_bytes or 0) if self._shared else 0

    def has_copy(self, spec: ExpertSpec) -> bool:
        """Whether there is a copy."""
        return spec.ref in self.copies

    def drop_copy(self, spec: ExpertSpec) -> None:
        """Forget the copy."""
        self.copies.pop(spec.ref, None)

    def keep_copy(self, spec: ExpertSpec) -> int:
        """Keep a copy if it fits; returns its bytes, 0 if there is none."""
        n_bytes = self.copy_bytes(spec)
        others = sum(size for ref, size in self.copies.items() if ref != spec.ref)
        if not n_bytes or others + n_bytes > self._host_bytes:
            return 0
        self.copies[spec.ref] = n_bytes
        return n_bytes

    async def open_slot(self, shape: ShapeKey) -> Slot:
        """An empty slot, at once."""
        return FakeSlot(shape, self) if shape.expert is None else LoadingSlot(shape, self)

    async def load(self, spec: ExpertSpec, path: Path) -> FakeExpert:
        """Count a load; `path` is not read. Raises WeightsError for `fake://fail?at=load` and `?at=switch`."""
        await self.sleep(self.load_delay_s)
        expert = self.made(spec, fails_at="load switch")
        self.enter(expert)
        return expert

    async def unload(self, expert: Expert) -> None:
        """Count an unload. Raises EngineError if the expert generates, or is not loaded."""
        name = expert.spec.name
        if expert.spec.ref not in self.resident:
            raise EngineError(f"{name!r} is not loaded")
        if isinstance(expert, FakeExpert) and expert.generating:
            raise EngineError(f"{name!r} is generating and cannot be unloaded")
        self.leave(expert)

    def made(self, spec: ExpertSpec, fails_at: str) -> FakeExpert:
        """The expert, not resident yet. Raises WeightsError if its source fails at one of these words."""
        expert = FakeExpert(spec, self)
        if expert.fails_at in fails_at.split():
            raise WeightsError(f"{spec.name!r} failed to load, as its source {spec.source!r} specifies")
        return expert

    def enter(self, expert: Expert) -> None:
        """Count a load; the expert is resident."""
        self.tally.loads[expert.spec.name] += 1
        self.resident.add(expert.spec.ref)

    def leave(self, expert: Expert) -> None:
        """Count an unload; the expert is not resident."""
        self.tally.unloads[expert.spec.name] += 1
        self.resident.discard(expert.spec.ref)


def _prompt(request: GenerateRequest) -> str:
    return "\n".join(m.content for m in request.messages) if request.prompt is None else request.prompt
