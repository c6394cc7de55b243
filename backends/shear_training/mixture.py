"""How much of which source: weights from degradation, counts that add up, rows without replacement."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np

from shear_ir.errors import PlanError

Draw = tuple[str, int]
"""A source, and the number of a row in it."""


def degradation(now: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """``max(0, NLL(now) - NLL(dense))`` per source, in nats per token (LoRAShear, section 5)."""
    return {name: max(0.0, nll - dense[name]) for name, nll in now.items()}


def weights(deviations: Mapping[str, float], floor: float = 0.2) -> dict[str, float]:
    """``w_i = (1 - rho) * d_i / sum(d) + rho / n`` with ``rho = floor``; uniform where nothing is degraded.

    They sum to 1, none is below ``rho / n``, and each grows with its own deviation. Raises ``PlanError`` for a
    deviation that is negative or not finite, and for a floor that is no share.
    """
    if not 0.0 <= floor <= 1.0:
        raise PlanError(f"the floor of a mixture is a share between 0 and 1, not {floor}")
    for name, deviation in deviations.items():
        if not (math.isfinite(deviation) and deviation >= 0.0):
            raise PlanError(f"the degradation of {name} is {deviation}, so it cannot be weighed")
    count, worst = len(deviations), max(deviations.values(), default=0.0)
    if worst == 0.0:
        return dict.fromkeys(deviations, 1.0 / count) if count else {}
    # Divided by the worst first, so that the sum cannot overflow and tiny deviations do not vanish.
    scaled = {name: deviation / worst for name, deviation in deviations.items()}
    total = math.fsum(scaled.values())
    return {name: (1.0 - floor) * share / total + floor / count for name, share in scaled.items()}


def counts(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """``total`` rows split by ``shares``, which sum to 1, by largest remainder; ties go to the earlier source."""
    exact = {name: share * total for name, share in shares.items()}
    made = {name: math.floor(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: made[name] - exact[name])
    for name in order[: total - sum(made.values())]:
        made[name] += 1
    return made


class Sampler:
    """Rows of each source in a seeded order, each once before any comes twice, whatever is asked for when.

    ``sizes``: rows per source. ``drawn``: how many were taken so far, which is all of its state and JSON.
    """

    def __init__(self, sizes: Mapping[str, int], seed: int, drawn: Mapping[str, int] | None = None) -> None:
        self.sizes, self.seed = dict(sizes), seed
        self.drawn = {name: (drawn or {}).get(name, 0) for name in sizes}

    def draw(self, wanted: Mapping[str, int]) -> list[Draw]:
        """The next ``wanted`` rows of each source, source by source; an exhausted one is shuffled anew."""
        taken: list[Draw] = []
        for name, count in wanted.items():
            size = self.sizes[name]
            while count:
                turn, start = divmod(self.drawn[name], size)
                rows = self._permutation(name, turn)[start : start + count].tolist()
                taken += [(name, row) for row in rows]
                self.drawn[name] += len(rows)
                count -= len(rows)
        return taken

    def _permutation(self, name: str, turn: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode()), turn]).permutation(self.sizes[name])


def shuffled(rows: list[Draw], epochs: int, seed: int, number: int) -> list[Draw]:
    """``rows`` once per epoch, each time in another order, drawn by the seed and the number of the round."""
    orders = (np.random.default_rng([seed, number, epoch]).permutation(len(rows)) for epoch in range(epochs))
    return [rows[i] for order in orders for i in order.tolist()]
