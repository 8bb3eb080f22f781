"""A Mixture of Thoughts that is served: peers read the answer of the primary while it is written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, make_tokenizer, model_spec, save_adapter, say
from latent_models import save_tiny
from other_tokenizer import make_piece_tokenizer
from safetensors.torch import load_file, save_file
from test_engine_hf_admission import joins, running

from coe.engines.base import Adapter, Member
from coe.engines.fake import FakeEngine
from coe.engines.hf import together
from coe.engines.hf.composed.mot import Mot, _Spans
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.together import ReadingPeer
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.growing_text import GrowingText
from coe.engines.latent.memory import Memories, Memory, PeerStates
from coe.engines.latent.mot import MotInteractions, documents
from coe.engines.latent.shape import InteractionShape, deep_layers, same_layers
from coe.errors import ConfigError, ContextLengthExceeded, EngineError, InvalidRequest, Unsupported, WeightsError
from coe.types import GenerateRequest
from registry.composed import Composed
from registry.digest import identity
from registry.spec import ExpertSpec, Kind
from routers.base import Message

__all__ = ["joins"]
PROMPTS = ("the capital of france", "paris is the end 😀", "of the answer")
NAMES = ("first", "second", "third")
N_TOKENS = 24


def ask(text: str = PROMPTS[0], **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), **{"max_tokens": N_TOKENS, **fields})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of other architectures and tokenizers, and an adapter of the first one."""
    root = tmp_path_factory.mktemp("mot")
    first = save_tiny(root / "first", "LlamaForCausalLM", make_tokenizer())
    third = save_tiny(root / "third", "Gemma3ForCausalLM", make_piece_tokenizer(), seed=1, hidden_size=24)
    weights = load_file(third / "model.safetensors")
    weights["lm_head.weight"][4:260] = 0.0  # no single bytes: the text of wrong ones depends on where a stream is cut
    save_file(weights, third / "model.safetensors", {"format": "pt"})
    return {"first": first, "second": save_adapter(root / "second", first), "third": third}


@pytest.fixture
async def members(folders: dict[str, Path], engine: HFEngine) -> AsyncIterator[dict[str, Member]]:
    models = {}
    for name in ("first", "third"):
        models[name] = await engine.load(model_spec(folders[name]).model_copy(update={"name": name}), folders[name])
    spec = adapter_spec(folders["second"]).model_copy(update={"base": "first"})
    yield {
        "first": Member(models["first"]),
        "second": Member(models["first"], Adapter(spec, folders["second"])),
        "third": Member(models["third"]),
    }
    for model in models.values():
        await engine.unload(model)


def expert_of(member: Member) -> HFExpert:
    assert isinstance(member.expert, HFExpert)
    return member.expert


def decoder_of(member: Member) -> Decoder:
    return Decoder.of(expert_of(member).loaded.model)


def trained(
    members: Mapping[str, Member], *, layers: str, scale: float
) -> tuple[MotInteractions, dict[str, list[int]]]:
    """Random interactions of every primary, whose output matrices are `scale` times random."""
    widths = {name: decoder_of(member).width for name, member in members.items()}
    shapes, read = {}, {}
    for name, member in members.items():
        n_layers = decoder_of(member).n_layers
        read[name] = list(same_layers(n_layers, 2) if layers == "same" else deep_layers(n_layers, 2))
        shapes[name] = InteractionShape(
            width=widths[name],
            n_layers=n_layers,
            peers={other: width for other, width in widths.items() if other != name},
            shared_width=16,
            heads=4,
            interactions=2,
            depths=2,
            layers=layers,  # type: ignore[arg-type]
        )
    made = MotInteractions(tuple(members), shapes, seed=5)
    torch.manual_seed(4)
    for name, parameter in made.named_parameters():
        if name.endswith(".output"):
            parameter.data = scale * torch.randn_like(parameter)
    return made, read


