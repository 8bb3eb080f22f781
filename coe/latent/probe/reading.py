"""The report of a probe in plain English: can a composition work, and what should it read?"""

from __future__ import annotations

from typing import Final

from coe.latent.probe.probe import Accuracy, ProbeReport, WordingReport
from coe.latent.states import Place
from coe.seam import visible

PLACE_NAMES: Final[dict[Place, str]] = {
    "last": "the last prompt token",
    "span": "the end of the span",
    "mean": "the mean of the prompt",
}
_CARRIES_MORE: Final = 0.1
"""Difference of accuracies from which on the answers are recommended instead of the prompt's states."""
_HARDLY_ANY: Final = 0.05
"""Share of right answers up to which the wording is doubted where the states hold the label."""
_MOST_SHOWN: Final = 60
"""Characters of an answer, or of the labels, that a hint shows."""


def reading(report: ProbeReport) -> str:
    """A few sentences about the best wording: what is readable where, and which settings follow."""
    wording = report.wordings[report.best]
    return f"{_finding(report, wording)}. {_advice(report, wording)}{_about_answers(report, wording)}"


def layer_name(layer: int) -> str:
    """A layer in words; 0 is what the head reads."""
    return f"layer {layer}" if layer else "the final norm"


def percent(share: float) -> str:
    """Such as `96%`."""
    return f"{100 * share:.0f}%"


def _finding(report: ProbeReport, wording: WordingReport) -> str:
    best = wording.best
    where = f"{PLACE_NAMES[best.place]}, {layer_name(best.layer)} of {report.n_layers}"
    asked = f" of {wording.wording!r}" if len(report.wordings) > 1 else ""
    words = {
        "readable": "Readable at",
        "partly readable": "Partly readable at",
        "in the text": "Readable from the text alone as well as at",
        "not readable": "Not readable; the best place is",
    }
    beside = f"chance {percent(report.chance)}, majority {percent(report.majority)}, text alone {_figure(wording.text)}"
    return f"{words[wording.verdict]} {where}{asked}: {_figure(best.found)}; {beside}"


def _figure(found: Accuracy) -> str:
    return f"{percent(found.accuracy)} ({percent(found.low)[:-1]}-{percent(found.high)[:-1]})"


def _advice(report: ProbeReport, wording: WordingReport) -> str:
    best, answer = wording.best, wording.answer
    places = "speaking" if best.place == "last" else "all"
    how = f"`layers: {{{report.expert}: [{best.layer}]}}` and `places: {places}`"
    own = "" if answer is None else f"Its own answer is right in {percent(answer.accuracy)}"
    answers_more = answer is not None and answer.low > best.found.accuracy + _CARRIES_MORE
    if answers_more:
        return f"{own}, more than these states hold: let the composition read its answer (`reads: answer`)."
    if wording.verdict == "readable":
        return f"A composition can read this: {how}, asked in this wording."
    if wording.verdict == "partly readable":
        return f"A composition gets a part of it at most ({how}); another wording may hold more (--template)."
    if wording.verdict == "in the text":
        return "The probe does not show that the expert knows more than the words of the text say."
    return (
        f"A composition has nothing to read here. {own or 'Try'}{'; try' if own else ''} another wording (--template)."
    )


def _about_answers(report: ProbeReport, wording: WordingReport) -> str:
    """What it means that the states hold the label and hardly any answer states it, and what to try."""
    answer, mistake = wording.answer, wording.mistake
    if answer is None or mistake is None or answer.accuracy > _HARDLY_ANY:
        return ""
    if wording.verdict not in ("readable", "partly readable"):
        return ""
    labels, other = " ".join(visible(", ".join(report.labels)).split()), "without --raw" if report.raw else "with --raw"
    choice = f"Answer with one of: {labels}." if len(labels) <= _MOST_SHOWN else "Answer with the label alone."
    return (
        f" Its own answers begin with the label in {percent(answer.accuracy)}, such as {_quoted(mistake.answer)} where "
        f"{_quoted(mistake.expected)} is right ({mistake.place}): its states hold the label, and its text does not "
        "begin with it. Look whether the answers state it in another form, and try a wording that asks for the label "
        f"alone (--template '... {choice}'), or {other}. If no wording helps, compositions that exchange text cannot "
        "use what this expert knows, and those that read its states can."
    )


def _quoted(text: str) -> str:
    """The text in one line, cut if it is long."""
    shown = " ".join(visible(text).split())
    return repr(shown if len(shown) <= _MOST_SHOWN else f"{shown[: _MOST_SHOWN - 3]}...")
