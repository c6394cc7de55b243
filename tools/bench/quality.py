"""What pruning costs a language model, and what brings it back: the bundled model, three seeds, two ratios.

    python tools/bench/quality.py                                 # everything, resumable: about an hour on two cores
    python tools/bench/quality.py --ratio 0.2 --seed 0 --seed 1   # a part
    python tools/bench/quality.py --quick                         # a few steps of each, to see that it works
    python tools/bench/quality.py --table criteria                # without training: see tools/bench/criteria.py

For each ratio and seed, on held-out text of each domain: the dense model; pruned by magnitude without training; by
LHSPG; after recovery stage 1 and 2 (all of these by ``shear-ir lorashear``); magnitude with the same recovery;
magnitude with plain LoRA fine-tuning on as many tokens as LHSPG and recovery took together, also with the shares of
the layers that LHSPG had, and with its repair; and LHSPG with the same recovery on a uniform mixture. One process and
thread per run. Writes quality.json, quality.md and quality.svg.
"""

from __future__ import annotations

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
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL = ROOT / "tools" / "assets" / "tiny-llama"
DOMAINS = ("code", "docs", "topics")
"""The sources that are compared; the instructions are made of the same texts, so their loss counts nowhere."""
RATIOS = (0.2, 0.5)
SEEDS = (0, 1, 2)
VARIANTS = {
    "dense": "dense",
    "magnitude": "magnitude, no training",
    "lhspg": "LHSPG, no recovery",
    "stage 1": "LHSPG + stage 1",
    "stage 2": "LHSPG + stages 1, 2",
    "uniform": "LHSPG + stages 1, 2, uniform mixture",
    "magnitude + recovery": "magnitude + stages 1, 2",
    "magnitude + LoRA": "magnitude + plain LoRA, as many tokens as LHSPG + stages",
    "shares + LoRA": "magnitude, layers sharing by knowledge + plain LoRA, as many tokens",
    "repair + LoRA": "magnitude, sharing by knowledge, least squares + plain LoRA, as many tokens",
}
MAGNITUDE_LR = {"pretraining": 5e-3, "instructions": 2e-3}
"""Learning rates of what starts from magnitude alone, which is further from the dense model: these suit it better."""
console = Console(stderr=True)

Losses = dict[str, float]
"""Mean NLL in nats per token by source."""


# -- one run ----------------------------------------------------------------------------------------------------------


def run(ratio: float, seed: int, folder: Path, recipe_file: Path) -> dict[str, Any]:
    """All variants of one ratio and seed; each is kept in ``folder`` when it is done."""
    import torch

    import shear_ir as sir
    from shear_ir.workflow.recipe import load_recipe

    torch.set_num_threads(1)
    recipe = load_recipe(recipe_file).with_options(seed=seed)
    started = time.perf_counter()
    out = folder / "out"
    if not out.exists():
        model, tokenizer = _load()
        sir.lorashear(
            model, tokenizer, out, ratio=ratio, data=MODEL / "data.yaml", recipe=recipe, work=folder / "work",
            keep_work=True, source=MODEL,
        )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    found: dict[str, Losses] = {
        key: {source: loss["nll"] for source, loss in report["losses"][name].items()}
        for key, name in zip(("dense", "lhspg", "stage 1", "stage 2"), report["losses"], strict=True)
    }
    tokens = {"lhspg": report["pruning"]["tokens"], "recovery": [_tokens(stage) for stage in report["stages"]]}
    given = Given(ratio, recipe, found["dense"], tokens["lhspg"] + sum(tokens["recovery"]), folder)
    for name, make in _BASELINES.items():
        found[name] = _kept(folder / f"{name}.json", lambda make=make: make(given))
    seconds = time.perf_counter() - started
    return {"ratio": ratio, "seed": seed, "losses": found, "tokens": tokens, "really": report["ratio"],
            "seconds": seconds, "repair": report["pruning"].get("repair"), "stages": report["stages"]}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """What a baseline is made of. ``dense``: losses of the dense model; ``budget``: tokens of LHSPG and recovery."""

    ratio: float
    recipe: Any
    dense: Losses
    budget: int
    folder: Path


def _load() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL)


@cache
def _sources() -> Any:
    from shear_ir.training.data import load_data, prepare

    config = load_data(MODEL / "data.yaml")
    return config, prepare(config, _load()[1])


