"""LoRA adapters on a resident base: kept in a limited number of slots, mixed in one batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from coe.engines.base import Adapter
from coe.engines.hf.lora.adapter_files import AdapterFiles, read_adapter
from coe.engines.hf.lora.base_parameters import BaseParameters, Replacements
from coe.engines.hf.lora.low_rank import LowRankAdapters
from coe.engines.hf.lora.mixture import Mixture, MixtureSlot, QueryMixture, RowSlot, name_of
from coe.engines.hf.lora.mixture_slots import MOST_MIXTURE_BYTES, MixtureSlots
from coe.engines.hf.lora.peft_layers import inject, tuner_layers, unwrap
from coe.errors import WeightsError
from registry.lora.plan import is_fused

if TYPE_CHECKING:
    from coe.engines.hf.lora.gates.gate import AdaptedLayer
    from coe.engines.hf.lora.token_mixing import TokenWeights

_BASE: Final = "__base__"  # peft's name for "no adapter" in a mixed batch


@dataclass(frozen=True, slots=True)
class _Slot:
    """A loaded adapter.

    Attributes:
        name: of the adapter on the base, in peft too.
        replacements: parameters that it brings beside its low-rank matrices.
        activated: it acts from its invocation tokens on (aLoRA, arXiv 2504.12397).
        alone: its rows need a batch of their own.
        unmixed: why it is left to peft, and cannot be mixed by token; None if it is a `LowRankAdapters`' one.
    """

    name: str
    replacements: Replacements
    activated: bool
    alone: bool
    unmixed: str | None


@dataclass(frozen=True, slots=True)
class _Applied:
    """What applies the adapters of a forward to its rows.

    Attributes:
        names: of the adapters and mixtures that rows may have; `None` is the bare base.
        close: the model applies no adapter any more.
        select: takes what each row of the next forward has.
        keep: takes the positions of the rows that stay, where a batch has more by row than the names.
    """

    names: frozenset[str | None]
    close: Callable[[], None]
    select: Callable[[Sequence[RowSlot]], None]
    keep: Callable[[Sequence[int]], None]


class AdapterSlots:
    """The adapters of one base model; only its worker thread calls this.

    An adapter is loaded on first use and kept until its slot is needed: the least recently used one is evicted, never
    one of the current batch; if all are in use, the next one is resident beside them meanwhile. Adapters are identified
    by content, so a new version under an old name is loaded again. Their weights take the base's device and dtype. The
    base's own tensors are never written.

    Args:
        model: a transformers causal model; peft wraps its layers in place at the first adapter that is more than
            low-rank updates of linear layers.
        base: the base's name, for error messages.
        n_slots: most adapters resident at once.
    """

    def __init__(self, model: Any, base: str, n_slots: int) -> None:
        self._model = model
        self._base = base
        self._n_slots = n_slots
        self._parameters = BaseParameters(model)
        self._low_rank = LowRankAdapters(model)
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # by key, least recently used first
        self._n_loaded = 0
        self._peft: Any = None
        self._mixtures = MixtureSlots()
        self._applied: _Applied | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def close(self) -> None:
        """Free all adapters; the model is the bare base again."""
        self._leave()
        while self._slots:
            self._discard(self._slots.popitem()[1])

    def acquire(self, adapter: Adapter, in_use: Collection[RowSlot] = ()) -> RowSlot:
        """The name of the adapter on the base, which is loaded if absent, or the mixture, whose members are.

        Args:
            in_use: what must not be evicted: names of adapters, and mixtures.

        Raises:
            WeightsError: files are missing, unsafe, or do not fit the base; an adapter cannot be mixed by token; or a
                mixture has more members than there are slots.
        """
        members = {name for slot in in_use for name in self._members(name_of(slot)) if name is not None}
        if isinstance(adapter, Mixture):
            return self._acquire_mixture(adapter, members, {name_of(slot) for slot in in_use})
        return self._acquire(adapter, members)

    def _acquire_mixture(self, mixture: Mixture, members: set[str], in_use: Collection[str | None]) -> QueryMixture:
        import torch

        self._mixtures.check(mixture, self._n_slots)
        names = self._acquire_members(mixture.members, members, mixture.spec.name)
        with torch.inference_mode(False), torch.no_grad():
            return self._mixtures.acquire(mixture, names, self._low_rank, in_use)

    def _acquire_members(self, adapters: Sequence[Adapter], in_use: set[str], expert: str) -> list[str]:
        names: list[str] = []
        for member in adapters:
            names.append(self._acquire(member, {*in_use, *names}))
            if (reason := self._slots[member.key()].unmixed) is not None:
                raise WeightsError(
                    f"adapter {member.spec.name!r}, a member of {expert!r}, cannot be mixed by token: {reason}. Leave "
                    "it out of `members`"
                )
        return names

    def _acquire(self, adapter: Adapter, in_use: Collection[str]) -> str:
        import torch

        key = adapter.key()
        if key not in self._slots:
            with torch.inference_mode(False):  # a batch may run: its tensors could not be changed after it
                self._slots[key] = self._load(adapter)
                self._evict({*in_use, self._slots[key].name})
        self._slots.move_to_end(key)
        return self._slots[key].name

    def batches(self, slots: Sequence[RowSlot]) -> list[list[int]]:
        """The rows that can run together, in order: adapters that cannot be mixed have batches of their own."""
        names = [name_of(slot) for slot in slots]
        alone: set[str | None] = {slot.name for slot in self._slots.values() if slot.alone}
        if not self._fit_together(frozenset(names) - alone):
            alone |= self._mixtures.by_name.keys()
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name if name in alone else None, []).append(row)
        return list(rows.values())

    def _fit_together(self, names: frozenset[str | None]) -> bool:
        """Whether mixtures among these can share a batch with the others; without mixtures, all can."""
        if self._mixtures.by_name.keys().isdisjoint(names):
            return True
        members = {member for name in names for member in self._members(name) if member is not None}
        low_rank = all(member in self._low_rank for member in members)
        return low_rank and self._low_rank.n_bytes(members) <= MOST_MIXTURE_BYTES

    def _members(self, name: str | None) -> Sequence[str | None]:
        mixture = self._mixtures.by_name.get(name or "")
        return [name] if mixture is None else mixture.members

    def can_join(self, adapter: Adapter | None, slots: Sequence[RowSlot]) -> bool:
        """Whether a row with this adapter can join a running batch; an adapter not loaded yet counts as mixable.

        Args:
            slots: of the rows of the batch.
        """
        # Peft finds where an aLoRA acts in a whole prompt, for a whole batch.
        return not self.has_activated(slots) and len(self.batches([*slots, self._name(adapter)])) == 1

    def _name(self, adapter: Adapter | None) -> str | None:
        if adapter is None:
            return None
        found = self._mixtures if isinstance(adapter, Mixture) else self._slots
        slot = found.get(adapter.key())
        return slot.name if slot else None

    def generate(self, names: Sequence[RowSlot], **kwargs: Any) -> Any:
        """What `model.generate(**kwargs)` returns with the adapter or mixture of each row, `None` for the bare base.

        Raises:
            ValueError: these rows cannot run together (`batches`).
        """
        try:
            self.select(names, prompts=kwargs.get("inputs"))
            return self._model.generate(**kwargs)
        finally:
            self._leave()

    def select(self, slots: Sequence[RowSlot], among: Collection[RowSlot] = (), prompts: Any = None) -> None:
        """The rows of the next forward have these adapters or mixtures.

        Args:
            slots: (n_rows,) names of adapters, and mixtures.
            among: those of rows that other forwards of the batch process: one preparation serves all of them.
            prompts: (n_rows, n_tokens) ids, which an aLoRA reads.

        Raises:
            ValueError: these rows cannot run together (`batches`).
        """
        names = [name_of(slot) for slot in (*slots, *among)]
        if self._applied is None or not self._applied.names.issuperset(names):
            self._leave()
            self._applied = self._apply(list(dict.fromkeys(names)), prompts)
        self._applied.select(slots)

    def layers(self, adapters: Sequence[Adapter], *, expert: str) -> tuple[list[str], list[AdaptedLayer]]:
        """Load adapters that are to be mixed by token: their names, and what they change.

        Raises:
            WeightsError: see `acquire`.
        """
        from coe.engines.hf.lora.token_mixing import layers_of

        names = self._acquire_members(adapters, set(), expert)
        return names, layers_of(self._low_rank, names)

    @contextmanager
    def mixing(self, mixture: MixtureSlot) -> Iterator[TokenWeights]:
        """All rows of forwards in the block have a mixture of loaded adapters, whose gate may be in training."""
        from coe.engines.hf.lora.token_mixing import mixed_by_token

        self._leave()
        with self._without_peft(), mixed_by_token(self._low_rank, [mixture.name], {mixture.name: mixture}) as weights:
            yield weights

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch that `generate` is at work on; the others have left it."""
        if self._applied is not None:
            self._applied.keep(rows)

    def has_activated(self, names: Collection[RowSlot]) -> bool:
        """Whether one of these is an aLoRA: its forwards are prepared with their prompts, and none of another kind can
        run between them."""
        return any(slot.activated for slot in self._slots.values() if slot.name in names)

    def _leave(self) -> None:
        applied, self._applied = self._applied, None
        if applied is not None:
            applied.close()

    def _apply(self, kinds: list[str | None], prompts: Any) -> _Applied:
        select: Callable[[Sequence[Any]], None] = _one_kind
        keep: Callable[[Sequence[int]], None] = _one_kind
        others = [name for name in kinds if name is not None and name not in self._low_rank]
        mixtures = {name: self._mixtures.by_name[name] for name in others if name in self._mixtures.by_name}
        with ExitStack() as stack:
            if mixtures:
                if len(self.batches(kinds)) > 1:
                    raise ValueError("adapters that cannot be mixed by token are among mixtures")
                from coe.engines.hf.lora.token_mixing import mixed_by_token

                stack.enter_context(self._without_peft())
                select = stack.enter_context(mixed_by_token(self._low_rank, kinds, mixtures)).select
            elif len(kinds) == 1 and others:
                keep = self._apply_alone(stack, next(s for s in self._slots.values() if s.name == kinds[0]), prompts)
            elif len(self.batches(kinds)) > 1:
                raise ValueError("an adapter that needs a batch of its own is among others")
            else:
                select = self._apply_by_row(stack, kinds, others)
            return _Applied(frozenset(kinds), stack.pop_all().close, select, keep)

    def _apply_by_row(
        self, stack: ExitStack, kinds: Sequence[str | None], others: Collection[str]
    ) -> Callable[[Sequence[Any]], None]:
        """Rows with low-rank adapters, with the `others` that peft runs one by one, and with none."""
        low_rank = [name for name in kinds if name is not None and name not in others]
        selected: list[Callable[[Sequence[Any]], None]] = []
        if low_rank:
            selected.append(stack.enter_context(self._low_rank.applied(low_rank)).select)
        if others:
            by_row = [_BASE] * len(kinds)  # peft's hooks read this list at every step
            stack.enter_context(self._peft._enable_peft_forward_hooks(adapter_names=by_row))
            selected.append(partial(_replace, by_row, frozenset(others)))
        else:
            stack.enter_context(self._without_peft())
        return partial(_select_each, selected)

    def _without_peft(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._peft is None else self._peft.disable_adapter()

    def _apply_alone(self, stack: ExitStack, slot: _Slot, prompts: Any) -> Callable[[Sequence[int]], None]:
        self._peft.set_adapter(slot.name, inference_mode=True)
        stack.enter_context(self._parameters.replaced(slot.replacements))
        if not slot.activated:
            return _one_kind
        from peft.tuners.lora.variants import calculate_alora_offsets

        offsets = calculate_alora_offsets(self._peft.peft_config, slot.name, prompts)
        stack.enter_context(self._peft._enable_peft_forward_hooks(alora_offsets=offsets))
        return partial(_keep, offsets)

    def _evict(self, in_use: Collection[str]) -> None:
        unused = [key for key, slot in self._slots.items() if slot.name not in in_use]
        for key in unused[: max(0, len(self._slots) - self._n_slots)]:
            self._discard(self._slots.pop(key))

    def _load(self, adapter: Adapter) -> _Slot:
        files = read_adapter(adapter, self._base, self._parameters)
        self._n_loaded += 1
        name = f"slot{self._n_loaded}"
        if (unmixed := self._low_rank.why_not(files.plan)) is None:
            self._low_rank.add(name, files)
            return _Slot(name, Replacements(), activated=False, alone=False, unmixed=None)
        return self._load_by_peft(name, files, adapter, unmixed)

    def _load_by_peft(self, name: str, files: AdapterFiles, adapter: Adapter, unmixed: str) -> _Slot:
        self._leave()  # peft enables layers as it adds an adapter, also for the rows of a running batch
        try:
            self._peft = inject(self._model, self._peft, name, files)
            replacements = self._parameters.replacements(files.plan, files.tensors)
        except BaseException as error:  # also out of memory: half an adapter must not remain
            self._discard_from_peft(name)
            if not isinstance(error, ValueError | RuntimeError | KeyError | TypeError):
                raise
            raise WeightsError(
                f"adapter {adapter.spec.name!r} ({adapter.path}) does not fit its base {self._base!r}: {error}"
            ) from error
        config = files.plan.config
        activated, fused = bool(config.alora_invocation_tokens), any(map(is_fused, files.plan.ranks))
        alone = activated or fused or config.use_dora or bool(replacements)
        return _Slot(name, replacements, activated, alone, unmixed)

    def _discard(self, slot: _Slot) -> None:
        """Remove an adapter, which is in no slot any more."""
        self._mixtures.forget(slot.name)
        if slot.unmixed is None:
            self._low_rank.remove(slot.name)
        else:
            self._discard_from_peft(slot.name)

    def _discard_from_peft(self, name: str) -> None:
        """Remove an adapter, whole or half injected. Without others, the model is as it was before peft."""
        self._leave()
        others = [slot.name for slot in self._slots.values() if slot.unmixed is not None]
        if not others:
            unwrap(self._model)
            self._peft = None
            return
        if name in self._peft.peft_config:
            del self._peft.peft_config[name]
        self._peft.set_adapter(others[-1], inference_mode=True)  # peft warns about deleting an active one
        for layer in tuner_layers(self._model):
            layer.delete_adapter(name)


def _one_kind(rows: Sequence[Any]) -> None:
    """All rows of the batch have the same adapter: nothing has to know which ones there are."""


def _select_each(selected: Sequence[Callable[[Sequence[Any]], None]], names: Sequence[str | None]) -> None:
    for select in selected:
        select(names)


def _replace(by_row: list[str], known: Set[str], names: Sequence[str | None]) -> None:
    by_row[:] = [_BASE if name is None or name not in known else name for name in names]


def _keep(by_row: list[Any], rows: Sequence[int]) -> None:
    by_row[:] = [by_row[row] for row in rows]
