"""What an adapter of the zoo knows is found at the last prompt token, in the late layers of SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coe.config import load_config
from coe.experts import open_snapshot
from coe.latent.probe.probe import ProbeSettings, probe
from coe.latent.probe.rows import Wording, read_rows
from coe.latent.states import StateReader
from examples.zoo.families import FAMILIES, Split

pytestmark = pytest.mark.integration
ZOO = Path(__file__).parents[3] / "examples" / "zoo"


def test_the_sentiment_adapter_holds_its_answer_late_at_the_last_token(
    zoo_bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_HOME", str(zoo_bases.parent))
    config = load_config(ZOO / "config.yaml")
    snapshot = open_snapshot(config)
    file = tmp_path / "rows.jsonl"
    drawn = FAMILIES["sentiment"].rows(Split.VALID, 40, seed=3)
    file.write_text("".join(json.dumps({"prompt": row.prompt, "label": row.answer}) + "\n" for row in drawn))
    rows, settings = read_rows(file), ProbeSettings(layers=(2, 30), places=("last",), folds=4)

    with StateReader.open("sentiment", snapshot, config.engines) as reader:
        report = probe(reader, rows, [Wording.of_column("prompt")], settings)
    [wording] = report.wordings
    early, late = (cell.found.accuracy for cell in wording.cells)
    assert late >= 0.9 and late >= early + 0.15
    assert wording.best.layer == 30 and wording.answer is not None and wording.answer.accuracy >= 0.9
