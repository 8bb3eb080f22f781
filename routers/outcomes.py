"""OutcomeTable: what n queries scored and cost on m experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class OutcomeTable:
    """n queries x m experts.

    scores: (n, m) float64 in [0, 1]; costs_usd: (n, m) or None; domains / folds: per query or None; frame: other columns
    """

    query_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    experts: tuple[str, ...]
    scores: NDArray[np.float64]
    costs_usd: NDArray[np.float64] | None = None
    frame: pd.DataFrame | None = None