def _measured(model: Any) -> Losses:
    from shear_ir.training.evaluate import evaluate_sources

    return {name: loss.nll for name, loss in evaluate_sources(model, _sources()[1]).items()}


def _by_magnitude(given: Given, shares: bool = False, repair: bool = False) -> Any:
    """Sheared by magnitude; ``shares``: layers lose what they lose by ``given``; ``repair``: by least squares."""
    import shear_ir as sir
    from shear_ir.training.knowledge import Knowledge
    from shear_ir.workflow.calibration import batches_of

    model, _ = _load()
    curves = Knowledge.load(given.folder / "work" / "knowledge.json").curves if shares else None
    plan = sir.plan(
        sir.trace(model), ratio=given.ratio, importance="magnitude", knowledge=curves,
        allocation=given.recipe.allocation if shares else "uniform",
    )  # fmt: skip
    if repair:
        config, sources = _sources()
        rows = {name: sources[name].train for name in config.road[0].sources}
        asked = given.recipe.pruning
        model = sir.repair(model, plan, "least-squares", data=batches_of(rows, asked.calibration, seed=asked.seed))
    return sir.shear(model, plan)


def _magnitude(given: Given) -> Losses:
    return _measured(_by_magnitude(given))


def _recovered(model: Any, given: Given, name: str, rates: Mapping[str, float] | None = None, **changes: Any) -> Losses:
    """The stages of ``data.yaml`` on a pruned model."""
    from shear_ir.training.recovery import recover

    config, sources = _sources()
    for number, stage in enumerate(config.road):
        settings = replace(given.recipe.stage(stage.name), **changes)
        settings = replace(settings, lr=(rates or {}).get(stage.name, settings.lr))
        rows = {source: sources[source] for source in stage.sources}
        folder = given.folder / name / f"{number}"
        model = recover(model, rows, given.dense, settings, folder, stage=stage.name).model
    return _measured(model)


def _magnitude_recovered(given: Given) -> Losses:
    return _recovered(_by_magnitude(given), given, "magnitude", MAGNITUDE_LR)


def _uniform(given: Given) -> Losses:
    import shear_ir as sir

    return _recovered(sir.load(given.folder / "work" / "pruned"), given, "uniform", dynamic=False)


def _plain_lora(given: Given) -> Losses:
    return _tuned(_by_magnitude(given), given, "plain", MAGNITUDE_LR["pretraining"])


def _plain_lora_by_shares(given: Given) -> Losses:
    return _tuned(_by_magnitude(given, shares=True), given, "shares", given.recipe.recovery.lr)


def _plain_lora_repaired(given: Given) -> Losses:
    return _tuned(_by_magnitude(given, shares=True, repair=True), given, "repaired", given.recipe.recovery.lr)


def _tuned(model: Any, given: Given, name: str, lr: float) -> Losses:
    """One run of LoRA fine-tuning over all sources evenly, with one schedule."""
    from shear_ir.training.recovery import recover

    _, sources = _sources()
    each = statistics.mean(source.train.tokens / len(source.train) for source in sources.values())
    settings = replace(
        given.recipe.recovery, dynamic=False, max_rounds=1, epochs=1, rows_per_round=math.ceil(given.budget / each),
        lr=lr,
    )  # fmt: skip
    return _measured(recover(model, sources, given.dense, settings, given.folder / name, stage="plain").model)


_BASELINES = {
    "magnitude": _magnitude,
    "magnitude + recovery": _magnitude_recovered,
    "magnitude + LoRA": _plain_lora,
    "uniform": _uniform,
    "shares + LoRA": _plain_lora_by_shares,
    "repair + LoRA": _plain_lora_repaired,
}


def _kept(path: Path, make: Any) -> Losses:
    if not path.is_file():
        beside = path.with_name(f".{path.name}")
        beside.write_text(json.dumps(make()))
        beside.replace(path)
    return dict(json.loads(path.read_text()))


def _tokens(stage: Mapping[str, Any]) -> int:
    return sum(each["tokens"] for each in stage["rounds"])


