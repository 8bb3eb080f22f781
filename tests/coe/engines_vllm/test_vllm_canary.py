"""The canary: what is kept, what is compared, and what quarantines; vLLM is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from coe.engines.vllm.canary import N_PROMPT, Canaries, CanaryAnswer, prompt, salt
from coe.errors import WeightsError
from registry.spec import ExpertSpec, Kind

SPEC = ExpertSpec(name="m", kind=Kind.MODEL, source="/m", digest="d" * 64)
WAY = ("vllm 1", "cpu", "float32")
FIRST = CanaryAnswer((5, 6, 7), ({5: -0.1}, {6: -0.7, 9: -0.8, 4: -3.0}, {7: -0.1}))


def test_the_first_answer_is_kept_and_the_same_one_passes(tmp_path: Path) -> None:
    Canaries(tmp_path).check(SPEC, WAY, FIRST, tolerant=False)
    [file] = tmp_path.iterdir()
    Canaries(tmp_path).check(SPEC, WAY, FIRST, tolerant=False)
    assert list(tmp_path.iterdir()) == [file]


def test_another_answer_quarantines_until_the_file_is_deleted(tmp_path: Path) -> None:
    canaries, other = Canaries(tmp_path), CanaryAnswer((5, 8, 7), FIRST.top)
    canaries.check(SPEC, WAY, FIRST, tolerant=False)
    for _ in range(2):  # the wrong answer does not replace the kept one
        with pytest.raises(WeightsError, match="quarantined.*token 2 of 3 is 8 instead of 6") as raised:
            canaries.check(SPEC, WAY, other, tolerant=False)
    [file] = tmp_path.iterdir()
    assert str(file) in str(raised.value) and str(file) not in str(raised.value.public)
    file.unlink()
    canaries.check(SPEC, WAY, other, tolerant=False)


def test_other_weights_and_other_hardware_have_answers_of_their_own(tmp_path: Path) -> None:
    canaries, other = Canaries(tmp_path), CanaryAnswer((1, 1, 1), FIRST.top)
    canaries.check(SPEC, WAY, FIRST, tolerant=False)
    canaries.check(SPEC.model_copy(update={"digest": "e" * 64}), WAY, other, tolerant=False)
    canaries.check(SPEC, ("vllm 1", "cuda", "float32"), other, tolerant=False)


def test_tolerance_forgives_a_near_tie_and_nothing_else(tmp_path: Path) -> None:
    canaries = Canaries(tmp_path)
    canaries.check(SPEC, WAY, FIRST, tolerant=True)
    canaries.check(SPEC, ("other",), CanaryAnswer((5, 9, 1), FIRST.top), tolerant=True)  # -0.8 beside -0.7
    for wrong in (4, 77):
        top = (FIRST.top[0], {6: -3.0, wrong: -0.1}, FIRST.top[2])
        with pytest.raises(WeightsError, match="quarantined"):
            canaries.check(SPEC, ("other",), CanaryAnswer((5, wrong, 7), top), tolerant=True)


def test_a_damaged_file_is_written_again(tmp_path: Path) -> None:
    canaries = Canaries(tmp_path)
    canaries.check(SPEC, WAY, FIRST, tolerant=False)
    [file] = tmp_path.iterdir()
    file.write_text('{"tokens": 3}')
    canaries.check(SPEC, WAY, FIRST, tolerant=False)
    with pytest.raises(WeightsError):
        canaries.check(SPEC, WAY, CanaryAnswer((1, 2, 3), FIRST.top), tolerant=False)


def test_prompts_are_in_the_vocabulary_and_salts_are_never_shared() -> None:
    assert len(prompt(300)) == N_PROMPT and max(prompt(300)) < 300
    assert salt(SPEC) != salt(SPEC)
