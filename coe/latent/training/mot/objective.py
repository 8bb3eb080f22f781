"""The objective of a Mixture of Thoughts: draws of primary and peers, forwards with notes, and all losses.

A micro-batch is split by the primaries that were drawn; each part is one forward of that member, whose layers read the
stored states of the row's peers. Peers are not computed: they are frozen, and with the right answer given
(`reads: together`, teacher-forced) their states of a row never change. No token of an answer sees more of it than it
was given: see `Reading.given`, `Reading.read` and `Memories.visible`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from coe.engines.latent.artifact import Artifact
from coe.engines.latent.interaction import Interactions
from coe.engines.latent.memory import Memories, PeerStates
from coe.engines.latent.mot import MotInteractions
from coe.engines.latent.mot_router import Draw, MotRouter, gumbel, temperature
from coe.latent.by_length import batches
from coe.latent.config import TrainingConfig
from coe.latent.training.members import Hook, Member, Members, Reading
from coe.latent.training.mot import losses as mot_losses
from coe.latent.training.mot.draws import Noted, by_primary, drawn, exposed, other_peers
from coe.latent.training.mot.settings import MotSettings
from coe.latent.training.mot.states import StateStore, answer_tokens, score
from coe.latent.training.trainer import Group, Losses, Step, Validation
from registry.composed import Composed

BETA_RATE: Final = 1e-2
"""Learning rate of beta: its few weights must move further than those of a projection."""
_VALIDATION_ROWS: Final = 16


@dataclass(frozen=True, eq=False, slots=True)
class MotRows:
    """N rows as M members read them.

    Attributes:
        readings: of each member, those of the rows.
        losses, right: (N, M) what the bare members make of them (`Measured`).
        embeddings: (N, dim) of the prompts, for the router; None without one.
    """

    readings: Sequence[Sequence[Reading]]
    losses: Tensor
    right: Tensor
    embeddings: Tensor | None = None

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def n_tokens(self) -> Tensor:
        """(N,) tokens of each answer for the first member: losses of all members are divided by them.

        Members with other tokenizers have other numbers of tokens; nats of a whole answer can be compared.
        """
        return torch.tensor([float(len(each.targets)) for each in self.readings[0]])

    @property
    def regret(self) -> Tensor:
        """(N, M) loss of an answer token with each member as primary, minus that of the best member.

        The untrained composition answers as its bare primary does, so these are the losses of the bare members.
        """
        losses = self.losses / self.n_tokens[:, None]
        return losses - losses.amin(1, keepdim=True)


class MotObjective:
    """See `coe.latent.training.trainer.Objective`.

    Args:
        members: in memory. stores: of each member, at the layers that are read.
        train, valid: rows, all measured.
        interactions, router: what is trained; without a router the first K members in their order are active.
        identities: of the members' contents.
        extra: further settings for the artifact.
        others: what other routers choose for the validation rows, (N,) positions by name.
    """

    def __init__(
        self,
        members: Members,
        stores: Sequence[StateStore],
        train: MotRows,
        valid: MotRows,
        interactions: MotInteractions,
        router: MotRouter | None,
        settings: MotSettings,
        training: TrainingConfig,
        identities: Sequence[str],
        extra: Mapping[str, Any],
        others: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self.members, self.train, self.valid = members, train, valid
        self.interactions, self.router = interactions.to(members[0].device), router
        self._stores, self._settings, self._training = stores, settings, training
        self._identities, self._extra, self._others = identities, extra, others
        self._k = settings.active(len(members))
        self._n_tokens, self._regret = train.n_tokens, train.regret

    def groups(self) -> Sequence[Group]:
        """The tensors of the interactions, beta with a rate of its own, and those of the router."""
        named = dict(self.interactions.named_parameters())
        betas = {name: tensor for name, tensor in named.items() if name.endswith(".beta")}
        groups = [Group({name: tensor for name, tensor in named.items() if name not in betas})]
        groups += [Group(betas, BETA_RATE)] if betas else []
        if self.router is not None:
            own = {f"router.{name}": tensor for name, tensor in self.router.named_parameters()}
            groups.append(Group(own, self._settings.router_learning_rate))
        return groups

    def loss(self, rows: Sequence[int], step: Step) -> Losses:
        """All terms of `mot_losses`, for training rows."""
        generator = torch.Generator().manual_seed(step.chance.getrandbits(63))
        first, second, p = self._draws(rows, generator, self._tau(step))
        plans = [self._planned(first, place, row, step.chance) for place, row in enumerate(rows)]
        n_tokens = self._n_tokens[list(rows)].sum()
        sums: dict[str, Tensor] = {}
        for primary, places in by_primary(first.order):
            for name, value in self._part(primary, places, rows, plans, second).items():
                sums[name] = sums.get(name, torch.zeros(())) + value.cpu()
        terms = {name: value / n_tokens for name, value in sums.items()}
        terms |= {} if p is None else self._router_terms(p, first, rows)
        factors = self._settings.losses.factors() | {"cross_entropy": 1.0, "keep": self._training.keep}
        total = torch.stack([factors[name] * value for name, value in terms.items()]).sum()
        figures = {name: float(value.detach()) for name, value in terms.items()}
        return Losses(total, figures | self._figures(first, rows, step))

    @torch.no_grad()
    def validate(self) -> Validation:
        """Every row with the members that are chosen for it without noise."""
        rows = self.valid
        order = self._order(rows)
        losses, right = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
        for primary, places in by_primary(order):
            for part in batches([len(rows.readings[primary][place].ids) for place in places], _VALIDATION_ROWS):
                at = [places[i] for i in part]
                notes = [[Noted(member, place) for member in order[place, 1:].tolist()] for place in at]
                logits = self._logits(rows, primary, at, notes)
                found = score(logits, [rows.readings[primary][place] for place in at])
                losses[at], right[at] = found[0].cpu(), found[1].cpu()
        return Validation(float(losses.sum() / rows.n_tokens.sum()), float(right.float().mean()))

    def choices(self) -> dict[str, float]:
        """Mean loss of an answer token of the validation rows, each answered by one bare member without notes.

        `router`: the primary that is chosen now; `first`: the first member; `best_single`: the best one of the training
        rows; `oracle`: the best one of each row; and the choice of each router in the setting `compare`.
        """
        losses, n_tokens = self.valid.losses, self.valid.n_tokens.sum()
        chosen = {"router": self._order(self.valid)[:, 0], "first": torch.zeros(len(losses), dtype=torch.long)}
        chosen["best_single"] = self.train.losses.sum(0).argmin().expand(len(losses))
        chosen |= {"oracle": losses.argmin(1), **self._others()}
        return {
            name: round(float(losses.gather(1, each[:, None]).sum() / n_tokens), 4) for name, each in chosen.items()
        }

    def save(self, path: Path, card: str) -> Artifact:
        """Write the artifact; matrices in the type of the setting `saved`, mu and sigma in float32."""
        saved = torch.bfloat16 if self._settings.saved == "bfloat16" else torch.float32
        tensors = self.interactions.tensors() | ({} if self.router is None else self.router.tensors())
        members = dict(zip([each.name for each in self.members], self._identities, strict=True))
        settings = {**self._extra, "primary": self.choices()}
        return Artifact.write(
            path,
            Composed("mot", members, settings),
            tensors={
                name: each if name.endswith((".mean", ".deviation")) else each.to(saved)
                for name, each in tensors.items()
            },
            card=card,
        )

    def close(self) -> None:
        """End the processes of the members."""
        self.members.close()

    # Choices

    def _tau(self, step: Step) -> float:
        first, last = self._settings.temperatures
        return temperature(step.number, step.of, first, last)

    def _draws(
        self, rows: Sequence[int], generator: torch.Generator, tau: float
    ) -> tuple[Draw, Draw | None, Tensor | None]:
        """A draw, another one with the same primaries, and the router's probabilities (B, M)."""
        if self.router is None:
            return self._first_members(len(rows)), None, None
        assert self.train.embeddings is not None  # as `prepare` provides for a router
        scores = self.router(self.train.embeddings[list(rows)])
        first = self.router.draw(scores, gumbel(tuple(scores.shape), generator), tau)
        second = self.router.draw(scores, gumbel(tuple(scores.shape), generator), tau, primary=first.primary)
        return first, second, scores.softmax(1)

    def _order(self, rows: MotRows) -> Tensor:
        """(N, K) active members without noise."""
        if self.router is None:
            return self._first_members(len(rows)).order
        assert rows.embeddings is not None
        with torch.no_grad():
            return self.router.draw(self.router(rows.embeddings)).order

    def _first_members(self, n_rows: int) -> Draw:
        order = torch.arange(self._k).expand(n_rows, -1)
        return Draw(order, torch.zeros(n_rows, len(self.members)).scatter(1, order, 1.0))

    def _planned(self, draw: Draw, place: int, row: int, chance: Random) -> list[Noted]:
        """The notes that a row is trained with."""
        notes, active = drawn(draw, place, row), draw.order[place].tolist()
        return exposed(notes, active, len(self.members), len(self.train), self._training, chance)

    # Forwards

    def _part(
        self,
        primary: int,
        places: Sequence[int],
        rows: Sequence[int],
        plans: Sequence[Sequence[Noted]],
        second: Draw | None,
    ) -> dict[str, Tensor]:
        """Sums over the answer tokens of the rows with one primary."""
        at = [rows[place] for place in places]
        logits = self._logits(self.train, primary, at, [plans[place] for place in places])
        targets, row_of = answer_tokens([self.train.readings[primary][row] for row in at], logits.device)
        sums = {"cross_entropy": mot_losses.row_losses(logits, targets, row_of, len(at)).sum()}
        known = [i for i, row in enumerate(at) if bool(self.train.right[row, primary])]
        if known and self._training.keep:
            with torch.no_grad():
                bare = self._logits(self.train, primary, [at[i] for i in known], [[] for _ in known])
            sums["keep"] = len(bare) * mot_losses.divergence(bare, _of_rows(logits, row_of, known))
        others = [
            [] if second is None else other_peers(second, place, row, plans[place])
            for place, row in zip(places, at, strict=True)
        ]
        if any(others) and self._settings.losses.consistency:
            chosen = [i for i, each in enumerate(others) if each]
            again = self._logits(self.train, primary, [at[i] for i in chosen], [others[i] for i in chosen])
            temperature = self._settings.losses.consistency_temperature
            same = mot_losses.consistency(_of_rows(logits, row_of, chosen), again, temperature)
            sums["consistency"] = len(again) * same
        return sums

    def _logits(self, rows: MotRows, primary: int, at: Sequence[int], notes: Sequence[Sequence[Noted]]) -> Tensor:
        """`Member.logits` of rows with one primary, which reads the notes."""
        member, readings = self.members[primary], [rows.readings[primary][row] for row in at]
        if not any(notes):
            return member.logits(readings)
        interactions = self.interactions.of(member.name)
        memories = Memories.stacked([interactions.memory(self._states(rows, each)) for each in notes])
        return member.logits(readings, self._hooks(member, interactions, memories, readings))

    def _states(self, rows: MotRows, notes: Sequence[Noted]) -> dict[str, PeerStates]:
        found = {}
        for each in notes:
            reading = rows.readings[each.member][each.row]
            found[self.members[each.member].name] = PeerStates(
                states=self._stores[each.member].states(reading),
                spans=torch.from_numpy(reading.spans),
                ends=torch.from_numpy(reading.read),
                weight=each.weight,
            )
        return found

    def _hooks(
        self, member: Member, interactions: Interactions, memories: Memories | None, readings: Sequence[Reading]
    ) -> dict[int, Hook]:
        """What adds the updates to the layers of a primary."""
        width = max(len(each.ids) for each in readings)
        spans = _padded([each.spans for each in readings], width, -1).to(member.device)
        ends = _padded([each.given for each in readings], width, 0).to(member.device)

        def add(q: int, hidden: Tensor) -> Tensor | None:
            if memories is None:
                return None
            update = interactions.read(q, hidden, memories, spans=spans, ends=ends)
            return (hidden.float() + update).to(hidden.dtype)

        return {layer: partial(add, q) for q, layer in enumerate(interactions.where())}

    # Figures

    def _router_terms(self, p: Tensor, draw: Draw, rows: Sequence[int]) -> dict[str, Tensor]:
        return {
            "entropy": mot_losses.negative_entropy(p),
            "balance": mot_losses.balance(p, draw.primary),
            "regret": mot_losses.expected_regret(p, self._regret[list(rows)]),
        }

    def _figures(self, draw: Draw, rows: Sequence[int], step: Step) -> dict[str, float]:
        if self.router is None:
            return {}
        best = self._regret[list(rows)].argmin(1) == draw.primary
        return {"temperature": self._tau(step), "best_primary": float(best.float().mean())}


def _of_rows(logits: Tensor, row_of: Tensor, rows: Sequence[int]) -> Tensor:
    """The logits (n, V) of some rows, in this order."""
    return torch.cat([logits[row_of == row] for row in rows])


def _padded(arrays: Sequence[np.ndarray[Any, Any]], width: int, fill: int) -> Tensor:
    """(rows, width, ...) with `fill` behind shorter rows."""
    padded = np.full((len(arrays), width, *arrays[0].shape[1:]), fill, np.int64)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return torch.from_numpy(padded)
