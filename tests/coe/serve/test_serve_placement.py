"""Which host a request goes to, by the status of the hosts."""

from collections import Counter

import pytest

from coe.serve.cluster.placement import HEARD_S, Board, HostStatus, rank


def test_the_host_that_has_the_expert_is_first_however_busy_until_waiting_costs_more_than_loading() -> None:
    has_it = HostStatus("a", load_s={"sql": 0.0}, busy=20)
    idle = HostStatus("b", load_s={"sql": 2.0})
    assert rank("sql", [idle, has_it]) == ["a", "b"]
    crowded = HostStatus("a", load_s={"sql": 0.0}, queue_s={"sql": 3.0}, busy=200)
    assert rank("sql", [crowded, idle]) == ["b", "a"]


def test_else_where_loading_is_cheapest_then_where_there_is_room_then_where_least_is_asked() -> None:
    slow, fast = HostStatus("slow", load_s={"m": 9.0}), HostStatus("fast", load_s={"m": 1.0}, busy=3)
    assert rank("m", [slow, fast]) == ["fast", "slow"]
    full = HostStatus("full", load_s={"m": 1.0}, tight=frozenset({"m"}))
    assert rank("m", [full, fast]) == ["fast", "full"]
    assert rank("m", [fast, HostStatus("idle", load_s={"m": 1.0})]) == ["idle", "fast"]


def test_a_slow_host_is_taken_once_waiting_for_the_fast_one_costs_more() -> None:
    cpu = HostStatus("cpu", load_s={"m": 0.0}, answer_s={"m": 20.0})
    gpu = HostStatus("gpu", load_s={"m": 0.0}, answer_s={"m": 2.0}, busy=8)
    assert rank("m", [cpu, gpu]) == ["gpu", "cpu"]
    queued = HostStatus("gpu", load_s={"m": 0.0}, answer_s={"m": 2.0}, queue_s={"m": 17.0}, busy=80)
    assert rank("m", [cpu, queued]) == ["gpu", "cpu"]
    longer = HostStatus("gpu", load_s={"m": 0.0}, answer_s={"m": 2.0}, queue_s={"m": 19.0}, busy=90)
    assert rank("m", [cpu, longer]) == ["cpu", "gpu"]
    cold = HostStatus("gpu", load_s={"m": 30.0}, answer_s={"m": 2.0})
    assert rank("m", [cpu, cold]) == ["cpu", "gpu"]


def test_equal_hosts_share_the_requests_though_their_answers_differ_a_little() -> None:
    a = HostStatus("a", load_s={"m": 0.0}, answer_s={"m": 2.0}, busy=3)
    b = HostStatus("b", load_s={"m": 0.0}, answer_s={"m": 2.9}, busy=2)
    untried = HostStatus("c", load_s={"m": 0.0}, busy=1)
    assert rank("m", [a, b, untried]) == ["c", "b", "a"]


def test_a_host_that_has_not_spoken_yet_is_not_taken_for_one_that_has_everything() -> None:
    silent, resident, cold = (
        HostStatus("s"),
        HostStatus("r", load_s={"m": 0.0}, busy=5),
        HostStatus("c", load_s={"m": 1.0}),
    )
    assert rank("m", [silent, cold, resident])[0] == "r"
    assert rank("m", [silent]) == ["s"]


def test_what_was_just_sent_keeps_its_expert_together_and_spreads_the_others() -> None:
    now = 0.0
    board = Board(clock=lambda: now)
    board.publish("hosts", [HostStatus(name, load_s={"x": 1.0, "y": 1.0}) for name in ("a", "b")])
    assert rank("x", board.hosts("hosts"))[0] == "a"
    call = board.open("x", ["hosts"])
    assert call.host == "a"
    assert rank("x", board.hosts("hosts")) == ["a", "b"]  # it is as good as loading there
    assert rank("y", board.hosts("hosts")) == ["b", "a"]  # the other one is idle
    now = HEARD_S + 0.1
    assert rank("y", board.hosts("hosts")) == ["b", "a"]  # still so: this gateway knows its own calls
    board.close(call)
    assert rank("y", board.hosts("hosts")) == ["a", "b"]  # by now the host has reported its status


def test_a_host_that_is_gone_takes_what_was_sent_with_it() -> None:
    board = Board(clock=lambda: 0.0)
    board.publish("hosts", [HostStatus("a"), HostStatus("b")])
    call = board.open("x", ["hosts"])
    assert call.host == "a"
    board.publish("hosts", [HostStatus("b")])
    assert [view.id for view in board.hosts("hosts")] == ["b"]
    board.close(call)
    board.publish("hosts", [HostStatus("a"), HostStatus("b")])
    assert all(view.busy == 0 for view in board.hosts("hosts"))
    assert board.hosts("elsewhere") == []


