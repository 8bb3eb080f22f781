"""LoRA adapters on a resident base: kept in a limited number of slots, mixed in one batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from coe.engines.base import Adapter
from coe.engines.hf.lora import mixing
from coe.engines.hf.lora.adapter_files import read_adapter
from coe.engines.hf.lora.base_parameters import BaseParameters, Replacements
from coe.engines.hf.lora.mixing import can_mix, mixed
from coe.engines.hf.lora.mixture import Mixture, MixtureSlot, QueryMixture, RowSlot, name_of
from coe.engines.hf.lora.mixture_slots import MOST_MIXTURE_BYTES, MixtureSlots
from coe.engines.hf.lora.peft_layers import inject, tuner_layers, unwrap
from coe.errors import WeightsError
from registry.lora.combining import why_not_mixed
from registry.lora.plan import is_fused

if TYPE_CHECKING:
    from coe.engines.hf.lora.gates.gate import AdaptedLayer
    from coe.engines.hf.lora.token_mixing import TokenWeights

_BASE: Final = "__base__"  # peft's name for "no adapter" in a mixed batch
_MOST_KNOWN: Final = 1024  # sets of adapters of which it is known whether they fit one batch


@dataclass(frozen=True, slots=True)
class _Slot:
    """A loaded adapter.

    Attributes:
        name: peft's name.
        replacements: parameters that it brings beside its low-rank matrices.
        activated: it acts from its invocation tokens on (aLoRA, arXiv 2504.12397).
        alone: its rows need a batch of their own.
        unmixed: why it cannot be mixed by token; None if it can.
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
        model: a transformers causal model; peft wraps its layers in place at the first adapter.
        base: the base's name, for error messages.
        n_slots: most adapters resident at once.
    """

    def __init__(self, model: Any, base: str, n_slots: int) -> None:
        self._model = model
        self._base = base
        self._n_slots = n_slots
        self._parameters = BaseParameters(model)
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # by key, least recently used first
        self._n_loaded = 0
        self._peft: Any = None
        self._mixtures = MixtureSlots()
        self._mixable: dict[frozenset[str | None], bool] = {}
        self._applied: _Applied | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def close(self) -> None:
        """Free all adapters; the model is the bare base again."""
        self._leave()
        self._slots.clear()
        self._discard("")

    def acquire(self, adapter: Adapter, in_use: Collection[RowSlot] = ()) -> RowSlot:
        """Peft's name of the adapter, which is loaded if absent, or the mixture, whose members are.

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
            return self._mixtures.acquire(mixture, names, self._peft, in_use)

    def _acquire_members(self, adapters: Sequence[Adapter], in_use: set[str], expert: str) -> list[str]:
        names: list[str] = []
        for member in adapters:
            names.append(self._acquire(member, {*in_use, *names}))
            if (reason := self._why_not_mixed(names[-1])) is not None:
                raise WeightsError(
                    f"adapter {member.spec.name!r}, a member of {expert!r}, cannot be mixed by token: {reason}. Leave "
                    "it out of `members`"
                )
        return names

    def _why_not_mixed(self, name: str) -> str | None:
        slot = next(slot for slot in self._slots.values() if slot.name == name)
        return slot.unmixed or mixing.why_not_mixed(self._peft, [name])

    def _acquire(self, adapter: Adapter, in_use: Collection[str]) -> str:
        import torch

        key = adapter.key()
        if key not in self._slots:
            self._leave()  # peft enables and disables layers as it adds and removes adapters
            with torch.inference_mode(False):  # a batch may run: its tensors could not be changed after it
                self._slots[key] = self._load(adapter)
                self._mixable.clear()
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
        if names not in self._mixable:
            members = [member for name in names for member in self._members(name)]
            if len(self._mixable) >= _MOST_KNOWN:
                self._mixable.clear()
            self._mixable[names] = can_mix(self._peft, members, MOST_MIXTURE_BYTES)
        return self._mixable[names]

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

        A batch with one adapter uses peft's plain forward; a mixed one adds each row's update by itself (`mixing`).

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
            slots: (n_rows,) peft's names, and mixtures.
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
        """Load adapters that are to be mixed by token: peft's names, and what they change.

        Raises:
            WeightsError: see `acquire`.
        """
        from coe.engines.hf.lora.token_mixing import layers_of

        names = self._acquire_members(adapters, set(), expert)
        return names, layers_of(self._peft, names)

    @contextmanager
    def mixing(self, mixture: MixtureSlot) -> Iterator[TokenWeights]:
        """All rows of forwards in the block have a mixture of loaded adapters, whose gate may be in training."""
        from coe.engines.hf.lora.token_mixing import mixed_by_token

        self._leave()
        with mixed_by_token(self._peft, [mixture.name], {mixture.name: mixture}) as weights:
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
        with ExitStack() as stack:
            if kinds == [None]:
                if self._peft is not None:
                    stack.enter_context(self._peft.disable_adapter())
            elif mixtures := {name: self._mixtures.by_name[name] for name in kinds if name in self._mixtures.by_name}:
                if len(self.batches(kinds)) > 1:
                    raise ValueError("adapters that cannot be mixed by token are among mixtures")
                from coe.engines.hf.lora.token_mixing import mixed_by_token

                select = stack.enter_context(mixed_by_token(self._peft, kinds, mixtures)).select
            elif len(kinds) == 1:
                keep = self._apply_alone(stack, next(s for s in self._slots.values() if s.name == kinds[0]), prompts)
            elif len(self.batches(kinds)) > 1:
                raise ValueError("an adapter that needs a batch of its own is among others")
            elif can_mix(self._peft, kinds):
                select = stack.enter_context(mixed(self._peft, kinds)).select
            else:
                by_row = [name or _BASE for name in kinds]  # peft's hooks read this very list at every step
                stack.enter_context(self._peft._enable_peft_forward_hooks(adapter_names=by_row))
                select = partial(_replace, by_row)
            return _Applied(frozenset(kinds), stack.pop_all().close, select, keep)

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
            self._discard(self._slots.pop(key).name)

    def _load(self, adapter: Adapter) -> _Slot:
        files = read_adapter(adapter, self._base, self._parameters)
        self._n_loaded += 1
        name = f"slot{self._n_loaded}"
        try:
            self._peft = inject(self._model, self._peft, name, files)
            replacements = self._parameters.replacements(files.plan, files.tensors)
        except BaseException as error:  # also out of memory: half an adapter must not remain
            self._discard(name)
            if not isinstance(error, ValueError | RuntimeError | KeyError | TypeError):
                raise
            raise WeightsError(
                f"adapter {adapter.spec.name!r} ({adapter.path}) does not fit its base {self._base!r}: {error}"
            ) from error
        config = files.plan.config
        activated, fused = bool(config.alora_invocation_tokens), any(map(is_fused, files.plan.ranks))
        alone = activated or fused or config.use_dora or bool(replacements)
        return _Slot(name, replacements, activated, alone, why_not_mixed(files.plan))

    def _discard(self, name: str) -> None:
        """Remove an adapter, whole or half injected. Without adapters, the model is the bare base again."""
        self._mixtures.forget(name)
        self._mixable.clear()
        if not self._slots:
            unwrap(self._model)
            self._peft = None
            return
        if name in self._peft.peft_config:
            del self._peft.peft_config[name]
        # peft warns about deleting an active one
        self._peft.set_adapter(next(reversed(self._slots.values())).name, inference_mode=True)
        for layer in tuner_layers(self._model):
            layer.delete_adapter(name)


def _one_kind(rows: Sequence[Any]) -> None:
    """All rows of the batch have the same adapter: nothing has to know which ones there are."""


def _replace(by_row: list[str], names: Sequence[str | None]) -> None:
    by_row[:] = [name or _BASE for name in names]


def _keep(by_row: list[Any], rows: Sequence[int]) -> None:
    by_row[:] = [by_row[row] for row in rows]
