"""Which units to remove: criteria, allocations and repairs without training, and what a little training adds.

    python tools/bench/quality.py --table criteria                # everything, resumable: about an hour on two cores
    python tools/bench/quality.py --table criteria --seed 0       # a part

For each seed (of the calibration rows): every criterion at every ratio, with and without least squares; the other
allocations for some of them; torch-pruning's pruners on the same model and rows; what the same small recovery makes of
some of these; and a trained sentence encoder, whose similarities are compared with the dense one's by rank. Writes
criteria.json, criteria.md and criteria.svg.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tools" / "assets" / "tiny-llama"
DOMAINS = ("code", "docs", "topics")
RATIOS = (0.1, 0.2, 0.3, 0.5)
CRITERIA = (
    "random", "magnitude", "taylor", "taylor-second", "taylor-mixed", "taylor-vector", "lora-guided", "wanda", "flap",
    "minitron", "mini-llm", "bonsai",
)  # fmt: skip
REPAIRS = ("none", "least-squares")
SHARED = ("magnitude", "taylor", "flap")
"""Criteria that are tried with every allocation."""
RECOVERED = (
    ("magnitude", "uniform", "none"), ("taylor", "uniform", "none"), ("flap", "uniform", "none"),
    ("taylor", "uniform", "least-squares"), ("flap", "uniform", "least-squares"),
    ("taylor", "by-knowledge", "least-squares"), ("flap", "by-knowledge", "least-squares"),
)  # fmt: skip
"""What the small recovery is tried on: criterion, allocation, repair."""
PEERS = {
    "torch-pruning magnitude": "", "torch-pruning Taylor": "", "torch-pruning activation": "",
    "shear-ir magnitude": "magnitude", "shear-ir Taylor": "taylor", "shear-ir flap": "flap",
}  # fmt: skip
"""Rows of the table of peers; of ours, the criterion."""
ENCODER = ("random", "magnitude", "wanda", "flap", "minitron")
ROWS = 96
ENCODED = 160

Losses = dict[str, float]


# -- one seed ---------------------------------------------------------------------------------------------------------


def run(seed: int, folder: Path) -> dict[str, Any]:
    """All measurements of one seed; each is kept in ``folder`` when it is done."""
    import torch

    torch.set_num_threads(1)
    bench = _Bench(seed, folder)
    found = {
        "without": bench.without_training(), "recovered": bench.recovered(), "peers": bench.peers(),
        "encoder": bench.encoder(),
    }  # fmt: skip
    return {"seed": seed, **found}


class _Bench:
    def __init__(self, seed: int, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from shear_tools.workflow.calibration import calibration_batches
        from shear_training.data import load_data, prepare

        self.seed, self.folder = seed, folder
        made: Any = AutoModelForCausalLM.from_pretrained(MODEL)
        self.model = made.eval()
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.sources = {n: s for n, s in prepare(load_data(MODEL / "data.yaml"), tokenizer).items() if n in DOMAINS}
        self.held = {name: source.validation for name, source in self.sources.items()}
        # Rows to train on: what is measured was not looked at.
        self.batches, _ = calibration_batches(MODEL / "data.yaml", tokenizer, samples=ROWS, seed=seed)

    def without_training(self) -> dict[str, Any]:
        """Every criterion evenly, some of them with every allocation."""
        from shear_passes.select import ALLOCATIONS
        from shear_tools.workflow.sweep import sweep, trials

        wanted = trials(RATIOS, CRITERIA, ["uniform"], REPAIRS)
        wanted += trials((0.2, 0.5), SHARED, [a for a in ALLOCATIONS if a != "uniform"], REPAIRS)
        made = sweep(
            self.model, wanted, self.batches, self.held, knowledge=self._knowledge(), keep=self.folder / "sweep.json",
            seed=self.seed, progress=_told,
        )  # fmt: skip
        return made.to_json()

    def recovered(self) -> list[dict[str, Any]]:
        """The same small recovery on some of them."""
        made = []
        for ratio, (name, allocation, repair) in product((0.2, 0.5), RECOVERED):
            part = f"{ratio}-{name}-{allocation}-{repair}"
            losses = self._kept(part, self._recovery(ratio, name, allocation, repair))
            made.append({"ratio": ratio, "importance": name, "allocation": allocation, "repair": repair,
                         "losses": losses})  # fmt: skip
        return made

    def peers(self) -> list[dict[str, Any]]:
        """torch-pruning on the same model, rows and ratios, and shear-ir confined to what that can remove."""
        return [
            self._kept(f"peer-{name}-{ratio}", partial(self._peer, name, ratio))
            for name, ratio in product(PEERS, RATIOS)
        ]

    def encoder(self) -> list[dict[str, Any]]:
        """Rank correlation of a sentence encoder's similarities with those of the dense one; empty without weights."""
        found: list[dict[str, Any]] = self._kept("encoder", lambda: _encoder(self.seed))
        return found

    def _knowledge(self) -> dict[str, dict[float, float]]:
        import shear_ir as sir
        from shear_passes.importance.calibration import call
        from shear_training.knowledge import measure_knowledge

        def loss(model: Any) -> float:
            import torch

            with torch.no_grad():
                return statistics.mean(
                    float(call(model, {**b, "labels": b["input_ids"]}).loss) for b in self.batches[::3]
                )

        def measure() -> dict[str, dict[str, float]]:
            made = measure_knowledge(self.model, sir.groups(sir.trace(self.model)), loss, share=0.0)
            return {name: {str(r): d for r, d in curve.items()} for name, curve in made.curves.items()}

        read = self._kept("knowledge", measure)
        return {name: {float(r): d for r, d in curve.items()} for name, curve in read.items()}

    def _recovery(self, ratio: float, name: str, allocation: str, repair: str) -> Callable[[], Losses]:
        def make() -> Losses:
            import shear_ir as sir
            from shear_training.evaluate import evaluate
            from shear_training.recovery import recover
            from shear_training.settings import Recovery

            plan = sir.plan(
                sir.trace(self.model), ratio=ratio, importance=name, data=self.batches, allocation=allocation,
                knowledge=self._knowledge(), seed=self.seed,
            )  # fmt: skip
            ready = self.model if repair == "none" else sir.repair(self.model, plan, repair, data=self.batches)
            settings = Recovery(rank=32, alpha=64, dropout=0.0, lr=2e-3, warmup=0.1, schedule="cosine", batch=8,
                                rows_per_round=240, epochs=1, max_rounds=1, seed=self.seed, dynamic=False)  # fmt: skip
            folder = self.folder / "recovery" / f"{ratio}-{name}-{allocation}-{repair}"
            dense = dict.fromkeys(self.sources, 0.0)
            made = recover(sir.shear(ready, plan), self.sources, dense, settings, folder).model
            return {n: evaluate(made, rows).nll for n, rows in self.held.items()}

        return make

    def _peer(self, name: str, ratio: float) -> dict[str, Any]:
        import shear_ir as sir
        from bench.peers import pruned
        from shear_training.evaluate import evaluate

        row: dict[str, Any] = {"importance": name, "ratio": ratio}
        try:
            if ours := PEERS[name]:
                plan = sir.plan(
                    sir.trace(self.model), ratio=ratio, importance=ours, data=self.batches, kinds=("ffn",),
                    seed=self.seed,
                )  # fmt: skip
                made, really = sir.shear(self.model, plan), plan.ratio
            else:
                made, really = pruned(self.model, name.split()[1].lower(), ratio, self.batches)
            losses = {n: evaluate(made, rows).nll for n, rows in self.held.items()}
        except Exception as failure:  # whatever stops another project's code is the measurement
            return {
                **row,
                "really": None,
                "losses": {},
                "why": f"{type(failure).__name__}: {failure}".splitlines()[0][:160],
            }
        return {**row, "really": really, "losses": losses, "why": ""}

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            _told(name, 0, 1)
            beside = path.with_name(f".{path.name}")
            beside.write_text(json.dumps(make()))
            beside.replace(path)
        return json.loads(path.read_text())


