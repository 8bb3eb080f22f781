"""Mixtures of adapters by token: against peft's own forward, and in batches with all other kinds of rows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, model_spec, save_adapter, save_tiny_model, say, wrapped_with
from peft import LoraConfig

from coe.engines.base import Adapter, Member
from coe.engines.hf.composed.lora_mix import MOST_QUERY, LoraMix, text_of
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.load import load_model
from coe.engines.hf.lora.gates import build_gate
from coe.engines.hf.lora.gates.settings import MixSettings
from coe.engines.hf.lora.mixture import MixtureSlot, QueryMixture
from coe.engines.hf.lora.token_mixing import layers_of, mixed_by_token
from coe.errors import ConfigError, Unsupported, WeightsError
from coe.types import GenerateRequest
from registry.describe import describe
from registry.errors import SourceError
from registry.spec import ExpertSpec, Kind
from routers.base import Message

IDS = torch.tensor([[5, 60, 70, 80], [9, 61, 71, 81], [5, 60, 70, 80], [7, 62, 72, 82]])


@pytest.fixture
def peft(tiny: Path, tmp_path: Path) -> Any:
    """The tiny model with adapters of other ranks, scales and layers; their weights are random."""
    model = load_model("tiny", tiny, "cpu", torch.float32).model
    both = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    one = LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False, use_rslora=True)
    down = LoraConfig(r=2, lora_alpha=9, target_modules=["down_proj"], init_lora_weights=False)
    return wrapped_with(model, {"both": both, "one": one, "down": down}, tmp_path / "adapters")


def mixture(peft: Any, name: str, members: Sequence[str], **settings: Any) -> MixtureSlot:
    read = MixSettings.read(settings, members, expert=name)
    layers = layers_of(peft.low_rank, members)
    return MixtureSlot(name, tuple(members), build_gate(layers, members, read, None, expert=name))


def logits(peft: Any, slots: Sequence[Any], *mixtures: MixtureSlot, ids: torch.Tensor = IDS, **kwargs: Any) -> Any:
    by_name = {each.name: each for each in mixtures}
    names = list(dict.fromkeys(slot.name if isinstance(slot, QueryMixture) else slot for slot in slots))
    with torch.inference_mode(), peft.disable_adapter(), mixed_by_token(peft.low_rank, names, by_name) as weights:
        weights.select(slots)
        return peft(input_ids=ids[: len(slots)], **kwargs)


def alone(peft: Any, name: str | None, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        if name is None:
            with peft.disable_adapter():
                return peft(input_ids=ids).logits  # type: ignore[no-any-return]
        peft.set_adapter(name)
        return peft(input_ids=ids).logits  # type: ignore[no-any-return]


def test_what_a_mixture_adapts(peft: Any) -> None:
    found = layers_of(peft.low_rank, ["both", "down"])
    assert [(layer.name, layer.depth) for layer in found] == [
        (f"model.layers.{i}.{name}", i / 2)
        for i in range(2)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    assert [[pair is not None for pair in layer.updates] for layer in found[:3]] == [[True, False]] * 2 + [
        [False, True]
    ]
    a, b = found[2].updates[1] or (None, None)
    layer = peft.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert a is not None
    torch.testing.assert_close(b @ a, layer.get_delta_weight("down"))


@pytest.mark.parametrize("name", ["both", "one", "down"])
def test_one_adapter_with_weight_1_is_that_adapter(peft: Any, name: str) -> None:
    mix = mixture(peft, "mix", ["both", "one", "down"], gate="fixed", weights={name: 1.0})
    expected = alone(peft, name, IDS)
    found = logits(peft, [QueryMixture("mix")] * 4, mix).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - alone(peft, None, IDS)).abs().max() > 1e-3


def test_adapters_of_a_tied_head_are_mixed(tokenizer: Any, tmp_path: Path) -> None:
    """The head is the embedding: an adapter of the head changes no embedding."""
    tied = save_tiny_model(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    model = load_model("tied", tied, "cpu", torch.float32).model
    head = LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    plain = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    peft = wrapped_with(model, {"head": head, "plain": plain}, tmp_path / "adapters")
    members = ["head", "plain"]
    for name in members:
        mix = mixture(peft, "mix", members, gate="fixed", weights={name: 1.0})
        found = logits(peft, [QueryMixture("mix")] * 4, mix).logits
        torch.testing.assert_close(found, alone(peft, name, IDS), rtol=1e-4, atol=1e-5)
    assert (alone(peft, "head", IDS) - alone(peft, None, IDS)).abs().max() > 1e-3


def test_weights_of_0_are_the_base_bit_for_bit(peft: Any) -> None:
    mix = mixture(peft, "mix", ["both", "one"], gate="fixed", weights={"one": 0.0})
    assert logits(peft, [QueryMixture("mix")] * 4, mix).logits.equal(alone(peft, None, IDS))


def test_weights_are_those_of_the_sum_of_the_updates(peft: Any) -> None:
    """peft adds the weighed matrices to one adapter of the sum of the ranks (`combination_type="cat"`)."""
    mix = mixture(peft, "mix", ["both", "one"], gate="fixed", weights={"both": 0.7, "one": 0.4})
    found = logits(peft, [QueryMixture("mix")] * 4, mix).logits
    peft.add_weighted_adapter(["both", "one"], [0.7, 0.4], "sum", combination_type="cat")
    torch.testing.assert_close(found, alone(peft, "sum", IDS), rtol=1e-4, atol=1e-4)


def arrow_by_hand(peft: Any, members: Sequence[str], top_k: int, ids: torch.Tensor) -> torch.Tensor:
    """One layer after the other, with dense updates and a loop over the adapters."""
    hooks = []
    for layer in [each for each in peft.modules() if hasattr(each, "lora_A")]:
        updates = {m: layer.get_delta_weight(m) for m in members if m in layer.lora_A}
        if not updates:
            continue

        def add(_: Any, given: Any, output: torch.Tensor, updates: Mapping[str, torch.Tensor] = updates) -> Any:
            h = given[0]
            scores = torch.stack([(h @ torch.linalg.svd(u).Vh[0]).abs() for u in updates.values()], dim=-1)
            best = scores.topk(min(top_k, len(updates)), dim=-1)
            weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(dim=-1))
            parts = [w[..., None] * (h @ u.mT) for w, u in zip(weights.unbind(-1), updates.values(), strict=True)]
            return output + sum(parts)

        hooks.append(layer.base_layer.register_forward_hook(add))
    try:
        with torch.inference_mode():
            return alone(peft, None, ids)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_is_a_loop_over_dense_updates(peft: Any, top_k: int) -> None:
    members = ["both", "one", "down"]
    mix = mixture(peft, "mix", members, gate="arrow", top_k=top_k)
    found = logits(peft, [QueryMixture("mix")] * 4, mix).logits
    torch.testing.assert_close(found, arrow_by_hand(peft, members, top_k, IDS), rtol=1e-3, atol=1e-4)


def test_a_batch_of_mixtures_adapters_and_the_base(peft: Any) -> None:
    first = mixture(peft, "first", ["both", "one"], gate="arrow", top_k=1)
    second = mixture(peft, "second", ["one", "down"], gate="fixed", weights={"down": 0.5, "one": 2.0})
    slots = [QueryMixture("first"), None, QueryMixture("second"), "down"]
    together = logits(peft, slots, first, second).logits
    mixtures = {"first": first, "second": second}
    for i, slot in enumerate(slots):
        row = IDS[i : i + 1]
        single = (
            logits(peft, [slot], mixtures[slot.name], ids=row).logits
            if isinstance(slot, QueryMixture)
            else alone(peft, slot, row)
        )
        torch.testing.assert_close(together[i : i + 1], single, rtol=1e-4, atol=1e-5)
    assert together[1:2].equal(alone(peft, None, IDS[1:2]))


def test_cached_tokens_are_weighed_as_uncached_ones(peft: Any) -> None:
    mix = mixture(peft, "mix", ["both", "one", "down"], gate="arrow")
    slots = [QueryMixture("mix"), "one"]
    whole = logits(peft, slots, mix).logits
    start = logits(peft, slots, mix, ids=IDS[:, :2], use_cache=True)
    rest = logits(peft, slots, mix, ids=IDS[:, 2:], past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_infinite_products_of_adapters_that_a_row_does_not_use_do_no_harm(peft: Any) -> None:
    peft.half()
    for updates in peft.low_rank._updates.values():
        for layer, pair in updates.items():
            updates[layer] = tuple(matrix.half() for matrix in pair)
    for a, _ in peft.low_rank._updates["one"].values():
        a.fill_(60_000)
    mix = mixture(peft, "mix", ["both", "one"], gate="fixed", weights={"both": 1.0})
    assert logits(peft, [QueryMixture("mix")] * 2, mix).logits.isfinite().all()


def test_layers_whose_input_has_no_rows(peft: Any) -> None:
    """Such as those that choose experts by token: (n_rows * n_tokens, n_in)."""
    mix = mixture(peft, "mix", ["both", "one"], gate="fixed", weights={"both": 0.7, "one": 0.4})
    _, module = next(peft.low_rank.layers(["both"]))
    x = torch.randn(3, 5, module.in_features)
    for slots in ([QueryMixture("mix"), None, "one"], [QueryMixture("mix")] * 3):
        names = list(dict.fromkeys(each.name if isinstance(each, QueryMixture) else each for each in slots))
        with torch.inference_mode(), mixed_by_token(peft.low_rank, names, {"mix": mix}) as weights:
            weights.select(slots)
            torch.testing.assert_close(module(x.reshape(15, -1)).reshape(3, 5, -1), module(x))


# In the engine


def composed(expert: Any, adapters: Sequence[Adapter], **settings: Any) -> LoraMix:
    members = {adapter.spec.name: Member(expert, adapter) for adapter in adapters}
    spec = ExpertSpec(
        name="mix", kind=Kind.COMPOSED, architecture="lora-mix", members=tuple(members), settings=settings
    )
    return LoraMix(spec, members, None)


PROMPTS = ("the capital of france is", "of france", "the end of the answer", "paris", "is the capital")


async def test_rows_with_mixtures_join_and_leave_a_batch(expert: HFExpert, adapters: list[Adapter]) -> None:
    """Every answer is that of the request alone, whatever else is in its batch."""
    arrow = composed(expert, adapters[:3], gate="arrow")
    fixed = composed(expert, adapters[1:4], gate="fixed", weights={"a1": 0.5, "a3": 0.7})
    calls: list[tuple[Any, Adapter | None]] = [
        (arrow, None),
        (expert, adapters[0]),
        (fixed, None),
        (expert, None),
        (arrow, None),
    ]
    requests = [
        (each, GenerateRequest(prompt=prompt, max_tokens=3 + 5 * n), adapter)
        for n, prompt in enumerate(PROMPTS)
        for each, adapter in calls
    ]
    expected = [(await say(each, request, adapter)).text for each, request, adapter in requests]

    async def later(n: int, each: Any, request: GenerateRequest, adapter: Adapter | None) -> str:
        await asyncio.sleep(0.002 * n)
        return (await say(each, request, adapter)).text

    said = await asyncio.gather(*(later(n, *request) for n, request in enumerate(requests)))
    assert said == expected
    assert len(set(expected)) >= 15


async def test_one_member_with_weight_1_answers_as_it_does(expert: HFExpert, adapters: list[Adapter]) -> None:
    request = GenerateRequest(prompt=PROMPTS[0], max_tokens=20, logprobs=2)
    mix = await say(composed(expert, adapters[:2], gate="fixed", weights={"a1": 1.0}), request)
    own = await say(expert, request, adapters[1])
    assert (mix.text, mix.reason, mix.usage) == (own.text, own.reason, own.usage)
    assert [t.token for c in mix.chunks for t in c.logprobs] == [t.token for c in own.chunks for t in c.logprobs]
    assert own.text != (await say(expert, request)).text


async def test_stop_sampling_and_cancellation_work_as_for_an_adapter(expert: HFExpert, adapters: list[Adapter]) -> None:
    mix = composed(expert, adapters[:2], gate="arrow")
    whole = (await say(mix, GenerateRequest(prompt=PROMPTS[0], max_tokens=30))).text
    stopped = await say(mix, GenerateRequest(prompt=PROMPTS[0], max_tokens=30, stop=(whole[5:9],)))
    assert (stopped.text, stopped.reason) == (whole[: whole.index(whole[5:9])], "stop")
    seeded = GenerateRequest(prompt=PROMPTS[0], max_tokens=30, temperature=1.0, seed=3)
    assert (await say(mix, seeded)).text == (await say(mix, seeded)).text != whole
    chunks = mix.generate(GenerateRequest(prompt=PROMPTS[0], max_tokens=400))
    await anext(chunks)
    await chunks.aclose()
    assert (await say(mix, GenerateRequest(prompt=PROMPTS[0], max_tokens=30))).text == whole


async def test_an_adapter_that_is_evicted_and_loaded_again_is_mixed_again(tiny: Path, adapters: list[Adapter]) -> None:
    engine = HFEngine(device="cpu", dtype="float32", max_adapters=2)
    expert = await engine.load(model_spec(tiny), tiny)
    assert isinstance(expert, HFExpert)
    mix, request = composed(expert, adapters[:2], gate="arrow"), GenerateRequest(prompt=PROMPTS[0], max_tokens=12)
    before = (await say(mix, request)).text
    for adapter in adapters[2:]:
        await say(expert, request, adapter)
    assert (await say(mix, request)).text == before
    both = await asyncio.gather(say(mix, request), say(expert, request, adapters[3]))  # more adapters than slots
    assert both[0].text == before
    with pytest.raises(WeightsError, match="mixes 3 adapters, and its base keeps at most 2"):
        await say(composed(expert, adapters[:3], gate="arrow"), request)
    await engine.unload(expert)


async def test_the_least_recently_used_mixtures_are_forgotten(
    expert: HFExpert, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coe.engines.hf.lora.mixture_slots.MOST_MIXTURES", 2)
    request = GenerateRequest(prompt=PROMPTS[0], max_tokens=8)
    mixes = [composed(expert, adapters[:2], gate="fixed", weights={"a1": n / 4}) for n in (1, 2, 3, 4)]
    expected = [(await say(mix, request)).text for mix in mixes]
    slots = expert._worker.slots._mixtures
    assert [slots.get(mix._mixture.key()) is not None for mix in mixes] == [False, False, True, True]
    said = await asyncio.gather(*(say(mix, request) for mix in mixes))  # more in one batch than are kept
    assert [each.text for each in said] == expected
    assert len(slots.by_name) >= 2


def test_only_the_start_of_a_query_is_embedded() -> None:
    text = "a" * MOST_QUERY
    assert text_of(GenerateRequest(prompt=text + "b")) == text
    messages = (Message("user", "first"), Message("assistant", "no"), Message("user", text + "b"))
    assert text_of(GenerateRequest(messages=messages)) == text
    assert text_of(GenerateRequest(messages=(Message("user", text),))) == text


async def test_mixtures_too_large_for_a_batch_with_others_run_alone(
    expert: HFExpert, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow, request = composed(expert, adapters[:2], gate="arrow"), GenerateRequest(prompt=PROMPTS[0], max_tokens=12)
    expected = [(await say(arrow, request)).text, (await say(expert, request, adapters[3])).text]
    slots = expert._worker.slots
    names = [slots.acquire(arrow._mixture), slots.acquire(adapters[3]), None]
    assert slots.batches(names) == [[0, 1, 2]]
    most = slots._low_rank.n_bytes([name for name in slots._members("mixture1") if name])
    monkeypatch.setattr("coe.engines.hf.lora.adapters.MOST_MIXTURE_BYTES", most)
    assert slots.batches(names) == [[0], [1, 2]]
    assert not slots.can_join(adapters[3], names[:1])
    said = await asyncio.gather(say(arrow, request), say(expert, request, adapters[3]))
    assert [each.text for each in said] == expected
    monkeypatch.setattr("coe.engines.hf.lora.mixture_slots.MOST_MIXTURE_BYTES", 100)
    with pytest.raises(WeightsError, match="name fewer members"):
        await say(composed(expert, adapters[1:3], gate="arrow"), request)


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "such as DoRA"),
    "tokens": ({"trainable_token_indices": [3]}, "it replaces parameters"),
    "activated": ({"alora_invocation_tokens": [3]}, "aLoRA"),
    "saved": ({"modules_to_save": ["lm_head"]}, "it replaces parameters"),
    "bias": ({"lora_bias": True}, "it has biases"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "which is not a linear layer"),
}


@pytest.mark.parametrize("kind", list(KINDS))
async def test_adapters_that_are_more_than_low_rank_updates_are_refused(
    expert: HFExpert, adapters: list[Adapter], tiny: Path, tmp_path: Path, kind: str
) -> None:
    saved, reason = KINDS[kind]
    folder = save_adapter(tmp_path / kind, tiny, **saved)
    mix = composed(expert, [adapters[0], Adapter(adapter_spec(folder), folder)], gate="arrow")
    request = GenerateRequest(prompt=PROMPTS[0], max_tokens=3)
    with pytest.raises(WeightsError, match=f"adapter '{kind}', a member of 'mix', cannot be mixed .*: .*{reason}"):
        await say(mix, request)
    assert (await say(expert, request, adapters[0])).reason == "length"
    members = (adapters[0].spec, adapter_spec(folder))
    known = {"tiny": model_spec(tiny), **{member.name: member for member in members}}
    drafted = ExpertSpec(
        name="mix", kind=Kind.COMPOSED, architecture="lora-mix", members=tuple(member.name for member in members)
    )
    with pytest.raises(SourceError, match=f"'lora-mix' cannot use the adapter '{kind}': .*{reason}"):
        describe(drafted, experts=known)
    plain = drafted.model_copy(update={"members": (members[0].name, adapters[1].spec.name)})
    assert describe(plain, experts={**known, adapters[1].spec.name: adapters[1].spec}).digest


async def test_members_are_adapters_of_one_base(engine: HFEngine, expert: HFExpert, adapters: list[Adapter]) -> None:
    path = adapters[0].path.parents[1] / "model"
    other = await engine.load(model_spec(path), path)
    spec = ExpertSpec(name="mix", kind=Kind.COMPOSED, architecture="lora-mix", members=("a0", "a1"))
    for members, problem in [
        ({"a0": Member(expert, adapters[0]), "tiny": Member(expert)}, "'tiny' is not an adapter"),
        ({"a0": Member(expert, adapters[0]), "a1": Member(other, adapters[1])}, "'a1' and 'a0' have other bases"),
        ({"a0": Member(expert, adapters[0]), "far": Member(object())}, "'far' is served by object: .*engine: hf"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(Unsupported, match=problem):
            engine.compose(spec, members, None)
    with pytest.raises(Unsupported, match="no composed expert of the architecture 'duet'; it serves: .*lora-mix"):
        engine.compose(spec.model_copy(update={"architecture": "duet"}), {}, None)
    await engine.unload(other)


def test_wrong_settings_are_found_before_anything_is_loaded(engine: HFEngine) -> None:
    def mix(**settings: Any) -> ExpertSpec:
        members = ("a0", "a1")
        return ExpertSpec(name="mix", kind=Kind.COMPOSED, architecture="lora-mix", members=members, settings=settings)

    engine.check_expert(mix(gate="arrow"))
    engine.check_expert(mix(gate="fixed", weights={"a1": 1}))
    engine.check_expert(mix(gate="trained").model_copy(update={"source": "folder"}))
    for settings, problem in [
        ({"gate": "trained"}, "train it with `coe latent train`"),
        ({"gate": "fixed", "weights": {"a2": 1}}, "'a2', which are not among its members"),
        ({"gate": "dart"}, "gate: Input should be"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            engine.check_expert(mix(**settings))


async def test_glider_reads_the_query(expert: HFExpert, adapters: list[Adapter], tmp_path: Path) -> None:
    from coe.engines.hf.composed.lora_mix import embed
    from coe.engines.latent.artifact import Artifact
    from registry.composed import Composed

    members = [adapter.spec.name for adapter in adapters[:2]]
    name = expert._worker.slots.acquire(adapters[0]), expert._worker.slots.acquire(adapters[1])
    settings = MixSettings.read(
        {"gate": "glider", "scale": 1000.0, "top_k": 1, "encoder": "hashing:64"}, members, expert="mix"
    )
    from coe.engines.hf.lora.gates import new_gate

    gate = new_gate(layers_of(expert._worker.slots._low_rank, [str(n) for n in name]), members, settings)
    instructions = torch.from_numpy(embed("hashing:64", ["capital of france", "end of the answer"]))
    stated = settings.model_dump(mode="json", exclude_defaults=True)
    composed = Composed("lora-mix", dict.fromkeys(members, ""), stated)
    Artifact.write(tmp_path, composed, tensors=gate.weights() | {"instructions": instructions}, card="")
    spec = ExpertSpec(
        name="mix",
        kind=Kind.COMPOSED,
        architecture="lora-mix",
        members=tuple(members),
        settings=stated,
        source=str(tmp_path),
    )
    mix = engine_mix(expert, spec, adapters[:2], tmp_path)
    for number, text in enumerate(["capital of france", "end of the answer"]):
        request = GenerateRequest(prompt=text, max_tokens=16)
        assert (await say(mix, request)).text == (await say(expert, request, adapters[number])).text
        assert (await say(mix, request)).text != (await say(expert, request, adapters[1 - number])).text
    other = spec.model_copy(update={"settings": stated | {"encoder": "hashing:32"}})
    with pytest.raises(WeightsError, match="embeddings of 64 numbers, and the encoder 'hashing:32' gives 32"):
        await say(engine_mix(expert, other, adapters[:2], tmp_path), request)


def engine_mix(expert: HFExpert, spec: ExpertSpec, adapters: Sequence[Adapter], path: Path) -> LoraMix:
    return LoraMix(spec, {adapter.spec.name: Member(expert, adapter) for adapter in adapters}, path)
