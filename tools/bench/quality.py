"""What pruning costs a language model, and what brings it back: the bundled model, three seeds, two ratios.

    python tools/bench/quality.py                    # everything, resumable: half an hour of one core
    python tools/bench/quality.py --tokens 240000    # every training five times as long
    python tools/bench/quality.py --quick            # a few steps of each, to see that it works
    python tools/bench/quality.py --table criteria   # without training: see tools/bench/criteria.py

Every method trains on as many tokens of the same texts: plain LoRA on the dense model, on the model cut by magnitude,
and on that cut by FLAP, with layers sharing by knowledge, and repaired by least squares; and ``shear-ir lorashear``, by
the bundled recipe and by the default one. Each at three learning rates on the first seed and the largest ratio; the
best of them, by the same held-out text, everywhere else. One process and thread per ratio and seed. Writes quality.md
and quality.svg.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
MODEL = ROOT / "tools" / "assets" / "tiny-llama"
DOMAINS = ("code", "docs", "topics")
"""The sources that are compared; the instructions are made of the same texts, so their loss counts nowhere."""
RATIOS = (0.2, 0.5)
SEEDS = (0, 1, 2)
TOKENS = 40_000
STEP = 8
"""Rows of a step, in every training."""
LOOKED_AT = 4
"""Held-out rows of a source that a training looks at by itself; what is told is measured on all of them."""
VARIANTS = {
    "dense": "dense",
    "dense + LoRA": "dense + LoRA",
    "magnitude": "magnitude",
    "magnitude + LoRA": "magnitude + LoRA",
    "repaired": "FLAP, layers sharing by knowledge, least squares",
    "repaired + LoRA": "FLAP, layers sharing by knowledge, least squares + LoRA",
    "bundled, pruned": "lorashear, bundled recipe, before recovery",
    "bundled": "lorashear, bundled recipe",
    "default, pruned": "lorashear, default recipe, before recovery",
    "default": "lorashear, default recipe",
}
RATES = {
    "dense + LoRA": (3e-4, 1e-3, 3e-3),
    "magnitude + LoRA": (1e-3, 3e-3, 9e-3),
    "repaired + LoRA": (1e-3, 3e-3, 9e-3),
    "bundled": (1e-3, 3e-3, 9e-3),
    "default": (3e-4, 1e-3, 3e-3),
}
"""What is trained, and the rates that are tried; a recipe's other rates keep their proportion to that of recovery."""
COMPARED = (
    ("bundled, pruned", "repaired"), ("bundled", "repaired + LoRA"), ("default", "repaired + LoRA"),
    ("repaired + LoRA", "magnitude + LoRA"),
)  # fmt: skip
console = Console(stderr=True)

Losses = dict[str, float]
"""Mean NLL in nats per token by source."""


# -- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """One ratio (0: nothing goes) and seed. ``tokens``: what each method trains on; ``folder``: where parts are kept;
    ``rates``: by method, those that are tried."""

    ratio: float
    seed: int
    tokens: int
    folder: Path
    rates: Mapping[str, Sequence[float]]

    @property
    def rows(self) -> int:
        """Rows of all training of a method."""
        rows: int = round(self.tokens / _sources()[0].length)
        return max(3 * STEP, rows)

    @cached_property
    def flap(self) -> tuple[Any, Any]:
        """FLAP's plan with layers sharing by knowledge, and the rows that both it and a repair read."""
        import shear_ir as sir
        from shear_tools.workflow.calibration import batches_of

        config, sources = _sources()
        rows = {name: sources[name].train for name in config.road[0].sources}
        batches = batches_of(rows, _bundled().pruning.calibration, seed=self.seed)
        plan = sir.plan(
            sir.trace(_load()[0]), ratio=self.ratio, importance="flap", allocation="by-knowledge",
            knowledge=_knowledge(self.folder.parent).curves, data=batches,
        )  # fmt: skip
        return plan, batches

    @cached_property
    def repaired(self) -> Any:
        """The model by that plan, repaired by least squares; whoever trains it takes a copy."""
        import shear_ir as sir

        plan, batches = self.flap
        return sir.shear(sir.repair(_load()[0], plan, "least-squares", data=batches), plan)


