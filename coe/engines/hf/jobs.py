"""Functions that run on the worker thread of a model, between two steps of its running batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from coe.engines.base import Adapter
from coe.engines.hf.load import translate
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.hf.lora.mixture import RowSlot
from coe.errors import EngineError, Unsupported

T = TypeVar("T")


class Job(ABC, Generic[T]):
    """Work on the worker thread of a model, and its result.

    Args:
        adapters: the adapter of each row of its forwards, `None` for the bare base, and then others to load.
        name: of the model, for error messages.

    Attributes:
        future: has its result or error.
    """

    def __init__(self, adapters: Sequence[Adapter | None], name: str) -> None:
        self._adapters, self._name = adapters, name
        self.future: Future[T] = Future()

    def run(self, model: Any, slots: AdapterSlots, running: Collection[RowSlot]) -> None:
        """Load the adapters, and do it. Nothing is raised: the future has the error.

        Args:
            running: slots of the rows of the running batch, whose adapters are kept.
        """
        import torch

        if not self.future.set_running_or_notify_cancel():
            return
        try:
            with translate(f"{self._name!r} failed while generating", EngineError), torch.inference_mode():
                result = self._result(model, slots, self._acquired(slots, running), running)
        except Exception as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """End the job with an error, unless it has run or was cancelled."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    @abstractmethod
    def _result(self, model: Any, slots: AdapterSlots, names: Sequence[RowSlot], running: Collection[RowSlot]) -> T: ...

    def _acquired(self, slots: AdapterSlots, running: Collection[RowSlot]) -> list[RowSlot]:
        """The slots of the adapters."""
        names: list[RowSlot] = []
        for adapter in self._adapters:
            in_use = {name for name in (*running, *names) if name}
            names.append(slots.acquire(adapter, in_use) if adapter else None)
        if slots.has_activated(names):
            raise Unsupported(
                f"an adapter on {self._name!r} acts from its invocation tokens on (aLoRA): it cannot be a member here"
            )
        return names


class Call(Job[T]):
    """A function of the model, whose forwards run in inference mode with the adapters of `n_rows` rows."""

    def __init__(self, adapters: Sequence[Adapter | None], name: str, call: Callable[[Any], T], n_rows: int) -> None:
        super().__init__(adapters, name)
        self._call, self._n_rows = call, n_rows

    def _result(self, model: Any, slots: AdapterSlots, names: Sequence[RowSlot], running: Collection[RowSlot]) -> T:
        rows, others = names[: self._n_rows], [*names[self._n_rows :], *running]
        together = len(slots.batches([*rows, *others])) == 1
        slots.select(rows, among=others if together else ())
        return self._call(model)


class Batching(Job[list[list[int]]]):
    """Which of the adapters can be in one forward, as positions."""

    def _result(
        self, model: Any, slots: AdapterSlots, names: Sequence[RowSlot], running: Collection[RowSlot]
    ) -> list[list[int]]:
        return slots.batches(names)
