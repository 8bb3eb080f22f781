"""Own signals of a small expert: what a model that is hosted anyway thinks of a prompt, as features for routers.

    hidden/<expert>        (2 h,) hidden states of the prompt's last token, in the middle and in the last layer
    uncertainty/<expert>   (4,) of the next token: entropy in nats, probability of the likeliest; of the prompt: mean
                           log-likelihood of its tokens, log of their number

A router asks for them by name (`Router.requires`). `Signals.add_features` puts them beside a table, for training and
evaluation, and keeps them on disk; `Filled` puts them into queries as they come. The model is loaded beside the router,
as its encoder is, with the loader of the hf engine, in float32: so that a prompt has the same signals alone and in a
batch, to rounding. Prompts are read raw, without a chat template, up to `MAX_TOKENS`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coe.catalog import locate
from coe.engines import engine_kind
from coe.engines.hf_load import LoadedModel, choose_device, choose_dtype, load_model, require_memory, translate
from coe.errors import ConfigError, EngineError
from registry.errors import UnknownExpert
from registry.files import coe_home
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Estimate, Query, Router
from routers.embedding_store import EmbeddingStore
from routers.outcomes import OutcomeTable

HIDDEN, UNCERTAINTY = "hidden", "uncertainty"
MAX_TOKENS: Final = 256
"""Of a prompt; what follows is not read."""
_FORMAT: Final = 1
_N_UNCERTAINTY: Final = 4
_TOKENS_AT_ONCE: Final = 1024
_STORED_AT_ONCE: Final = 64
_DTYPE: Final = "float32"

Vectors = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (prompts read, prompts in all)."""


class SignalReader:
    """The model of one expert, loaded when it is first read with; safe to share between threads.

    Args:
        spec: of kind `model`.
        find: folder of its verified files; may block.
        device: as for the hf engine.
    """

    def __init__(self, spec: ExpertSpec, *, find: Callable[[ExpertSpec], Path] = locate, device: str = "auto") -> None:
        self.spec = spec
        self._find, self._device = find, device
        self._lock = threading.Lock()
        self._loaded: LoadedModel | None = None

    def read(self, texts: Sequence[str]) -> Vectors:
        """(n, 2 h + 4) of n texts: hidden states, then uncertainty.

        Raises:
            WeightsError, OutOfMemory: the model cannot be loaded. EngineError: it failed.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            with translate(f"{self.spec.name!r} failed while reading prompts", EngineError):
                return _read(self._loaded, texts)

    def store(self) -> EmbeddingStore:
        """Where the signals of tables are kept, by the model's digest."""
        key = f"signals-{_FORMAT} {self.spec.digest or self.spec.ref} {MAX_TOKENS} {_DTYPE}"
        return EmbeddingStore(coe_home() / "signals" / f"{hashlib.sha256(key.encode()).hexdigest()}.sqlite")

    def _load(self) -> LoadedModel:
        device, path = choose_device(self._device), self._find(self.spec)
        needed = sum(file.stat().st_size for file in path.glob("*.safetensors")) * 2  # files hold two bytes a weight
        require_memory(self.spec.name, needed, device)
        return load_model(self.spec.name, path, device, choose_dtype(_DTYPE, device))


