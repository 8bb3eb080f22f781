"""Signals of a tiny model against its own forward pass; stored for tables, computed for queries."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import make_tokenizer

from coe.config import PolicyConfig
from coe.engines.hf.load import LoadedModel, load_model, require_memory
from coe.errors import ConfigError, OutOfMemory
from coe.local import build_policies
from coe.routing import Routed, route
from coe.signals.features import Filled, Signals
from coe.signals.hidden import MAX_TOKENS, SignalReader
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.artifacts import save
from routers.base import Estimate, Query
from routers.encoders.build import HashingEncoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

TEXTS = ["the capital of france is paris", "", "é\ud83d", "the end of the answer " * 200, "the"]
SPECS = [
    ExpertSpec(name="fake", kind=Kind.MODEL, source="fake://echo"),
    ExpertSpec(name="away", kind=Kind.REMOTE, source="https://host/v1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer, path = make_tokenizer(), tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Snapshot:
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    tiny = ExpertSpec(name="tiny", kind=Kind.MODEL, source=str(folder), version=1)
    return Snapshot(1, {spec.name: spec for spec in [tiny, *SPECS]})


class Counting(SignalReader):
    read_texts = 0

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec, find=lambda spec: Path(spec.source), device="cpu")

    def read(self, texts: Any) -> Any:
        Counting.read_texts += len(texts)
        return super().read(texts)


@pytest.fixture
def signals(snapshot: Snapshot) -> Signals:
    Counting.read_texts = 0
    return Signals(snapshot, readers=Counting)


def table(prompts: list[str]) -> OutcomeTable:
    scores = np.tile([[1.0, 0.0], [0.0, 1.0]], (len(prompts), 1))[: len(prompts)]
    return OutcomeTable(tuple(map(str, range(len(prompts)))), tuple(prompts), ("fake", "away"), scores)


def by_hand(loaded: LoadedModel, text: str) -> tuple[Any, Any]:
    import torch

    ids = torch.tensor([loaded.tokenizer(text)["input_ids"][:MAX_TOKENS]])
    with torch.inference_mode():
        out = loaded.model(ids, output_hidden_states=True)
    log_p = out.logits[0].log_softmax(-1).double().numpy()
    hidden = np.concatenate([out.hidden_states[i][0, -1].numpy() for i in (2, 4)])
    tokens, last = ids[0].numpy(), log_p[-1]
    likelihood = np.mean([log_p[i, tokens[i + 1]] for i in range(len(tokens) - 1)])
    return hidden, [-(np.exp(last) * last).sum(), np.exp(last.max()), likelihood, np.log(len(tokens))]


def test_signals_are_those_of_the_models_own_forward_pass(signals: Signals, folder: Path) -> None:
    import torch

    names = ["hidden/tiny", "uncertainty/tiny"]
    filled = signals.fill([Query.of(text) for text in TEXTS], names)
    loaded = load_model("tiny", folder, "cpu", torch.float32)
    for i in (0, 3):
        hidden, uncertainty = by_hand(loaded, TEXTS[i])
        assert filled[i].features["hidden/tiny"] == pytest.approx(hidden, abs=1e-5)
        assert filled[i].features["uncertainty/tiny"] == pytest.approx(uncertainty, abs=1e-4)
    assert filled[3].features["uncertainty/tiny"][3] == pytest.approx(np.log(MAX_TOKENS))
    assert all(np.isfinite(query.features[name]).all() for query in filled for name in names)
    for query, alone in zip(filled, [signals.fill([Query.of(text)], names)[0] for text in TEXTS], strict=True):
        assert query.features["hidden/tiny"] == pytest.approx(alone.features["hidden/tiny"], abs=1e-5)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    signals: Signals, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_bytes = (folder / "model.safetensors").stat().st_size
    for n_free, fits in ((2 * n_bytes - 1, False), (2 * n_bytes, True)):  # files may hold two bytes a weight
        free = partial(require_memory, free=lambda device, n=n_free: n)
        monkeypatch.setattr("coe.latent.loading.require_memory", free)
        with nullcontext() if fits else pytest.raises(OutOfMemory, match="'tiny' needs .* on cpu"):
            signals.fill([Query.of("the")], ["hidden/tiny"])


def test_a_tables_signals_are_read_once_and_an_interrupted_run_goes_on(signals: Signals, snapshot: Snapshot) -> None:
    prompts, seen = [f"the answer {i}" for i in range(100)], []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        signals.add_features(table(prompts), ["hidden/tiny"], on_progress=stop)
    assert seen == [(64, 100)] and Counting.read_texts == 64
    whole = signals.add_features(table(prompts), ["hidden/tiny", "uncertainty/tiny"])
    assert Counting.read_texts == 100
    assert (whole.features["hidden/tiny"].shape, whole.features["uncertainty/tiny"].shape) == ((100, 32), (100, 4))
    again = Signals(snapshot, readers=Counting).add_features(table(prompts[::-1]), ["hidden/tiny"])
    assert Counting.read_texts == 100
    assert np.array_equal(again.features["hidden/tiny"][::-1], whole.features["hidden/tiny"])
    live = signals.fill(whole.queries()[:1], ["hidden/tiny"])[0]
    assert live.features["hidden/tiny"] == pytest.approx(whole.features["hidden/tiny"][0], abs=1e-5)


@dataclass
class ByLength:
    """Chooses `away` for prompts with many tokens, which its signal counts."""

    requires: frozenset[str] = frozenset({"uncertainty/tiny"})

    def estimate(self, queries: Any) -> Estimate:
        long = np.array([query.features["uncertainty/tiny"][3] > np.log(10) for query in queries], dtype=float)
        return Estimate(("fake", "away"), np.stack([1 - long, long], axis=1))


def test_routing_fills_what_the_router_requires(signals: Signals, snapshot: Snapshot) -> None:
    from coe.policy import Policy

    policy = Policy("default", Filled(ByLength(), signals))
    routed = route([Query.of("the"), Query.of("the end of the answer " * 9)], policy, snapshot, {})
    assert [r.decision.experts for r in routed if isinstance(r, Routed)] == [("fake",), ("away",)]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("length", "no feature 'length': there are hidden/<expert> and uncertainty/<expert>"),
        ("hidden/", "no feature 'hidden/'"),
        ("hidden/tinny", "feature 'hidden/tinny': .*did you mean 'tiny'"),
        ("hidden/fake", "'fake' is not a model with local weights"),
        ("uncertainty/away", "'away' is not a model with local weights"),
    ],
)
def test_what_no_expert_can_give_is_refused(signals: Signals, name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        signals.check({name})


def test_a_policy_loads_a_router_with_signals_and_refuses_what_cannot_be_provided(
    signals: Signals, snapshot: Snapshot, tmp_path: Path
) -> None:
    encoder = HashingEncoder(32)
    trained = signals.add_features(table([f"the {'answer ' * (i % 7)}{i}" for i in range(60)]), ["uncertainty/tiny"])
    router = build("quality", encoder, {"signals": ["uncertainty/tiny"]}).fit(trained)
    save(router, tmp_path / "router", table=trained, encoder=encoder)
    config = {"default": PolicyConfig(router=tmp_path / "router")}
    policy = build_policies(config, snapshot)["default"]
    assert isinstance(policy.router, Filled) and policy.router.router.requires == {"uncertainty/tiny"}
    without = Snapshot(2, {spec.name: spec for spec in SPECS})
    with pytest.raises(
        ConfigError, match="router of policy 'default' requires an unavailable feature: .*uncertainty/tiny"
    ):
        build_policies(config, without)


def test_router_train_reads_what_the_kind_requires(snapshot: Snapshot, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from coe.cli.router.app import app
    from registry.documents import load_document
    from registry.reconcile import apply, plan
    from registry.store import Registry
    from routers.artifacts import load

    tiny = tmp_path / "experts.yaml"
    tiny.write_text(f"experts: [{{name: tiny, kind: model, source: {snapshot.experts['tiny'].source}}}]\n")
    with Registry(None) as store:
        apply(plan(load_document(tiny), store), store)
    planted = table([f"the {'answer ' * (i % 7)}{i}" for i in range(60)])
    planted.write(tmp_path / "table.parquet")
    arguments = (
        f"train --outcomes {tmp_path}/table.parquet --kind quality --out {tmp_path}/r --encoder hashing:32".split()
    )
    arguments += ["--set", 'signals=["uncertainty/tiny"]']
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "r").router.requires == {"uncertainty/tiny"}
