"""What matters in latent compositions: settings of `notes`, `mot` and their training, each changed alone.

    OMP_NUM_THREADS=1 python benchmarks/latent_ablations.py [--seed 1 --seed 2 --seed 3] [--only NAME] [--folder DIR]

Tiny models with planted knowledge (`planted_models`): the question is two words, the answer the names of their letters'
numbers; one member knows the letters and another the names. Every variant is trained by `coe latent train` on 480
questions about 240 words, and its figures are those of 120 questions about 80 other words, at the lowest loss there.
Chance is 1.6%. A seed has its own words, models, first weights and order of rows; a run takes half a minute on one
core, is kept in the folder, and is not repeated.

Prints a markdown table: right answers by seed and their mean, the mean loss a token, trained weights, seconds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import logging
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from planted_models import make_members, write_rows

NOTES: Final = {"interactions": 2, "shared_width": 32, "heads": 4}
MOT: Final = {**NOTES, "k": 2, "router": "first", "compare": [], "encoder": "hashing:64"}
TRAINING: Final = {
    "steps": 250, "batch": 16, "accumulate": 1, "learning_rate": 5e-3, "wrong_peer": 0.0, "validate_every": 25,
    "patience": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A change of a preset. peers: in place of `knows`."""

    about: str
    preset: str = "notes"
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] = ("knows",)

    def document(self, seed: int) -> dict[str, Any]:
        """The file of `coe latent train`."""
        return {
            "preset": self.preset,
            "config": "service.yaml",
            "members": ["answers", *self.peers],
            "train": "train.jsonl",
            "valid": "valid.jsonl",
            "out": "artifact",
            "settings": {**(MOT if self.preset == "mot" else NOTES), **self.settings},
            "training": {**TRAINING, "seed": seed, **self.training},
        }


VARIANTS: Final[Mapping[str, Variant]] = {
    "notes": Variant("states of the peer's answer in their order, its last layer, two interactions"),
    "order-off": Variant("notes are a set", settings={"order": False}),
    "wrong-peers": Variant("in 15% of the rows a peer leaves the notes of another row", training={"wrong_peer": 0.15}),
    "both": Variant("the last two", settings={"order": False}, training={"wrong_peer": 0.15}),
    "drop-off": Variant("peers are never left out in training", training={"drop_peer": 0.0, "drop_all": 0.0}),
    "keep-off": Variant("no loss that keeps the primary's right answers", training={"keep": 0.0}),
    "lora": Variant("with a LoRA on the primary", settings={"lora": {}}),
    "reads-prompt": Variant("states of the prompt alone", "notes-prompt"),
    "places-all": Variant("of all tokens of the peer's prompt, too", settings={"places": "all"}),
    "layers-same": Variant("the peer's layers at the depths of the interactions", settings={"layers": "same"}),
    "depths-2": Variant("two layers of the peer", settings={"depths": 2}),
    "q-1": Variant("one interaction", settings={"interactions": 1}),
    "q-3": Variant("three interactions", settings={"interactions": 3}),
    "width-8": Variant("notes of 8 numbers", settings={"shared_width": 8}),
    "width-128": Variant("notes of 128 numbers", settings={"shared_width": 128}),
    "spans-off": Variant("no bias for notes on the same characters", settings={"spans": False}),
    "null-off": Variant("no null note", settings={"null_note": False}),
    "three-members": Variant("one more peer, which knows nothing", peers=("knows", "unknowing")),
    "random-peer": Variant("a peer that knows nothing in place of the right one", peers=("unknowing",)),
    "self-notes": Variant("the primary's own notes: weights without knowledge", peers=("again",)),
    "mot": Variant("Mixture of Thoughts: read while the answer is written, layers as published", "mot"),
    "mot-deep": Variant("the same, of the peer's last layer", "mot", {"layers": "deep"}),
    "mot-wrong-peers": Variant("with wrong peers in 15% of the rows", "mot", training={"wrong_peer": 0.15}),
    "mot-k-3": Variant("K = 3: one more peer, which knows nothing", "mot", {"k": 3}, peers=("knows", "unknowing")),
}
"""Each beside `notes` or `mot`, which are the references."""


@dataclass(frozen=True)
class Result:
    """Of a variant and a seed. right: share of the answers, in [0, 1]. loss: nats a token. seconds: of training."""

    right: float
    loss: float
    trained: int
    seconds: float


def result_of(name: str, seed: int, root: Path) -> Result:
    """Train a variant, unless its result is kept."""
    from coe.latent.config import read_train_file
    from coe.latent.training.run import train_composition

    folder = root / str(seed) / name
    kept = folder / "result.json"
    if not kept.exists():
        service = make_members(root / str(seed) / "models", seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in ("service.yaml", "experts.yaml"):
            shutil.copy(service.parent / file, folder)
        write_rows(folder, seed)
        (folder / "train.yaml").write_text(yaml.safe_dump(VARIANTS[name].document(seed)))
        trained = train_composition(
            read_train_file(folder / "train.yaml"),
            on_progress=lambda what, done, total: None,
            on_step=lambda step, figures: None,
        )
        after, seconds = trained.outcome.after, trained.outcome.seconds
        found = Result(after.accuracy, after.loss, trained.n_parameters, seconds)
        shutil.rmtree(folder / "artifact")
        kept.write_text(json.dumps(asdict(found)))
    return Result(**json.loads(kept.read_text()))


def line_of(name: str, found: list[Result]) -> str:
    """A line of the table."""
    right = [100 * each.right for each in found]
    cells = [
        name,
        VARIANTS[name].about,
        " ".join(f"{share:.0f}" for share in right),
        f"{statistics.fmean(right):.0f}",
        f"{statistics.fmean(each.loss for each in found):.2f}",
        f"{found[0].trained:,}",
        f"{statistics.fmean(each.seconds for each in found):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what is not kept, and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed", type=int, action="append", help="by default 1, 2 and 3")
    arguments.add_argument("--only", action="append", choices=VARIANTS, help="variants; by default all")
    arguments.add_argument("--folder", type=Path, default=Path("latent-ablations"), help="where runs are kept")
    given = arguments.parse_args()
    logging.disable(logging.WARNING)
    print("| variant | | right by seed, % | mean | loss | trained | s |")
    print("|---|---|---|---:|---:|---:|---:|", flush=True)
    for name in given.only or VARIANTS:
        found = []
        for seed in given.seed or (1, 2, 3):
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            found.append(result_of(name, seed, given.folder))
        print(line_of(name, found), flush=True)


if __name__ == "__main__":
    main()
