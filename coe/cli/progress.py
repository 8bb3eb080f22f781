"""Progress of long commands on stderr: bars on a terminal, elsewhere a plain line every 10 s.

    with progress() as shown:
        task = shown.add("encoding prompts", total=1200)
        task.advance(32)                                   # or task.update(completed=..., total=..., note=...)

    with status("loading sql"): ...                        # work without a count: a spinner, or a line every 10 s

A command that takes less than 10 s prints no progress line, so logs and pipes stay short.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING

from coe.cli.output import console

if TYPE_CHECKING:
    import rich.progress
    from rich.console import Console

PLAIN_EVERY_S = 10.0
"""Seconds between two lines where stderr is not a terminal."""
_MOST_IN_A_LINE = 4


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work with a count; its clock starts with the first advance or update."""

    _bars: rich.progress.Progress
    _id: rich.progress.TaskID

    def advance(self, done: float = 1) -> None:
        """`done` more units are finished."""
        self._bars.start_task(self._id)
        self._bars.advance(self._id, done)

    def update(
        self,
        *,
        completed: float | None = None,
        total: float | None = None,
        name: str | None = None,
        note: str | None = None,
    ) -> None:
        """Set what is given; `note` is a short text beside the count, such as a mean score."""
        self._bars.start_task(self._id)
        self._bars.update(self._id, completed=completed, total=total, description=name)
        if note is not None:
            self._bars.update(self._id, note=note)

    def remove(self) -> None:
        """Take the bar away."""
        self._bars.remove_task(self._id)

    @property
    def completed(self) -> float:
        """Units finished so far."""
        return self._bars.tasks[self._bars.task_ids.index(self._id)].completed


@dataclass(frozen=True, slots=True)
class Progress:
    """The tasks that are shown; see the module's docstring."""

    _bars: rich.progress.Progress

    def add(self, name: str, total: float | None = None, *, note: str = "", in_bytes: bool = False) -> Task:
        """A new task. total: `None` where it is not known. in_bytes: its units are bytes."""
        task = self._bars.add_task(name, total=total, start=False, note=note, in_bytes=in_bytes)
        return Task(self._bars, task)

    def line(self, text: str) -> None:
        """Print a line, above the bars where there are any. Rich markup is read."""
        self._bars.console.print(text, highlight=False)


@contextmanager
def progress(*, to: Console = console, every_s: float = PLAIN_EVERY_S, transient: bool = False) -> Iterator[Progress]:
    """Show the tasks that the block adds.

    Args:
        to: where; bars only if it is a terminal that can redraw a line.
        every_s: seconds between two plain lines.
        transient: remove the bars at the end.
    """
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _count_column(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Bars(*columns, console=to, transient=transient, disable=not to.is_interactive)
    with bars, _lines(to, lambda: _line(bars.tasks), every_s):
        yield Progress(bars)


@contextmanager
def status(text: str, *, to: Console = console, every_s: float = PLAIN_EVERY_S) -> Iterator[Callable[[str], None]]:
    """Show that work without a count goes on; call what is yielded to change the text."""
    if to.is_interactive:
        with to.status(text) as spinner:
            yield spinner.update
        return
    started, current = monotonic(), [text]
    with _lines(to, lambda: f"{current[0]}: {_clock(monotonic() - started)}", every_s):
        yield lambda new: current.__setitem__(0, new)


@contextmanager
def _lines(to: Console, line: Callable[[], str], every_s: float) -> Iterator[None]:
    """Print `line()` every `every_s` seconds while the block runs, unless bars are shown."""
    if to.is_interactive:
        yield
        return
    stop = threading.Event()

    def print_lines() -> None:
        while not stop.wait(every_s):
            if text := line():
                to.print(text, highlight=False, markup=False, soft_wrap=True)

    printer = threading.Thread(target=print_lines, name="progress", daemon=True)
    printer.start()
    try:
        yield
    finally:
        stop.set()
        printer.join()


def _line(tasks: list[rich.progress.Task]) -> str:
    """The tasks that are at work, in one line: `smol: 35 of 120 (29%), 83.0%, 0:00:42, about 0:01:40 left`."""
    from rich.text import Text

    working = [task for task in tasks if task.started and not task.finished and task.visible]
    parts = [Text.from_markup(_part(task)).plain for task in working[:_MOST_IN_A_LINE]]
    if len(working) > len(parts):
        parts.append(f"and {len(working) - len(parts)} more")
    return "; ".join(parts)


def _part(task: rich.progress.Task) -> str:
    facts = [_count(task), task.fields["note"]]
    if task.elapsed is not None:
        facts.append(_clock(task.elapsed))
    if (left := _remaining(task)) is not None:
        facts.append(f"about {_clock(left)} left")
    return f"{task.description}: {', '.join(filter(None, facts))}"


def _remaining(task: rich.progress.Task) -> float | None:
    """Seconds, at the mean rate so far. Rich's own estimate stays what it was while no unit is finished."""
    if not task.total or not task.completed or task.elapsed is None:
        return None
    return task.elapsed * (task.total - task.completed) / task.completed


def _count(task: rich.progress.Task) -> str:
    if not task.total:
        return f"{_amount(task, task.completed)}" if task.completed else ""
    return f"{_amount(task, task.completed)} of {_amount(task, task.total)} ({task.percentage:.0f}%)"


def _amount(task: rich.progress.Task, count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if task.fields["in_bytes"] else f"{count:,.0f}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


def _count_column() -> rich.progress.ProgressColumn:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task: rich.progress.Task) -> Text:
            return Text(_count(task), style="progress.download")

    return Count()
