"""Training of a Mixture of Thoughts (arXiv 2509.21164), the preset `mot`.

As published: frozen members of any widths and tokenizers; a router of a frozen encoder and an MLP chooses K of them and
the primary among these; Q cross-attentions at equal depths; peers read what the primary writes. What differs, and why:
docs/latent.md. Every member may be primary with `router: latent`, so each has its own interactions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Final

import torch
from pydantic import BaseModel
from torch import Tensor

from coe.engines.latent.mot import MotInteractions, documents
from coe.engines.latent.mot_router import LATENT, MotRouter, encoder_facts
from coe.engines.latent.shape import InteractionShape, deep_layers, same_layers
from coe.errors import CoeError, ConfigError
from coe.latent.training.answer_rows import AnswerRow
from coe.latent.training.checks import check_members, sizes_of
from coe.latent.training.members import Member, Members, Reading
from coe.latent.training.mot.choices import fitted_choices, outcomes
from coe.latent.training.mot.objective import MotObjective, MotRows
from coe.latent.training.mot.settings import MotSettings
from coe.latent.training.mot.states import Measured, StateStore
from coe.latent.training.trainer import Job
from registry.digest import identity
from registry.storage import coe_home
from routers.encoders.build import Encoder, build_encoder
from routers.encoders.embed import embed
from routers.errors import RouterError
from routers.factory import router_class

OUTCOMES: Final = "primary_outcomes.parquet"
"""In `Job.work`: the outcome table of the bare members, for `coe router train`."""
_STATES: Final = ("latent", "states")
"""Folder of the members' states under `$COE_HOME`: trainings share them."""


class MotTrainer:
    """See `coe.latent.training.trainer.Trainer`."""

    settings: ClassVar[type[BaseModel]] = MotSettings
    architecture: ClassVar[str] = "mot"
    start: ClassVar[str] = "the untouched member that a random router chooses, or with `router: first` the first one"

    @classmethod
    def check(cls, job: Job) -> None:
        """Refuse members whose states cannot be read, K above their number, and an unknown encoder.

        Raises:
            ConfigError: also if a member has too few layers. Unsupported: see `check_members`.
        """
        settings = _settings(job)
        with _placed(job, "k"):
            settings.active(len(job.config.members))
        with _placed(job, "shared_width"):
            if settings.shared_width % settings.heads:
                raise ConfigError(f"shared_width {settings.shared_width} is not a multiple of heads {settings.heads}")
        with _placed(job, "depths"):
            if settings.layers == "same" and settings.depths != MotSettings().depths:
                raise ConfigError("depths is for layers 'deep'; with 'same' an interaction reads one layer of a peer")
        check_members(job, cls.architecture)
        with _placed(job, "interactions"):
            for spec in job.members:
                _layers(spec.name, sizes_of(spec, job.snapshot)[1], settings)
        if settings.router == LATENT:
            with _placed(job, "encoder"):
                _encoder(settings)
            with _placed(job, "compare"):
                for kind in settings.compare:
                    _check_kind(kind)

    @classmethod
    def prepare(cls, job: Job) -> MotObjective:
        """Load all members, and measure what they leave of the rows.

        Raises:
            ContextLengthExceeded, Rejected: a member cannot read a row.
            EngineError, OutOfMemory: a member failed.
        """
        members = Members(job.config.members, job.snapshot, job.service.engines, on_loading=job.on_loading)
        try:
            return _objective(job, members)
        except BaseException:
            members.close()
            raise


