"""What peers of a Mixture of Thoughts read while the answer grows: the same as from forwards of everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from engine_models import say
from mot_serving import (
    N_TOKENS,
    ask,
    expert_of,
    folders,
    hf_member,
    members,
    mot,
    ordered,
    states,
    trained,
    write,
)

from coe.engines.base import Member
from coe.engines.hf.composed.mot import _Spans
from coe.engines.hf.decoding import Decoding
from coe.engines.hf.in_step.reading_peer import Prompt, ReadingPeer
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.growing_text import GrowingText
from coe.engines.latent.memory import Memories, Memory, PeerStates
from coe.engines.latent.mot import MotInteractions
from coe.types import GenerateRequest

__all__ = ["folders", "members"]

# Against a forward of everything for each token


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
    said = await say(served, ask())
    assert said.text == await uncached(chosen, made, read, ask())
    assert said.text != bare  # the notes have an effect


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
    prompt = Prompt(row, [(-1, -1)] * len(row.prompt_ids))
    peer = ReadingPeer(hf_member(name, member), prompt, read[name], interactions, n_user=21)
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


@pytest.mark.parametrize("name", ["first", "third"])
@pytest.mark.parametrize("seed", range(4))
async def test_texts_that_grow_by_random_pieces_are_read_as_a_whole(
    members: dict[str, Member], name: str, seed: int
) -> None:
    member, other, random = members[name], "third" if name != "third" else "first", Random(seed)
    made, read = trained(ordered(members, name, other), layers="same", scale=1.0)
    interactions, expert = made.of(other), expert_of(member)
    row = await expert.prepare(ask(), member.adapter)
    peer = ReadingPeer(
        hf_member(name, member), Prompt(row, [(-1, -1)] * len(row.prompt_ids)), read[name], interactions, n_user=21
    )
    await peer.begin()
    text = ""
    for _ in range(12):
        text += "".join(random.choices([*"the ndis\n", "😀", "\u0301", "é", "capital"], k=random.randint(1, 4)))
        await peer.read(text)
    ids = expert.loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        expected = interactions.memory({name: PeerStates(states(member, [*row.prompt_ids, *ids], read[name]))})
    assert_same_notes(peer.memory, expected)


@pytest.mark.parametrize("order", [("first", "third"), ("third", "first"), ("first", "second")])
@pytest.mark.parametrize("seed", range(3))
async def test_no_score_depends_on_text_behind_it(
    members: dict[str, Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...], seed: int
) -> None:
    """Answers that are forced, and differ from one token on: all scores before this token is read are the same bits."""
    chosen, random = ordered(members, *order), Random(seed)
    served = mot(chosen, write(tmp_path / "mot", chosen))
    vocabulary = [*range(5, 250)] if order[0] == "first" else [*range(262, 350)]
    same = random.randrange(2, 10)
    answers = [random.choices(vocabulary, k=12)]
    answers.append([*answers[0][:same], *random.choices(vocabulary, k=12 - same)])
    answers[1][same] = next(token for token in vocabulary if token != answers[0][same])
    recorded: list[list[torch.Tensor]] = []

    def choose(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        recorded[-1].append(scores.clone())
        return torch.tensor([answers[len(recorded) - 1][len(recorded[-1]) - 1]]), [None]

    monkeypatch.setattr(Decoding, "_choose", choose)
    for _ in answers:
        recorded.append([])
        await say(served, ask(max_tokens=12))
    equal = [torch.equal(a, b) for a, b in zip(*recorded, strict=True)]
    assert len(equal) == 12
    assert equal[: same + 1] == [True] * (same + 1)
    assert not any(equal[same + 1 :])


def assert_same_notes(a: Memory, b: Memory) -> None:
    """The same notes; their order means nothing."""
    assert len(a) == len(b)
    for keys, values, keys_b, values_b in zip(a.keys, a.values, b.keys, b.values, strict=True):
        ours, theirs = (torch.cat([k.flatten(1), v.flatten(1)], 1) for k, v in ((keys, values), (keys_b, values_b)))
        distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
        assert distances.min(0).values.max() < 2e-3 and distances.min(1).values.max() < 2e-3
