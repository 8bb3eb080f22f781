"""Which files take the place of others in a running process, and how it is parked; vLLM is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_models import model_spec, save_other_weights
from safetensors.torch import load_file, save_file

from coe.engines.base import ShapeKey
from coe.engines.page_cache import read_ahead
from coe.engines.vllm.files import check_merged, fits_in_place
from coe.engines.vllm.slot import VLLMSlot
from coe.errors import EngineError, WeightsError
from registry.spec import ExpertSpec


def test_only_files_with_the_same_config_tokenizer_and_tensors_fit_in_place(tiny: Path, tmp_path: Path) -> None:
    other = save_other_weights(tiny, tmp_path / "other")
    assert fits_in_place("other", other, tiny)
    assert not fits_in_place("other", other, None)
    assert not fits_in_place("other", other, tmp_path / "deleted")
    for file, old, new in (
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        ("tokenizer.json", '"version": "1.0"', '"version":  "1.0"'),
    ):
        text = (other / file).read_text()
        assert old in text
        (other / file).write_text(text.replace(old, new))
        assert not fits_in_place("other", other, tiny)
        (other / file).write_text(text)
    assert fits_in_place("other", other, tiny)


def test_damaged_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    other = save_other_weights(tiny, tmp_path / "other")
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="'other' cannot be loaded"):
        fits_in_place("other", other, tiny)


@pytest.mark.parametrize("lost", ["1.mlp.up_proj", "0.mlp.gate_proj", "1.self_attn.v_proj"])
def test_a_checkpoint_that_lacks_a_part_of_merged_weights_is_refused(tiny: Path, tmp_path: Path, lost: str) -> None:
    """vLLM would answer with whatever is in memory."""
    other = save_other_weights(tiny, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    del tensors[f"model.layers.{lost}.weight"]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(WeightsError, match=f"lacks 1 of the model's weights, such as model.layers.{lost}.weight"):
        fits_in_place("other", other, tiny)


def test_models_without_a_part_in_every_layer_are_whole() -> None:
    check_merged("m", Path("/m"), ("a.0.up_proj.weight", "a.1.up_proj.weight"), {})  # a model without gates
    keys = ("a.0.k_proj.weight", "a.1.k_proj.weight", "a.1.v_proj.weight", "a.1.v_proj.bias")
    for config in ({"attention_k_eq_v": True}, {"text_config": {"attention_k_eq_v": True}}):
        check_merged("m", Path("/m"), keys, config)
    with pytest.raises(WeightsError, match=r"such as a\.0\.v_proj\.weight"):
        check_merged("m", Path("/m"), keys, {"text_config": {}})
    experts = [f"a.experts.{i}.{part}_proj" for i in (0, 1) for part in ("gate", "up")]
    packed = [f"{each}.{kind}" for each in experts for kind in ("qweight", "scales")]
    check_merged("m", Path("/m"), packed, {})
    with pytest.raises(WeightsError, match=r"lacks 1 .* such as a\.experts\.1\.up_proj\.qweight"):
        check_merged("m", Path("/m"), packed[:6], {})


class Expert:
    """As VLLMExpert; `log` has what happens to processes, which are numbered."""

    def __init__(self, spec: ExpertSpec, path: Path, log: list[str], fails: set[str]) -> None:
        self.spec, self.path, self.log, self.fails = spec, path, log, fails
        self.process = ""

    def does(self, what: str) -> None:
        self.log.append(f"{what} {self.process}")
        if what in self.fails:
            raise EngineError(f"{what} fails")

    async def open(self) -> None:
        self.process = str(sum(each.startswith("open") for each in self.log) + 1)
        self.does("open")

    async def close(self) -> None:
        self.does("close")

    async def sleep(self) -> bool:
        self.does("sleep")
        return "died" not in self.fails

    async def wake(self) -> None:
        self.does("wake")

    async def take_over(self, former: Expert) -> bool:
        self.process = former.process
        self.does("reload")
        return True


class Slots:
    def __init__(self, folder: Path, *, sleeps: bool = True) -> None:
        self.log: list[str] = []
        self.fails: set[str] = set()
        self.spec, self.folder = model_spec(folder), folder
        self.slot = VLLMSlot(ShapeKey(), self._expert, sleeps=sleeps)  # type: ignore[arg-type]

    def _expert(self, spec: ExpertSpec, path: Path) -> Expert:
        return Expert(spec, path, self.log, self.fails)

    async def switch(self, folder: Path | None = None) -> None:
        expert = await self.slot.switch(self.spec, folder or self.folder)
        assert self.slot.expert is expert


async def test_a_parked_process_sleeps_and_reads_weights_in_place_after_it_has_woken(
    tiny: Path, tmp_path: Path
) -> None:
    slots = Slots(tiny)
    await slots.switch()
    for _ in range(2):
        assert await slots.slot.park() is True
    assert slots.slot.expert is None and slots.log == ["open 1", "sleep 1"]
    for _ in range(2):
        await slots.slot.unpark()
    assert slots.slot.expert is None  # its weights were discarded
    await slots.switch()  # the same expert
    await slots.slot.park()
    await slots.switch(save_other_weights(tiny, tmp_path / "other"))  # without `unpark`
    assert slots.log[2:] == ["wake 1", "reload 1", "sleep 1", "wake 1", "reload 1"]
    await slots.slot.park()
    for _ in range(2):
        await slots.slot.close()
    assert slots.log[-2:] == ["sleep 1", "close 1"] and slots.slot.expert is None


async def test_on_a_cpu_a_parked_process_ends(tiny: Path) -> None:
    slots = Slots(tiny, sleeps=False)
    assert await slots.slot.park() is False
    await slots.slot.unpark()
    await slots.switch()
    assert await slots.slot.park() is False
    await slots.slot.unpark()
    await slots.switch()
    assert slots.log == ["open 1", "close 1", "open 2"]


@pytest.mark.parametrize(
    ("fails", "log"),
    [
        ("sleep", ["open 1", "sleep 1", "close 1", "open 2"]),
        ("died", ["open 1", "sleep 1", "close 1", "open 2"]),
        ("wake", ["open 1", "sleep 1", "wake 1", "close 1", "open 2"]),
    ],
)
async def test_a_process_that_does_not_sleep_or_wake_ends_and_the_next_switch_starts_one(
    fails: str, log: list[str], tiny: Path
) -> None:
    slots = Slots(tiny)
    slots.fails.add(fails)
    await slots.switch()
    await slots.slot.park()
    await slots.slot.unpark()
    await slots.switch()
    assert slots.log == log


async def test_damaged_files_leave_the_expert_and_its_process(tiny: Path, tmp_path: Path) -> None:
    slots = Slots(tiny)
    await slots.switch()
    expert, other = slots.slot.expert, save_other_weights(tiny, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError):
        await slots.switch(other)
    assert slots.slot.expert is expert and slots.log == ["open 1"]
    slots.fails.add("reload")
    with pytest.raises(EngineError, match="reload fails"):
        await slots.switch(save_other_weights(tiny, tmp_path / "another"))
    assert slots.slot.expert is None
    slots.fails.clear()
    await slots.switch()
    assert slots.log[-1] == "open 2"


async def test_prefetch_reads_ahead_and_leaves_missing_files_to_the_load(tiny: Path, tmp_path: Path) -> None:
    slots = Slots(tiny)
    await slots.slot.prefetch(slots.spec, tiny)
    await slots.slot.prefetch(slots.spec, tmp_path / "gone")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    read_ahead(tmp_path)
    assert slots.log == [] and slots.slot.expert is None
