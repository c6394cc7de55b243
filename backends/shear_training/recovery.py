"""Dynamic knowledge recovery (LoRAShear, section 5): rounds of LoRA fine-tuning on what a model has forgotten most."""

from __future__ import annotations

import hashlib
import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from shear_ir.errors import PlanError, SaveError
from shear_training.data import Source, SourceProgress
from shear_training.evaluate import evaluate_sources
from shear_training.journal import Journal, Round, mean, weights_digest
from shear_training.lora import as_it_was, attach, detach, finite, load_adapter, save_adapter
from shear_training.mixture import Draw, Sampler, counts, degradation, shuffled, weights
from shear_training.rounds import Diverged, arguments, processes, train
from shear_training.settings import Recovery

__all__ = ["Recovered", "Recovery", "Round", "recover"]


@dataclass(frozen=True, eq=False)
class Recovered:
    """How a stage ended. ``model``: the recovered one, a PEFT model where the adapters were kept; ``baseline``: NLL
    per source before the first round; ``best``: number of the round it is of, 0 for none; ``stopped``: why it ended."""

    model: nn.Module
    stage: str
    baseline: Mapping[str, float]
    rounds: tuple[Round, ...]
    best: int
    stopped: str

    @property
    def losses(self) -> Mapping[str, float]:
        """NLL per source of ``model``."""
        return self.rounds[self.best - 1].after if self.best else self.baseline

    def to_json(self) -> dict[str, Any]:
        """All but the model, as JSON types."""
        return {
            "stage": self.stage,
            "baseline": dict(self.baseline),
            "rounds": [asdict(each) for each in self.rounds],
            "best": self.best,
            "losses": dict(self.losses),
            "stopped": self.stopped,
        }


def recover(
    model: nn.Module, sources: Mapping[str, Source], dense: Mapping[str, float], settings: Recovery, folder: str | Path,
    *, stage: str = "recovery", progress: SourceProgress | None = None,
) -> Recovered:  # fmt: skip
    """Recover ``model`` in place, for one stage; callers run the stages one after the other.

    ``dense``: NLL per source of the full model, in nats per token. ``folder``: keeps the state; the same call goes on
    where it was stopped, and on a CPU ends with the same bits. Raises ``PlanError`` when the folder is of another
    model, data or settings, when a loss to begin with is not a number, or when the batch cannot be split.
    """
    unknown = [name for name in sources if not math.isfinite(dense.get(name, math.nan))]
    if unknown or not sources:
        raise PlanError(f"the loss of the dense model on {unknown[0] if unknown else 'any source'} is not known")
    home, args = _home(Path(folder)), arguments(settings, Path(folder))
    if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        model.to(args.device)
    journal = Journal.open(home, _digests(model, sources, dense, settings, stage))
    with as_it_was(model):
        adapted = attach(model, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=settings.seed)
        try:
            _Stage(adapted, sources, dense, settings, home, stage, journal, progress).run()
            load_adapter(adapted, journal.adapter(home, journal.best))
        except BaseException:
            detach(adapted, merge=False)
            raise
        result = detach(adapted, merge=True) if settings.merge else adapted
    assert journal.baseline is not None
    assert journal.stopped is not None
    return Recovered(result.eval(), stage, journal.baseline, tuple(journal.rounds), journal.best, journal.stopped)


