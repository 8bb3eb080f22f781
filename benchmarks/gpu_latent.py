"""Latent compositions on a GPU: decoding with notes, members in step, a training step, memory.

    python benchmarks/gpu_latent.py [--size 1.5b 7b] [--minutes 8] [--json PATH]

Needs a CUDA machine with this repository, and no network: models of real shapes with random weights, and adapters, are
made here (`gpu_models.py`). For each size, one after the other, each in a process of its own:

    decoding  tokens/s with hidden states and with key-value entries of two peers beside the bare primary's
              (`latent_decoding.py`; aim: at least 0.95)
    together  an answer of `mot` and of combined logits over the sum of its members' (`latent_together.py`; aim: 1.3)
    training  seconds of a step of `notes`, `cache` and `mot`, and the most memory that the device gave

A part that `--minutes` leave no time for is left out, and the results name it. Without a CUDA device the script says so
and ends with status 0; `--device cpu --size tiny` runs the same on a CPU. The results are JSON, on stdout or in
`--json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from gpu_models import SIZES, save_adapter, save_model

HERE: Final = Path(__file__).parent
N_ADAPTERS: Final = 3
STEPS: Final = 6
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "notes": {"max_answer_tokens": 16},
    "cache": {"max_answer_tokens": 16},
    "mot": {"k": 2, "router": "first"},
}
"""Preset -> its settings."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*SIZES], default=["1.5b", "7b"])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # one training, in a process of its own
    arguments = parser.parse_args()
    if arguments.train is not None:
        print(json.dumps(trained(arguments.train)))
        return 0
    if reason := missing(arguments.device):
        print(f"skipped: {reason}")
        return 0
    results = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "device": described(arguments.device)}
    ends = time.monotonic() + 60 * arguments.minutes
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as folder:
            results[size] = measured(size, Path(folder), arguments, ends)
    text = json.dumps(results, indent=1)
    if arguments.json is None:
        print(text)
    else:
        arguments.json.write_text(text + "\n")
    return 0


def missing(device: str) -> str | None:
    """Why nothing can be measured here."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        return "this machine has no CUDA device (--device cpu --size tiny runs the same on a CPU)"
    return None


def described(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def measured(size: str, folder: Path, arguments: argparse.Namespace, ends: float) -> dict[str, Any]:
    """The parts of one size."""
    device = arguments.device
    models = [save_model(folder / name, size, seed, device) for seed, name in enumerate(("first", "second"))]
    adapters = [save_adapter(folder / "adapters" / f"a{i}", models[0], seed=i) for i in range(N_ADAPTERS)]
    common = ["--device", device, "--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats), "--json", "-"]
    parts: dict[str, Sequence[str]] = {
        "decoding": [str(HERE / "latent_decoding.py"), str(models[0]), *common],
        "together": [str(HERE / "latent_together.py"), *map(str, models), str(adapters[0].parent), *common],
    }
    write_service(folder, device)
    for preset, settings in PRESETS.items():
        parts[f"training of {preset}"] = [__file__, "--train", str(write_training(folder, preset, settings))]
    return {name: run(command, folder, ends) for name, command in parts.items()}


def run(command: Sequence[str], folder: Path, ends: float) -> Any:
    """The JSON that a script prints last; why there is none."""
    left = ends - time.monotonic()
    if left <= 0:
        return "left out: no time"
    environment = {**os.environ, "COE_HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        ended = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        return "stopped: no time"
    if ended.returncode:
        return f"failed with status {ended.returncode}: {ended.stderr[-2000:]}"
    start = min(i for i in (ended.stdout.find("["), ended.stdout.find("{")) if i >= 0)
    return json.loads(ended.stdout[start:])


def write_service(folder: Path, device: str) -> None:
    """A service of the models and one adapter, and rows to train with."""
    experts = [
        {"name": "first", "kind": "model", "source": "first"},
        {"name": "second", "kind": "model", "source": "second"},
        {"name": "a0", "kind": "adapter", "base": "first", "source": "adapters/a0"},
    ]
    (folder / "experts.yaml").write_text(json.dumps({"experts": experts}))
    service = {"experts": ["experts.yaml"], "engines": {"hf": {"device": device}}}
    (folder / "service.yaml").write_text(json.dumps(service))
    for name, n in (("train", 8 * STEPS), ("valid", 8)):
        rows = [
            {
                "id": str(i),
                "prompt": f"{name} {i}: how many days are there in a year?",
                "answer": f"{name} {i}: 365 days",
            }
            for i in range(n)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_training(folder: Path, preset: str, settings: Mapping[str, Any]) -> Path:
    """The file of `coe latent train`; JSON is YAML."""
    document = {
        "preset": preset,
        "config": "service.yaml",
        "members": ["first", "a0"] if preset == "cache" else ["first", "second"],
        "train": "train.jsonl",
        "valid": "valid.jsonl",
        "out": f"out-{preset}",
        "settings": dict(settings),
        "training": {"steps": STEPS, "batch": 8, "accumulate": 1, "validate_every": STEPS, "keep": 0},
    }
    path = folder / f"{preset}.yaml"
    path.write_text(json.dumps(document))
    return path


def trained(path: Path) -> dict[str, Any]:
    """Seconds of the steps but the first, which warms up, and the most memory."""
    import torch

    from coe.latent.config import read_train_file
    from coe.latent.training.run import train_composition

    times = []
    train_composition(
        read_train_file(path),
        on_progress=lambda *_: None,
        on_step=lambda *_: times.append(time.perf_counter()),
    )
    seconds = [after - before for before, after in pairwise(times)]
    return {
        "s_a_step": round(sum(seconds) / len(seconds), 4),
        "rows_a_step": 8,
        "most_device_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
    }


if __name__ == "__main__":
    sys.exit(main())