def write(
    folder: Path, members: Mapping[str, Member], *, form: str = "same", scale: float = 0.4, **settings: Any
) -> Path:
    made, read = trained(members, layers=form, scale=scale)
    specs = [expert_of(member).spec for member in members.values()]
    specs += [member.adapter.spec for member in members.values() if member.adapter]
    experts = {spec.name: spec for spec in specs}
    stated = {"reads": "together", "router": "first", "k": len(members), "layers": read}
    stated |= {"primaries": documents(made.shapes)} | settings
    identities = {name: identity(experts[name], experts) for name in members}
    Artifact.write(folder, Composed("mot", identities, stated), tensors=made.tensors(), card="# card")
    return folder


def spec(members: Mapping[str, Member], path: Path) -> ExpertSpec:
    names = tuple(members)
    return ExpertSpec(name="mot", kind=Kind.COMPOSED, architecture="mot", members=names, source=str(path))


def mot(members: Mapping[str, Member], path: Path) -> Any:
    return Mot(spec(members, path), members, path)


def ordered(members: Mapping[str, Member], *names: str) -> dict[str, Member]:
    return {name: members[name] for name in names}


# Without an effect


@pytest.mark.parametrize("order", [("first", "second", "third"), ("third", "first"), ("second", "third")])
async def test_with_zero_output_matrices_it_is_the_bare_primary(
    members: dict[str, Member], tmp_path: Path, order: tuple[str, ...]
) -> None:
    """Whatever the request: text, log-probabilities, stop strings, seeds, formats, raw prompts."""
    chosen = ordered(members, *order)
    both, bare = mot(chosen, write(tmp_path / "mot", chosen, scale=0.0)), chosen[order[0]]
    for request in (
        ask(logprobs=2),
        ask(PROMPTS[1], stop=("e",)),
        ask(temperature=1.0, seed=3, logprobs=0),
        ask(max_tokens=1),
        ask(PROMPTS[2] * 30, max_tokens=40),
        GenerateRequest(prompt="the end", max_tokens=9, echo=True),
        GenerateRequest(prompt="the end", max_tokens=0, echo=True),
    ):
        alone, said = await say(expert_of(bare), request, bare.adapter), await say(both, request)
        assert said.reason == alone.reason
        if not request.temperature:  # what is drawn has wrong bytes, whose text depends on where the stream is cut
            assert said.text == alone.text
        ours, theirs = ([entry for c in each.chunks for entry in c.logprobs] for each in (said, alone))
        assert [entry.token for entry in ours] == [entry.token for entry in theirs]
        torch.testing.assert_close([e.logprob for e in ours], [e.logprob for e in theirs], rtol=1e-4, atol=1e-5)


