"""Loading an expert whose layers are read or trained on, in this process: with the loader of the hf engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from coe.engine_config import EnginesConfig, HFConfig
from coe.engines import engine_kind
from coe.engines.base import Adapter
from coe.engines.hf.load import LoadedModel, choose_device, choose_dtype, load_model, require_memory, weight_bytes
from coe.errors import Unsupported
from coe.experts import locate, locator
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot


@dataclass(frozen=True, eq=False, slots=True)
class LoadedExpert:
    """An expert in this process.

    Attributes:
        model: the expert's model, or the adapter's base, without the adapter.
        adapter: the files of the adapter, if the expert is one.
    """

    spec: ExpertSpec
    model: LoadedModel
    adapter: Adapter | None

    @classmethod
    def load(
        cls,
        spec: ExpertSpec,
        snapshot: Snapshot,
        engines: EnginesConfig,
        *,
        find: Callable[[ExpertSpec], Path] | None = None,
    ) -> Self:
        """Load a registered expert, whatever engine serves it. Blocks.

        Args:
            find: verified files; by default `coe.experts.locate` among the experts of the snapshot.

        Raises:
            Unsupported: its weights are not here. WeightsError, OutOfMemory: it cannot be loaded.
        """
        base = snapshot.experts[spec.base] if spec.base else spec
        _check_weights(spec, base)
        find = find or locator(snapshot.experts)
        loaded = load_weights(base, engines.hf, find=find)
        adapter = Adapter(spec, find(spec)) if spec.kind is Kind.ADAPTER else None
        return cls(spec, loaded, adapter)


def load_weights(spec: ExpertSpec, settings: HFConfig, *, find: Callable[[ExpertSpec], Path] = locate) -> LoadedModel:
    """The model of an expert of kind `model`, whatever engine serves it. Blocks.

    Args:
        settings: device, dtype and threads.
        find: verified files.

    Raises:
        WeightsError, OutOfMemory: it cannot be loaded.
    """
    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    path = find(spec.model_copy(update={"engine": "hf"}))  # for which a GGUF file is converted
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    require_memory(spec.name, weight_bytes(path, dtype), device)
    return load_model(spec.name, path, device, dtype)


def _check_weights(spec: ExpertSpec, base: ExpertSpec) -> None:
    reasons = {
        Kind.REMOTE: "it answers behind an endpoint, which returns no hidden states",
        Kind.COMPOSED: "it is composed of others: name one of its members",
        Kind.EMBEDDING: "it is an embedding model, which generates no text",
    }
    reason = reasons.get(spec.kind) or ("it has no weights" if engine_kind(base) == "fake" else None)
    if reason is not None:
        raise Unsupported(f"the layers of {spec.name!r} cannot be read: {reason}")