def _told(what: str, done: int, total: int) -> None:
    print(f"{done}/{total} {what}", flush=True)


def _encoder(seed: int) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    import shear_ir as sir
    from fetch_models import found

    place = found("minilm")
    if place is None:
        return []
    model, tokenizer = AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    texts = [json.loads(line)["text"] for line in (MODEL / "heldout" / "docs.jsonl").read_text().splitlines()]
    other = [json.loads(line)["text"] for line in (MODEL / "train" / "docs.jsonl").read_text().splitlines()]
    draw = torch.Generator().manual_seed(seed)
    picked = [other[i] for i in torch.randperm(len(other), generator=draw)[:ENCODED].tolist()]

    def feed(some: Sequence[str]) -> dict[str, Any]:
        return dict(tokenizer(list(some), padding=True, truncation=True, max_length=64, return_tensors="pt"))

    def similarities(one: Any) -> torch.Tensor:
        with torch.no_grad():
            inputs = feed(texts[:ENCODED])
            states, mask = one(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        rows, columns = torch.triu_indices(len(mean), len(mean), 1)
        return (mean @ mean.T)[rows, columns]

    batches = [feed(picked[i : i + 16]) for i in range(0, len(picked), 16)]
    program, dense, made = sir.trace(model), similarities(model), []
    for name in ENCODER:
        for ratio in RATIOS:
            data = None if name in ("random", "magnitude") else batches
            try:
                plan = sir.plan(program, ratio=ratio, importance=name, data=data, seed=seed)
            except sir.PlanError:  # out of reach: half of the encoder is its table of words
                continue
            for repair in REPAIRS:
                ready = model if repair == "none" else sir.repair(model, plan, repair, data=batches)
                rank = _spearman(dense, similarities(sir.shear(ready, plan)))
                made.append({"importance": name, "ratio": ratio, "repair": repair, "rank": rank})
    return made


def _spearman(a: Any, b: Any) -> float:
    import torch

    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    found: Any = torch.corrcoef(ranks)[0, 1]
    return float(found)


# -- the tables -------------------------------------------------------------------------------------------------------

Key = tuple[Any, ...]


def markdown(runs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """The tables for people."""
    dense = statistics.mean(_nll(r["without"]["dense"]["losses"]) for r in runs)
    domains = [f"{math.exp(runs[0]['without']['dense']['losses'][d]['nll']):.2f} {d}" for d in DOMAINS]
    lines = [
        "# Which units to remove, and how to repair what that breaks", "",
        f"The bundled model ({options['parameters']:,} parameters), mean of {len(runs)} seeds (of the {ROWS} rows that "
        "criteria and repairs look at; ± is the standard deviation); `python tools/bench/quality.py --table criteria` "
        f"made it. Loss is the growth of the mean held-out NLL over the dense model's {dense:.4f} (perplexity "
        f"{', '.join(domains)}), in nats per token, without any training.", "",
        "## Criteria, every layer alike", "",
        *_grid(runs, "uniform"), "",
        "## Allocations", "", *_allocations(runs), "",
        "## Held-out perplexity per domain at 20 %", "", *_domains(runs), "",
        "## After the same small recovery", "", *_recovered(runs), "",
        "## torch-pruning on the same model, rows and ratios", "", *_peers(runs), "",
        "## A sentence encoder", "", *_encoders(runs), "",
        *[f"- {sentence}" for sentence in verdicts(runs)], "",
        "![criteria](criteria.svg)", "", f"{options['versions']}; {options['machine']}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def growth(runs: Sequence[Mapping[str, Any]]) -> dict[Key, list[float]]:
    """Criterion, allocation, repair and ratio to the growth of the mean NLL of each seed."""
    found: dict[Key, list[float]] = {}
    for run_ in runs:
        dense = _nll(run_["without"]["dense"]["losses"])
        for p in run_["without"]["points"]:
            if p["losses"]:
                key = p["importance"], p["allocation"], p["repair"], p["ratio"]
                found.setdefault(key, []).append(_nll(p["losses"]) - dense)
    return found


def verdicts(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers say."""
    found = growth(runs)

    def at(ratio: float) -> list[tuple[float, Key]]:
        return sorted((statistics.mean(v), key) for key, v in found.items() if key[3] == ratio)

    (best, key), taylor = at(0.2)[0], statistics.mean(found["taylor", "uniform", "none", 0.2])
    said = [
        f"At 0.2 the best combination, {_label(key)}, loses {best:.4f} nats; first-order Taylor by itself loses "
        f"{taylor:.4f}: {100 * best / taylor:.0f} % of it."
    ]
    for repair in REPAIRS:
        rank = [(m, k) for m, k in at(0.5) if k[1] == "uniform" and k[2] == repair]
        order = ", ".join(f"{k[0]} {m:.2f} ± {_spread(found[k]):.2f}" for m, k in rank)
        said.append(
            f"At 0.5, {'with least squares' if repair != 'none' else 'without repair'}, from best to worst: {order}."
        )
    even = [k for k in found if k[1] == "uniform" and k[2] == "none" and k[0] not in ("random",)]
    rise = {
        name: statistics.mean(statistics.mean(found[k]) for k in even if k[0] == name) for name in {k[0] for k in even}
    }
    first = min(rise, key=rise.__getitem__)
    said.append(f"Over all ratios, without repair, {first} loses least in the mean.")
    repaired = [k for k in found if k[1] == "uniform" and k[2] != "none"]
    after = {
        n: statistics.mean(statistics.mean(found[k]) for k in repaired if k[0] == n) for n in {k[0] for k in repaired}
    }
    said.append(f"With least squares, {min(after, key=after.__getitem__)} does.")
    return said


def _label(key: Key) -> str:
    return " + ".join([key[0], *([key[1]] if key[1] != "uniform" else []), *([key[2]] if key[2] != "none" else [])])


def _grid(runs: Sequence[Mapping[str, Any]], allocation: str) -> list[str]:
    found = growth(runs)
    head = [f"{r:g}" for r in RATIOS] + [f"{r:g}, least squares" for r in RATIOS]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    for name in CRITERIA:
        cells = [_cell(found.get((name, allocation, repair, r), [])) for repair in REPAIRS for r in RATIOS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _allocations(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    found = growth(runs)
    kinds = list(dict.fromkeys(key[1] for key in found))
    head = [f"{r:g}{'' if repair == 'none' else ', least squares'}" for repair in REPAIRS for r in (0.2, 0.5)]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    for name in SHARED:
        for kind in kinds:
            cells = [_cell(found.get((name, kind, repair, r), [])) for repair in REPAIRS for r in (0.2, 0.5)]
            lines.append(f"| {name}, {kind} | " + " | ".join(cells) + " |")
    return lines


def _domains(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| | " + " | ".join(f"{d}{r}" for r in ("", ", least squares") for d in DOMAINS) + " |"]
    lines.append("|---|" + "---:|" * (2 * len(DOMAINS)))
    for name in CRITERIA:
        cells = []
        for repair in REPAIRS:
            points = [
                p
                for run_ in runs
                for p in run_["without"]["points"]
                if p["losses"]
                and (p["importance"], p["allocation"], p["repair"], p["ratio"]) == (name, "uniform", repair, 0.2)
            ]
            cells += [
                f"{statistics.mean(math.exp(p['losses'][d]['nll']) for p in points):.2f}" if points else ""
                for d in DOMAINS
            ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines  # fmt: skip


def _recovered(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| | 0.2 | 0.5 |", "|---|---:|---:|"]
    for name, allocation, repair in RECOVERED:
        cells = []
        for ratio in (0.2, 0.5):
            rises = [
                statistics.mean(p["losses"][d] for d in DOMAINS) - _nll(run_["without"]["dense"]["losses"])
                for run_ in runs for p in run_["recovered"]
                if (p["ratio"], p["importance"], p["allocation"], p["repair"]) == (ratio, name, allocation, repair)
            ]  # fmt: skip
            cells.append(_cell(rises))
        lines.append(f"| {_label((name, allocation, repair))} | " + " | ".join(cells) + " |")
    return lines


def _peers(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    from bench.peers import SETTINGS

    lines = [SETTINGS, "", "| | " + " | ".join(f"{r:g}" for r in RATIOS) + " |", "|---|" + "---:|" * len(RATIOS)]
    for name in dict.fromkeys(p["importance"] for p in runs[0]["peers"]):
        cells = []
        for ratio in RATIOS:
            mine = [(r, p) for r in runs for p in r["peers"] if (p["importance"], p["ratio"]) == (name, ratio)]
            rises = [
                statistics.mean(p["losses"][d] for d in DOMAINS) - _nll(r["without"]["dense"]["losses"])
                for r, p in mine if p["losses"]
            ]  # fmt: skip
            really = [p["really"] for _, p in mine if p["really"] is not None]
            cells.append(f"{_cell(rises)} ({statistics.mean(really):.3f} gone)" if rises else mine[0][1]["why"])
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _encoders(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not any(r["encoder"] for r in runs):
        return ["MiniLM was not there: `tools/fetch_models minilm` makes it."]
    head = [f"{r:g}" for r in RATIOS] + [f"{r:g}, least squares" for r in RATIOS]
    lines = [
        f"all-MiniLM-L6-v2, rank correlation (Spearman) of the similarities of {ENCODED} held-out texts with the dense "
        "model's; 1 is the same order.", "",
        "| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head),
    ]  # fmt: skip
    for name in ENCODER:
        cells = []
        for repair in REPAIRS:
            for ratio in RATIOS:
                ranks = [p["rank"] for r in runs for p in r["encoder"]
                         if (p["importance"], p["repair"], p["ratio"]) == (name, repair, ratio)]  # fmt: skip
                cells.append(_cell(ranks))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f} ± {_spread(values):.3f}"


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _nll(losses: Mapping[str, Any]) -> float:
    return float(statistics.mean(losses[d]["nll"] for d in DOMAINS))


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss over the ratio, a line per criterion, without and with repair."""
    from matplotlib.figure import Figure

    found = growth(runs)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    colours = ("#999999", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#000000",
               "#7f4f00", "#5a3d8a", "#8ab17d")  # fmt: skip
    for axes, repair in zip(figure.subplots(1, 2, sharey=True).flat, REPAIRS, strict=True):
        for name, colour in zip(CRITERIA, colours, strict=True):
            points = [(r, found[name, "uniform", repair, r]) for r in RATIOS if (name, "uniform", repair, r) in found]
            means = [statistics.mean(v) for _, v in points]
            axes.errorbar([r for r, _ in points], means, yerr=[_spread(v) for _, v in points], marker="o", markersize=3,
                          color=colour, label=name)  # fmt: skip
        axes.set_title("no repair" if repair == "none" else "least squares", loc="left")
        axes.set_xlabel("share of the parameters removed")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yscale("log")
    figure.axes[0].set_ylabel("growth of the held-out NLL, nats per token")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)
