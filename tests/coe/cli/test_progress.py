"""Progress: bars on a terminal, plain lines elsewhere, nothing for short work."""

import io
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from coe.cli import progress as module
from coe.cli.progress import progress, status


@pytest.fixture
def plain() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=True)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def wait_for(console: Console, text: str) -> None:
    deadline = time.monotonic() + 5
    while not any(text in line for line in lines(console)):
        assert time.monotonic() < deadline, lines(console)
        time.sleep(0.002)


def test_plain_lines_have_count_share_note_and_time(plain: Console) -> None:
    with progress(to=plain, every_s=0.01) as shown:
        task = shown.add("[bold]sql[/]", total=1200)
        task.update(completed=300, note="83.0%")
        wait_for(plain, "sql: 300 of 1,200 (25%), 83.0%, 0:00:00")
        task.update(completed=600)
        wait_for(plain, "sql: 600 of 1,200 (50%), 83.0%")


def test_a_plain_line_says_that_work_goes_on_though_no_count_moves(plain: Console) -> None:
    with progress(to=plain, every_s=0.01) as shown:
        shown.add("reading smol", in_bytes=True).advance(0)
        wait_for(plain, "reading smol: 0:00:00")
        before = len(lines(plain))
        wait_for(plain, "reading smol")
        time.sleep(0.05)
    assert len(lines(plain)) > before


def test_plain_lines_leave_out_what_has_not_begun_and_what_is_over(plain: Console) -> None:
    with progress(to=plain, every_s=0.01) as shown:
        tasks = [shown.add(f"task{i}", total=2) for i in range(7)]
        for task in tasks[1:]:
            task.advance()
        tasks[1].advance()
        wait_for(plain, "task5: 1 of 2")
        last = lines(plain)[-1]
        assert "task0" not in last and "task1" not in last and "and 1 more" in last
        tasks[2].remove()
        wait_for(plain, "task6: 1 of 2")
        assert "task2" not in lines(plain)[-1]


def test_short_work_prints_nothing(plain: Console) -> None:
    with progress(to=plain) as shown:
        shown.add("quick", total=1).advance()
    with status("quick", to=plain):
        pass
    assert lines(plain) == []


def test_a_line_is_printed_at_once(plain: Console) -> None:
    with progress(to=plain) as shown:
        shown.line("routing: 4 rows [yellow](1 failed)[/]")
        assert lines(plain) == ["routing: 4 rows (1 failed)"]


def test_a_terminal_gets_bars(terminal: Console) -> None:
    with progress(to=terminal, every_s=0.01) as shown:
        task = shown.add("hashing", total=4e6, in_bytes=True)
        task.update(completed=1e6)
        assert task.completed == 1e6
    assert any("hashing" in line and "━" in line and "1.0 MB of 4.0 MB (25%)" in line for line in lines(terminal))


def test_a_status_can_change_its_text(plain: Console, terminal: Console) -> None:
    with status("reading", to=plain, every_s=0.01) as say:
        wait_for(plain, "reading: 0:00:00")
        say("starting")
        wait_for(plain, "starting: 0:00:00")
    with status("reading", to=terminal):
        pass
    assert any("reading" in line for line in lines(terminal))


def test_the_time_left_grows_while_no_unit_is_finished() -> None:
    now = [0.0]
    bars = Progress(get_time=lambda: now[0])
    bars.add_task("reading", total=4, note="", in_bytes=False)
    [task] = bars.tasks
    assert module._part(task) == "reading: 0 of 4 (0%), 0:00:00"
    now[0] = 10
    bars.update(task.id, completed=2)
    assert module._part(task) == "reading: 2 of 4 (50%), 0:00:10, about 0:00:10 left"
    now[0] = 60
    assert module._part(task) == "reading: 2 of 4 (50%), 0:01:00, about 0:01:00 left"