async def test_scores_are_bit_for_bit_those_of_the_bare_primary(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ordered(members, "first", "third")
    both = mot(chosen, write(tmp_path / "mot", chosen, scale=0.0))
    scores: list[torch.Tensor] = []
    advance = together.Decoding.advance

    def seen(self: Any) -> None:
        scores.append(self.scores.clone())
        advance(self)

    monkeypatch.setattr("coe.engines.hf.decoding.Decoding.advance", seen)
    await say(both, ask())
    ours = scores.copy()
    scores.clear()
    await say(expert_of(chosen["first"]), ask())
    assert len(ours) == len(scores) == N_TOKENS
    assert all(torch.equal(a, b) for a, b in zip(ours, scores, strict=True))


# Against a forward of everything for each token


def states(member: Member, ids: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
    """(J, n, d) of all tokens, on the worker thread, without a cache."""

    def read(model: Any) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        with ExitStack() as stack:
            for layer in layers:
                keep = (
                    Decoder.of(model)
                    .at(layer)
                    .register_forward_hook(lambda _m, _i, out, n=layer: found.update({n: out}))
                )
                stack.callback(keep.remove)
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        return torch.stack([found[layer][0] for layer in layers])

    return expert_of(member).run(read, [member.adapter]).result(60)


async def uncached(
    members: Mapping[str, Member], made: MotInteractions, layers: Mapping[str, Sequence[int]], request: GenerateRequest
) -> str:
    """The answer, each token of it from whole forwards of all members."""
    primary, *peers = members
    own = made.of(primary)
    seen = {name: _Spans(m.adapter) for name, m in members.items()}
    rows = {n: await expert_of(m).prepare(request, m.adapter, reading=seen[n]) for n, m in members.items()}
    assert all(span != (-1, -1) for span in seen[primary].spans[5:8])
    tokenizers = {name: expert_of(m).loaded.tokenizer for name, m in members.items()}
    n_user, growing = len(request.messages[-1].content), GrowingText(tokenizers[primary])
    answer: list[int] = []
    spans = list(seen[primary].spans)
    memories: list[Memory] = []  # of the prompt, then after each token of the answer

    def notes(text: str) -> Memory:
        parts = {}
        for name in peers:
            ids = tokenizers[name](text, add_special_tokens=False)["input_ids"]
            ends = GrowingText(tokenizers[name])
            for token in ids:
                ends.push(token)
            of_answer = [(n_user + a, n_user + b) for a, b in ends.spans()]
            both = torch.tensor([*seen[name].spans, *of_answer])
            parts[name] = PeerStates(states(members[name], [*rows[name].prompt_ids, *ids], layers[name]), spans=both)
        return own.memory(parts)

    def scores(model: Any) -> torch.Tensor:
        def add(q: int, hidden: torch.Tensor) -> torch.Tensor:
            n_prompt, updates = len(rows[primary].prompt_ids), []
            for p in range(hidden.shape[1]):
                memory = Memories.stacked([memories[max(0, p - n_prompt + 1)]])
                assert memory is not None
                updates.append(own.read(q, hidden[:, p : p + 1], memory, spans=torch.tensor([[spans[p]]])))
            return hidden + torch.cat(updates, 1)

        with ExitStack() as stack:
            for q, layer in enumerate(own.where()):
                hook = Decoder.of(model).at(layer).register_forward_hook(lambda _m, _i, out, q=q: add(q, out))
                stack.callback(hook.remove)
            ids = torch.tensor([[*rows[primary].prompt_ids, *answer]])
            return model(input_ids=ids, use_cache=False).logits[0, -1]  # type: ignore[no-any-return]

    with torch.inference_mode():
        memories.append(notes(""))
        while len(answer) < N_TOKENS:
            logits = expert_of(members[primary]).run(scores, [members[primary].adapter]).result(60)
            answer.append(int(logits.argmax()))
            growing.push(answer[-1])
            spans += [(n_user + a, n_user + b) for a, b in growing.spans(-1)]
            memories.append(notes(growing.text))
    text: str = tokenizers[primary].decode(answer, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("layers", ["same", "deep"])
@pytest.mark.parametrize("order", [("first", "third"), ("third", "second"), ("first", "second", "third")])
async def test_cached_steps_answer_as_forwards_of_everything(
    members: dict[str, Member],
    tmp_path: Path,
    order: tuple[str, ...],
    layers: str,
) -> None:
    chosen = ordered(members, *order)
    made, read = trained(chosen, layers=layers, scale=0.4)
    served = mot(chosen, write(tmp_path / "mot", chosen, form=layers))
    bare = (await say(expert_of(chosen[order[0]]), ask(), chosen[order[0]].adapter)).text
    texts = []
    for prompt in PROMPTS[:2]:
        said = await say(served, ask(prompt))
        assert said.text == await uncached(chosen, made, read, ask(prompt))
        texts.append(said.text)
    assert texts[0] != bare  # the notes have an effect
    assert texts[0] != texts[1]


# Growing texts


@pytest.mark.parametrize("name", ["first", "second", "third"])
async def test_a_longer_text_may_have_other_last_tokens(members: dict[str, Member], name: str) -> None:
    """Tokens that changed are dropped with their states: notes are those of the text, also of a shorter one."""
    member, other = members[name], "third" if name != "third" else "first"
    made, read = trained(ordered(members, name, other), layers="deep", scale=1.0)
    interactions, expert = made.of(other), expert_of(member)
    texts = ("", "t", "th", "the", "the ", "the e", "the en", "the end is", "the e", "", "paris 😀", "paris 😀\u0301")
    dropped, drop = [], ReadingPeer._drop

    def counted(self: ReadingPeer, n_kept: int) -> None:
        dropped.append(self.n_tokens - n_kept)
        drop(self, n_kept)

    row = await expert.prepare(ask(), member.adapter)
    prompt = together.Prompt(row, [(-1, -1)] * len(row.prompt_ids))
    peer = ReadingPeer(_member(name, member), prompt, read[name], interactions, n_user=21)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadingPeer, "_drop", counted)
        await peer.begin()
        for text in texts:
            await peer.read(text)
            ids = expert.loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert peer.n_tokens == len(ids)
            whole = states(member, [*row.prompt_ids, *ids], read[name])
            with torch.inference_mode():
                expected = interactions.memory({name: PeerStates(whole)})
            assert_same_notes(peer.memory, expected)
    assert any(dropped[1:8]) and sum(dropped) > 5


def assert_same_notes(a: Memory, b: Memory) -> None:
    """The same notes; their order means nothing."""
    assert len(a) == len(b)
    for keys, values, keys_b, values_b in zip(a.keys, a.values, b.keys, b.values, strict=True):
        ours, theirs = (torch.cat([k.flatten(1), v.flatten(1)], 1) for k, v in ((keys, values), (keys_b, values_b)))
        distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
        assert distances.min(0).values.max() < 2e-3 and distances.min(1).values.max() < 2e-3


def _member(name: str, member: Member) -> Any:
    from coe.engines.hf.members import HFMember

    return HFMember(name, expert_of(member), member.adapter)


# Side by side


async def test_requests_side_by_side_answer_as_each_alone(
    members: dict[str, Member], tmp_path: Path, joins: list[int]
) -> None:
    served, first = mot(members, write(tmp_path / "mot", members)), expert_of(members["first"])
    alone = [(await say(served, ask(prompt))).text for prompt in PROMPTS]
    plain = (await say(first, ask(max_tokens=60))).text
    async with running(first) as task:
        *said, beside = await asyncio.gather(
            *(say(served, ask(prompt)) for prompt in PROMPTS), say(first, ask(max_tokens=60))
        )
        assert not task.done()
    assert [each.text for each in said] == alone
    assert beside.text == plain
    assert len(set(alone)) == len(PROMPTS)


async def test_closing_the_answer_ends_its_steps(members: dict[str, Member], tmp_path: Path) -> None:
    chunks = mot(members, write(tmp_path / "mot", members)).generate(ask(max_tokens=200))
    await anext(chunks)
    await chunks.aclose()
    for name in ("first", "third"):
        assert not expert_of(members[name])._waiting._jobs
        assert (await say(expert_of(members[name]), ask())).text


# Peers that are missing


def failing(monkeypatch: pytest.MonkeyPatch, name: str, after: int, error: Exception) -> None:
    read = ReadingPeer._follow

    def follow(self: ReadingPeer, model: Any, *, text: str) -> None:
        if self.name == name and len(text) > after:
            raise error
        read(self, model, text=text)

    monkeypatch.setattr(ReadingPeer, "_follow", follow)


async def test_a_peer_that_fails_is_left_out_and_named(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mot", members)
    whole = await say(mot(members, path), ask())
    assert whole.chunks[-1].notes == ("first answers, and reads second, third",)
    failing(monkeypatch, "third", -1, WeightsError("the secret path"))
    said = await say(mot(members, path), ask())
    assert said.chunks[-1].notes == ("first answers, and reads second, third", "third was left out: it failed")
    assert said.usage is not None and said.usage.completion_tokens < whole.usage.completion_tokens  # type: ignore[union-attr]
    failing(monkeypatch, "second", 5, EngineError("later"))
    later = await say(mot(members, path), ask())
    assert [note for note in later.chunks[-1].notes if note.startswith("second")] == ["second was left out: later"]
    assert whole.text != said.text


async def test_without_any_peer_the_bare_primary_answers(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: ReadingPeer) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(ReadingPeer, "begin", refuse)
    said = await say(mot(members, write(tmp_path / "mot", members)), ask())
    assert said.text == (await say(expert_of(members["first"]), ask())).text
    assert [note.split()[0] for note in said.chunks[-1].notes] == ["first", "second", "third"]


async def test_a_peer_whose_context_is_too_short_is_left_out(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ordered(members, "first", "third")
    served, peer = mot(chosen, write(tmp_path / "mot", chosen)), expert_of(members["third"])
    monkeypatch.setattr(peer, "context_length", 30)
    notes = (await say(served, ask())).chunks[-1].notes
    assert notes[0] == "first answers alone" and "third was left out" in notes[1] and "30" in notes[1]
    n_prompt = len((await peer.prepare(ask(max_tokens=1))).prompt_ids)
    monkeypatch.setattr(peer, "context_length", n_prompt + N_TOKENS)  # its answer has more tokens than the primary's
    notes = (await say(served, ask())).chunks[-1].notes
    assert notes[0] == "first answers, and reads third" and "third was left out" in notes[1]


async def test_a_slow_peer_is_left_out(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ordered(members, "first", "third")
    served = mot(chosen, write(tmp_path / "mot", chosen))
    init: Callable[..., None] = together.Together.__init__

    def hasty(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs, deadline_s=0.2)

    async def wait(self: ReadingPeer, text: str) -> None:
        await asyncio.sleep(30)

    monkeypatch.setattr(together.Together, "__init__", hasty)
    monkeypatch.setattr(ReadingPeer, "read", wait)
    async with asyncio.timeout(20):
        notes = (await say(served, ask())).chunks[-1].notes
    assert notes[1] == "third was left out: 'third' took longer than 0.2 s for a step"


# Refusals


async def test_what_does_not_fit_the_members_is_refused(
    members: dict[str, Member], tmp_path: Path, engine: HFEngine
) -> None:
    path = write(tmp_path / "mot", members)
    with pytest.raises(WeightsError, match="trained with the members first, second, third, in this order"):
        await say(mot(ordered(members, "second", "first", "third"), path), ask())
    with pytest.raises(WeightsError, match="needs `source`"):
        Mot(spec(members, path), members, None)
    with pytest.raises(ConfigError, match="k, the number of active members, is 4; it is 1 to 3"):
        await say(mot(members, write(tmp_path / "k", members, k=4)), ask())
    for layers in ([1, 9], [1], ["a", "b"], None):
        wrong = write(tmp_path / "layers", members, layers={"first": [1, 2], "second": [1, 2], "third": layers})
        with pytest.raises(WeightsError, match=r"states for 'third' `layers`.*numbers from 1 to 4 are needed"):
            await say(mot(members, wrong), ask())
    fake = await FakeEngine().load(ExpertSpec(name="f", kind=Kind.MODEL, source="fake://echo"), tmp_path)
    with pytest.raises(Unsupported, match="'third' is served by FakeExpert"):
        mot({**members, "third": Member(fake)}, path)


async def test_members_of_other_contents_are_refused_by_name(members: dict[str, Member], tmp_path: Path) -> None:
    path = write(tmp_path / "mot", members)
    second = members["second"].adapter
    assert second is not None
    changed = Adapter(second.spec.model_copy(update={"digest": "sha256:other"}), second.path)
    with pytest.raises(WeightsError, match="'second' was trained with as .* and is now sha256:other on"):
        await say(mot({**members, "second": Member(members["second"].expert, changed)}, path), ask())


async def test_requests_that_it_cannot_answer_are_refused(members: dict[str, Member], tmp_path: Path) -> None:
    served = mot(members, write(tmp_path / "mot", members))
    with pytest.raises(Unsupported, match="no log-probabilities of prompts"):
        await say(served, ask(prompt_logprobs=0))
    with pytest.raises(InvalidRequest, match="token ids are of one tokenizer"):
        await say(served, GenerateRequest(prompt="", prompt_ids=(5, 6), max_tokens=2))
    with pytest.raises(ContextLengthExceeded):
        await say(served, ask(max_tokens=5000))


async def test_k_members_are_active(members: dict[str, Member], tmp_path: Path) -> None:
    said = await say(mot(members, write(tmp_path / "mot", members, k=2)), ask())
    assert said.chunks[-1].notes == ("first answers, and reads second",)
    said = await say(mot(members, write(tmp_path / "one", members, k=1)), ask())
    assert said.chunks[-1].notes == ("first answers alone",)
    assert said.text == (await say(expert_of(members["first"]), ask())).text
