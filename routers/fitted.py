"""What router kinds share: settings in, a fitted model, and the way to an artifact and back.

A kind states two classes: `Settings`, a frozen dataclass that checks itself, and `Model`, what training finds. Settings
are keyword arguments of the router and JSON values in the artifact; a model is arrays and JSON values.

    class KNNRouter(EmbeddingRouter[KNNSettings, KNNModel]):
        kind, Settings, Model = "knn", KNNSettings, KNNModel

    KNNRouter(encoder, k=15).settings.k == 15
"""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

from routers.base import RouterState
from routers.encoders.embed import check_dim
from routers.errors import InvalidArtifact, RouterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from routers.encoders.base import Encoder


class Model(Protocol):
    """What training found. Its class has `restored(arrays, values, settings)`, the reverse of the two methods here.

    `restored` raises KeyError where an array or a value is missing.
    """

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the m experts it was trained on."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array."""
        ...

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        ...


class EmbeddingModel(Model, Protocol):
    """A model of embeddings."""

    @property
    def dim(self) -> int | None:
        """Dimensions of the embeddings it was trained on; `None` where it keeps none."""
        ...


S = TypeVar("S", bound=Any)
M = TypeVar("M", bound=Model)
E = TypeVar("E", bound=EmbeddingModel)


@dataclass(frozen=True, slots=True)
class NoSettings:
    """Settings of a kind that has none."""


class FittedRouter(Generic[S, M]):
    """A router of settings and a fitted model; kinds add `fit` and `estimate`.

    Args:
        settings: keyword arguments of the class `Settings`.

    Raises:
        InvalidSettings: a value that the settings refuse.
    """

    kind: ClassVar[str]
    Settings: ClassVar[type[Any]] = NoSettings
    Model: ClassVar[type[Any]]

    def __init__(self, **settings: Any) -> None:
        self.settings: S = self.Settings(**settings)
        self._model: M | None = None

    @property
    def requires(self) -> frozenset[str]:
        """Names of `Query.features` that must be filled before `estimate`."""
        return frozenset()

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts it was trained on; empty before `fit`."""
        return () if self._model is None else self._model.experts

    @property
    def model(self) -> M:
        """What training found.

        Raises:
            RouterError: the router is not trained.
        """
        if self._model is None:
            raise RouterError(f"this {self.kind} router is not trained: call fit(table), or load a saved one")
        return self._model

    def with_model(self, model: M) -> Self:
        """A router of the same settings with another model; this one stays as it is."""
        other = copy(self)
        other._model = model
        return other

    def state(self) -> RouterState:
        """The trained router as arrays and JSON values; no prompts.

        Raises:
            RouterError: the router is not trained.
        """
        return RouterState(self.model.arrays(), {"settings": saved(self.settings), **self.model.values()})

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder | None = None) -> Self:
        """The router that `state()` describes.

        Raises:
            InvalidArtifact: something is missing or malformed, or the encoder has another dimension.
        """
        try:
            router = cls._unfitted(state.settings["settings"], encoder)
            router._restore(state)
        except KeyError as error:
            raise InvalidArtifact(f"the saved {cls.kind} router lacks {error}: train it again") from error
        except (TypeError, ValueError) as error:
            raise InvalidArtifact(f"the saved {cls.kind} router cannot be read ({error}): train it again") from error
        return router

    @classmethod
    def _unfitted(cls, settings: Mapping[str, Any], encoder: Encoder | None) -> Self:
        return cls(**settings)

    def _restore(self, state: RouterState) -> None:
        self._model = self.Model.restored(state.arrays, state.settings, self.settings)


class EmbeddingRouter(FittedRouter[S, E]):
    """A fitted router that reads queries with an encoder.

    Args:
        encoder: text -> vectors. settings: keyword arguments of the class `Settings`.
    """

    def __init__(self, encoder: Encoder, **settings: Any) -> None:
        super().__init__(**settings)
        self.encoder = encoder

    @classmethod
    def _unfitted(cls, settings: Mapping[str, Any], encoder: Encoder | None) -> Self:
        if encoder is None:
            raise InvalidArtifact(f"a {cls.kind} router reads text: load it with the encoder it was trained with")
        return cls(encoder, **settings)

    def _restore(self, state: RouterState) -> None:
        super()._restore(state)
        self._check_encoder()

    def _check_encoder(self) -> None:
        if self.model.dim is not None:
            check_dim(self.encoder, self.model.dim, self.kind)


def saved(settings: Any) -> dict[str, Any]:
    """Settings as JSON values, without the fields whose metadata say `saved: False`."""
    kept = {field.name for field in fields(settings) if field.metadata.get("saved", True)}
    return {name: value for name, value in asdict(settings).items() if name in kept}


def under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
