"""Who should be primary, measured: losses of the bare members as an outcome table, and other routers fitted on it.

The table has a row for each training prompt and a column for each member; a score is the mean probability of an answer
token, exp(-loss). `coe router train` and the kinds of `routers.kinds` read it as they read any table, so the router of
the composition can be compared with them on equal terms: the same prompts, the same losses, the same encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coe.errors import ConfigError
from coe.latent.training.answer_rows import AnswerRow
from routers.base import Query
from routers.encoders.build import CachedEncoder, Encoder
from routers.errors import RouterError
from routers.factory import build
from routers.outcomes.table import OutcomeTable


def outcomes(rows: Sequence[AnswerRow], losses: Tensor, members: Sequence[str]) -> OutcomeTable:
    """The outcome table of rows. losses: (N, M) of an answer token with each member as primary, in nats."""
    return OutcomeTable(
        query_ids=tuple(row.id for row in rows),
        prompts=tuple(row.prompt for row in rows),
        experts=tuple(members),
        scores=np.exp(-losses.double().numpy()),
    )


def fitted_choices(kind: str, table: OutcomeTable, rows: Sequence[AnswerRow], encoder: Encoder) -> Tensor:
    """(n,) position of the member that a router of this kind, fitted on the table, would choose for each row.

    Raises:
        ConfigError: there is no such kind, or it cannot be fitted on the table.
    """
    try:
        router = build(kind, CachedEncoder(encoder), {}).fit(table)
        quality = router.estimate([Query.of(row.prompt) for row in rows]).quality
    except RouterError as error:
        raise ConfigError(f"settings.compare: a {kind!r} router cannot be fitted on the rows: {error}") from error
    order = [router.experts.index(name) for name in table.experts]
    return torch.from_numpy(np.asarray(quality)[:, order].argmax(1))