class Signals:
    """The signals that experts of a snapshot can give.

    Args:
        readers: makes the reader of an expert.
    """

    def __init__(self, snapshot: Snapshot, *, readers: Callable[[ExpertSpec], SignalReader] = SignalReader) -> None:
        self._snapshot, self._make = snapshot, readers
        self._readers: dict[str, SignalReader] = {}

    def check(self, names: Collection[str]) -> None:
        """Raises ConfigError for a name that is no signal, or whose expert is not there or has no weights here."""
        for name in sorted(names):
            kind, _, expert = name.partition("/")
            if kind not in (HIDDEN, UNCERTAINTY) or not expert:
                raise ConfigError(
                    f"no feature {name!r}: there are {HIDDEN}/<expert> and {UNCERTAINTY}/<expert> of registered models"
                )
            if expert not in self._snapshot:
                raise ConfigError(f"feature {name!r}: {UnknownExpert(expert, self._snapshot.experts)}")
            spec = self._snapshot.experts[expert]
            if spec.kind is not Kind.MODEL or engine_kind(spec) != "hf":
                raise ConfigError(f"feature {name!r}: {expert!r} is no model with weights that are read here")

    def add_features(
        self, table: OutcomeTable, names: Collection[str], *, on_progress: Progress | None = None
    ) -> OutcomeTable:
        """The table with those features beside it. What was read is on disk: an interrupted run goes on where it was.

        Raises:
            ConfigError: see `check`. WeightsError, OutOfMemory, EngineError: see `SignalReader.read`.
        """
        self.check(names)
        rows = {expert: self._stored(expert, table.prompts, on_progress) for expert in _experts(names)}
        return replace(table, features={**table.features, **{name: _part(name, rows) for name in names}})

    def fill(self, queries: Sequence[Query], names: Collection[str]) -> list[Query]:
        """The n queries with those features, all read afresh."""
        self.check(names)
        texts = [query.text for query in queries]
        rows = {expert: self._reader(expert).read(texts) for expert in _experts(names)}
        parts = {name: _part(name, rows) for name in names}
        return [
            replace(query, features={**query.features, **{name: part[i] for name, part in parts.items()}})
            for i, query in enumerate(queries)
        ]

    def _reader(self, expert: str) -> SignalReader:
        if expert not in self._readers:
            self._readers[expert] = self._make(self._snapshot.experts[expert])
        return self._readers[expert]

    def _stored(self, expert: str, texts: Sequence[str], on_progress: Progress | None) -> Vectors:
        """(n, 2 h + 4), read where they are not known yet."""
        reader = self._reader(expert)
        store, keys = reader.store(), [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        known = store.get(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        todo = sorted(missing, key=lambda key: -len(missing[key]))  # texts of like length share a batch
        for start in range(0, len(todo), _STORED_AT_ONCE):
            some = todo[start : start + _STORED_AT_ONCE]
            fresh = dict(zip(some, reader.read([missing[key] for key in some]), strict=True))
            store.put(fresh)
            known |= fresh
            if on_progress is not None:
                on_progress(min(start + _STORED_AT_ONCE, len(todo)), len(todo))
        return np.stack([known[key] for key in keys])


@dataclass(slots=True)
class Filled:
    """A router whose features are filled in as its queries come: to everybody else it needs none."""

    router: Router
    signals: Signals
    requires: frozenset[str] = frozenset()

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The router's estimate of the n queries, with the features that it requires."""
        return self.router.estimate(self.signals.fill(queries, self.router.requires))


def _experts(names: Collection[str]) -> list[str]:
    return sorted({name.partition("/")[2] for name in names})


def _part(name: str, rows: dict[str, Vectors]) -> Vectors:
    """The columns of a feature."""
    kind, _, expert = name.partition("/")
    return rows[expert][:, :-_N_UNCERTAINTY] if kind == HIDDEN else rows[expert][:, -_N_UNCERTAINTY:]


def _read(loaded: LoadedModel, texts: Sequence[str]) -> Vectors:
    import torch

    ids = [_tokens(loaded, text) for text in texts]
    signals = np.empty((len(texts), 2 * loaded.model.config.get_text_config().hidden_size + _N_UNCERTAINTY), np.float32)
    with torch.inference_mode():
        for rows in _batches(ids):
            for row, values in zip(rows, _read_batch(loaded.model, [ids[row] for row in rows]), strict=True):
                signals[row] = values
    return signals


def _tokens(loaded: LoadedModel, text: str) -> list[int]:
    valid = text.encode("utf-8", "replace").decode("utf-8")  # JSON may carry lone surrogates
    ids: list[int] = loaded.tokenizer(valid, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return ids or [min(loaded.eos, default=0)]  # something must be read


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Rows of like length, of at most `_TOKENS_AT_ONCE` tokens with their padding."""
    order, start = sorted(range(len(ids)), key=lambda row: -len(ids[row])), 0
    while start < len(order):
        rows = order[start : start + max(1, _TOKENS_AT_ONCE // len(ids[order[start]]))]
        yield rows
        start += len(rows)


def _read_batch(model: Any, ids: Sequence[Sequence[int]]) -> Iterator[Vectors]:
    """(2 h + 4,) of each row, padded on the right, where a causal model does not look."""
    import torch

    width = max(map(len, ids))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=model.device)
    states = model.base_model(
        input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    for row, length in enumerate(map(len, ids)):
        middle, last = states[len(states) // 2][row, length - 1], states[-1][row, :length]
        uncertainty = _uncertainty(_log_probabilities(model, last), tokens[row, :length])
        yield torch.cat([middle, last[-1], uncertainty]).float().cpu().numpy()


def _log_probabilities(model: Any, states: Any) -> Any:
    """(tokens, vocabulary) of the token after each position."""
    import torch

    logits = model.get_output_embeddings()(states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)


def _uncertainty(log_p: Any, tokens: Any) -> Any:
    import torch

    last, count = log_p[-1], len(tokens)
    likelihood = log_p[:-1].gather(1, tokens[1:, None]).mean() if count > 1 else last.new_zeros(())
    entropy = -(last.exp() * last).sum()
    return torch.stack([entropy, last.max().exp(), likelihood, last.new_tensor(count).log()])