@contextmanager
def _placed(job: Job, setting: str) -> Iterator[None]:
    """A ConfigError in the block names the file, line and setting."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{job.file.document.place(('settings', setting))}: {error}") from error


def _objective(job: Job, members: Members) -> MotObjective:
    settings, seed = _settings(job), job.config.training.seed
    identities = [identity(spec, job.snapshot.experts) for spec in job.members]
    layers = [_layers(member.name, member.decoder.n_layers, settings) for member in members]
    interactions = MotInteractions([each.name for each in members], _shapes(members, settings, layers), seed=seed)
    encoder = _encoder(settings) if settings.router == LATENT else None
    stores = [
        StateStore(coe_home().joinpath(*_STATES), member, identity_of, at)
        for member, identity_of, at in zip(members, identities, layers, strict=True)
    ]
    measure = partial(_rows, members=members, stores=stores, encoder=encoder, on_progress=job.on_progress)
    train, valid = measure(job.train), measure(job.valid)
    for member, store, readings in zip(members, stores, train.readings, strict=True):
        interactions.standardise(member.name, *store.moments(readings))
    router = None
    if encoder is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = MotRouter(len(members), settings.active(len(members)), encoder.dim)
    extra = _artifact_settings(settings, members, layers, encoder, interactions)
    table = outcomes(job.train, train.losses / train.n_tokens[:, None], job.config.members)
    table.write(job.work / OUTCOMES)

    def others() -> dict[str, Tensor]:
        kinds = () if encoder is None else settings.compare
        return {kind: fitted_choices(kind, table, job.valid, encoder) for kind in kinds if encoder}

    return MotObjective(
        members, stores, train, valid, interactions, router, settings, job.config.training, identities, extra, others
    )


def _rows(
    rows: Sequence[AnswerRow],
    *,
    members: Members,
    stores: Sequence[StateStore],
    encoder: Encoder | None,
    on_progress: Callable[[str, int, int], None],
) -> MotRows:
    """The rows as all members read them, measured."""
    readings, measured = [], list[Measured]()
    for member, store in zip(members, stores, strict=True):
        readings.append([_reading(member, row) for row in rows])
        measured.append(store.measure(readings[-1], partial(on_progress, f"states of {member.name}")))
    embeddings = None
    if encoder is not None:
        embeddings = torch.from_numpy(embed(encoder, [row.prompt for row in rows]))
    return MotRows(
        readings,
        losses=torch.stack([each.losses for each in measured], 1),
        right=torch.stack([each.right for each in measured], 1),
        embeddings=embeddings,
    )


def _reading(member: Member, row: AnswerRow) -> Reading:
    try:
        return member.reading(row.prompt, row.answer)
    except CoeError as error:
        error.args = (f"{row.place}: {error}",)
        raise


def _layers(name: str, n_layers: int, settings: MotSettings) -> tuple[int, ...]:
    """(J,) layers of a member that others read. Raises ConfigError if it has too few for its interactions or theirs."""
    try:
        own = same_layers(n_layers, settings.interactions)
        return own if settings.layers == "same" else deep_layers(n_layers, settings.depths)
    except ConfigError as error:
        raise ConfigError(f"member {name!r}: {error}") from None


def _shapes(members: Members, settings: MotSettings, layers: Sequence[tuple[int, ...]]) -> dict[str, InteractionShape]:
    """The interactions of each member that may be primary: all with a router, else the first one."""
    widths = {each.name: each.decoder.width for each in members}
    primaries = list(members) if settings.router == LATENT else [members[0]]
    return {
        each.name: InteractionShape(
            width=each.decoder.width,
            n_layers=each.decoder.n_layers,
            peers={name: width for name, width in widths.items() if name != each.name},
            shared_width=settings.shared_width,
            heads=settings.heads,
            interactions=settings.interactions,
            depths=len(layers[0]),
            layers=settings.layers,
            null_note=settings.null_note,
            spans=settings.spans,
        )
        for each in primaries
    }


def _artifact_settings(
    settings: MotSettings,
    members: Members,
    layers: Sequence[tuple[int, ...]],
    encoder: Encoder | None,
    interactions: MotInteractions,
) -> dict[str, Any]:
    """What serving needs to know."""
    return {
        "reads": settings.reads,
        "router": settings.router,
        "k": settings.active(len(members)),
        "layers": {member.name: list(at) for member, at in zip(members, layers, strict=True)},
        "primaries": documents(interactions.shapes),
    } | ({} if encoder is None else {"encoder": encoder_facts(encoder)})


def _settings(job: Job) -> MotSettings:
    settings = job.settings
    assert isinstance(settings, MotSettings)  # the file's reader validated them with the trainer's model
    return settings


def _check_kind(kind: str) -> None:
    try:
        router_class(kind)
    except RouterError as error:
        raise ConfigError(str(error)) from error


def _encoder(settings: MotSettings) -> Encoder:
    try:
        return build_encoder(settings.encoder)
    except RouterError as error:
        raise ConfigError(str(error)) from error
