"""Members of a Mixture of Thoughts that is served, of two architectures and tokenizers; random interactions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, make_tokenizer, model_spec, save_adapter
from latent_models import save_tiny
from other_tokenizer import make_piece_tokenizer
from safetensors.torch import load_file, save_file

from coe.engines.base import Adapter, Member
from coe.engines.hf.composed.mot import Mot
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.members import HFMember
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.mot import MotInteractions, documents
from coe.engines.latent.mot_router import MotRouter
from coe.engines.latent.shape import InteractionShape, deep_layers, same_layers
from coe.types import GenerateRequest
from registry.composed import Composed
from registry.digest import identity
from registry.spec import ExpertSpec, Kind
from routers.base import Message

PROMPTS = ("the capital of france", "paris is the end 😀", "of the answer")
NAMES = ("first", "second", "third")
N_TOKENS = 14


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
    folder: Path,
    members: Mapping[str, Member],
    *,
    form: str = "same",
    scale: float = 0.4,
    router: MotRouter | None = None,
    **settings: Any,
) -> Path:
    made, read = trained(members, layers=form, scale=scale)
    specs = [expert_of(member).spec for member in members.values()]
    specs += [member.adapter.spec for member in members.values() if member.adapter]
    experts = {spec.name: spec for spec in specs}
    stated = {"reads": "together", "router": "first", "k": len(members), "layers": read}
    stated |= {"primaries": documents(made.shapes)} | ({"router": "latent"} if router else {}) | settings
    identities = {name: identity(experts[name], experts) for name in members}
    tensors = made.tensors() | (router.tensors() if router else {})
    Artifact.write(folder, Composed("mot", identities, stated), tensors=tensors, card="# card")
    return folder


def spec(members: Mapping[str, Member], path: Path) -> ExpertSpec:
    names = tuple(members)
    return ExpertSpec(name="mot", kind=Kind.COMPOSED, architecture="mot", members=names, source=str(path))


def mot(members: Mapping[str, Member], path: Path) -> Any:
    return Mot(spec(members, path), members, path)


def ordered(members: Mapping[str, Member], *names: str) -> dict[str, Member]:
    return {name: members[name] for name in names}


def states(member: Member, ids: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
    """(J, n, d) of all tokens, on the worker thread, without a cache."""

    def read(model: Any) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        with ExitStack() as stack:
            for layer in layers:
                module = Decoder.of(model).at(layer)
                hook = module.register_forward_hook(lambda _m, _i, out, n=layer: found.update({n: out}))
                stack.callback(hook.remove)
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        return torch.stack([found[layer][0] for layer in layers])

    return expert_of(member).run(read, [member.adapter]).result(60)


def hf_member(name: str, member: Member) -> Any:
    return HFMember(name, expert_of(member), member.adapter)
