"""The interaction: formulas against a plain loop, the untouched start, gradients, masks, order of peers."""

from __future__ import annotations

import math

import pytest
import torch

from coe.engines.latent.interaction import Interactions
from coe.engines.latent.memory import Memories, Memory, PeerStates
from coe.engines.latent.shape import InteractionShape, deep_layers, same_layers
from coe.errors import ConfigError, EngineError

WIDTH, TOKENS = 12, 5


def shape(**fields: object) -> InteractionShape:
    settings = {"shared_width": 8, "heads": 2, "interactions": 2, "depths": 2} | fields
    return InteractionShape(width=WIDTH, n_layers=6, peers={"a": 7, "b": 3, "c": 7}, **settings)  # type: ignore[arg-type]


def module(*, zero: bool = False, **fields: object) -> Interactions:
    made = Interactions(shape(**fields), seed=1)
    if not zero:
        torch.manual_seed(2)
        for name, parameter in made.named_parameters():
            if name.endswith("output"):
                torch.nn.init.normal_(parameter)
    return made


def states(width: int, n: int, *, depths: int = 2, seed: int = 0, **fields: object) -> PeerStates:
    generator = torch.Generator().manual_seed(seed + 100 * width)
    return PeerStates(torch.randn(depths, n, width, generator=generator), **fields)  # type: ignore[arg-type]


