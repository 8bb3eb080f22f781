"""The waiting bound of the scheduler, and what always holds in a simulation, for any arrivals."""

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from coe.memory import look_ahead
from coe.scheduler import Scheduler
from coe.simulation.device import Device
from coe.simulation.run import Outcome, Simulation
from coe.simulation.workload import Machine, Workload

AGING_S, LOAD_S, LONGEST_S, SIZE, EPSILON_S = 1.0, 0.25, 0.8, 2**20, 1e-6

load_times = st.sampled_from([1e-3, LOAD_S, 3 * AGING_S])
"""Switches that cost next to nothing, less than the bound, and more."""
workloads = st.lists(
    st.tuples(st.floats(0, 20), st.integers(0, 6), st.integers(1, int(1000 * LONGEST_S))), min_size=1, max_size=80
).map(
    lambda requests: Workload(
        [(f"e{number}",) for number in range(7)],
        {f"e{number}": SIZE for number in range(7)},
        *(list(column) for column in zip(*[(at, want, 0, new) for at, want, new in sorted(requests)], strict=True)),
    )
)


def simulate(workload: Workload, room: int, places: int, load_s: float = LOAD_S, aging_s: float = AGING_S) -> Outcome:
    machine = Machine(room * SIZE, SIZE / load_s, new_tokens_per_s=1000.0, places=places, shared=False)
    device = Device(machine.device_bytes, workload.bytes_of, load_s=machine.load_s, policy=look_ahead)
    rule = Scheduler(device, capacity=lambda name: places, aging_s=aging_s)
    return Simulation(workload, machine, device, rule).run()


@settings(max_examples=150, deadline=None)
@given(workload=workloads, room=st.integers(1, 4), load_s=load_times)
def test_no_request_waits_beyond_the_bound_because_of_other_experts(
    workload: Workload, room: int, load_s: float
) -> None:
    """With places for all, it waits `aging_s`, one load that is under way and one drain; and the same once more for
    each absent expert that was asked for earlier and still waits then."""
    found = simulate(workload, room, 1000, load_s)
    admitted_s = [at_s + wait_s for at_s, wait_s in zip(workload.at_s, found.wait_s, strict=True)]
    for index, wait_s in enumerate(found.wait_s):
        overdue_s = workload.at_s[index] + AGING_S
        own = workload.wants[index]
        before = {workload.wants[i] for i in range(index) if admitted_s[i] > overdue_s and workload.wants[i] != own}
        assert wait_s <= AGING_S + (1 + len(before)) * (load_s + LONGEST_S) + EPSILON_S


def loads_of(workload: Workload, found: Outcome) -> Iterator[tuple[float, str, int]]:
    """When each load started, of what, and the oldest request that it was for."""
    for load_s, name in found.moves.loads:
        yield (
            load_s,
            name,
            min(
                index
                for index in found.admitted
                if workload.residencies[workload.wants[index]] == (name,)
                and abs(workload.at_s[index] + found.wait_s[index] - load_s) < EPSILON_S
            ),
        )


@settings(max_examples=150, deadline=None)
@given(workload=workloads, room=st.integers(1, 4), places=st.integers(1, 4), load_s=load_times)
def test_no_load_for_a_younger_request_starts_before_that_of_an_overdue_one(
    workload: Workload, room: int, places: int, load_s: float
) -> None:
    check_order(workload, simulate(workload, room, places, load_s), AGING_S)


@settings(max_examples=150, deadline=None)
@given(workload=workloads, room=st.integers(1, 4), places=st.integers(1, 4))
def test_where_loads_take_no_time_the_oldest_request_loads_first_without_any_bound(
    workload: Workload, room: int, places: int
) -> None:
    found = simulate(workload, room, places, load_s=1e-9, aging_s=1e9)
    check_order(workload, found, aging_s=0.0, apart_s=EPSILON_S)  # loads decide between requests of one moment


def check_order(workload: Workload, found: Outcome, aging_s: float, apart_s: float = 0.0) -> None:
    """No load starts while an older request for other weights that are absent has waited `aging_s`.

    apart_s: requests that came less than this before are not older.
    """
    starts = list(loads_of(workload, found))
    for load_s, name, oldest in starts:
        for index in range(oldest):
            waits = workload.at_s[oldest] - workload.at_s[index] >= apart_s
            waits &= workload.at_s[index] + aging_s + EPSILON_S < load_s
            waits &= load_s < workload.at_s[index] + found.wait_s[index] - EPSILON_S
            own = workload.residencies[workload.wants[index]][0]
            moves = [(at_s, True) for at_s, moved in found.moves.loads if moved == own and at_s <= load_s]
            moves += [(at_s, False) for at_s, moved in found.moves.evictions if moved == own and at_s <= load_s]
            present = max(moves, default=(0.0, False))[1]
            assert not waits or present or own == name


@settings(max_examples=100, deadline=None)
@given(workload=workloads, room=st.integers(1, 4), places=st.integers(1, 4), load_s=load_times)
def test_all_are_answered_within_capacity_and_memory_and_it_repeats(
    workload: Workload, room: int, places: int, load_s: float
) -> None:
    found = simulate(workload, room, places, load_s)
    assert sorted(found.admitted) == sorted(found.served) == list(range(len(workload)))
    resident: set[str] = set()
    moves = [(at_s, 0, name) for at_s, name in found.moves.evictions]
    for _, is_load, name in sorted(moves + [(at_s, 1, name) for at_s, name in found.moves.loads]):
        resident = resident | {name} if is_load else resident - {name}
        assert len(resident) <= room
    for index in range(len(workload)):
        start_s = workload.at_s[index] + found.wait_s[index]
        at_once = [
            other
            for other in range(len(workload))
            if workload.wants[other] == workload.wants[index]
            and workload.at_s[other] + found.wait_s[other] <= start_s
            and start_s < workload.at_s[other] + found.done_s[other] - EPSILON_S
        ]
        assert len(at_once) <= places
    for wait_s, first_s, done_s in zip(found.wait_s, found.first_s, found.done_s, strict=True):
        assert 0 <= wait_s <= first_s + EPSILON_S and first_s <= done_s + EPSILON_S
    again = simulate(workload, room, places, load_s)
    assert (again.admitted, again.moves, again.done_s) == (found.admitted, found.moves, found.done_s)
