"""The folder of a trained composition: written whole, read with care, refused with other experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coe.engines.latent.artifact import Artifact
from coe.engines.latent.interaction import Interactions
from coe.engines.latent.memory import Memories, PeerStates
from coe.engines.latent.shape import InteractionShape
from coe.errors import WeightsError
from registry.composed import Composed
from registry.spec import ExpertSpec, Kind

SHAPE = InteractionShape(width=6, n_layers=4, peers={"sql": 5}, shared_width=4, heads=2, interactions=1)


def made(seed: int = 1) -> Interactions:
    module = Interactions(SHAPE, seed=seed)
    torch.nn.init.normal_(module.interactions[0].output)
    module.peer("sql").standardise(torch.randn(1, 5), torch.rand(1, 5))
    return module


def write(folder: Path, module: Interactions | None = None, **fields: object) -> Artifact:
    settings = {"interaction": SHAPE.document(), "reads": "answer"}
    composed = Composed("notes", {"base": "sha256:aa", "sql": "sha256:bb"}, settings)
    arguments: dict[str, object] = {
        "composed": composed,
        "tensors": (module or made()).state_dict(),
        "card": "# A composition\n",
    }
    return Artifact.write(folder, **(arguments | fields))  # type: ignore[arg-type]


def spec(name: str, digest: str) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.MODEL, source="/nowhere", digest=digest)


def test_a_saved_composition_reads_the_same(tmp_path: Path) -> None:
    module = made()
    artifact = Artifact.read(write(tmp_path / "c", module).path)
    assert (artifact.composed.architecture, artifact.primary, artifact.peers) == ("notes", "base", ("sql",))
    again = artifact.interactions()
    assert not any(parameter.requires_grad for parameter in again.parameters())
    notes = {"sql": PeerStates(torch.randn(1, 3, 5))}
    h = torch.randn(1, 2, 6)
    one, two = (m.read(0, h, Memories.stacked([m.memory(notes)])) for m in (module, again))  # type: ignore[arg-type]
    assert torch.equal(one, two)
    assert artifact.adapter is None


def test_an_adapter_lies_beside_the_weights(tmp_path: Path) -> None:
    def adapter(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")

    artifact = write(tmp_path / "c", adapter=adapter, tensors={})
    assert artifact.adapter == tmp_path / "c" / "adapter"
    assert artifact.tensors() == {}


def test_a_failed_write_leaves_the_former_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("no adapter")

    write(tmp_path / "c")
    with pytest.raises(RuntimeError, match="no adapter"):
        write(tmp_path / "c", composed=Composed("cache", {"a": "x"}, {}), adapter=fail)
    assert Artifact.read(tmp_path / "c").composed.architecture == "notes"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_members_of_other_digests_are_refused_by_name(tmp_path: Path) -> None:
    artifact = write(tmp_path / "c")
    base, sql = spec("base", "sha256:aa"), spec("sql", "sha256:bb")
    artifact.check_members({"base": base, "sql": sql})
    with pytest.raises(WeightsError, match="'sql' was trained with as sha256:bb, and is now sha256:cc"):
        artifact.check_members({"base": base, "sql": spec("sql", "sha256:cc")})
    with pytest.raises(WeightsError, match="'base' is not registered; 'sql' was trained with as .* now sha256:dd"):
        artifact.check_members({"sql": spec("sql", "sha256:dd")})


@pytest.mark.parametrize(
    ("interaction", "message"),
    [
        (None, "settings.interaction: the interaction is a mapping"),
        ({**SHAPE.document(), "heads": 3}, "not a multiple of heads"),
        ({**SHAPE.document(), "peers": {"other": 5}}, "lacks the peer 'sql'"),
        ({**SHAPE.document(), "interactions": 2}, "interactions.1.key is missing"),
        (
            {**SHAPE.document(), "shared_width": 2**16},  # its keys alone are 16 GiB: refused before they are made
            r"interactions.0.key has the shape \(4, 4\) instead of \(65536, 65536\)",
        ),
    ],
)
def test_settings_that_do_not_fit_the_tensors_are_refused(tmp_path: Path, interaction: object, message: str) -> None:
    artifact = write(tmp_path / "c")
    file = artifact.path / "composed.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"settings": {"interaction": interaction}}))
    with pytest.raises(WeightsError, match=message):
        Artifact.read(artifact.path).interactions()


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no composed.json"):
        Artifact.read(tmp_path)
    (tmp_path / "composed.json").write_text('{"format": 2}')
    with pytest.raises(WeightsError, match="format 2; this version reads 1"):
        Artifact.read(tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = made().state_dict()
    cases = [
        ({name: value for name, value in state.items() if name != "null"}, "null is missing"),
        ({**state, "more": torch.zeros(1)}, "more is unknown"),
        ({**state, "null": torch.zeros(9)}, r"null has the shape \(9,\) instead of \(4,\)"),
        (
            {**state, "null": torch.full((4,), torch.nan)},
            "weights.safetensors does not fit its settings: null is not finite",
        ),
        ({**state, "null": torch.zeros(4, dtype=torch.int64)}, r"other types than F32, BF16: null \(I64\)"),
    ]
    for tensors, message in cases:
        artifact = write(tmp_path / "c", tensors=tensors)
        with pytest.raises(WeightsError, match=message):
            artifact.load_into(made())


def test_a_damaged_or_missing_weights_file_is_refused(tmp_path: Path) -> None:
    artifact = write(tmp_path / "c")
    file = artifact.path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="cannot be read"):
        artifact.tensors()
    file.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        artifact.tensors()


def test_bfloat16_tensors_are_read(tmp_path: Path) -> None:
    artifact = write(tmp_path / "c")
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in made().state_dict().items()}
    save_file(halves, artifact.path / "weights.safetensors")
    again = made(seed=2)
    artifact.load_into(again)
    torch.testing.assert_close(again.null, made().null.bfloat16().float())