def test_a_published_state_reads_back() -> None:
    state = {"load_s": {"m": 1.5}, "queue_s": {"m": 0.5}, "tight": ["m"], "busy": 3}
    assert HostStatus.of("a", state) == HostStatus("a", {"m": 1.5}, {"m": 0.5}, frozenset({"m"}), 3)
    assert HostStatus.of("a", {}) == HostStatus("a")


def answering(name: str, *, places: int = 4, answer_s: float = 1.0, **calls: dict[str, int]) -> HostStatus:
    """A host that has `x` in memory."""
    busy = sum(count for each in calls.values() for count in each.values())
    known = {"load_s": {"x": 0.0}, "places": {"x": places}, "answer_s": {"x": answer_s}}
    return HostStatus(name, busy=busy, calls=calls, **known)  # type: ignore[arg-type]


def test_a_burst_between_two_reports_fills_the_places_of_both_hosts() -> None:
    board = Board(clock=lambda: 0.0)
    board.publish("hosts", [answering("a"), answering("b")])
    calls = [board.open("x", ["hosts"]) for _ in range(8)]
    assert Counter(call.host for call in calls) == {"a": 4, "b": 4}
    for call in calls[:3]:
        board.close(call)
    freed = Counter(call.host for call in calls[:3])
    assert Counter(board.open("x", ["hosts"]).host for _ in range(3)) == freed, "places that became free are filled"


def test_a_report_that_is_older_than_the_calls_does_not_send_all_of_them_to_one_host() -> None:
    board = Board(clock=lambda: 0.0)
    full = answering("a", **{board.origin: {"x": 4}})
    board.publish("hosts", [full, answering("b")])  # the four calls in this report have ended since
    assert Counter(board.open("x", ["hosts"]).host for _ in range(8)) == {"a": 4, "b": 4}


def test_calls_of_other_gateways_count_as_the_hosts_report_them() -> None:
    board = Board(clock=lambda: 0.0)
    board.publish("hosts", [answering("a", other={"x": 4}), answering("b", other={"x": 1})])
    assert Counter(board.open("x", ["hosts"]).host for _ in range(3)) == {"b": 3}
    wide = answering("c", places=32, other={"x": 20})
    board.publish("hosts", [answering("a", other={"x": 4}), wide])
    assert board.open("x", ["hosts"]).host == "c", "it is busier, and has free places"


@pytest.mark.parametrize(("load_s", "where"), [(0.3, "b"), (5.0, "a")])
def test_a_free_place_elsewhere_is_taken_when_loading_there_is_sooner_than_waiting(load_s: float, where: str) -> None:
    board = Board(clock=lambda: 0.0)
    board.publish("hosts", [answering("a"), HostStatus("b", load_s={"x": load_s})])
    assert [board.open("x", ["hosts"]).host for _ in range(4)] == ["a"] * 4
    assert [board.open("x", ["hosts"]).host for _ in range(2)] == ["a", where]  # waits 0.25 s, then 0.5 s


def test_a_queue_that_lasts_pays_for_a_second_copy_but_never_for_an_eviction() -> None:
    for tight, hosts in ((frozenset[str](), {"a", "b"}), (frozenset({"x"}), {"a"})):
        board = Board(clock=lambda: 0.0)
        board.publish("hosts", [answering("a"), HostStatus("b", load_s={"x": 3.0}, tight=tight)])
        for _ in range(4):
            board.open("x", ["hosts"])
        seen = set()
        for _ in range(20):  # each waits a quarter of a second, less than the load
            call = board.open("x", ["hosts"])
            seen.add(call.host)
            board.close(call)
        assert seen == hosts


def test_before_the_first_answer_the_age_of_the_oldest_call_counts() -> None:
    now = 0.0
    board = Board(clock=lambda: now)
    a, b = answering("a", answer_s=0.0), HostStatus("b", load_s={"x": 2.0})
    board.publish("hosts", [a, b])
    assert {board.open("x", ["hosts"]).host for _ in range(8)} == {"a"}
    now = 10.0
    assert board.open("x", ["hosts"]).host == "b", "ten seconds for four places are longer than the load"


def test_a_host_that_serve_chose_in_place_of_ours_is_the_one_that_counts() -> None:
    board = Board(clock=lambda: 0.0)
    board.publish("hosts", [answering("a"), answering("b")])
    call = board.open("x", ["hosts"])
    board.sent(call.id, "b")
    assert board.target(call.id) == "b" and {view.id: view.busy for view in board.hosts("hosts")} == {"a": 0, "b": 1}
    board.close(call)
    board.sent(call.id, "a")  # too late: the call has ended
    assert board.target(call.id) is None and all(view.busy == 0 for view in board.hosts("hosts"))
    assert not board.in_use("hosts")


def test_many_calls_leave_nothing_behind() -> None:
    board = Board(clock=lambda: 0.0)
    board.publish("hosts", [answering("a"), answering("b")])
    for call in [board.open(f"x{i}", ["hosts"]) for i in range(500)]:
        board.close(call)
    assert not board.in_use("hosts") and not board._calls and not board._at