# -- the table --------------------------------------------------------------------------------------------------------


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per ratio and variant: means over the seeds, and the spread of the mean loss."""
    rows = []
    for ratio in sorted({r["ratio"] for r in runs}):
        mine = [r for r in runs if r["ratio"] == ratio]
        for name in VARIANTS:
            found = [r["losses"][name] for r in mine]
            dense = [mean(r["losses"]["dense"]) for r in mine]
            means = [mean(losses) for losses in found]
            rows.append({
                "ratio": ratio, "variant": name, "seeds": len(mine),
                "perplexity": {d: statistics.mean(math.exp(losses[d]) for losses in found) for d in DOMAINS},
                "nll": statistics.mean(means),
                "spread": statistics.stdev(means) if len(means) > 1 else 0.0,
                "degradation": statistics.mean(m / d - 1.0 for m, d in zip(means, dense, strict=True)),
                "perplexity degradation": statistics.mean(
                    math.exp(m - d) - 1.0 for m, d in zip(means, dense, strict=True)
                ),
            })  # fmt: skip
    return rows


def mean(losses: Mapping[str, float]) -> float:
    """The mean NLL of the domains, each of the same weight."""
    return statistics.mean(losses[domain] for domain in DOMAINS)


def verdicts(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the issue asks of the table, answered by it."""
    said = []
    for ratio in sorted({r["ratio"] for r in runs}):
        mine = [r for r in runs if r["ratio"] == ratio]
        for name in ("magnitude + recovery", "magnitude + LoRA", "shares + LoRA", "repair + LoRA", "uniform"):
            gaps = [mean(r["losses"][name]) - mean(r["losses"]["stage 2"]) for r in mine]
            beats = "beats" if statistics.mean(gaps) > 0 else "does not beat"
            won = sum(gap > 0 for gap in gaps)
            said.append(
                f"At {ratio:g}, LHSPG with dynamic recovery {beats} {VARIANTS[name]}: {statistics.mean(gaps):+.4f} "
                f"nats per token in the mean, better in {won} of {len(gaps)} seeds."
            )
        repaired = [r["repair"] for r in mine if r["repair"]]
        if repaired:
            taken = sum(r["taken"] == "repaired" for r in repaired)
            gap = statistics.mean(r["trained"] - r["repaired"] for r in repaired)
            said.append(
                f"At {ratio:g}, with the units that LHSPG chose, the weights from before it, repaired, were better "
                f"than those that it trained in {taken} of {len(repaired)} seeds, by {gap:.4f} nats in the mean."
            )
    return said


