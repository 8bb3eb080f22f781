"""Serve and route many expert LLMs and LoRA adapters as one system.

    local         open_local: the whole system in one process, for notebooks, `coe ask` and the demo
    orchestrator  how a request is answered, end to end; routing and policy: which policy decides, and how
    switching     the expert of a conversation's previous turns, and the price of another one
    compose       what is done with the chosen experts: one answers, several vote, a cascade asks on
    tokens        counts of prompt tokens by the experts' own tokenizers, for the context constraint
    host          holds weights: schedules, leases, generates; host_engines: the engines of its experts
    admission     the requests of a host that wait, in a request_queue an expert; scheduler: which one is next
    residents     the experts in memory: loaded and unloaded on demand, and when they are idle
    latent        what can be read from an expert, and training of composed experts
    hosting       opens a host for a configuration: engines, memory budget
    memory        the cache of resident experts: byte budget, leases, pins, eviction
    engines       turn an expert's files into text: transformers, remote endpoints, fakes, plug-ins
    signals       features that routers ask for: hidden states, keywords
    config        one tree of settings, validated at once; experts: which experts it names
    engine_config its section `engines`
    evaluation    tasks, graders: what experts and policies score
    batch         offline answers to files of requests; runs: folders of runs that resume, of both
    simulation    the scheduler and its rivals under a virtual clock: many experts on little memory
    serve         the OpenAI-compatible service on Ray Serve; protocol: its requests and responses
    cli           the command `coe`
    types         the values that move through the system; sampling: options of decoding; chunks: joined to an answer
    errors        CoeError and what derives from it
    own_ray       a Ray of this process, on this machine
    seam          what third-party code raises, translated into these errors
    telemetry     traces and JSON logs, off by default; expert_spans: the spans of a call to an expert

What `__all__` lists is the public interface; it is imported when it is first used. Plug-ins: docs/plugins.md.
"""

from typing import TYPE_CHECKING

from coe.version import __version__
from registry.lazy import lazy_exports

if TYPE_CHECKING:
    from coe.compose import COMPOSITIONS, Composition, Done, ExpertCall, ExpertCalls, Final, Single, build_composition
    from coe.config import CompositionConfig, Config, PolicyConfig, load_config
    from coe.engines import (
        ENGINES,
        Adapter,
        Capabilities,
        Engine,
        Expert,
        LoadingEngine,
        ShapeKey,
        Slot,
        SlotEngine,
        create_engine,
    )
    from coe.errors import (
        Abstained,
        BudgetExceeded,
        CoeError,
        CompositionError,
        ConfigError,
        ContextLengthExceeded,
        DeadlineExceeded,
        EngineError,
        ExpertDrained,
        HostLost,
        InUse,
        InvalidRequest,
        LoadFailing,
        NotAllowed,
        NotServedHere,
        OutOfMemory,
        Overloaded,
        PolicyUnavailable,
        Rejected,
        RemoteError,
        RoutingFailed,
        Scope,
        TaskError,
        TemplateError,
        UnknownModel,
        Unsupported,
        WeightsError,
    )
    from coe.evaluation.graders import GRADERS, GoldError, Grader, GraderModel
    from coe.evaluation.recorded_answers import replay_composition
    from coe.evaluation.tasks import Task, load_task
    from coe.host import Host
    from coe.hosting import open_host
    from coe.local import System, open_local
    from coe.orchestrator import Orchestrator, Reply
    from coe.policy import Policy
    from coe.sampling import SamplingOptions
    from coe.types import (
        Answer,
        Chunk,
        Failure,
        GenerateRequest,
        Timing,
        TokenLogprob,
        ToolCallDelta,
        Usage,
        Wants,
    )
    from routers.base import Message, Query

__all__ = [
    "COMPOSITIONS",
    "ENGINES",
    "GRADERS",
    "Abstained",
    "Adapter",
    "Answer",
    "BudgetExceeded",
    "Capabilities",
    "Chunk",
    "CoeError",
    "Composition",
    "CompositionConfig",
    "CompositionError",
    "Config",
    "ConfigError",
    "ContextLengthExceeded",
    "DeadlineExceeded",
    "Done",
    "Engine",
    "EngineError",
    "Expert",
    "ExpertCall",
    "ExpertCalls",
    "ExpertDrained",
    "Failure",
    "Final",
    "GenerateRequest",
    "GoldError",
    "Grader",
    "GraderModel",
    "Host",
    "HostLost",
    "InUse",
    "InvalidRequest",
    "LoadFailing",
    "LoadingEngine",
    "Message",
    "NotAllowed",
    "NotServedHere",
    "Orchestrator",
    "OutOfMemory",
    "Overloaded",
    "Policy",
    "PolicyConfig",
    "PolicyUnavailable",
    "Query",
    "Rejected",
    "RemoteError",
    "Reply",
    "RoutingFailed",
    "SamplingOptions",
    "Scope",
    "ShapeKey",
    "Single",
    "Slot",
    "SlotEngine",
    "System",
    "Task",
    "TaskError",
    "TemplateError",
    "Timing",
    "TokenLogprob",
    "ToolCallDelta",
    "UnknownModel",
    "Unsupported",
    "Usage",
    "Wants",
    "WeightsError",
    "__version__",
    "build_composition",
    "create_engine",
    "load_config",
    "load_task",
    "open_host",
    "open_local",
    "replay_composition",
]

_ROOMS = {
    "coe.compose": "COMPOSITIONS ExpertCall ExpertCalls Composition Done Final Single build_composition",
    "coe.config": "CompositionConfig Config PolicyConfig load_config",
    "coe.engines": "ENGINES Adapter Capabilities Engine Expert LoadingEngine ShapeKey Slot SlotEngine create_engine",
    "coe.errors": (
        "Abstained BudgetExceeded CoeError CompositionError ConfigError ContextLengthExceeded DeadlineExceeded "
        "EngineError ExpertDrained HostLost InUse InvalidRequest LoadFailing NotAllowed NotServedHere OutOfMemory "
        "Overloaded PolicyUnavailable Rejected RemoteError RoutingFailed Scope TaskError TemplateError UnknownModel "
        "Unsupported WeightsError"
    ),
    "coe.evaluation.graders": "GRADERS GoldError Grader GraderModel",
    "coe.evaluation.recorded_answers": "replay_composition",
    "coe.evaluation.tasks": "Task load_task",
    "coe.host": "Host",
    "coe.hosting": "open_host",
    "coe.local": "System open_local",
    "coe.orchestrator": "Orchestrator Reply",
    "coe.policy": "Policy",
    "coe.sampling": "SamplingOptions",
    "coe.types": "Answer Chunk Failure GenerateRequest Timing TokenLogprob ToolCallDelta Usage Wants",
    "routers.base": "Message Query",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and refuses names that are not there
    __getattr__, __dir__ = lazy_exports(__name__, _ROOMS)