class _Stage:
    """The rounds of one stage, from where its journal stands to its end."""

    def __init__(
        self, model: PeftModel, sources: Mapping[str, Source], dense: Mapping[str, float], settings: Recovery,
        folder: Path, name: str, journal: Journal, progress: SourceProgress | None,
    ) -> None:  # fmt: skip
        self.model, self.sources, self.dense, self.settings = model, sources, dense, settings
        self.folder, self.name, self.journal, self.progress = folder, name, journal, progress
        self.state = processes(settings.device)
        self.sampler = Sampler({n: len(s.train) for n, s in sources.items()}, settings.seed, journal.drawn)

    def run(self) -> None:
        """All rounds that are left."""
        journal = self.journal
        if journal.baseline is None:
            journal.baseline = self._measure()
            bad = [name for name, nll in journal.baseline.items() if not math.isfinite(nll)]
            if bad:
                raise PlanError(f"the loss of the model on {bad[0]} is no number before any training")
            self._keep(0)
        load_adapter(self.model, journal.adapter(self.folder, len(journal.rounds)))
        while journal.stopped is None:
            journal.stopped = self._reason() or self._round(len(journal.rounds) + 1)
            self._write()

    def _reason(self) -> str | None:
        """Why no further round is due."""
        losses = [mean(self.journal.baseline or {}), *(each.loss for each in self.journal.rounds)]
        gains = [(old - new) / old if old else 0.0 for old, new in pairwise(losses)]
        last = gains[-self.settings.patience :]
        if len(last) == self.settings.patience and all(gain < self.settings.tolerance for gain in last):
            return "converged"
        return "max rounds" if len(self.journal.rounds) >= self.settings.max_rounds else None

    def _round(self, number: int) -> str | None:
        """One round, noted in the journal when it is worth it; why it was the last, None when it was not."""
        settings, journal, started = self.settings, self.journal, time.perf_counter()
        before = dict(journal.rounds[-1].after if journal.rounds else journal.baseline or {})
        deviations = degradation(before, self.dense)
        # Without dynamic weights everything is as with them, but the mixture.
        shares = weights(deviations if settings.dynamic else dict.fromkeys(deviations, 0.0), settings.floor)
        rows = counts(shares, settings.rows_per_round)
        drawn = shuffled(self.sampler.draw(rows), settings.epochs, settings.seed, number)
        order, tokens = self._affordable(drawn)
        if len(order) < min(settings.batch, len(drawn)):
            return "token budget"
        try:
            steps = self._train(order, number)
        except Diverged as failure:
            return f"diverged: {failure} of round {number}, which is thrown away; a lower lr may help"
        after = self._measure()
        if not (finite(self.model) and all(map(math.isfinite, after.values()))):
            return f"diverged: the loss after round {number} is not a number; the round is thrown away"
        seconds = time.perf_counter() - started
        journal.rounds.append(Round(number, before, deviations, shares, rows, after, tokens, steps, seconds))
        journal.drawn = dict(self.sampler.drawn)
        losses = [mean(journal.baseline or {}), *(each.loss for each in journal.rounds)]
        journal.best = losses.index(min(losses))
        self._keep(number)
        return None

    def _affordable(self, drawn: Sequence[Draw]) -> tuple[Sequence[Draw], int]:
        """The rows that the token budget still pays for, and their tokens."""
        lengths = [int(self.sources[name].train.lengths[row]) for name, row in drawn]
        spent = list(accumulate(lengths))
        budget = self.settings.token_budget
        if budget is None:
            return drawn, sum(lengths)
        left = budget - sum(each.tokens for each in self.journal.rounds)
        count = bisect_right(spent, left)
        return drawn[:count], spent[count - 1] if count else 0

    def _train(self, order: Sequence[Draw], number: int) -> int:
        rows = {name: source.train for name, source in self.sources.items()}
        return train(
            self.model, rows, order, self.settings, self.folder / f"round-{number}",
            self._told(f"{self.name}: round {number}"),
        )  # fmt: skip

    def _measure(self) -> dict[str, float]:
        """NLL per source, each process measuring its share; the same everywhere, so that all of them decide alike."""
        settings = self.settings
        found = evaluate_sources(
            self.model, self.sources, batch=settings.eval_batch, bf16=settings.bf16, progress=self.progress,
            state=self.state,
        )  # fmt: skip
        return {name: loss.nll for name, loss in found.items()}

    def _keep(self, number: int) -> None:
        if self.state.is_main_process:
            save_adapter(self.model, self.journal.adapter(self.folder, number))
        self._write()

    def _write(self) -> None:
        if self.state.is_main_process:
            self.journal.save(self.folder)
        self.state.wait_for_everyone()

    def _told(self, what: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)


def _home(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise SaveError(f"{folder} cannot be made: {failure.strerror}") from failure
    return folder


def _digests(
    model: nn.Module, sources: Mapping[str, Source], dense: Mapping[str, float], settings: Recovery, stage: str
) -> dict[str, str]:
    """What a journal belongs to, by the words that a refusal uses."""
    data = {name: (source.train.digest, source.validation.digest) for name, source in sources.items()}
    return {
        "weights (of another model or plan)": weights_digest(model),
        "settings": settings.digest,
        "data": _hash({"stage": stage, "sources": data}),
        "losses of the dense model": _hash({name: dense[name] for name in sources}),
    }


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]
