"""What each policy does on workloads whose outcome is known, and how much a machine carries."""

import pytest

from coe.errors import ConfigError
from coe.simulation.arrivals import by_zipf, poisson
from coe.simulation.compare import POLICIES, Comparison, Row
from coe.simulation.sizing import capacity_per_s, devices_needed, spread
from coe.simulation.workload import Machine, Workload, synthetic_experts

ONE = Machine(10, 10.0, prompt_tokens_per_s=10.0, new_tokens_per_s=10.0, places=4)
"""Room for one expert of 10 bytes, which loads in 1 s."""


def of(wants: str, at_s: list[float] | None = None, prompt: int = 1, new: int = 9) -> Workload:
    names = sorted(set(wants))
    return Workload(
        [(name,) for name in names],
        dict.fromkeys(names, 10),
        at_s or [0.0] * len(wants),
        [names.index(want) for want in wants],
        [prompt] * len(wants),
        [new] * len(wants),
    )


def rows(workload: Workload, machine: Machine = ONE, **options: float) -> dict[str, Row]:
    return {row.policy: row for row in Comparison(machine, **options).rows(workload)}  # type: ignore[arg-type]


def test_one_request_takes_its_load_its_prompt_and_its_answer() -> None:
    for row in rows(of("a")).values():
        assert (row.loads, row.loads_bound, row.bytes_moved, row.evictions) == (1, 1, 10, 0)
        assert row.ttft_p50_s == pytest.approx(1.1)
        assert row.done_p50_s == row.makespan_s == pytest.approx(2.0)
        assert row.goodput_per_s == pytest.approx(0.5)


def test_grouping_loads_each_expert_once_and_order_of_arrival_each_time() -> None:
    """CoServe's batch is what waits when it starts: here one request."""
    found = rows(of("ababab"), aging_s=100.0)
    assert {name: row.loads for name, row in found.items()} == {
        "fcfs-lru": 6,
        "coserve": 3,
        "ours": 2,
        "belady-arrival": 6,
        "belady-ours": 2,
    }
    assert found["ours"].loads_bound == 2 and found["fcfs-lru"].loads_bound == 6
    # Two batches, each with a load (1 s), three prompts in turn (0.3 s) and answers side by side (0.9 s).
    assert found["ours"].makespan_s == pytest.approx(4.4, rel=1e-3)
    assert found["fcfs-lru"].makespan_s == pytest.approx(12.0)


def test_belady_evicts_what_is_needed_last_and_lru_does_not() -> None:
    machine = Machine(20, 1e9, prompt_tokens_per_s=10.0, new_tokens_per_s=10.0, places=1)
    apart = [float(3 * number) for number in range(5)]
    found = rows(of("abcab", apart), machine)
    assert found["fcfs-lru"].loads == 5 and found["belady-arrival"].loads == 4 == found["fcfs-lru"].loads_bound


def test_experts_that_share_the_compute_take_twice_as_long_side_by_side() -> None:
    shared = Machine(20, 1e9, prompt_tokens_per_s=10.0, new_tokens_per_s=10.0, places=4)
    separate = Machine(20, 1e9, prompt_tokens_per_s=10.0, new_tokens_per_s=10.0, places=4, shared=False)
    assert rows(of("ab"), shared)["ours"].makespan_s == pytest.approx(2.0, rel=1e-3)
    assert rows(of("aa"), shared)["ours"].makespan_s == pytest.approx(1.1, rel=1e-3)  # its prompts take turns
    assert rows(of("ab"), separate)["ours"].makespan_s == pytest.approx(1.0, rel=1e-3)


def test_places_bound_a_batch() -> None:
    assert rows(of("aaaaa"))["ours"].makespan_s == pytest.approx(3.3, rel=1e-3)


def test_every_policy_answers_everything_and_loads_at_least_the_bound() -> None:
    workload = by_zipf(poisson(800, 3.0, 100, 20, seed=0), *synthetic_experts(20, 10), exponent=1.0, seed=0)
    machine = Machine(50, 100.0, prompt_tokens_per_s=1000.0, new_tokens_per_s=100.0, places=4)
    found = rows(workload, machine)
    assert list(found) == list(POLICIES)
    for row in found.values():
        assert row.loads >= row.loads_bound and row.bytes_moved == 10 * row.loads
        assert row.ttft_p50_s <= row.ttft_p95_s <= row.ttft_p99_s and row.longest_wait_s <= row.makespan_s
    assert found["ours"].ttft_p95_s < found["fcfs-lru"].ttft_p95_s
    assert found["ours"].document()["policy"] == "ours"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_load_too_short_for_the_clock_ends_and_its_expert_can_be_evicted(policy: str) -> None:
    machine = Machine(10, 1e13, load_fixed_s=0.0)
    far = of("abab", [0.0, 1e6, 2e6, 3e6])
    [row] = Comparison(machine).rows(far, ("ours", policy) if policy == "belady-ours" else (policy,))[-1:]
    assert (row.requests, row.loads, row.evictions) == (4, 4, 3)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ConfigError, match="no policy best; there are fcfs-lru"):
        Comparison(ONE).rows(of("a"), ["best"])


def test_the_capacity_is_the_highest_rate_that_keeps_the_limit() -> None:
    workload = by_zipf(poisson(400, 1.0, 10, 10, seed=0), *synthetic_experts(3, 10), exponent=0.0, seed=0)
    machine = Machine(30, 100.0, prompt_tokens_per_s=100.0, new_tokens_per_s=100.0, places=4)
    comparison = Comparison(machine, ttft_limit_s=1.0)
    per_s = capacity_per_s(comparison, workload)

    def p95(factor: float) -> float:
        [row] = comparison.rows(workload.at_rate(factor * per_s), ["ours"])
        return row.ttft_p95_s

    assert p95(1.0) <= 1.0 < p95(1.1)
    with pytest.raises(ConfigError, match="raise --ttft-limit or --bandwidth"):
        capacity_per_s(Comparison(machine, ttft_limit_s=1e-6), workload)


def test_devices_are_added_until_the_limit_is_kept() -> None:
    """Four experts with a request each at once: 0.2 s of load and 1 s of answer each, one after the other."""
    machine = Machine(10, 50.0, prompt_tokens_per_s=10.0, new_tokens_per_s=10.0, places=4)
    workload = of("abcd")
    assert devices_needed(Comparison(machine, ttft_limit_s=9.0), workload) == 1
    assert devices_needed(Comparison(machine, ttft_limit_s=2.0), workload) == 2
    assert devices_needed(Comparison(machine, ttft_limit_s=0.5), workload) == 4
    assert devices_needed(Comparison(machine, ttft_limit_s=0.1), workload) is None


def test_experts_are_spread_by_their_requests() -> None:
    assert spread(of("aaabbc"), 2) == [frozenset({"a"}), frozenset({"b", "c"})]