def run(given: Given) -> None:
    """All methods of one ratio and seed at all rates; each is kept in the folder when it is done."""
    import torch

    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    if not given.ratio:
        _keep(given.folder / "dense.json", lambda: {"losses": _dense()})
    else:
        _keep(given.folder / "magnitude.json", lambda: _measured(_by_magnitude(given)))
        _keep(given.folder / "repaired.json", lambda: _measured(given.repaired))
    for name in ["dense + LoRA"] if not given.ratio else [name for name in RATES if name != "dense + LoRA"]:
        for rate in given.rates[name]:
            _keep(given.folder / f"{name}@{rate:g}.json", lambda name=name, rate=rate: _TRAINED[name](given, rate))


def collected(out: Path, ratios: Sequence[float], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What is there: of each ratio (0: the dense model) and seed, each variant at each rate that was tried."""
    runs = []
    for seed in seeds:
        for ratio in (0.0, *ratios):
            tried: dict[str, dict[str, Any]] = {}
            for name in VARIANTS:
                for file in sorted((out / f"{ratio:g}-{seed}").glob(f"{name}@*.json"), key=_rate):
                    tried.setdefault(name, {})[file.stem.partition("@")[2]] = json.loads(file.read_text())
                file = out / f"{ratio:g}-{seed}" / f"{name}.json"
                if file.is_file():
                    tried[name] = {"": json.loads(file.read_text())}
            if tried:
                runs.append({"ratio": ratio, "seed": seed, "tried": tried})
    return runs


def _rate(file: Path) -> float:
    return float(file.stem.partition("@")[2])


def _load() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL)


@cache
def _sources() -> Any:
    from shear_training.data import load_data, prepare

    config = load_data(MODEL / "data.yaml")
    return config, prepare(config, _load()[1])


@cache
def _bundled() -> Any:
    from shear_tools.workflow.recipe import load_recipe

    return load_recipe(MODEL / "recipe.yaml")


@cache
def _dense() -> Losses:
    return _losses(_load()[0])


def _losses(model: Any) -> Losses:
    from shear_training.evaluate import evaluate_sources

    return {name: loss.nll for name, loss in evaluate_sources(model, _sources()[1]).items()}


def _measured(model: Any) -> dict[str, Any]:
    return {"losses": _losses(model), "parameters": sum(p.numel() for p in model.parameters())}


def _by_magnitude(given: Given) -> Any:
    """Sheared by magnitude, every layer alike."""
    import shear_ir as sir

    model, _ = _load()
    return sir.shear(model, sir.plan(sir.trace(model), ratio=given.ratio, importance="magnitude"))


def _knowledge(out: Path) -> Any:
    """The knowledge distribution, measured once: neither ratios nor seeds change it."""
    import shear_ir as sir
    from shear_training.evaluate import evaluate
    from shear_training.knowledge import Knowledge, measure_knowledge

    file = out / "knowledge.json"
    if not file.is_file():
        model, _ = _load()
        rows = [source.train.spread(_bundled().knowledge.rows) for source in _sources()[1].values()]
        measure_knowledge(
            model, sir.groups(sir.trace(model)),
            lambda masked: statistics.mean(evaluate(masked, each).nll for each in rows), share=0.0,
        ).save(file)  # fmt: skip
    return Knowledge.load(file)


# -- what is trained --------------------------------------------------------------------------------------------------


def _tuned(model: Any, given: Given, name: str, rate: float) -> dict[str, Any]:
    """LoRA over all sources evenly, with one schedule, after which the weights are kept where they are better."""
    from shear_training.recovery import recover

    settings = replace(
        _bundled().recovery, dynamic=False, max_rounds=1, epochs=1, rows_per_round=given.rows, lr=rate, batch=STEP,
        seed=given.seed,
    )  # fmt: skip
    folder = given.folder / f"{name}-{rate:g}"
    sources = {name: replace(each, validation=each.validation[:LOOKED_AT]) for name, each in _sources()[1].items()}
    done = recover(model, sources, _dense(), settings, folder, stage="plain")
    return {**_measured(done.model), "tokens": sum(each.tokens for each in done.rounds)}


def _lorashear(given: Given, name: str, recipe: Any) -> dict[str, Any]:
    """``shear-ir lorashear`` as a whole, and what came of its units."""
    import shear_ir as sir
    from shear_ir.plans import Plan

    model, tokenizer = _load()
    place = given.folder / name
    place.mkdir(exist_ok=True)
    known = _knowledge(given.folder.parent)
    # Measured once for all runs, for it takes most of a short run's time.
    with mock.patch("shear_tools.workflow.run.measure_knowledge", lambda *_, share, **__: known.with_share(share)):
        sir.lorashear(
            model, tokenizer, place / "out", ratio=given.ratio, data=_few(given.folder.parent), recipe=recipe,
            work=place / "work", keep_work=True, source=MODEL, force=True,
        )  # fmt: skip
    report = json.loads((place / "out" / "report.json").read_text())
    flap = {cut.group: list(cut.kept) for cut in given.flap[0].cuts}
    mine = {cut.group: list(cut.kept) for cut in Plan.load(place / "work" / "cut.json").cuts}
    stages = [each["tokens"] for stage in report["stages"] for each in stage["rounds"]]
    return {
        **_measured(sir.load(place / "out")), "pruned": _losses(sir.load(place / "work" / "pruned")),
        "tokens": report["pruning"]["tokens"] + sum(stages), "lhspg": report["pruning"]["tokens"],
        "repair": report["pruning"].get("repair"),
        "as flap": [sum(mine.get(group) == kept for group, kept in flap.items()), len(flap)],
    }  # fmt: skip


def _few(out: Path) -> Path:
    """``data.yaml`` with fewer rows to measure on."""
    import yaml

    document = yaml.safe_load((MODEL / "data.yaml").read_text())
    document["validation"] = LOOKED_AT
    for source in document["sources"].values():
        for key in ("path", "validation"):
            source[key] = str(MODEL / source[key])
    file = out / "data.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def bundled(given: Given, rate: float) -> Any:
    """The bundled recipe at this rate, with the rows of its stages shortened alike."""
    recipe = _bundled().with_options(seed=given.seed)
    scale = rate / recipe.recovery.lr
    asked = recipe.pruning
    rows = [recipe.stage(name).rows_per_round for name in ("pretraining", "instructions")]
    left = max(2 * STEP, given.rows - asked.batch * (asked.warmup + asked.periods * asked.steps))
    first, second = (max(STEP, round(left * each / sum(rows))) for each in rows)
    instructions = dict(recipe.stages["instructions"])
    return replace(
        recipe, pruning=replace(asked, lr=asked.lr * scale),
        recovery=replace(recipe.recovery, lr=rate, rows_per_round=first),
        stages={"instructions": {**instructions, "lr": instructions["lr"] * scale, "rows_per_round": second}},
    )  # fmt: skip


def default(given: Given, rate: float) -> Any:
    """The default recipe at this rate: half of the tokens for LHSPG, a round for each stage of what is left."""
    from shear_tools.workflow.recipe import Recipe

    recipe = Recipe().with_options(seed=given.seed)
    steps = max(4, given.rows // (2 * STEP))
    periods = min(recipe.pruning.periods, steps // 2)
    each = (steps - steps // 6) // periods
    warmup = steps - periods * each
    left = max(2 * STEP, given.rows - steps * STEP)
    return replace(
        recipe,
        pruning=replace(recipe.pruning, lr=recipe.pruning.lr * rate / recipe.recovery.lr, batch=STEP, warmup=warmup,
                        periods=periods, steps=each),
        recovery=replace(recipe.recovery, lr=rate, batch=STEP, rows_per_round=left // 2, epochs=1, max_rounds=1),
    )  # fmt: skip


_TRAINED: dict[str, Any] = {
    "dense + LoRA": lambda given, rate: _tuned(_load()[0], given, "dense", rate),
    "magnitude + LoRA": lambda given, rate: _tuned(_by_magnitude(given), given, "magnitude", rate),
    "repaired + LoRA": lambda given, rate: _tuned(copy.deepcopy(given.repaired), given, "repaired", rate),
    "bundled": lambda given, rate: _lorashear(given, f"bundled-{rate:g}", bundled(given, rate)),
    "default": lambda given, rate: _lorashear(given, f"default-{rate:g}", default(given, rate)),
}


def _keep(path: Path, make: Any) -> None:
    if not path.is_file():
        started = time.process_time()
        beside = path.with_name(f".{path.name}")
        beside.write_text(json.dumps(make() | {"seconds": time.process_time() - started}))
        beside.replace(path)


def best(tried: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the rates that were tried, the one with the lowest mean loss."""
    return min(tried, key=lambda rate: mean(tried[rate]["losses"]))


# -- the table --------------------------------------------------------------------------------------------------------


def cell(runs: Sequence[Mapping[str, Any]], variant: str, ratio: float, seed: int) -> dict[str, Any] | None:
    """What a variant lost in a seed at its best rate, ``rate`` (of the method) beside it; None where it was not run."""
    name = variant.removesuffix(", pruned")
    mine = [r for r in runs if r["seed"] == seed and r["ratio"] == (0 if name.startswith("dense") else ratio)]
    if not mine or name not in mine[0]["tried"]:
        return None
    tried = mine[0]["tried"][name]
    rate = best(tried)
    found = {"tokens": 0, **tried[rate], "rate": rate}
    return found if name == variant else {**found, "losses": found["pruned"], "tokens": found["lhspg"]}


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per ratio and variant: means over the seeds, and the spread of the growth of the perplexity."""
    rows = []
    seeds = sorted({r["seed"] for r in runs})
    for ratio in sorted({r["ratio"] for r in runs} - {0}):
        for variant in VARIANTS:
            cells = [found for seed in seeds if (found := cell(runs, variant, ratio, seed)) is not None]
            growth = [more for seed in seeds if (more := _growth(runs, variant, ratio, seed)) is not None]
            if cells:
                rows.append({
                    "ratio": ratio, "variant": variant, "seeds": len(cells), "rate": cells[0]["rate"],
                    "tokens": statistics.mean(each["tokens"] for each in cells),
                    "perplexity": {d: statistics.mean(math.exp(each["losses"][d]) for each in cells) for d in DOMAINS},
                    "growth": statistics.mean(growth), "spread": statistics.stdev(growth) if len(growth) > 1 else 0.0,
                    "nll": statistics.mean(mean(each["losses"]) for each in cells),
                })  # fmt: skip
    return rows


def mean(losses: Mapping[str, float]) -> float:
    """The mean NLL of the domains, each of the same weight."""
    return statistics.mean(losses[domain] for domain in DOMAINS)


def verdicts(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rows say of each other, over the seeds in which both were run."""
    said = []
    seeds = sorted({r["seed"] for r in runs})
    for ratio in sorted({r["ratio"] for r in runs} - {0}):
        done = [found for seed in seeds if (found := cell(runs, "bundled", ratio, seed)) is not None]
        if done:
            groups = "; ".join("{} of {}".format(*each["as flap"]) for each in done)
            thrown = sum(each["repair"]["taken"] == "repaired" for each in done)
            said.append(
                f"At {ratio:g}, groups of the bundled recipe that keep the units FLAP alone keeps: {groups}; the "
                f"weights that LHSPG trained were thrown away for repaired ones in {thrown} of {len(done)} runs."
            )
        for one, other in COMPARED:
            pairs = [(left, right) for seed in seeds
                     if (left := _growth(runs, one, ratio, seed)) is not None
                     and (right := _growth(runs, other, ratio, seed)) is not None]  # fmt: skip
            if pairs:
                left, right = (100 * statistics.mean(side) for side in zip(*pairs, strict=True))
                said.append(
                    f"At {ratio:g}, {VARIANTS[one]}: perplexity {left:+.1f} %; {VARIANTS[other]}: {right:+.1f} %; the "
                    f"first is lower in {sum(a < b for a, b in pairs)} of {len(pairs)} seeds."
                )
    return said


def _growth(runs: Sequence[Mapping[str, Any]], variant: str, ratio: float, seed: int) -> float | None:
    """Growth of the perplexity over the dense model's, which is that of the mean loss over the domains."""
    found, dense = (cell(runs, name, ratio, seed) for name in (variant, "dense"))
    if found is None or dense is None:
        return None
    return math.exp(mean(found["losses"]) - mean(dense["losses"])) - 1.0


def markdown(runs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """The table for people."""
    rows = summary(runs)
    lines = [
        "# What pruning costs, and what brings it back", "",
        f"The bundled model ({options['parameters']:,} parameters), perplexity on held-out text, mean of "
        f"{max(r['seeds'] for r in rows)} seeds; `{options['command']}` made this page. Against dense: growth of the "
        "perplexity (that of the mean loss over the three domains), ± its standard deviation over the seeds. Every "
        f"method trains on some {options['tokens']:,} tokens of the same four sources, recovery and LHSPG together; "
        "its rate is the best of three on the first seed and the largest ratio, by the same held-out text.", "",
    ]  # fmt: skip
    for ratio in sorted({r["ratio"] for r in rows}):
        lines += [
            f"## {100 * ratio:g} % of the parameters gone", "",
            "| | perplexity against dense | " + " | ".join(DOMAINS) + " | mean NLL | tokens | rate | seeds |",
            "|---|" + "---:|" * (len(DOMAINS) + 5),
        ]  # fmt: skip
        for row in (r for r in rows if r["ratio"] == ratio):
            cells = [f"{100 * row['growth']:+.1f} ± {100 * row['spread']:.1f} %"]
            cells += [f"{row['perplexity'][d]:.2f}" for d in DOMAINS]
            cells += [f"{row['nll']:.4f}", f"{row['tokens']:,.0f}", row["rate"], str(row["seeds"])]
            lines.append(f"| {VARIANTS[row['variant']]} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"- {sentence}" for sentence in verdicts(runs)]
    lines += [
        "",
        "## Learning rates",
        "",
        "Growth of the perplexity on the first seed, by rate of recovery.",
        "",
        *_sweep(runs),
    ]
    lines += ["", "![quality](quality.svg)", "", f"{options['versions']}; {options['machine']}; one thread, "
              f"{_seconds(runs) / 60:.0f} minutes of CPU time.", ""]  # fmt: skip
    return "\n".join(lines)


def _seconds(runs: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(each["seconds"] for run in runs for tried in run["tried"].values() for each in tried.values()))


def _sweep(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of the table of rates: the first seed, each method at each ratio."""
    first = min(r["seed"] for r in runs)
    dense = cell(runs, "dense", 0, first)
    assert dense is not None
    made = ["| | ratio | rates, and what each costs |", "|---|---:|---|"]
    for name in RATES:
        several = [r for r in runs if r["seed"] == first and len(r["tried"].get(name, ())) > 1]
        for mine in several:
            tried = mine["tried"][name]
            costs = {rate: math.exp(mean(each["losses"]) - mean(dense["losses"])) - 1.0 for rate, each in tried.items()}
            told = "; ".join(f"{rate}: {100 * cost:+.1f} %" for rate, cost in costs.items())
            made.append(f"| {VARIANTS[name]} | {mine['ratio'] or '–'} | {told} |")
    return made


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A bar per variant and ratio: growth of the perplexity, with its spread over the seeds."""
    from matplotlib.figure import Figure

    ratios = sorted({r["ratio"] for r in rows})
    figure = Figure(figsize=(9, 1.2 + 2.4 * len(ratios)), layout="constrained")
    for axes, ratio in zip(figure.subplots(len(ratios), 1, squeeze=False).flat, ratios, strict=True):
        mine = [r for r in rows if r["ratio"] == ratio and r["variant"] != "dense"]
        names = [VARIANTS[r["variant"]] for r in mine]
        colours = ["#0072b2" if name.startswith("lorashear") else "#e69f00" for name in names]
        axes.barh(names, [100 * r["growth"] for r in mine], xerr=[100 * r["spread"] for r in mine], color=colours)
        axes.axvline(0.0, color="#666666", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=10.0)
        axes.invert_yaxis()
        axes.set_title(f"{100 * ratio:g} % of the parameters gone", loc="left")
        axes.set_xlabel("growth of the held-out perplexity over the dense model's, % (linear below 10)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


# -- all runs ---------------------------------------------------------------------------------------------------------


def main(
    ratio: Annotated[list[float] | None, typer.Option(help="Repeatable.", show_default="0.2 0.5")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable.", show_default="0 1 2")] = None,
    tokens: Annotated[int, typer.Option(help="What every method trains on, all in all.", min=1)] = TOKENS,
    out: Annotated[Path, typer.Option(help="Where results and finished parts go.")] = ROOT / "out" / "quality",
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.", min=1)] = 1,
    table: Annotated[Literal["lorashear", "criteria"], typer.Option(help="What is measured.")] = "lorashear",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of each, one rate, one seed.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing: the table of what is there.")] = False,
    one: Annotated[str | None, typer.Option("--one", hidden=True)] = None,
) -> None:
    """Measure all variants and write the table; parts that are done are not done again."""
    ratios, seeds = tuple(ratio or RATIOS), tuple(seed or SEEDS)
    if table == "criteria":
        return _criteria(seeds, out, jobs, one)
    if one is not None:
        folder = out / f"{ratios[0]:g}-{seeds[0]}"
        return run(Given(ratios[0], seeds[0], tokens, folder, json.loads(one)))
    out.mkdir(parents=True, exist_ok=True)
    rates: dict[str, Sequence[float]] = {name: each[1:2] if quick else each for name, each in RATES.items()}
    seeds, tokens = (seeds[:1], 1) if quick else (seeds, tokens)
    wanted = [(r, s) for s in seeds for r in (0.0, *sorted(ratios, reverse=True))]
    for number, group in enumerate([] if show else [wanted[:2], wanted[2:]]):
        if number:  # the best of the first part
            tried = [each for r in collected(out, ratios, seeds[:1]) for each in r["tried"].items()]
            rates |= {name: [float(best(each))] for name, each in tried if len(each) > 1}
        parts = {
            f"{r:g}-{s}": ["--ratio", f"{r:g}", "--seed", str(s), "--tokens", str(tokens), "--one", json.dumps(rates)]
            for r, s in group
        }
        _run_all(parts, out, jobs)
    runs = collected(out, ratios, seeds)
    text = markdown(runs, _options() | {"tokens": tokens, "command": _spelled(ratio, seed, tokens, quick)})
    (out / "quality.md").write_text(text)
    plot(summary(runs), out / "quality.svg")
    print(text)
    console.print(f"wrote {out}")


def _spelled(ratio: list[float] | None, seed: list[int] | None, tokens: int, quick: bool) -> str:
    """The command line."""
    options = [f"--ratio {r:g}" for r in ratio or ()] + [f"--seed {s}" for s in seed or ()]
    options += ["--quick"] if quick else [f"--tokens {tokens}"] if tokens != TOKENS else []
    return " ".join(["python tools/bench/quality.py", *options])


def _criteria(seeds: Sequence[int], out: Path, jobs: int, one: str | None) -> None:
    from bench import criteria

    if one is not None:
        folder = out / f"criteria-{seeds[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(criteria.run(seeds[0], folder), indent=1))
        return
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        f"criteria-{s}": ["--table", "criteria", "--seed", str(s), "--one", ""]
        for s in seeds
        if not (out / f"criteria-{s}" / "run.json").is_file()
    }
    _run_all(parts, out, jobs)
    runs = [json.loads((out / f"criteria-{s}" / "run.json").read_text()) for s in seeds]
    text = criteria.markdown(runs, _options())
    (out / "criteria.json").write_text(json.dumps({"runs": runs, "verdicts": criteria.verdicts(runs)}, indent=1))
    (out / "criteria.md").write_text(text)
    criteria.plot(runs, out / "criteria.svg")
    print(text)
    console.print(f"wrote {out}")


def _run_all(parts: Mapping[str, Sequence[str]], out: Path, jobs: int) -> None:
    """Run every part, by name and arguments, in a process of its own."""
    waiting = dict(parts)
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    while waiting or running:
        while waiting and len(running) < jobs:
            part = next(iter(waiting))
            log = (out / f"{part}.log").open("a")
            command = [sys.executable, __file__, "--out", str(out), *waiting.pop(part)]
            running[part] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            console.print(f"{part}: started; its log is {log.name}")
        time.sleep(1)
        for part, process in list(running.items()):
            if process.poll() is not None:
                del running[part]
                if process.returncode:
                    raise SystemExit(f"{part} failed: see its log in {out}")
                console.print(f"{part}: done")


def _options() -> dict[str, Any]:
    from importlib.metadata import version

    model, _ = _load()
    names = ("torch", "transformers", "peft")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": ", ".join(f"{name} {version(name)}" for name in names),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


if __name__ == "__main__":
    typer.run(main)
