"""Prompts that are read in turn, and weights that come from the disk through host memory."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coe.memory import lru
from coe.memory.demand import NO_DEMAND
from coe.simulation.batch import Batch
from coe.simulation.compare import Comparison, Row
from coe.simulation.host_tier import HostTier
from coe.simulation.workload import Machine, Workload

HALF = Machine(10, 10.0, prompt_tokens_per_s=10.0, new_tokens_per_s=10.0, prefill_tokens=1)
"""Prompts get half of the compute while there are answers. An expert of 10 bytes loads in 1 s."""


def run(machine: Machine, at_s: Sequence[float], wants: str, prompt: int, new: int) -> Row:
    names = sorted(set(wants))
    n = len(wants)
    which = [names.index(name) for name in wants]
    workload = Workload([(x,) for x in names], dict.fromkeys(names, 10), at_s, which, [prompt] * n, [new] * n)
    [row] = Comparison(machine).rows(workload, ["ours"])
    return row


def test_a_prompt_waits_for_those_before_it_and_delays_the_answers() -> None:
    """The second prompt (1 s) is read at half speed beside the first answer, for 1 s each of the answer and of it."""
    batch = Batch(0.0, 0.5)
    batch.add(0.0, 1, prompt_s=1.0, answer_s=0.5)
    batch.add(0.0, 2, prompt_s=1.0, answer_s=3.0)
    steps = []
    while not batch.is_empty:
        at_s = batch.due_s()
        steps.append((at_s, *batch.take_step(at_s)))
    # From 2 s on the prompt is read with all of the compute: it has 0.5 s left.
    assert steps == [(1.0, 1, False), (2.0, 1, True), (2.5, 2, False), (5.5, 2, True)]


def test_a_prompt_that_joins_waits_for_what_is_left_of_the_one_before() -> None:
    batch = Batch(0.0, 0.9)
    batch.add(0.0, 1, prompt_s=2.0, answer_s=0.0)
    batch.add(1.5, 2, prompt_s=1.0, answer_s=0.0)
    assert batch.due_s() == 2.0 and batch.take_step(2.0) == (1, False)
    assert batch.due_s() == 2.0 and batch.take_step(2.0) == (1, True)
    assert batch.due_s() == 3.0 and batch.take_step(3.0) == (2, False)


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(st.tuples(st.floats(0, 9), st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=12),
    share=st.floats(0.01, 0.99),
)
def test_a_batch_takes_at_most_its_work_and_first_tokens_come_in_order(
    requests: list[tuple[float, float, float]], share: float
) -> None:
    """As if the compute were idle never: prompts take the sum of their seconds, answers at most theirs beside these."""
    batch, first, ended, now_s = Batch(0.0, share), list[int](), list[int](), 0.0
    waiting = sorted(requests)
    for number, (at_s, prompt_s, answer_s) in enumerate(waiting):
        while not batch.is_empty and batch.due_s() <= at_s:
            now_s = max(now_s, batch.due_s())
            request, is_end = batch.take_step(now_s)
            (ended if is_end else first).append(request)
        batch.add(at_s, number, prompt_s, answer_s)
    while not batch.is_empty:
        assert batch.due_s() >= now_s - 1e-9
        now_s = max(now_s, batch.due_s())
        request, is_end = batch.take_step(now_s)
        (ended if is_end else first).append(request)
    assert first == list(range(len(requests))) and sorted(ended) == first
    assert now_s <= waiting[-1][0] + sum(prompt + answer for _, prompt, answer in waiting) + 1e-6


def test_a_burst_of_prompts_takes_the_sum_of_their_seconds() -> None:
    row = run(HALF, [0.0] * 4, "aaaa", prompt=10, new=0)
    assert row.makespan_s == pytest.approx(1 + 4 * 1.0)
    assert row.ttft_p50_s == pytest.approx(1 + 2.5)


def test_a_load_waits_for_the_disk_once_and_what_stays_in_host_memory_does_not() -> None:
    """Reads take 2 s, loads 1 s; `a` comes back after `b` has taken its room on the device."""
    tier = {"host_bytes": 20, "disk_bytes_per_s": 5.0, "prompt_tokens_per_s": 1e9, "new_tokens_per_s": 1e9}
    row = run(Machine(10, 10.0, **tier), [0.0, 10.0, 20.0], "aba", prompt=1, new=1)
    assert (row.loads, row.disk_reads, row.bytes_moved, row.bytes_from_disk) == (3, 2, 30, 20)
    assert row.ttft_p50_s == pytest.approx(3.0) and row.makespan_s == pytest.approx(21.0)
    row = run(Machine(10, 10.0, **{**tier, "host_bytes": 9}), [0.0, 10.0, 20.0], "aba", prompt=1, new=1)
    assert (row.loads, row.disk_reads, row.makespan_s) == (3, 3, pytest.approx(23.0))


def test_what_waits_for_its_room_is_read_ahead() -> None:
    """`b` comes while `a` is answered (3 s to 13 s), and is in host memory when that ends."""
    tier = {"host_bytes": 20, "disk_bytes_per_s": 5.0, "prompt_tokens_per_s": 1e9, "new_tokens_per_s": 1.0}
    row = run(Machine(10, 10.0, **tier), [0.0, 5.0], "ab", prompt=1, new=10)
    assert row.disk_reads == 2 and row.makespan_s == pytest.approx(13 + 1 + 10)


def tier_of(budget_bytes: int) -> HostTier:
    return HostTier(
        budget_bytes,
        dict.fromkeys("abc", 10),
        disk_bytes_per_s=10.0,
        policy=lru,
        demand=lambda name, now_s: NO_DEMAND,
    )


def test_reads_take_turns_and_the_policy_says_what_leaves_host_memory() -> None:
    host = tier_of(20)
    assert [host.fetch(name, 0.0) for name in "ab"] == [1.0, 2.0]
    assert host.fetch("a", 3.0) == 3.0
    assert host.fetch("c", 4.0) == 5.0  # in the place of `b`
    assert host.fetch("a", 5.0) == 5.0 and host.fetch("b", 6.0) == 7.0 and host.reads == 4


def test_a_copy_that_is_read_or_loaded_stays() -> None:
    host = tier_of(10)
    assert host.fetch("a", 0.0) == 1.0
    host.hold("a", 4.0)
    assert host.fetch("b", 3.0) == 4.0  # passes through
    assert host.fetch("a", 3.5) == 3.5 and host.fetch("b", 5.0) == 6.0
    assert host.fetch("a", 7.0) == 8.0 and host.bytes_read == 40


def test_one_at_a_time_is_read_ahead() -> None:
    host = tier_of(20)
    host.read_ahead(("a",), 0.0)
    host.read_ahead(("b",), 0.5)
    assert host.reads == 1 and host.fetch("a", 0.7) == 1.0
    host.read_ahead(("b",), 1.0)
    host.read_ahead(("b",), 5.0)  # it is there
    assert host.reads == 2 and host.fetch("b", 5.0) == 5.0
