"""Which host a request goes to, by the status of the hosts."""

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
    board.sent("a", "x")
    assert rank("x", board.hosts("hosts")) == ["a", "b"]  # it is as good as loading there
    assert rank("y", board.hosts("hosts")) == ["b", "a"]  # the other one is idle
    now = HEARD_S + 0.1
    assert rank("y", board.hosts("hosts")) == ["a", "b"]  # by now the host has reported its status


def test_a_host_that_is_gone_takes_what_was_sent_with_it() -> None:
    board = Board(clock=lambda: 0.0)
    board.publish("hosts", [HostStatus("a"), HostStatus("b")])
    board.sent("a", "x")
    board.publish("hosts", [HostStatus("b")])
    assert [view.id for view in board.hosts("hosts")] == ["b"]
    board.publish("hosts", [HostStatus("a"), HostStatus("b")])
    assert all(view.busy == 0 for view in board.hosts("hosts"))
    assert board.hosts("elsewhere") == []


def test_a_published_state_reads_back() -> None:
    state = {"load_s": {"m": 1.5}, "queue_s": {"m": 0.5}, "tight": ["m"], "busy": 3}
    assert HostStatus.of("a", state) == HostStatus("a", {"m": 1.5}, {"m": 0.5}, frozenset({"m"}), 3)
    assert HostStatus.of("a", {}) == HostStatus("a")
