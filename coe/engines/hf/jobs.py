"""Functions that run on the worker thread of a model, between two steps of its running batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from coe.engines.base import Adapter
from coe.engines.hf.adapters import AdapterSlots
from coe.engines.hf.load import translate
from coe.engines.hf.mixture import RowSlot
from coe.errors import EngineError, Unsupported

T = TypeVar("T")


class Runnable(Protocol):
    """A job whatever its result is."""

    def run(self, model: Any, slots: AdapterSlots, running: Collection[RowSlot]) -> None:
        """Run it, and keep its result or error; see `Job.run`."""
        ...

    def fail(self, error: Exception) -> None:
        """End it with an error, if it does not run."""
        ...


@dataclass(eq=False, slots=True)
class Job(Generic[T]):
    """A function of the model, called on its worker thread.

    Attributes:
        call: takes the transformers model; its forwards run in inference mode.
        adapters: the adapter of each row of its forwards, `None` for the bare base.
        name: of the model, for error messages.
    """

    call: Callable[[Any], T]
    adapters: Sequence[Adapter | None]
    name: str
    future: Future[T] = field(default_factory=Future)

    def run(self, model: Any, slots: AdapterSlots, running: Collection[RowSlot]) -> None:
        """Load and select the adapters, and call the function. Nothing is raised: the future has the error.

        Args:
            running: slots of the rows of the running batch, whose adapters are kept.
        """
        import torch

        if not self.future.set_running_or_notify_cancel():
            return
        try:
            with translate(f"{self.name!r} failed while generating", EngineError), torch.inference_mode():
                self._select(slots, running)
                result = self.call(model)
        except Exception as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def _select(self, slots: AdapterSlots, running: Collection[RowSlot]) -> None:
        names: list[RowSlot] = []
        for adapter in self.adapters:
            in_use = {name for name in (*running, *names) if name}
            names.append(slots.acquire(adapter, in_use) if adapter else None)
        if slots.has_activated(names):
            raise Unsupported(
                f"an adapter on {self.name!r} acts from its invocation tokens on (aLoRA): it cannot be a member here"
            )
        together = len(slots.batches([*names, *running])) == 1
        slots.select(names, among=running if together else ())

    def fail(self, error: Exception) -> None:
        """End the job with an error, unless it has run or was cancelled."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
