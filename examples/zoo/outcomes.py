"""The training outcomes of the zoo's router: shipped, or measured again for other experts.

outcomes.parquet           experts x training rows, written by `coe eval`
outcomes.digests.json      the digests of the experts that were measured
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from coe.evaluation.answer_folder import open_answer_folder
from coe.evaluation.plan import plan_run
from coe.evaluation.runner import Progress, run
from coe.evaluation.tasks import find_tasks
from coe.host import Host
from registry.spec import ExpertSpec
from registry.storage import coe_home
from routers.outcomes.table import OutcomeTable

ZOO = Path(__file__).parent
SHIPPED = ZOO / "outcomes.parquet"
DIGESTS = ZOO / "outcomes.digests.json"


def shipped_outcomes(experts: Mapping[str, ExpertSpec]) -> OutcomeTable | None:
    """The table in the repository, if it was measured on exactly these experts; otherwise None."""
    if not (SHIPPED.exists() and DIGESTS.exists()):
        return None
    measured = json.loads(DIGESTS.read_text(encoding="utf-8"))
    now = {name: spec.digest for name, spec in experts.items()}
    return OutcomeTable.read(SHIPPED) if measured == now else None


async def measured_outcomes(host: Host, on_progress: Callable[[Progress], None]) -> OutcomeTable:
    """Ask every expert every training question, as `coe eval` does; answers of an interrupted call are kept."""
    plan = plan_run(host.snapshot.experts, find_tasks(str(ZOO / "tasks"), []))
    with open_answer_folder(coe_home() / "zoo" / "outcomes", plan, resume=True) as folder:
        report = await run(plan, folder, host.ask, on_progress=on_progress)
        return report.outcome_table()
