"""Which expert answers: a router estimates every expert's quality and cost, `decide` chooses. No engine, no Ray.

    base          Query, Estimate, Router, RoutingDecision: the vocabulary
    decision      decide: from estimates to decisions, under a cost weight; ranking: the rule that it ranks by
    assignment    experts for many queries at once: within one budget, capacities and the cost of loads
    selectors     how many experts a decision holds; constraints: which experts can take a query at all
    tokens        estimated prompt tokens: a range over tokenizers
    kind_list     the list of router kinds
    factory       build makes a router from a kind and its settings
    fitted        what router kinds share: settings, a fitted model, and their way to an artifact and back
    artifacts     save and load trained routers: safetensors and JSON, never a pickle
    update        add rows or experts to a trained router, or remove an expert
    outcomes      OutcomeTable: n queries x m experts, the one input of training and evaluation
    conversation  what a router reads of a conversation: the user's words, and the weight of each turn
    encoders      text -> vectors
    numeric       fits, distances, calibration, conformal thresholds
    kinds         the routers themselves, one module or folder a method
    evaluation    what a router is worth: cross-validation, metrics, curves, cost weights, reports, plots
    errors        RouterError and what derives from it

What `__all__` lists is the public interface; it is imported when it is first used.
"""

from typing import TYPE_CHECKING

from registry.lazy import lazy_exports

if TYPE_CHECKING:
    from routers.artifacts import ArtifactMeta, EncoderInfo, LoadedRouter, load, save
    from routers.base import Estimate, Message, Query, Router, RouterState, RoutingDecision, ToolCall
    from routers.decision import Utility, decide
    from routers.encoders.base import Encoder
    from routers.encoders.build import build_encoder
    from routers.encoders.cache import CachedEncoder
    from routers.encoders.embed import check_dim, embed
    from routers.encoders.hashing import HashingEncoder
    from routers.errors import (
        BaselineLeftOut,
        EvaluatingOnTrainingData,
        InvalidArtifact,
        InvalidEncoder,
        InvalidOutcomes,
        InvalidSettings,
        NoEligibleExpert,
        RouterError,
        StaleArtifactWarning,
        UnknownRouterKind,
    )
    from routers.evaluation.compare import Comparison, compare
    from routers.evaluation.cost_weight import MeetBudget, SaveCost
    from routers.evaluation.cross_validation import (
        cross_validate,
        cross_validate_all,
        evaluate,
        standard_baselines,
        stratified_folds,
    )
    from routers.evaluation.plots import draw_reports
    from routers.evaluation.recorded_routing import Choosing
    from routers.evaluation.report import RouterReport
    from routers.evaluation.thresholds import cascade_for_cost, dynamic_for_calls
    from routers.factory import TrainableRouter, build, router_class, settings_of
    from routers.fitted import EmbeddingRouter, FittedRouter
    from routers.kind_list import KINDS
    from routers.outcomes.csv_import import import_csv
    from routers.outcomes.prices import read_prices
    from routers.outcomes.table import OutcomeTable
    from routers.selectors import Cascade, Dynamic, Recruit, Selector, TopK, build_selector
    from routers.update import Updatable, add_expert, add_rows, remove_expert

__all__ = [
    "KINDS",
    "ArtifactMeta",
    "BaselineLeftOut",
    "CachedEncoder",
    "Cascade",
    "Choosing",
    "Comparison",
    "Dynamic",
    "EmbeddingRouter",
    "Encoder",
    "EncoderInfo",
    "Estimate",
    "EvaluatingOnTrainingData",
    "FittedRouter",
    "HashingEncoder",
    "InvalidArtifact",
    "InvalidEncoder",
    "InvalidOutcomes",
    "InvalidSettings",
    "LoadedRouter",
    "MeetBudget",
    "Message",
    "NoEligibleExpert",
    "OutcomeTable",
    "Query",
    "Recruit",
    "Router",
    "RouterError",
    "RouterReport",
    "RouterState",
    "RoutingDecision",
    "SaveCost",
    "Selector",
    "StaleArtifactWarning",
    "ToolCall",
    "TopK",
    "TrainableRouter",
    "UnknownRouterKind",
    "Updatable",
    "Utility",
    "add_expert",
    "add_rows",
    "build",
    "build_encoder",
    "build_selector",
    "cascade_for_cost",
    "check_dim",
    "compare",
    "cross_validate",
    "cross_validate_all",
    "decide",
    "draw_reports",
    "dynamic_for_calls",
    "embed",
    "evaluate",
    "import_csv",
    "load",
    "read_prices",
    "remove_expert",
    "router_class",
    "save",
    "settings_of",
    "standard_baselines",
    "stratified_folds",
]

_ROOMS = {
    "routers.artifacts": "ArtifactMeta EncoderInfo LoadedRouter load save",
    "routers.base": "Estimate Message Query Router RouterState RoutingDecision ToolCall",
    "routers.decision": "Utility decide",
    "routers.encoders.base": "Encoder",
    "routers.encoders.build": "build_encoder",
    "routers.encoders.cache": "CachedEncoder",
    "routers.encoders.embed": "check_dim embed",
    "routers.encoders.hashing": "HashingEncoder",
    "routers.errors": (
        "BaselineLeftOut EvaluatingOnTrainingData InvalidArtifact InvalidEncoder InvalidOutcomes InvalidSettings "
        "NoEligibleExpert RouterError StaleArtifactWarning UnknownRouterKind"
    ),
    "routers.evaluation.compare": "Comparison compare",
    "routers.evaluation.cost_weight": "MeetBudget SaveCost",
    "routers.evaluation.cross_validation": (
        "cross_validate cross_validate_all evaluate standard_baselines stratified_folds"
    ),
    "routers.evaluation.plots": "draw_reports",
    "routers.evaluation.recorded_routing": "Choosing",
    "routers.evaluation.report": "RouterReport",
    "routers.evaluation.thresholds": "cascade_for_cost dynamic_for_calls",
    "routers.kind_list": "KINDS",
    "routers.factory": "TrainableRouter build router_class settings_of",
    "routers.fitted": "EmbeddingRouter FittedRouter",
    "routers.outcomes.csv_import": "import_csv",
    "routers.outcomes.prices": "read_prices",
    "routers.outcomes.table": "OutcomeTable",
    "routers.selectors": "Cascade Dynamic Recruit Selector TopK build_selector",
    "routers.update": "Updatable add_expert add_rows remove_expert",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and refuses names that are not there
    __getattr__, __dir__ = lazy_exports(__name__, _ROOMS)
