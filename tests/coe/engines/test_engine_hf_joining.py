"""Rows that join a running batch and leave it at any step answer as each does alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import CONTEXT, N_ADAPTERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coe.engines.answer import AnswerStream
from coe.engines.base import Adapter
from coe.engines.hf.batch import BatchRow
from coe.engines.hf.load import LoadedModel, load_model
from coe.engines.hf.loop import BatchLoop, padded
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.hf.sampling import Sampling, processors
from coe.engines.parsing.text import TextStream
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest

WINDOW = 7
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": WINDOW},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 64, "sliding_window": WINDOW},
    "gpt2": {"n_positions": CONTEXT},
}


class AtOnce:
    """Stands for the event loop of a reader."""

    def call_soon_threadsafe(self, call: Any, *args: Any) -> None:
        call(*args)


@dataclass
class Asked:
    """A request of the tests: the step before which it comes, and what it wants."""

    step: int
    prompt: list[int]
    max_tokens: int
    adapter: int = 0
    seed: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()

    def row(self, tokens: dict[int, list[int]], slots: Sequence[str | None]) -> BatchRow:
        """A row whose tokens are noted under the id of its request."""
        request = GenerateRequest(
            prompt="x", max_tokens=self.max_tokens, temperature=0.0 if self.seed is None else 1.0, **self.fields
        )
        seen = tokens.setdefault(id(self), [])
        seen.clear()

        def decode(ids: Any) -> str:
            return "".join(f"{i} " for i in ids)

        text = AnswerStream(TextStream(decode))
        row = BatchRow(
            request=request,
            prompt_ids=self.prompt,
            adapter=None,
            eos=self.ends,
            text=text,
            sampling=Sampling.of(request.temperature, 0.9, self.seed, request.sampling),
            loop=AtOnce(),  # type: ignore[arg-type]
            processors=processors(request.sampling, len(self.prompt), self.ends),
        )
        row.slot = slots[self.adapter]
        push = text.push
        text.push = lambda token: (seen.append(token), push(token))[1]  # type: ignore[func-returns-value]
        return row


class Planned:
    """Lets rows join at planned steps; one group at a time, as the queue does."""

    def __init__(self, waiting: list[tuple[int, BatchRow]], n_prefill: int) -> None:
        self.n_prefill, self._waiting, self._step = n_prefill, waiting, 0
        self.joined = 0

    def take(self, running: Sequence[BatchRow], n_columns: int) -> list[BatchRow]:
        assert n_columns <= max(len(row.prompt_ids) + row.max_tokens for row in running)
        assert not any(row.done for row in running)
        self._step += 1
        ready = [row for step, row in self._waiting if step <= self._step]
        self._waiting = [each for each in self._waiting if each[1] not in ready]
        self.joined += len(ready)
        return ready

    def put_back(self, rows: Sequence[BatchRow]) -> None:
        raise AssertionError("there is memory for all")

    @property
    def left(self) -> list[BatchRow]:
        return [row for _, row in self._waiting]


@pytest.fixture(scope="module")
def model(tiny: Path) -> LoadedModel:
    return load_model("tiny", tiny, "cpu", torch.float32)


@pytest.fixture(scope="module")
def slots(model: LoadedModel, adapters: list[Adapter]) -> tuple[AdapterSlots, list[str | None]]:
    slots = AdapterSlots(model.model, "tiny", N_ADAPTERS)
    return slots, [None, *(slots.acquire(adapter) for adapter in adapters)]


def run(model: Any, slots: AdapterSlots, rows: list[BatchRow], admission: Planned | None) -> None:
    with torch.inference_mode():
        ids, mask = padded(rows, 0, "cpu")
        slots.generate(
            [row.slot for row in rows],
            inputs=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=1,
            custom_generate=BatchLoop(rows, slots, admission),
        )


def outcome(row: BatchRow) -> tuple[Any, ...]:
    items = [row.queue.get_nowait() for _ in range(row.queue.qsize())]
    last = items[-1]
    assert row.done and not isinstance(last, Exception), last
    return last.finish_reason, last.usage


def check(model: Any, slots: AdapterSlots, names: Sequence[str | None], asked: Sequence[Asked], n_prefill: int) -> int:
    """Compare each request in the batch with the same one alone; returns how many rows have joined."""
    tokens: dict[int, list[int]] = {}
    alone = []
    for each in asked:
        row = each.row(tokens, names)
        run(model, slots, [row], None)
        alone.append((list(tokens[id(each)]), outcome(row)))
    rows = [each.row(tokens, names) for each in asked]
    first = min(each.step for each in asked)
    planned = Planned([(a.step - first, r) for a, r in zip(asked, rows, strict=True) if a.step > first], n_prefill)
    run(model, slots, [r for a, r in zip(asked, rows, strict=True) if a.step == first], planned)
    for row in planned.left:  # the batch had ended
        run(model, slots, [row], None)
    assert [(tokens[id(each)], outcome(row)) for each, row in zip(asked, rows, strict=True)] == alone
    return planned.joined


OPTIONS = st.sampled_from(
    [{}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.8, "min_tokens": 3}, {"logit_bias": {70: 4.0}}]
)
REQUESTS = st.builds(
    Asked,
    step=st.integers(0, 14),
    prompt=st.lists(st.integers(2, 250), min_size=1, max_size=24),
    max_tokens=st.integers(1, 12),
    adapter=st.integers(0, N_ADAPTERS),
    seed=st.none() | st.integers(0, 9),
    fields=OPTIONS.map(lambda options: {"sampling": SamplingOptions(**options)}),
    ends=st.frozensets(st.integers(2, 250), max_size=12),
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(REQUESTS, min_size=2, max_size=7), n_prefill=st.integers(1, 40))
def test_rows_that_join_and_leave_at_any_step_answer_as_alone(
    model: LoadedModel, slots: tuple[AdapterSlots, list[str | None]], asked: list[Asked], n_prefill: int
) -> None:
    check(model.model, *slots, asked, n_prefill)


def random_model(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 260}
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.3}
    config = AutoConfig.for_model(kind, **small, **KINDS[kind])
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config = type(model.generation_config)()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_prefill", [5, 64])
def test_every_kind_of_cache_and_position_is_joined(kind: str, n_prefill: int) -> None:
    model = random_model(kind)
    slots = AdapterSlots(model, kind, 1)
    random = torch.Generator().manual_seed(3)

    def prompt(n: int) -> list[int]:
        return torch.randint(2, 260, (n,), generator=random).tolist()

    asked = [
        Asked(0, prompt(3), 20),
        Asked(0, prompt(9), 4),
        Asked(2, prompt(30), 6),  # longer than the batch and the window
        Asked(3, prompt(1), 25),
        Asked(11, prompt(12), 3),
        Asked(13, prompt(2), 2 * WINDOW),
        Asked(14, prompt(2), 1),
    ]
    assert check(model, slots, [None], asked, n_prefill) == 5
