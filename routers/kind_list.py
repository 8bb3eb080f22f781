"""The visible list of router kinds. A new kind is one file and one line here; `routers.factory` makes them."""

from __future__ import annotations

from typing import Final

KINDS: dict[str, str] = {
    "category": "routers.kinds.category.router:CategoryRouter",
    "knn": "routers.kinds.knn:KNNRouter",
    "cluster": "routers.kinds.cluster:ClusterRouter",
    "factor": "routers.kinds.factor:FactorRouter",
    "contrastive": "routers.kinds.contrastive.router:ContrastiveRouter",
    "pilot": "routers.kinds.pilot:PilotRouter",
    "guarded": "routers.kinds.guarded:GuardedRouter",
    "quality": "routers.kinds.quality.router:QualityRouter",
    "skill": "routers.kinds.skill.router:SkillRouter",
    "auto": "routers.kinds.auto.router:AutoRouter",
    "fixed": "routers.kinds.baselines:FixedRouter",
    "random": "routers.kinds.baselines:RandomRouter",
    "best-single": "routers.kinds.baselines:BestSingleRouter",
}
"""kind -> `module:Class`, imported only when it is used."""
UPDATABLE: Final = ("knn", "cluster", "category", "pilot")
"""The kinds that keep their training rows, so that `routers.update` can change them."""
