"""The whole road for one architecture in a process of its own: its answer as JSON.

    python tools/bench/coverage_one.py causal/llama

A tiny random model is built, traced, grouped, sheared by both backends, compared with the masked original, saved and
reloaded. Each stage adds to the answer; the first that fails names its cause.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import shear_ir as sir
from bench import tiny_config
from shear_backends.verify.numbers import Report, evaluation, run
from shear_ir.errors import ShearError, ShearingError, UnsoundError
from shear_ir.frontend.inputs import example_inputs
from shear_ir.frontend.sentences import sentence
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.analysis.find_groups import Group, Groups
from shear_passes.analysis.roles import attention_products
from shear_passes.rewrite.cuts import build_plan
from tests.zoo import randomised

T = TypeVar("T")

TASKS: dict[str, dict[str, Any]] = {
    "causal": dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": dict(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "image": dict(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
}
COLUMNS = {
    "ffn": ("ffn", "conv_channel"),
    "heads": ("kv_head", "query_group"),
    "experts": ("expert",),
}
LARGEST = 8_000_000
SEARCH_SECONDS = 20.0
ROUNDS = 3
LONG_SECONDS = 4.0


def names() -> list[str]:
    """``task/type`` of every model type in the auto classes."""
    return [f"{task}/{kind}" for task, mapping in TASKS.items() for kind in mapping]


def class_of(name: str) -> Any:
    """The model class that the auto class of the task has for the type."""
    task, kind = name.split("/")
    found = TASKS[task][kind]
    return getattr(transformers, found if isinstance(found, str) else found[0])


class NotBuilt(Exception):
    """No small config of the class gives a model that runs."""


def build(name: str) -> tuple[nn.Module, str]:
    """A tiny random model of the type that runs on example inputs; raises ``NotBuilt`` with the first reason.

    Without one that runs, the smallest one that is built: then the answer says why its forward does not take inputs.
    """
    model_class = class_of(name)
    # That of the text alone where the type's own config has one for images beside it.
    config_class = model_class.config_class or transformers.CONFIG_MAPPING[name.split("/")[1]]
    try:
        base = config_class()
    except Exception as failure:
        raise NotBuilt(f"{config_class.__name__}() is refused: {line(failure)}") from failure
    knobs = tiny_config.knobs_of(base)
    types = tiny_config.types_of(base.to_dict())
    reasons: list[str] = []
    built: tuple[nn.Module, str] | None = None
    stop = time.process_time() + SEARCH_SECONDS

    def asked() -> list[tiny_config.Knob]:
        try:
            config = config_class(**tiny_config.arguments(next(tiny_config.proposals(knobs)), types))
        except Exception:  # the same as above: then no model reads anything of it
            return []
        return tiny_config.knobs_asked(fields_asked(model_class, config), base.to_dict())

    for values in tiny_config.proposals(knobs, asked):
        if time.process_time() > stop or len(reasons) > 80:
            break
        try:
            model = _small(model_class, config_class(**tiny_config.arguments(values, types)))
        except Exception as failure:
            reasons.append(line(failure))
            continue
        try:
            with evaluation(model), torch.no_grad():
                run(model, example_inputs(model))
        except Exception as failure:
            reasons.append(line(failure))
            built = built or (model, f"forward: {line(failure)}")
            continue
        return model, ""
    if built is None:
        raise NotBuilt(reasons[0] if reasons else "nothing was tried in time")
    return built


def fields_asked(model_class: Any, config: Any) -> list[tiny_config.Path]:
    """The fields that the class reads from ``config`` and its sub-configs and that these do not have."""
    places: dict[type, tiny_config.Path] = {type(config): ()}
    for name, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            places.setdefault(type(value), (name,))
    found: list[tiny_config.Path] = []

    def note(self: Any, name: str) -> Any:
        if type(self) in places and not name.startswith("_"):
            found.append((*places[type(self)], name))
        raise AttributeError(f"{type(self).__name__} has no {name}")

    # Python calls __getattr__ for what it does not find, also where getattr is given a default.
    with mock.patch.object(transformers.PreTrainedConfig, "__getattr__", note, create=True), torch.device("meta"):
        try:
            model_class(config)
        except Exception:  # what was read until then is known
            return found
    return found


def _small(model_class: Any, config: Any) -> nn.Module:
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, type(value)(0))
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the smallest config that was found has {size:,} parameters")
    torch.manual_seed(0)
    model: nn.Module = model_class(config)
    return randomised(model.float())


def line(failure: BaseException) -> str:
    """The class of a failure and the first line that says something."""
    text = sentence(failure) if isinstance(failure, Exception) else str(failure)
    return f"{type(failure).__name__}: {' '.join(text.split())}"[:300]


class Logits(nn.Module):
    """What bare torch.export needs to take a model of transformers: tensors in, tensors out."""

    def __init__(self, root: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.root = root
        self.names = names

    def forward(self, *args: Tensor) -> Any:
        return run(self.root, dict(zip(self.names, args, strict=True)))


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result and the CPU seconds it took."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


class Road:
    """One model's way through everything; ``answer`` grows from stage to stage."""

    def __init__(self, name: str) -> None:
        self.answer: dict[str, Any] = {"name": name}

    def stages(self) -> Iterator[dict[str, Any]]:
        """The answer after each stage; ``stage`` is the one that comes next, ``done`` that there is none."""
        stage = "build"
        try:
            self.answer["class"] = class_of(self.answer["name"]).__name__
            model, refusal = build(self.answer["name"])
            self.answer |= {"built": True, "parameters": sum(p.numel() for p in model.parameters())}
            stage = "run"
            if refusal:
                raise NotBuilt(refusal)
            yield self.answer | {"stage": (stage := "trace")}
            found = self._trace(model)
            yield self.answer | {"stage": (stage := "shear")}
            self._shear(model, found)
        except Exception as failure:
            said = str(failure) if isinstance(failure, NotBuilt) else line(failure)
            self.answer["failure"] = {"stage": stage, "cause": said}
        yield self.answer | {"done": True}

    def _trace(self, model: nn.Module) -> Groups:
        feed = example_inputs(model)
        wrapper = Logits(model, tuple(feed)).eval()

        def bare() -> float | None:
            try:
                return timed(lambda: torch.export.export(wrapper, tuple(feed.values()), strict=False))[1]
            except Exception:
                return None

        found: Groups
        exports, ours = [], []
        for _ in range(ROUNDS):  # in turn, the least of each: the first pays for imports, any may meet the collector
            exports.append(bare())
            program, traced = timed(partial(sir.trace, model))
            found, grouped = timed(partial(sir.groups, program))
            ours.append((traced + grouped, traced, grouped))
            if sum(each[0] for each in ours) > LONG_SECONDS:
                break
        (_, traced, grouped), export = min(ours), min((e for e in exports if e is not None), default=None)
        self.answer |= {"traced": True, "trace_s": traced, "groups_s": grouped, "nodes": len(program.nodes)}
        if export is not None:
            self.answer |= {"export_s": export, "ratio": (traced + grouped) / export}
        kinds = Counter(g.kind for g in found)
        self.answer["groups"] = {k: [sum(1 for g in found if g.kind == k and able(g)), n] for k, n in kinds.items()}
        self.answer["frozen"] = {
            column: Counter(g.reason for g in found if g.kind in kinds and not able(g)).most_common(3)
            for column, kinds in COLUMNS.items()
        }
        self.answer["barriers"] = Counter(found.axes.barriers.values()).most_common(5)
        self.answer["attention"] = bool(attention_products(found.axes, found.zeros)[0])
        return found

    def _shear(self, model: nn.Module, found: Groups) -> None:
        chosen = {c: {g: units(g) for g in found if g.kind in kinds and able(g)} for c, kinds in COLUMNS.items()}
        chosen = {column: cuts for column, cuts in chosen.items() if cuts}
        if "heads" in chosen:
            first = next(k for k in COLUMNS["heads"] if any(g.kind == k for g in chosen["heads"]))
            chosen["heads"] = {g: u for g, u in chosen["heads"].items() if g.kind == first}
        if not chosen:
            return
        together = {g: kept for cuts in chosen.values() for g, kept in cuts.items()}
        outcome = self._attempt(model, found, together, save=True)
        self.answer |= outcome
        if outcome["module"] == outcome["graph"] == "sound" or len(chosen) == 1:
            verdicts = dict.fromkeys(chosen, verdict(outcome))
        else:
            each = {c: self._attempt(model, found, cuts, save=False) for c, cuts in chosen.items()}
            self.answer["each"] = each
            verdicts = {c: verdict(o) for c, o in each.items()}
        self.answer["sheared"] = verdicts

    def _attempt(self, model: nn.Module, found: Groups, kept: dict[Group, Any], *, save: bool) -> dict[str, Any]:
        plan = build_plan(found, sir.analyses(found.program).get(MeasureCosts()), kept)
        made: dict[str, Any] = {"removed": plan.ratio}
        backends: tuple[Literal["graph"], Literal["module"]] = ("graph", "module")
        for backend in backends:
            small = None
            try:
                small = sir.shear(model, plan, backend=backend)
                report, fixed = _verified(model, small, plan)
                made[backend] = ("sound" if report.sound else "unsound") if report.moved else "unmoved"
                made[f"{backend}_diff"] = report.max_abs_diff
                made[f"{backend}_lengths"] = len(set(report.lengths))
                if fixed:
                    made[f"{backend}_fixed"] = fixed
            except UnsoundError as failure:
                made[backend], made[f"{backend}_why"] = "chance", line(failure)
            except ShearError as failure:
                made[backend], made[f"{backend}_why"] = "refused", line(failure)
            except Exception as failure:
                made[backend], made[f"{backend}_why"] = "failed", line(failure)
            if save and backend == "module" and small is not None and made[backend] == "sound":
                made |= _saved(model, small)
        return made