def markdown(runs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """The table for people."""
    rows = summary(runs)
    lines = [
        "# What pruning costs, and what brings it back", "",
        f"The bundled model ({options['parameters']:,} parameters), perplexity on held-out text, mean of "
        f"{rows[0]['seeds']} seeds; `python tools/bench/quality.py` made it. Against dense: growth of the mean NLL, "
        "and of the perplexity, in percent. What starts from magnitude alone learns at rates of its own, "
        f"{MAGNITUDE_LR['pretraining']:g} and {MAGNITUDE_LR['instructions']:g}, which suit it better.", "",
    ]  # fmt: skip
    for ratio in sorted({r["ratio"] for r in rows}):
        really = statistics.mean(r["really"] for r in runs if r["ratio"] == ratio)
        spent = [r["tokens"] for r in runs if r["ratio"] == ratio]
        lines += [
            f"## Ratio {ratio:g} ({100 * really:.2f} % of the parameters gone)", "",
            f"LHSPG trained on {statistics.mean(s['lhspg'] for s in spent):,.0f} tokens, recovery on "
            f"{statistics.mean(sum(s['recovery']) for s in spent):,.0f}.", "",
            "| | " + " | ".join(DOMAINS) + " | mean NLL | spread | NLL against dense | perplexity against dense |",
            "|---|" + "---:|" * (len(DOMAINS) + 4),
        ]  # fmt: skip
        for row in (r for r in rows if r["ratio"] == ratio):
            cells = [f"{row['perplexity'][d]:.2f}" for d in DOMAINS]
            cells += [f"{row['nll']:.4f}", f"{row['spread']:.4f}", f"{100 * row['degradation']:+.2f} %",
                      f"{100 * row['perplexity degradation']:+.1f} %"]  # fmt: skip
            lines.append(f"| {VARIANTS[row['variant']]} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"- {sentence}" for sentence in verdicts(runs)]
    lines += ["", "![quality](quality.svg)", "", f"{options['versions']}; {options['machine']}; one thread per run, "
              f"{statistics.mean(r['seconds'] for r in runs) / 60:.0f} minutes per ratio and seed.", ""]  # fmt: skip
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A bar per variant and ratio: the mean NLL with the spread over the seeds."""
    from matplotlib.figure import Figure

    ratios = sorted({r["ratio"] for r in rows})
    figure = Figure(figsize=(9, 2.2 + 2.2 * len(ratios)), layout="constrained")
    for axes, ratio in zip(figure.subplots(len(ratios), 1, squeeze=False).flat, ratios, strict=True):
        mine = [r for r in rows if r["ratio"] == ratio]
        names = [VARIANTS[r["variant"]] for r in mine]
        baseline = ["magnitude" in name for name in names]
        colours = ["#e69f00" if is_one else "#0072b2" for is_one in baseline]
        colours[0] = "#999999"  # the dense model
        axes.barh(names, [r["nll"] for r in mine], xerr=[r["spread"] for r in mine], color=colours)
        axes.axvline(mine[0]["nll"], color="#666666", linewidth=0.8, linestyle=":")
        axes.invert_yaxis()
        axes.set_xlim(left=0.95 * mine[0]["nll"])
        axes.set_title(f"ratio {ratio:g}", loc="left")
        axes.set_xlabel("mean NLL on held-out text, nats per token")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


# -- all runs ---------------------------------------------------------------------------------------------------------


def main(
    ratio: Annotated[list[float] | None, typer.Option(help="Repeatable.", show_default="0.2 0.5")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable.", show_default="0 1 2")] = None,
    recipe: Annotated[Path, typer.Option(help="The options of the stages.")] = MODEL / "recipe.yaml",
    out: Annotated[Path, typer.Option(help="Where results and finished parts go.")] = ROOT / "out" / "quality",
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.", min=1)] = 2,
    table: Annotated[Literal["lorashear", "criteria"], typer.Option(help="What is measured.")] = "lorashear",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of each.")] = False,
    one: Annotated[bool, typer.Option("--one", hidden=True)] = False,
) -> None:
    """Measure all variants and write the table; parts that are done are not done again."""
    ratios, seeds = tuple(ratio or RATIOS), tuple(seed or SEEDS)
    if table == "criteria":
        return _criteria(seeds, out, jobs, one)
    if one:
        folder = out / f"{ratios[0]:g}-{seeds[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        found = run(ratios[0], seeds[0], folder, recipe)
        (folder / "run.json").write_text(json.dumps(found, indent=1))
        return
    out.mkdir(parents=True, exist_ok=True)
    if quick:
        recipe = _quick(recipe, out)
    wanted = [(r, s) for s in seeds for r in ratios]
    parts = {
        f"{r:g}-{s}": ["--ratio", f"{r:g}", "--seed", str(s), "--recipe", str(recipe)]
        for r, s in wanted
        if not (out / f"{r:g}-{s}" / "run.json").is_file()
    }
    _run_all(parts, out, jobs)
    runs = [json.loads((out / f"{r:g}-{s}" / "run.json").read_text()) for r, s in wanted]
    rows = summary(runs)
    text = markdown(runs, _options())
    (out / "quality.json").write_text(json.dumps({"runs": runs, "summary": rows, "verdicts": verdicts(runs)}, indent=1))
    (out / "quality.md").write_text(text)
    plot(rows, out / "quality.svg")
    print(text)
    console.print(f"wrote {out}")


def _criteria(seeds: Sequence[int], out: Path, jobs: int, one: bool) -> None:
    from tools.bench import criteria

    if one:
        folder = out / f"criteria-{seeds[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(criteria.run(seeds[0], folder), indent=1))
        return
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        f"criteria-{s}": ["--table", "criteria", "--seed", str(s)]
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


def _quick(recipe: Path, out: Path) -> Path:
    import yaml

    options = yaml.safe_load(recipe.read_text())
    options.setdefault("knowledge", {}).update(ratios=[0.5], rows=2)
    options.setdefault("pruning", {}).update(warmup=1, periods=1, steps=1, batch=2)
    options.setdefault("recovery", {}).update(batch=2, rows_per_round=4, max_rounds=1, epochs=1)
    options["stages"] = {}
    path = out / "quick.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def _run_all(parts: Mapping[str, Sequence[str]], out: Path, jobs: int) -> None:
    """Run every part, by name and arguments, in a process of its own."""
    waiting = dict(parts)
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    while waiting or running:
        while waiting and len(running) < jobs:
            part = next(iter(waiting))
            log = (out / f"{part}.log").open("a")
            command = [sys.executable, __file__, "--one", "--out", str(out), *waiting.pop(part)]
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
