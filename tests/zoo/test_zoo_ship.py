"""Shipping the artifact of a run: what is written, what is rounded, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from coe.engines.latent.artifact import Artifact
from coe.engines.latent.interaction import Interactions
from coe.engines.latent.shape import InteractionShape
from examples.zoo.card import read_card
from examples.zoo.latent import ship as shipping
from examples.zoo.latent.__main__ import app
from examples.zoo.latent.plan import Run
from examples.zoo.latent.results import Result, Training, write_result
from examples.zoo.latent.ship import CannotShip, experts_text, run_of, ship, size_of
from registry.composed import Composed
from registry.documents import parse_document
from registry.spec import ExpertSpec

SHAPE = InteractionShape(
    width=32, n_layers=4, peers={"fields": 32, "dates": 32}, interactions=1, shared_width=16, heads=2
)
TRAINING_CARD = "# artifact\n\nA composed expert.\n\n## Data\n\n- training: 480 rows, sha256:1\n"


def finished(root: Path, run: str = "bookings/notes/1", *, members: tuple[str, ...] = ("smollm2", "fields", "dates"),
             card: str = TRAINING_CARD, with_adapter: bool = False) -> Run:  # fmt: skip
    """A run with a result and an artifact of one small interaction."""
    made = run_of(run)
    composed = Composed(
        "notes", {name: f"sha256:{name}" for name in members}, {"reads": "answer", "interaction": SHAPE.document()}
    )
    module = Interactions(SHAPE, seed=1)
    module.peer("fields").standardise(torch.full((1, 32), 1000.5), torch.full((1, 32), 0.123456789))

    def adapter(folder: Path) -> None:
        from safetensors.torch import save_file

        (folder / "adapter_config.json").write_text('{"r": 2}')
        save_file({"lora_A.weight": torch.ones(2, 32)}, folder / "adapter_model.safetensors")

    Artifact.write(
        root / made.id / "artifact",
        composed,
        tensors=module.state_dict(),
        adapter=adapter if with_adapter else None,
        card=card,
    )
    scores = {
        "valid": {"bookings": [1.0, 0.0]},
        "test": {"bookings": [1.0, 1.0, 1.0, 0.0]},
        "fresh": {"bookings": [0.0]},
    }
    write_result(
        root / made.id,
        Result("bookings", made.method.name, 1, scores, 200.4, 40.25, 1e10, 2.0, Training(90.0, 5_000, 0.1)),
    )
    return made


def dtypes(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


def test_an_artifact_comes_with_its_weights_a_card_and_an_entry(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = ship(finished(tmp_path / "runs", with_adapter=True), tmp_path / "runs", "notes", out)
    assert folder == out / "notes"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "README.md",
        "composed.json",
        "weights.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    original = Artifact.read(tmp_path / "runs/bookings/notes/1/artifact")
    copied = Artifact.read(folder)
    assert copied.composed == original.composed
    assert all(torch.equal(copied.tensors()[name], tensor) for name, tensor in original.tensors().items())

    card = read_card(folder)
    assert (card["license"], card["base_model"]) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert card["members"] == ["smollm2", "fields", "dates"]
    assert card["training"] == {
        "bench": "bookings",
        "families": ["bookings"],
        "method": "notes",
        "seed": 1,
        "steps": 60,
        "batch": 8,
        "parameters": 5000,
        "seconds": 90,
    }
    assert card["scores"]["test"] == {"bookings": {"n": 4, "right": 0.75}}
    text = (folder / "README.md").read_text()
    assert "| test | bookings | 4 | 75.0% |" in text
    assert "200 tokens in and 40.2 out" in text
    assert "These are the weights that were measured." in text
    assert "# artifact" not in text and "- training: 480 rows, sha256:1" in text
    assert "Apache License 2.0" in text and "Gemma" not in text

    (entry,) = parse_document((out / "experts.yaml").read_text(), out / "experts.yaml").value["experts"]
    spec = ExpertSpec(**entry)
    assert (spec.name, spec.members, spec.source) == ("notes", ("smollm2", "fields", "dates"), "notes")
    assert (spec.is_staged, spec.licence) == (True, "Apache-2.0")
    assert spec.description == "smollm2 answers, and reads the hidden states of fields and dates."
    ship(finished(tmp_path / "runs", "bookings/notes-lora/1"), tmp_path / "runs", "a-second", out)
    listed = parse_document(experts_text(out), out / "experts.yaml").value["experts"]
    assert [entry["name"] for entry in listed] == ["a-second", "notes"]
    assert (out / "experts.yaml").read_text() == experts_text(out)


def test_what_was_made_from_gemma_carries_its_terms(tmp_path: Path) -> None:
    run = finished(tmp_path / "runs", members=("smollm2", "math"))
    folder = ship(run, tmp_path / "runs", "notes", tmp_path / "out")
    card = read_card(folder)
    assert card["license"] == "gemma"
    assert card["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m"]
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in (folder / "README.md").read_text()
    (entry,) = parse_document(experts_text(tmp_path / "out"), tmp_path).value["experts"]
    assert entry["licence"] == "Gemma"


def test_matrices_are_rounded_only_where_the_artifact_is_too_large_and_statistics_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    run = finished(root, with_adapter=True)
    exact = ship(run, root, "exact", tmp_path / "out")
    assert set(dtypes(exact / "weights.safetensors").values()) == {"F32"}
    monkeypatch.setattr(shipping, "MOST_BYTES", size_of(exact) - 1)
    small = ship(run, root, "small", tmp_path / "out")
    assert size_of(small) <= shipping.MOST_BYTES
    found = dtypes(small / "weights.safetensors")
    assert found["peers.0.project"] == found["interactions.0.output"] == "BF16"
    assert found["peers.0.mean"] == found["peers.0.deviation"] == found["peers.0.bias"] == "F32"
    assert set(dtypes(small / "adapter/adapter_model.safetensors").values()) == {"BF16"}
    assert Artifact.read(small).interactions().peer("fields").mean[0, 0] == 1000.5
    assert "rounded to bfloat16" in (small / "README.md").read_text()

    monkeypatch.setattr(shipping, "MOST_BYTES", 1000)
    with pytest.raises(CannotShip, match="at most 1,000: train it with a smaller `shared_width`"):
        ship(run, root, "larger", tmp_path / "out")
    assert not (tmp_path / "out" / "larger").exists()


def test_a_folder_of_this_machine_is_not_shipped(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = finished(root, card=f"{TRAINING_CARD}\nrows of {root}/train.jsonl\n")
    with pytest.raises(CannotShip, match=r"README.md names .*runs, a folder of this machine"):
        ship(run, root, "notes", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_without_an_artifact_of_the_zoo_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with pytest.raises(CannotShip, match="is not done: .* run --bench bookings --method cache --seed 2"):
        ship(run_of("bookings/cache/2"), root, "cache", tmp_path / "out")
    with pytest.raises(CannotShip, match="smollm2-again is no expert of the zoo"):
        ship(finished(root, members=("smollm2", "smollm2-again")), root, "notes", tmp_path / "out")
    run = finished(root)
    with pytest.raises(CannotShip, match="is no name of an artifact"):
        ship(run, root, "../notes", tmp_path / "out")
    (root / run.id / "artifact/weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(CannotShip, match="weights.safetensors cannot be read"):
        ship(run, root, "notes", tmp_path / "out")
    for name in ("bookings/notes", "booking/notes/1", "bookings/note/1", "bookings/notes/-1", "../notes/1"):
        with pytest.raises(CannotShip, match="no run"):
            run_of(name)
    with pytest.raises(CannotShip, match=r"direct trains no composition; these do: .*notes"):
        run_of("bookings/direct/1")


def test_the_command_ships_and_refuses(tmp_path: Path) -> None:
    run, runner = finished(tmp_path / "runs"), CliRunner()
    options = ["--as", "notes", "--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    done = runner.invoke(app, ["ship", run.id, *options])
    assert done.exit_code == 0, done.output
    assert f"{size_of(tmp_path / 'out/notes'):,} bytes" in done.output
    refused = runner.invoke(app, ["ship", "bookings/direct/1", *options])
    assert (refused.exit_code, "trains no composition" in refused.output) == (1, True)
