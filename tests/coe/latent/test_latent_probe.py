"""The probe finds planted knowledge at the right place and layer, and says what follows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import make_tokenizer
from planted_states import COPIED_AT, N_LAYERS, WORDS, class_of, save_planted

from coe.engine_config import EnginesConfig, HFConfig
from coe.errors import ConfigError, ContextLengthExceeded, Rejected, TaskError
from coe.latent.probe import probe as module
from coe.latent.probe.probe import Accuracy, ProbeReport, ProbeSettings, default_layers, is_right, probe
from coe.latent.probe.reading import reading
from coe.latent.probe.rows import LabelledRow, Wording, read_rows
from coe.latent.states import Place, StateReader
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

ALL = tuple(range(1, N_LAYERS + 1))
OWN = Wording("{word}=")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateReader]:
    folder = save_planted(tmp_path_factory.mktemp("planted"), make_tokenizer())
    snapshot = Snapshot(1, {"knows": ExpertSpec(name="knows", kind=Kind.MODEL, source=str(folder))})
    engines = EnginesConfig(hf=HFConfig(device="cpu", dtype="float32"))
    with StateReader.open("knows", snapshot, engines, raw=True, find=lambda spec: Path(spec.source)) as reader:
        yield reader


@pytest.fixture
def rows(tmp_path: Path) -> list[LabelledRow]:
    return make_rows(tmp_path, *({"word": word, "label": class_of(word)} for word in WORDS))


def make_rows(tmp_path: Path, *rows: dict[str, Any]) -> list[LabelledRow]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(file)


def accuracies(report: ProbeReport, place: Place, wording: int = 0) -> list[float]:
    return [cell.found.accuracy for cell in report.wordings[wording].cells if cell.place == place]


def test_planted_knowledge_is_found_where_it_is(reader: StateReader, rows: list[LabelledRow]) -> None:
    report = probe(reader, rows, [OWN], ProbeSettings(layers=ALL))
    assert report.settings.places == ("last", "span", "mean")
    assert accuracies(report, "span") == [1.0] * N_LAYERS
    last = accuracies(report, "last")
    assert all((found == 1.0) == (layer >= COPIED_AT) for layer, found in zip(ALL, last, strict=True))
    assert max(last[: COPIED_AT - 1]) <= 0.6  # that state is the same for every word
    wording = report.wordings[0]
    assert wording.answer is not None and wording.answer.accuracy == 1.0
    assert wording.text.accuracy < 0.7 and wording.verdict == "readable"
    assert (wording.best.place, wording.best.layer) == ("last", N_LAYERS)
    assert (report.chance, report.majority, report.labels) == (0.5, 0.5, {"x": 12, "y": 12})


def test_wordings_of_the_same_rows_are_compared(reader: StateReader, rows: list[LabelledRow]) -> None:
    report = probe(reader, rows, [Wording("it is"), OWN], ProbeSettings(layers=(N_LAYERS,)))
    unasked, own = report.wordings
    assert unasked.verdict == "not readable" and own.verdict == "readable" and report.best == 1
    assert report.settings.places == ("last", "mean")  # a wording without the word has no span
    assert "of '{word}='" in reading(report)


def test_the_same_rows_give_the_same_report_in_any_batch(
    reader: StateReader, rows: list[LabelledRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ProbeSettings(layers=(1, 4), folds=4, repeats=2, seed=7)
    report = probe(reader, rows, [OWN], settings)
    monkeypatch.setattr("coe.latent.states.TOKENS_AT_ONCE", 1)
    assert probe(reader, rows, [OWN], settings) == report
    assert report.settings.repeats == 2 and report.wordings[0].text.n == len(rows)


def test_what_the_text_states_is_not_knowledge(reader: StateReader, tmp_path: Path) -> None:
    rows = make_rows(tmp_path, *({"prompt": f"{word} {class_of(word) * 3}", "label": class_of(word)} for word in WORDS))
    report = probe(reader, rows, [Wording.of_column("prompt")])
    assert report.wordings[0].verdict == "in the text" and report.wordings[0].text.accuracy == 1.0
    assert "does not show that the expert knows more" in reading(report)


def test_what_the_expert_does_not_know_is_not_readable(reader: StateReader, tmp_path: Path) -> None:
    labels = np.random.default_rng(5).permutation(["x", "y"] * (len(WORDS) // 2))
    rows = make_rows(tmp_path, *({"word": w, "label": str(label)} for w, label in zip(WORDS, labels, strict=True)))
    report = probe(reader, rows, [OWN])
    assert report.wordings[0].verdict == "not readable"
    assert reading(report).startswith("Not readable; the best place is") and "nothing to read" in reading(report)


def test_an_answer_that_says_more_than_the_states_is_recommended(reader: StateReader, rows: list[LabelledRow]) -> None:
    report = probe(reader, rows, [OWN], ProbeSettings(layers=(1,), places=("last",)))
    assert report.wordings[0].verdict == "not readable"
    assert "Its own answer is right in 100%, more than these states hold" in reading(report)
    assert "`reads: answer`" in reading(report)


def test_the_reading_names_settings_of_a_composition(reader: StateReader, rows: list[LabelledRow]) -> None:
    text = reading(probe(reader, rows, [OWN]))
    assert text.startswith("Readable at the last prompt token, layer 4 of 4: 100% (86-100); chance 50%")
    assert "`layers: {knows: [4]}` and `places: speaking`" in text
    span = reading(probe(reader, rows, [OWN], ProbeSettings(places=("span",), layers=(2,))))
    assert "the end of the span, layer 2 of 4" in span and "`places: all`" in span


def test_a_label_that_is_readable_and_never_answered_has_a_hint(reader: StateReader, tmp_path: Path) -> None:
    names = {"x": "first", "y": "second"}  # the expert answers x and y
    rows = make_rows(tmp_path, *({"word": word, "label": names[class_of(word)]} for word in WORDS))
    report = probe(reader, rows, [OWN], ProbeSettings(layers=ALL))
    wording = report.wordings[0]
    assert wording.answer is not None and wording.answer.accuracy == 0 and wording.verdict == "readable"
    assert wording.mistake == module.Mistake(rows[0].place, "first", "x")
    text = reading(report)
    assert f"in 0%, such as 'x' where 'first' is right ({rows[0].place})" in text
    assert "(--template '... Answer with one of: first, second.'), or without --raw" in text


def test_right_answers_and_unreadable_labels_have_no_such_hint(reader: StateReader, rows: list[LabelledRow]) -> None:
    right = probe(reader, rows, [OWN])
    assert right.wordings[0].mistake is None and "such as" not in reading(right)
    unreadable = probe(reader, rows, [Wording("it is")], ProbeSettings(layers=(1,)))
    assert unreadable.wordings[0].mistake is not None and "such as" not in reading(unreadable)


def test_rows_without_a_group_are_grouped_by_their_text(reader: StateReader, tmp_path: Path) -> None:
    """Each text twice, under a random label: recognised only if its copy is in the training part."""
    labels = np.random.default_rng(6).permutation(["x", "y"] * 10)
    rows = [{"told": f"{word}=", "label": str(label)} for word, label in zip(WORDS, labels, strict=False)] * 2
    report = probe(reader, make_rows(tmp_path, *rows), [Wording.of_column("told")], ProbeSettings(layers=(1, 4)))
    assert (report.n_rows, report.n_groups) == (40, 20)
    assert max(cell.found.accuracy for cell in report.wordings[0].cells) < 0.8


def test_long_right_answers_are_not_compared(reader: StateReader, tmp_path: Path) -> None:
    rows = make_rows(tmp_path, *({"word": w, "label": class_of(w), "answer": "Z" * 60} for w in WORDS))
    report = probe(reader, rows, [OWN], ProbeSettings(layers=(4,)))
    assert report.wordings[0].answer is None and report.wordings[0].verdict == "readable"


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (" Positive.", "positive", True),
        ("7", "7", True),
        ("72", "7", False),
        ("positively", "positive", False),
        ("[refund] please", "[refund]", True),
        ("not positive", "positive", False),
        ("", "a", False),
    ],
)
def test_answers_are_right_as_whole_words_at_the_start(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected) is right


def test_accuracies_have_wilsons_interval() -> None:
    found = Accuracy.of(np.array([1.0] * 80 + [0.0] * 20), 100)
    assert found.accuracy == 0.8 and found.low == pytest.approx(0.711, abs=1e-3)
    assert found.high == pytest.approx(0.867, abs=1e-3)
    fewer = Accuracy.of(np.array([1.0] * 80 + [0.0] * 20), 25)  # rows of one group are no evidence of their own
    assert (fewer.accuracy, fewer.n) == (0.8, 25) and fewer.low < found.low < found.high < fewer.high


def test_default_layers_are_shares_of_the_depth() -> None:
    assert default_layers(30) == (15, 20, 25, 30)
    assert default_layers(2) == (1, 2) and default_layers(1) == (1,)


@pytest.mark.parametrize(
    "settings",
    [
        {"folds": 1},
        {"folds": 21},
        {"repeats": 0},
        {"repeats": 21},
        {"seed": -1},
        {"layers": (1, 1)},
        {"layers": tuple(range(65))},
        {"places": ("first",)},
    ],
)
def test_settings_are_bounded(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ProbeSettings(**settings)


def test_bad_rows_and_wordings_are_refused(
    reader: StateReader, rows: list[LabelledRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TaskError, match="all rows have the label"):
        probe(reader, rows[::2], [OWN])
    with pytest.raises(TaskError, match="there is no field 'nothing'; the row has 'word', 'label'"):
        probe(reader, rows, [OWN, Wording("{nothing}")])
    with pytest.raises(TaskError, match="with 13 folds"):
        probe(reader, rows, [OWN], ProbeSettings(folds=13))
    with pytest.raises(Rejected, match="there is no layer 5"):
        probe(reader, rows, [OWN], ProbeSettings(layers=(5,)))
    with pytest.raises(Rejected, match=r"rows\.jsonl:1: it has no span"):
        probe(reader, rows, [Wording("= {label}")], ProbeSettings(places=("span",)))
    long = make_rows(tmp_path, *({"word": w, "prompt": f"{w} " * 200, "label": class_of(w)} for w in WORDS))
    with pytest.raises(ContextLengthExceeded, match=r"rows\.jsonl:1: the prompt has \d+ tokens"):
        probe(reader, long, [Wording.of_column("prompt")])
    monkeypatch.setattr(module, "MOST_FITS", 2 * 4 * 2 * 5 * 3)
    settings = ProbeSettings(layers=ALL, places=("last", "mean"), folds=5, repeats=3)
    module._check_work(settings, 2)
    with pytest.raises(ConfigError, match="5 folds and 3 repeats are 360 regressions, more than 240: use fewer"):
        probe(reader, rows, [OWN, Wording("{word} "), Wording("{word}!")], settings)
    monkeypatch.setattr(module, "MOST_TOKENS", 60)
    with pytest.raises(Rejected, match="the wordings have more than 60 tokens"):
        probe(reader, rows, [OWN, Wording("{word}==")])
    for wordings in ([], [OWN] * (module.MOST_WORDINGS + 1)):
        with pytest.raises(ConfigError, match="wordings are stated"):
            probe(reader, rows, wordings)
