"""A mixture of thoughts is served as it was trained: each token is the one that training finds most likely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import say
from mot_members import answer_rows, job, random_rows, save_gemma, save_llama, snapshot_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from coe.engines.base import Member
from coe.engines.hf.composed.mot import Mot
from coe.engines.hf.engine import HFEngine
from coe.engines.latent.text_ends import AS_WRITTEN
from coe.latent.training.mot.draws import Noted
from coe.latent.training.mot.objective import MotObjective, MotRows
from coe.latent.training.mot.trainer import MotTrainer
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

NAMES = ("llama", "gemma", "second")
PROMPTS = [f"{start} {word}" for start in ("the end of", "is the") for word in ("klm", "answer", "a", "north 😀")]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    root = tmp_path_factory.mktemp("served")
    folders = {"llama": save_llama(root / "llama"), "gemma": save_gemma(root / "gemma")}
    folders["second"] = save_llama(root / "second", seed=5)
    for each in folders.values():
        only_characters(each)
    return snapshot_of(folders)


def only_characters(folder: Path) -> None:
    """Tokens that their text does not determine, such as single bytes, are not written."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    texts = [tokenizer.decode([token], **AS_WRITTEN) for token in range(len(tokenizer))]
    others = [i for i, text in enumerate(texts) if tokenizer(text, add_special_tokens=False)["input_ids"] != [i]]
    tensors["lm_head.weight"][others] = 0.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


async def test_each_token_of_a_served_answer_is_the_likeliest_one_in_training(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    objective = MotTrainer.prepare(
        job(tmp_path, snapshot, NAMES, random_rows(8, 0), random_rows(4, 1), settings={"k": 2, "saved": "float32"})
    )
    torch.manual_seed(3)
    for name, parameter in objective.interactions.named_parameters():
        if name.endswith("output"):
            torch.nn.init.normal_(parameter, std=0.5)
    assert objective.router is not None
    for parameter in objective.router.parameters():  # several primaries for the few prompts
        torch.nn.init.normal_(parameter)
    path = objective.save(tmp_path / "artifact", "# card").path
    engine = HFEngine(device="cpu", dtype="float32")
    members = {name: Member(await engine.load(snapshot.experts[name], folder(snapshot, name))) for name in NAMES}
    composed = ExpertSpec(name="mot", kind=Kind.COMPOSED, architecture="mot", members=NAMES, source=str(path))
    served: Any = Mot(composed, members, path)
    compared, primaries = 0, set()
    for prompt in PROMPTS:
        request = GenerateRequest(messages=(Message("user", prompt),), max_tokens=6)
        answer = (await say(served, request)).text
        chosen = served._composition().chooser.choose(prompt)
        order = [NAMES.index(name) for name in (chosen.primary, *chosen.peers)]
        if answer and all(grows_by_tokens(objective, member, answer) for member in order):
            logits, targets = forced(objective, order, prompt, answer)
            assert logits.argmax(1)[: len(targets)].tolist() == targets, (prompt, answer)
            compared, primaries = compared + len(targets), primaries | {chosen.primary}
    for member in members.values():
        await engine.unload(member.expert)
    objective.close()
    assert compared >= 12 and len(primaries) > 1


def folder(snapshot: Snapshot, name: str) -> Path:
    return Path(snapshot.experts[name].source)


def grows_by_tokens(objective: MotObjective, member: int, answer: str) -> bool:
    """Whether the tokens of every beginning of the answer are the first ones of the whole answer."""
    tokenizer = objective.members[member]._weights.loaded.tokenizer
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids, **AS_WRITTEN) != answer:
        return False
    parts = [tokenizer(answer[:n], add_special_tokens=False)["input_ids"] for n in range(len(answer) + 1)]
    return all(part == ids[: len(part)] for part in parts)


def forced(objective: MotObjective, order: list[int], prompt: str, answer: str) -> tuple[torch.Tensor, list[int]]:
    """Logits with the answer given, and its tokens, for the members that served it."""
    [row] = answer_rows([(prompt, answer)])
    readings = [[member.reading(row.prompt, row.answer)] for member in objective.members]
    for store, own in zip(objective._stores, readings, strict=True):
        store.measure(own, lambda done, total: None)
    rows = MotRows(readings, torch.zeros(1, 3), torch.zeros(1, 3))
    logits = objective._logits(rows, order[0], [0], [[Noted(peer, 0) for peer in order[1:]]])
    return logits.detach(), list(readings[order[0]][0].targets[:-1])
