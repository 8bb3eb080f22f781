"""Routers of llmrouter-lib on one fold; runs in a separate environment with that package.

    python peer_llmrouter.py FOLDER KIND     reads FOLDER/{train,test}.npz, writes FOLDER/KIND.json

Driven by `peers.py`. It uses the package's own files, classes and trainers; only its encoder, a Longformer fetched from
a hub, is replaced by the vectors that all compared routers read.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROUTERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # kind: package, router, trainer, and the settings that the project's own example configurations give
    "knnrouter": ("knnrouter", "KNNRouter", "KNNRouterTrainer", {"n_neighbors": 5, "metric": "cosine"}),
    "knnrouter-100": ("knnrouter", "KNNRouter", "KNNRouterTrainer", {"n_neighbors": 100, "metric": "cosine"}),
    "svmrouter": ("svmrouter", "SVMRouter", "SVMRouterTrainer", {"kernel": "rbf", "C": 1.0, "gamma": "scale"}),
    "mlprouter": (
        "mlprouter",
        "MLPRouter",
        "MLPTrainer",
        {"hidden_layer_sizes": [128, 64], "activation": "relu", "lr": 0.001, "epochs": 100, "batch_size": 32},
    ),
    "mfrouter": ("mfrouter", "MFRouter", "MFRouterTrainer", {"latent_dim": 128, "lr": 0.001, "epochs": 5}),
}


def main() -> None:
    folder, kind = Path(sys.argv[1]).resolve(), sys.argv[2]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, test = np.load(folder / "train.npz"), np.load(folder / "test.npz")
    package, router_name, trainer_name, settings = ROUTERS[kind]
    if package == "mfrouter":
        settings = settings | {"text_dim": int(train["vectors"].shape[1])}
    config = write_files(folder, kind, train, settings)
    module = importlib.import_module(f"llmrouter.models.{package}")
    routing = importlib.import_module(f"llmrouter.models.{package}.router")
    before = time.perf_counter()
    router = getattr(module, router_name)(str(config))
    getattr(module, trainer_name)(router).train()
    train_s = time.perf_counter() - before
    routing.get_longformer_embedding = lambda text: torch.tensor(test["vectors"][int(text)])
    names, times = [], []
    for row in range(len(test["vectors"])):
        begun = time.perf_counter()
        names.append(router.route_single({"query": str(row)})["model_name"])
        times.append(time.perf_counter() - begun)
    picks = [int(name) for name in names]
    document = {"picks": picks, "train_s": train_s, "route_ms_p50": 1e3 * float(np.median(times))}
    (folder / f"{kind}.json").write_text(json.dumps(document))


def write_files(folder: Path, kind: str, train: Any, settings: dict[str, Any]) -> Path:
    """The files that the package reads: outcomes as JSONL, vectors as a tensor, a YAML that names them."""
    outcomes, vectors = folder / "routing_train.jsonl", folder / "vectors.pt"
    if not outcomes.exists():
        with outcomes.open("w") as lines:
            for row, scores in enumerate(train["scores"]):
                for expert, score in enumerate(scores):
                    line = {
                        "query": f"{row:06d}",
                        "embedding_id": row,
                        "model_name": str(expert),
                        "performance": float(score),
                    }
                    lines.write(json.dumps(line) + "\n")
        torch.save(torch.tensor(train["vectors"]), vectors)
    saved = str(folder / f"{kind}.pkl")
    document = {
        "data_path": {"query_embedding_data": str(vectors), "routing_data_train": str(outcomes)},
        "model_path": {"ini_model_path": "", "save_model_path": saved, "load_model_path": saved},
        "metric": {"weights": {"performance": 1, "cost": 0, "llm_judge": 0}},
        "hparam": settings,
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


if __name__ == "__main__":
    main()
