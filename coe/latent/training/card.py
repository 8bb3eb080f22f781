"""The card of a trained composition: README.md of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from coe.engines.latent.mot_router import LATENT
from coe.latent.training.answer_rows import rows_digest
from coe.latent.training.loop import Outcome
from coe.latent.training.trainer import Job, Trainer
from registry.spec import ONE_BASE_ARCHITECTURES


def card_of(job: Job, trainer: type[Trainer], outcome: Outcome, n_parameters: int) -> str:
    """Members, data, settings, and what the training has changed on the validation rows."""
    config = job.config
    members = "\n".join(f"- `{spec.name}`: {spec.digest}" for spec in job.members)
    return f"""# {config.out.name}

A composed expert of the architecture `{trainer.architecture}`: {_roles(job, trainer)} The weights of the
members are not in this folder, and are as they were.

| validation | before | after |
|---|---|---|
| cross-entropy of an answer token | {outcome.before.loss:.4f} | {outcome.after.loss:.4f} |
| answers whose every token is the most likely one | {outcome.before.accuracy:.1%} | {outcome.after.accuracy:.1%} |

"Before" is {trainer.start}. The best step was {outcome.best_step} of {outcome.steps};
{n_parameters:,} trained weights; {outcome.seconds:.0f} s in steps and validations.

## Members

{members}

## Data

- training: {len(job.train):,} rows, {rows_digest(job.train)}
- validation: {len(job.valid):,} rows, {rows_digest(job.valid)}

## Settings

Preset `{config.preset}`:

```json
{_json(job.settings.model_dump(mode="json"))}
```

```json
{_json(config.training.model_dump(mode="json"))}
```
"""


def _roles(job: Job, trainer: type[Trainer]) -> str:
    primary, *peers = job.config.members
    if trainer.architecture in ONE_BASE_ARCHITECTURES:
        return f"every token mixes {_listed([primary, *peers])}, which are adapters of one base."
    if job.config.preset == "logits":
        return f"a gate weighs, for each token, the predictions of {_listed([primary, *peers])}."
    if getattr(job.settings, "router", None) == LATENT:
        return f"a router chooses which of {_listed([primary, *peers])} answers, and which of the others it reads."
    return f"`{primary}` answers, and reads what its peers leave for it: {_listed(peers)}."


def _listed(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False)