def hidden(rows: int = 1, seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def read(made: Interactions, q: int, h: torch.Tensor, *memories: Memory | None, **masks: torch.Tensor) -> torch.Tensor:
    stacked = Memories.stacked(memories)
    assert stacked is not None
    return made.read(q, h, stacked, **masks)


def test_the_update_is_that_of_the_formulas() -> None:
    made = module(depths=1)
    notes = {"a": states(7, 3, depths=1, weight=torch.tensor(0.5)), "b": states(3, 2, depths=1)}
    made.peer("a").standardise(torch.randn(1, 7), torch.rand(1, 7) + 0.5)
    h = hidden()
    update = read(made, 1, h, made.memory(notes))

    made.requires_grad_(False)
    this, n_heads, head = made.interactions[1], 2, 4
    lines, weights = [made.null], [1.0]
    for name, weight in (("a", 0.5), ("b", 1.0)):
        peer = made.peer(name)
        for state in notes[name].states[0]:
            lines.append((state - peer.mean[0]) / (peer.deviation[0] + 1e-4) @ peer.project + peer.bias)
            weights.append(weight)
    for i in range(TOKENS):
        query = this.norm(h[0, i]) @ this.query
        context = []
        for number in range(n_heads):
            part = slice(number * head, (number + 1) * head)
            scores = [
                float(query[part] @ (line @ this.key)[part]) / math.sqrt(head) + math.log(weight)
                for line, weight in zip(lines, weights, strict=True)
            ]
            total = sum(map(math.exp, scores))
            context.append(
                sum(
                    math.exp(s) / total * (line @ this.value)[part]
                    for s, line in zip(scores[1:], lines[1:], strict=True)
                )
            )
        torch.testing.assert_close(update[0, i], torch.cat(context) @ this.output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_module_leaves_the_primary_untouched_bit_for_bit(dtype: torch.dtype) -> None:
    made, h = module(zero=True), hidden(2).to(dtype)
    for notes in ({}, {"a": states(7, 3)}, {"a": states(7, 3), "b": states(3, 9), "c": states(7, 1)}):
        stacked = Memories.stacked([made.memory(notes), made.memory({"b": states(3, 4)})])
        assert stacked is not None
        for q in range(2):
            assert torch.equal(h + made.read(q, h, stacked).to(dtype), h)


@pytest.mark.parametrize("layers", ["deep", "same"])
def test_at_first_only_wo_has_a_gradient_and_then_every_tensor(layers: str) -> None:
    made = module(zero=True, layers=layers)
    spans = torch.tensor([[0, 2], [2, 4], [4, 6]])
    notes = {"a": states(7, 3, spans=spans), "b": states(3, 3, spans=spans), "c": states(7, 3)}
    token_spans = torch.tensor([[[0, 3], [3, 5], [-1, -1], [5, 7], [-1, -1]]])
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    target = hidden(seed=9)

    def backward() -> set[str]:
        optimizer.zero_grad()
        memory = made.memory(notes)
        h = hidden()
        for q in range(2):
            h = h + read(made, q, h, memory, spans=token_spans)
        (h - target).square().sum().backward()
        return {name for name, p in made.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}

    first = backward()
    assert first == {"interactions.0.output", "interactions.1.output"}
    optimizer.step()
    assert backward() == {name for name, _ in made.named_parameters()}


def test_the_order_of_peers_does_not_matter_and_a_missing_peer_is_a_masked_one() -> None:
    made, h = module(), hidden()
    a, b = states(7, 3), states(3, 4)
    both = made.memory({"a": a, "b": b})
    assert torch.equal(read(made, 0, h, both), read(made, 0, h, made.memory({"b": b, "a": a})))
    stacked = Memories.stacked([both])
    assert stacked is not None
    masked = Memories(
        stacked.keys,
        stacked.values,
        stacked.mask & (torch.arange(14) < 6),  # 2 depths of 3 tokens of `a` come first
        stacked.spans,
        stacked.ends,
        stacked.log_weights,
    )
    torch.testing.assert_close(made.read(0, h, masked), read(made, 0, h, made.memory({"a": a})))
    assert not torch.equal(made.read(0, h, masked), made.read(0, h, stacked))


def test_with_an_order_the_first_note_differs_from_the_second_and_without_it_notes_are_a_set() -> None:
    notes = states(7, 2)
    swapped = PeerStates(notes.states.flip(1))
    for fields, same in (({}, True), ({"order": True}, False)):
        made, h = module(**fields), hidden()
        order = torch.tensor([1, 2])
        first = read(made, 0, h, made.memory({"a": PeerStates(notes.states, order=order)}))
        second = read(made, 0, h, made.memory({"a": PeerStates(swapped.states, order=order)}))
        assert torch.allclose(first, second, atol=1e-5) is same
        moved = read(made, 0, h, made.memory({"a": PeerStates(swapped.states, order=order.flip(0))}))
        torch.testing.assert_close(
            moved, first, atol=1e-5, rtol=1e-4
        )  # the order is that of the places, not of the list


def test_an_order_changes_no_other_tensor_and_shapes_that_state_none_have_none() -> None:
    with_order, without = module(order=True).state_dict(), module().state_dict()
    assert with_order.keys() - without.keys() == {"order"}
    assert all(torch.equal(with_order[name], tensor) for name, tensor in without.items())
    document = shape().document()
    del document["order"]  # as artifacts of before state it
    assert InteractionShape.of(document) == shape()
    with pytest.raises(ConfigError, match="order must be true or false"):
        InteractionShape.of(document | {"order": 1})


@pytest.mark.parametrize("null_note", [True, False])
def test_padding_changes_nothing_and_a_row_without_notes_is_left_alone(null_note: bool) -> None:
    made, h = module(null_note=null_note), hidden(4)
    long, short = made.memory({"a": states(7, 9)}), made.memory({"b": states(3, 2)})
    together = read(made, 1, h, short, long, None, made.memory({}))
    torch.testing.assert_close(together[:1], read(made, 1, h[:1], short))
    torch.testing.assert_close(together[1:2], read(made, 1, h[1:2], long))
    assert torch.equal(together[2:], torch.zeros_like(together[2:]))
    assert Memories.stacked([None, made.memory({})]) is None


def test_selected_rows_are_those_of_the_batch() -> None:
    made, h = module(), hidden(3)
    memories = [made.memory({"a": states(7, n, seed=n)}) for n in (1, 4, 2)]
    stacked = Memories.stacked(memories)
    assert stacked is not None
    assert torch.equal(made.read(0, h[[2, 0]], stacked.select([2, 0])), made.read(0, h, stacked)[[2, 0]])


def test_overlapping_characters_raise_the_score() -> None:
    made, h = module(depths=1), hidden()
    spans = torch.tensor([[0, 3], [3, 6], [-1, -1]])
    memory = made.memory({"a": states(7, 3, depths=1, spans=spans)})
    tokens = torch.tensor([[[0, 1], [2, 4], [3, 3], [-1, -1], [6, 9]]])
    stacked = Memories.stacked([memory])
    assert stacked is not None
    wanted = [[True, False, False], [True, True, False], *[[False] * 3] * 3]
    assert stacked.overlaps(tokens)[0].tolist() == wanted
    with_spans, without = made.read(0, h, stacked, spans=tokens), made.read(0, h, stacked)
    changed = [not torch.equal(a, b) for a, b in zip(with_spans[0], without[0], strict=True)]
    assert changed == [True, True, False, False, False]
    off = module(depths=1, spans=False)
    assert torch.equal(read(off, 0, h, memory, spans=tokens), read(off, 0, h, memory))


def test_a_token_reads_no_note_of_text_behind_it() -> None:
    made, h = module(depths=1), hidden()
    ends = torch.tensor([[0, 2, 4, 6, 8]])  # of the primary's tokens in the text it writes
    peer = states(7, 4, depths=1, ends=torch.tensor([2, 4, 7, 8]))
    changed = PeerStates(peer.states.clone(), ends=peer.ends)
    changed.states[:, 2] += 1  # ends at 7: only the token that ends at 8 may see it
    before, after = (read(made, 0, h, made.memory({"a": each}), ends=ends) for each in (peer, changed))
    assert torch.equal(before[0, :4], after[0, :4])
    assert not torch.equal(before[0, 4], after[0, 4])
    assert torch.equal(before[0, 0], torch.zeros(WIDTH))  # the prompt sees none of them
    given = read(made, 0, h, made.memory({"a": PeerStates(peer.states)}), ends=ends)  # text of the prompt
    assert not torch.equal(given[0, 0], torch.zeros(WIDTH))


def test_notes_that_come_later_are_joined() -> None:
    made, h = module(), hidden()
    first, second = states(7, 2, seed=1), states(7, 3, seed=2)
    parts = Memory.joined([made.memory({"a": first}), made.memory({"a": second})])
    whole = made.memory({"a": PeerStates(torch.cat([first.states, second.states], 1))})
    torch.testing.assert_close(read(made, 0, h, parts), read(made, 0, h, whole))


def test_same_layers_reads_one_depth_per_interaction() -> None:
    made, h = module(layers="same"), hidden()
    peer = states(7, 3)
    changed = PeerStates(peer.states.clone())
    changed.states[1] += 1
    before, after = made.memory({"a": peer}), made.memory({"a": changed})
    assert len(before) == 3
    assert len(module().memory({"a": peer})) == 6  # both depths are notes of every interaction
    assert torch.equal(read(made, 0, h, before), read(made, 0, h, after))
    assert not torch.equal(read(made, 1, h, before), read(made, 1, h, after))


def test_a_router_gets_a_gradient_through_the_weight_of_a_peer() -> None:
    made = module()
    weight = torch.tensor(0.7, requires_grad=True)
    notes = {"a": states(7, 3, weight=weight), "b": states(3, 3)}
    read(made, 0, hidden(), made.memory(notes)).square().sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs()) > 0


def test_where_and_depths_are_those_of_the_papers_rule() -> None:
    assert same_layers(30, 4) == (6, 12, 18, 24)
    assert [deep_layers(30, n) for n in (1, 2, 4)] == [(30,), (25, 30), (15, 20, 25, 30)]
    assert InteractionShape(width=8, n_layers=30, peers={"a": 1}).where() == (6, 12, 18, 24)
    with pytest.raises(ConfigError, match="4 interactions need different layers, and a model of 2 layers"):
        same_layers(2, 4)
    with pytest.raises(ConfigError, match="at most 4 depths"):
        deep_layers(30, 5)
    with pytest.raises(ConfigError, match="2 depths need different layers"):
        deep_layers(1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "not a multiple of heads"),
        ({"heads": 0}, "heads must be an integer from 1"),
        ({"shared_width": 2**20}, "shared_width must be an integer from 1 to 65536"),
        ({"interactions": 65}, "interactions must be an integer from 1 to 64"),
        ({"layers": "same", "depths": 1}, "one layer of a peer per interaction"),
        ({"layers": "all"}, "layers must be one of deep, same"),
    ],
)
def test_sizes_out_of_bounds_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape(**fields)


def test_a_shape_is_read_back_from_its_document() -> None:
    assert InteractionShape.of(shape().document()) == shape()
    for document in ([], {"peers": {}}, {**shape().document(), "extra": 1}, {**shape().document(), "spans": 1}):
        with pytest.raises(ConfigError):
            InteractionShape.of(document)
    with pytest.raises(ConfigError, match="lacks a field"):
        InteractionShape.of({"peers": {"a": 1}})


def test_notes_of_other_shapes_or_peers_are_refused() -> None:
    made = module()
    with pytest.raises(EngineError, match="not trained with the peer 'z'; its peers: a, b, c"):
        made.memory({"z": states(7, 3)})
    with pytest.raises(EngineError, match=r"peer 'a' have the shape \(1, 3, 7\).* 2 depths of width 7"):
        made.memory({"a": states(7, 3, depths=1)})


def test_equal_seeds_give_equal_tensors() -> None:
    one, two, other = (Interactions(shape(), seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.peer("a").project, other.peer("a").project)
