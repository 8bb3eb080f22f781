"""The tensors of a Mixture of Thoughts: what primaries share, names in the artifact, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from coe.engines.latent.artifact import Artifact
from coe.engines.latent.memory import Memories, PeerStates
from coe.engines.latent.mot import MotInteractions, documents
from coe.engines.latent.mot_router import MotRouter
from coe.engines.latent.shape import InteractionShape
from coe.errors import ConfigError, WeightsError
from registry.composed import Composed

MEMBERS = ("org/a", "b.1", "c")
WIDTHS = {"org/a": 12, "b.1": 12, "c": 8}
LAYERS = {"org/a": 6, "b.1": 6, "c": 4}


def shapes(*primaries: str, **fields: object) -> dict[str, InteractionShape]:
    settings = {"shared_width": 8, "heads": 2, "interactions": 2, "depths": 2, "layers": "same"} | fields
    return {
        name: InteractionShape(
            width=WIDTHS[name],
            n_layers=LAYERS[name],
            peers={other: width for other, width in WIDTHS.items() if other != name},
            **settings,  # type: ignore[arg-type]
        )
        for name in primaries or MEMBERS
    }


def trained(**fields: object) -> MotInteractions:
    made = MotInteractions(MEMBERS, shapes(**fields), seed=3)
    torch.manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def update(made: MotInteractions, primary: str) -> torch.Tensor:
    own = made.of(primary)
    generator = torch.Generator().manual_seed(9)
    notes = {name: PeerStates(torch.randn(2, 3, width, generator=generator)) for name, width in own.shape.peers.items()}
    memories = Memories.stacked([own.memory(notes)])
    assert memories is not None
    return own.read(0, torch.ones(1, 4, WIDTHS[primary]), memories)


def test_primaries_share_the_projection_of_a_peer_and_nothing_else() -> None:
    made = MotInteractions(MEMBERS, shapes())
    assert made.of("org/a").peer("c") is made.of("b.1").peer("c")
    assert made.of("org/a").interactions[0] is not made.of("b.1").interactions[0]
    first, second = made.of("org/a").interactions[0].query, made.of("b.1").interactions[0].query
    assert not torch.equal(first, second)
    names = [name for name, _ in made.named_parameters()]
    assert len([name for name in names if "project" in name]) == 3
    assert sum(p.numel() for p in made.parameters()) == sum(
        tensor.numel() for name, tensor in made.tensors().items() if not name.endswith(("mean", "deviation"))
    )


def test_an_artifact_gives_back_the_same_updates(tmp_path: object) -> None:
    made, router = trained(), MotRouter(3, 2, 16)
    made.standardise("c", torch.randn(2, 8), torch.rand(2, 8) + 0.5)
    artifact = Artifact.write(
        tmp_path / "mot",  # type: ignore[operator]
        Composed("mot", {name: f"sha256:{name}" for name in MEMBERS}, {"primaries": documents(made.shapes)}),
        tensors=made.tensors() | router.tensors(),
        card="# card",
    )
    composed = artifact.composed
    read = MotInteractions.of_tensors(list(composed.members), composed.settings, artifact.tensors())
    assert not any(parameter.requires_grad for parameter in read.parameters())
    for name in MEMBERS:
        assert torch.equal(update(read, name), update(made, name))
        assert update(made, name).abs().max().item() > 0


def test_a_member_that_was_not_a_primary_is_refused() -> None:
    made = MotInteractions(MEMBERS, shapes("b.1"))
    assert made.primary_names == ("b.1",)
    with pytest.raises(WeightsError, match="'c' was not trained as a primary of the composition; these were: b.1"):
        made.of("c")


def test_settings_and_tensors_that_do_not_go_together_are_refused() -> None:
    made = trained()
    stated = json.loads(json.dumps({"primaries": documents(made.shapes)}))
    tensors = made.tensors()
    with pytest.raises(ConfigError, match="lack `primaries`"):
        MotInteractions.of_tensors(MEMBERS, {}, tensors)
    for change in ({"peers.2.bias": None}, {"primaries.0.interactions.1.query": None}):
        left = {name: tensor for name, tensor in tensors.items() if name not in change}
        with pytest.raises(WeightsError, match=r"is missing"):
            MotInteractions.of_tensors(MEMBERS, stated, left)
    with pytest.raises(WeightsError, match="extra is unknown"):
        MotInteractions.of_tensors(MEMBERS, stated, tensors | {"extra": torch.ones(1)})
    with pytest.raises(WeightsError, match="is not finite"):
        MotInteractions.of_tensors(MEMBERS, stated, tensors | {"peers.0.bias": torch.full((8,), torch.inf)})
    with pytest.raises(WeightsError, match=r"peers.0.bias has the shape \(9,\) instead of \(8,\)"):
        MotInteractions.of_tensors(MEMBERS, stated, tensors | {"peers.0.bias": torch.ones(9)})


def test_sizes_are_compared_before_memory_is_taken() -> None:
    stated = {"primaries": documents(shapes(shared_width=65536))}
    with pytest.raises(WeightsError, match=r"interactions.0.query has the shape \(12, 8\) instead of \(12, 65536\)"):
        MotInteractions.of_tensors(MEMBERS, stated, trained().tensors())


def test_shapes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="different experts"):
        MotInteractions(("a", "a"), {})
    with pytest.raises(ConfigError, match="primaries are some of the members"):
        MotInteractions(MEMBERS, {})
    with pytest.raises(ConfigError, match="the peers of 'c' are the other members, b.1, org/a"):
        MotInteractions(("b.1", "org/a", "c"), shapes("c"))
    other = {**shapes("org/a"), **shapes("b.1", shared_width=16)}
    with pytest.raises(ConfigError, match="one shared width"):
        MotInteractions(MEMBERS, other)
    wide = shapes("org/a")["org/a"]
    with pytest.raises(ConfigError, match="the width of 'c' is stated as 8 and as 9"):
        MotInteractions(
            MEMBERS,
            shapes("b.1") | {"org/a": InteractionShape.of(wide.document() | {"peers": {"b.1": 12, "c": 9}})},
        )
