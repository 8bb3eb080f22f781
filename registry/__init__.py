"""What experts exist: specs, a versioned store, and where their files come from. Pure data: no torch, no Ray.

    spec          ExpertSpec: everything that is known of an expert without loading it
    store         Registry, in SQL; stored_spec, database, schema, tables, migrations below it
    snapshot      the registry at one moment; aliases, expert_states: what is stated beside the specs
    references    bases and members of experts, checked
    reconcile     experts files: plan, show, apply in one transaction
    documents     any YAML, with line numbers; yaml_loader bounds it; json_text reads JSON
    sources       folders, GGUF files, the Hugging Face hub, endpoints; storage: COE_HOME, atomic writes
    describe      from a stated source to a full spec; inspection, headers, gguf_header, chat_templates, quantization
                  read files
    lora          whether an adapter fits its base, tensor by tensor
    digest        identity by content
    commands      servers that an expert's command starts; command_files: the files that a command names
    deltas        experts stored as their difference from a base, or in a few bits a weight
    endpoints     several endpoints of one remote expert
    composed      the artifact of a composed expert, and the facts that its members give
    keys          API keys: hashed secrets, and what each may be used for; usage: their limits, kept by usage_sql or
                  usage_redis; priorities: of requests
    profiles      measured strengths of experts; strengths summarises them
    plugins       classes of other packages: entry points and `module:Class`
    spelling      "did you mean"; lazy: the exports of this file; retries: where they are logged
    errors        RegistryError and what derives from it

What `__all__` lists is the public interface; it is imported when it is first used.
"""

from typing import TYPE_CHECKING

from registry.lazy import lazy_exports

if TYPE_CHECKING:
    from registry.digest import identity
    from registry.documents import Document, load_document, validate
    from registry.errors import (
        DigestMismatch,
        DiskFull,
        InvalidSpec,
        PluginError,
        Problem,
        RegistryError,
        SourceError,
        StaleChange,
        StoreError,
        TargetError,
        UnknownExpert,
        UnknownPlugin,
    )
    from registry.plugins import Plugins, only_modules
    from registry.profiles import Measure, ProfileRow
    from registry.reconcile import PlannedChange, RegistryPlan, apply, plan
    from registry.sources import SourceKind
    from registry.spec import ExpertSpec, FileRecord, Kind, Price
    from registry.storage import coe_home
    from registry.store import Registry, Snapshot

__all__ = [
    "DigestMismatch",
    "DiskFull",
    "Document",
    "ExpertSpec",
    "FileRecord",
    "InvalidSpec",
    "Kind",
    "Measure",
    "PlannedChange",
    "PluginError",
    "Plugins",
    "Price",
    "Problem",
    "ProfileRow",
    "Registry",
    "RegistryError",
    "RegistryPlan",
    "Snapshot",
    "SourceError",
    "SourceKind",
    "StaleChange",
    "StoreError",
    "TargetError",
    "UnknownExpert",
    "UnknownPlugin",
    "apply",
    "coe_home",
    "identity",
    "load_document",
    "only_modules",
    "plan",
    "validate",
]

_ROOMS = {
    "registry.digest": "identity",
    "registry.documents": "Document load_document validate",
    "registry.errors": (
        "DigestMismatch DiskFull InvalidSpec PluginError Problem RegistryError SourceError StaleChange StoreError "
        "TargetError UnknownExpert UnknownPlugin"
    ),
    "registry.plugins": "Plugins only_modules",
    "registry.profiles": "Measure ProfileRow",
    "registry.reconcile": "PlannedChange RegistryPlan apply plan",
    "registry.sources": "SourceKind",
    "registry.spec": "ExpertSpec FileRecord Kind Price",
    "registry.storage": "coe_home",
    "registry.store": "Registry Snapshot",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and refuses names that are not there
    __getattr__, __dir__ = lazy_exports(__name__, _ROOMS)