def able(group: Group) -> bool:
    """Whether units can go, be it with a rescaled norm."""
    return group.size > 1 and (group.prunable or group.rescalable)


def units(group: Group) -> Any:
    """The units that stay: half of the heads, three quarters of the others, in fours where there are so many."""
    share = 2 if group.kind in COLUMNS["heads"] else 4
    count = group.size - max(1, group.size // share)
    step = max(4, group.multiple)
    count = count // step * step if count >= step else count
    return np.sort(np.random.default_rng(0).permutation(group.size)[:count])


def _verified(model: nn.Module, small: nn.Module, plan: Any) -> tuple[Report, str]:
    """The report at two lengths; at that of the trace alone where the graph is fixed to it."""
    try:
        return sir.verify(model, small, plan), ""
    except ShearingError as failure:
        return sir.verify(model, small, plan, example_inputs(model)), line(failure)


def verdict(outcome: dict[str, Any]) -> str:
    """``sound`` where both backends are; else the worse of them."""
    states = [outcome["module"], outcome["graph"]]
    for state in ("unsound", "failed", "chance", "unmoved"):
        if state in states:
            return state
    if states == ["sound", "sound"]:
        return "sound"
    return "graph only" if states[1] == "sound" else "module only" if states[0] == "sound" else "refused"


def _saved(model: nn.Module, small: nn.Module) -> dict[str, Any]:
    feed = example_inputs(model)
    with tempfile.TemporaryDirectory() as folder, evaluation(small), torch.no_grad():
        try:
            saved = sir.save(small, Path(folder) / "out")
            again = sir.load(saved.path)
            for name in ("experts_implementation", "attn_implementation"):
                chosen = getattr(getattr(model, "config", None), f"_{name}", None)
                # Set on the whole model it would reach parts that have another one.
                if chosen and chosen != getattr(again.config, f"_{name}", None) and hasattr(again, f"set_{name}"):
                    getattr(again, f"set_{name}")(chosen)
            same = all(torch.equal(a, b) for a, b in zip(run(small, feed), run(again.eval(), feed), strict=True))
            return {"reloaded": same, "stock": saved.stock, "stock_note": saved.note}
        except Exception as failure:
            return {"reloaded": False, "reload_why": line(failure).replace(f"{folder}/", "")}


def warm() -> None:
    """One export, so that no architecture pays for what torch imports when it is first needed."""
    program = sir.trace(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), dynamic=True)
    sir.groups(program)


def _limits(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    hub_logging: Any = transformers.utils.logging  # its functions have no types
    hub_logging.disable_progress_bar()


def answer_to(name: str, memory: int, pipe: Any) -> None:
    """Measure ``name`` and send the answer so far after every stage, so that none is lost when a limit strikes."""
    _limits(memory)
    start = time.monotonic()
    for road in Road(name).stages():
        pipe.send(road | {"seconds": time.monotonic() - start})
    pipe.close()


if __name__ == "__main__":
    for stage in Road(sys.argv[1]).stages():
        print(json.dumps(stage), flush=True)
