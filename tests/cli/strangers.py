"""Files as a stranger may have written them, and the command that reads each: what tests and ``faults`` go through."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import shear_ir as sir
from shear_ir.frontend.load import load_model
from shear_training.knowledge import Knowledge, Sensitivity
from tests.workflow.tiny import write_data, write_model

Edit = Callable[[Path], None]
"""Does to a folder with ``model``, ``small``, ``ad``, ``plan.json``, ... what a stranger has done to it."""

GROUPS = ("groups", "model")
_PRUNE = ("prune", "model", "--ratio", "0.2", "-o", "out")
SMALL = ("groups", "small")
ADAPTER = ("groups", "ad")
PLAN = ("prune", "model", "--plan", "plan.json", "-o", "out")
EVAL = ("eval", "model", "--data", "rows.jsonl")
DATA = ("eval", "model", "--data", "data.yaml")
RECIPE = ("lorashear", "model", "--data", "data.yaml", "--recipe", "recipe.yaml", "-o", "out")
LOSSES = ("recover", "small", "--data", "data.yaml", "--dense-losses", "losses.json", "-o", "out")
KNOWLEDGE = (
    "prune", "model", "--ratio", "0.2", "--allocation", "by-knowledge", "--knowledge", "knowledge.json", "-o", "out",
)  # fmt: skip
INPUTS = ("groups", "model", "--inputs", "inputs.safetensors")


@dataclass(frozen=True)
class Case:
    """``said``: what the sentence has in it."""

    name: str
    command: tuple[str, ...]
    edit: Edit
    said: str = ""


def build(folder: Path) -> Path:
    """A folder with everything that a command reads, as shear-ir and transformers write it."""
    folder.mkdir(exist_ok=True)
    model = write_model(folder / "model")
    loaded = load_model(str(model)).model
    plan = sir.plan(sir.trace(loaded), ratio=0.2)
    plan.save(folder / "plan.json")
    sir.save(sir.shear(loaded, plan), folder / "small", source=model)
    adapted = get_peft_model(load_model(str(model)).model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(str(folder / "ad"))
    _json(folder / "ad/adapter_config.json", base_model_name_or_path="model")
    write_data(folder)
    (folder / "rows.jsonl").write_text('{"text": "abc def"}\n')
    (folder / "recipe.yaml").write_text("pruning: {}\n")
    (folder / "losses.json").write_text('{"texts": 1.0, "asked": 1.0}')
    groups = tuple(Sensitivity(c.group, c.kind, c.module, c.size, (0.1, 0.2)) for c in plan.cuts)
    Knowledge(plan.digest, 3.0, (0.25, 0.5), 0.0, groups).save(folder / "knowledge.json")
    save_file({"input_ids": torch.ones(1, 7, dtype=torch.int64)}, folder / "inputs.safetensors")
    return folder


def _json(path: Path, *gone: str, **change: Any) -> None:
    document = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in document.items() if key not in gone}))


def changed(name: str, *gone: str, **change: Any) -> Edit:
    """A JSON file with other values."""
    return lambda here: _json(here / name, *gone, **change)


def text(name: str, content: str | bytes) -> Edit:
    """A file with another content."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda here: _put(here / name, lambda path: path.write_bytes(raw))


def _put(path: Path, make: Callable[[Path], Any]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make(path)


def pipe(name: str) -> Edit:
    return lambda here: _put(here / name, os.mkfifo)


def folder(name: str) -> Edit:
    return lambda here: _put(here / name, os.mkdir)


def link(name: str, to: str) -> Edit:
    return lambda here: _put(here / name, lambda path: path.symlink_to(to))


def sparse(name: str, size: int) -> Edit:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return lambda here: _put(here / name, make)


def gone(name: str) -> Edit:
    return lambda here: _put(here / name, lambda path: None)


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    """A safetensors file with other tensors."""

    def edit(here: Path) -> None:
        found = {n: t.clone() for n, t in load_file(here / name).items()}
        change(found)
        save_file(found, here / name, {"format": "pt"})

    return edit


def filled(value: float, name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda found: found[name].view(-1)[3:5].fill_(value)


def _record(**change: Any) -> Edit:
    """The record of a model that no stock config gives, with other values."""
    return changed("small/shear_ir.json", stock=False, **change)


def _deep(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


def _nowhere(name: str, kind: tuple[str, ...], said: str) -> list[Case]:
    """What no reader of a file should wait for, or take for one."""
    return [
        Case(f"{name} is a pipe", kind, pipe(name), said),
        Case(f"{name} is a folder", kind, folder(name), said),
        Case(f"{name} has no end", kind, link(name, "/dev/zero"), said),
        Case(f"{name} links to itself", kind, link(name, Path(name).name), said),
        Case(f"{name} is binary", kind, text(name, b"\xff\xfe\x00\x01"), said),
        Case(f"{name} is empty", kind, text(name, ""), said),
        Case(f"{name} is a list", kind, text(name, "[1, 2]"), said),
        Case(f"{name} is nested deep", kind, text(name, "[" * 100_000), said),
        Case(f"{name} is nested", kind, text(name, _deep(300)), said),
        Case(f"{name} has half a letter", kind, text(name, '{"a": "\\ud800"}'), said),
        Case(f"{name} has a NUL", kind, text(name, '{"a": "\\u0000"}'), said),
        Case(f"{name} has a name of 5000 letters", kind, text(name, json.dumps({"x" * 5000: 1})), said),
        Case(f"{name} has a number of 5000 digits", kind, text(name, '{"a": ' + "1" * 5000 + "}"), said),
        Case(f"{name} has no number", kind, text(name, '{"a": NaN}'), said),
    ]


def _configs() -> list[Case]:
    odd: list[tuple[str, Any]] = [
        ("model_type", "nope"), ("model_type", 5), ("model_type", None), ("model_type", "x" * 900),
        ("num_hidden_layers", 20_000), ("num_hidden_layers", 10**30), ("num_hidden_layers", "two"),
        ("hidden_size", 0), ("hidden_size", -8), ("hidden_size", 10**30), ("hidden_size", "wide"), ("hidden_size", 1.5),
        ("vocab_size", -1), ("vocab_size", 10**15), ("num_attention_heads", 0), ("num_key_value_heads", 0),
        ("intermediate_size", [1]), ("intermediate_size", 7), ("hidden_act", "nope"), ("dtype", "evil"),
        ("architectures", ["BertModel"]), ("quantization_config", {"quant_method": "evil"}),
        ("transformers_weights", "/etc/passwd"), ("auto_map", {"AutoConfig": "a.B"}), ("attn_implementation", "a/b"),
    ]  # fmt: skip
    made = [Case(f"config: {key} is {str(value)[:20]}", _PRUNE, changed("model/config.json", **{key: value}))
            for key, value in odd if key != "auto_map"]  # fmt: skip
    unknown = changed("model/config.json", model_type="mine", auto_map={"AutoConfig": "evil.B"})
    made.append(Case("config: code of its own", GROUPS, unknown, "runs only if you trust it"))
    whole = Case("config: more layers than no weights", ("groups", "model"), _both(
        changed("model/config.json", num_hidden_layers=20_000), gone("model/model.safetensors")), "20,000 layers")  # fmt: skip
    return [*made, whole, Case("config: it is not there", GROUPS, gone("model/config.json"), "holds neither")]


def _both(*edits: Edit) -> Edit:
    def edit(here: Path) -> None:
        for each in edits:
            each(here)

    return edit


def _index(document: Any) -> Edit:
    return _both(
        lambda here: os.rename(here / "model/model.safetensors", here / "model/model-1.safetensors"),
        text("model/model.safetensors.index.json", json.dumps(document)),
    )


def _indices() -> list[Case]:
    said = "weight_map"
    maps: list[tuple[Any, str]] = [
        ({}, said), ({"weight_map": None}, said), ({"weight_map": []}, said), ({"weight_map": {"a": 1}}, said),
        ({"weight_map": {"a": "../plan.json"}}, "outside"), ({"weight_map": {"a": "/etc/passwd"}}, "outside"),
        ({"weight_map": {"a": ""}}, "not there"), ({"weight_map": {"a": "."}}, "not there"),
        ({"weight_map": {"a": "no.safetensors"}}, "not there"), ({"weight_map": {"a": "config.json"}}, "safetensors"),
        ({"weight_map": {"a": "model-1.safetensors"}}, "does not"), ({"weight_map": {"a": "x" * 5000}}, ""),
        ({"weight_map": {"x" * 5000: "model-1.safetensors"}}, "5,000 characters"),
        ({"weight_map": {"a": "\ud800"}}, "Unicode"), ({"weight_map": {"a": "a\0b"}}, "NUL"),
    ]  # fmt: skip
    made = [Case(f"index: {str(document)[:60]!a}", GROUPS, _index(document), said) for document, said in maps]
    outside = _both(
        _index({"weight_map": {"a": "l.safetensors"}}), link("model/l.safetensors", "../inputs.safetensors")
    )
    return [*made, Case("index: a shard links out", GROUPS, outside, "outside")]


def _weights() -> list[Case]:
    at, head = "model/model.safetensors", "lm_head.weight"
    length = struct.pack("<Q", 2**60)
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}'
    pickled = b"\x80\x04cos\nsystem\n(S'touch marker'\ntR."
    prune = ("prune", "model", "--ratio", "0.2", "-o", "out")
    return [
        Case("weights: empty", GROUPS, text(at, b""), "safetensors"),
        Case("weights: a header without end", GROUPS, text(at, length), "safetensors"),
        Case("weights: a header that is no JSON", GROUPS, text(at, struct.pack("<Q", 4) + b"nope"), "safetensors"),
        Case("weights: less than the header says", GROUPS, text(at, struct.pack("<Q", len(header)) + header), "safetensors"),
        Case("weights: a pickle", GROUPS, text(at, pickled), "safetensors"),
        Case("weights: a pickle by its name", GROUPS, _both(gone(at), text("model/pytorch_model.bin", pickled)), "not read"),
        Case("weights: a pipe", GROUPS, pipe(at), "no regular file"),
        Case("weights: a folder", GROUPS, folder(at), "folder"),
        Case("weights: without end", GROUPS, link(at, "/dev/zero"), "no regular file"),
        Case("weights: no number", prune, tensors(at, filled(float("nan"), head)), f"of {head} are not finite"),
        Case("weights: infinite", prune, tensors(at, filled(float("inf"), head)), f"2 of the 1,952 numbers of {head}"),
        Case("weights: infinite, rotated", (*prune, "--rotate", "heads"), tensors(at, filled(float("-inf"), head)), head),
        Case("weights: one is missing", prune, tensors(at, lambda t: t.pop(head)), f"lacks the tensor {head}"),
        Case("weights: one too many", prune, tensors(at, lambda t: t.update(other=torch.ones(1))), "no place"),
        Case("weights: of another size", prune, tensors(at, lambda t: t.update({head: torch.ones(3, 3)})), "makes it"),
        Case("weights: a name of 5000 letters", prune, tensors(at, lambda t: t.update({"x" * 5000: torch.ones(1)})), "no place"),
        Case("weights: a name that moves the cursor", prune, tensors(at, lambda t: t.update({"\x1b[2J": torch.ones(1)})), "no place"),
    ]  # fmt: skip


def _adapters() -> list[Case]:
    at = "ad/adapter_config.json"
    bases: list[tuple[Any, str]] = [
        (None, "does not name its base"), ("", "does not name its base"), (5, "does not name"), (["model"], "does not name"),
        ("ad", "an adapter itself"), ("evil:make", "there is no folder evil:make"), ("/nowhere", "there is no folder"),
        ("rows.jsonl", "is a file"), ("x" * 5000, ""), ("a\nb", "there is no folder"),
    ]  # fmt: skip
    odd: list[tuple[str, str]] = [
        ("lora_alpha", "NaN"), ("lora_alpha", "Infinity"), ("lora_alpha", "1e999"), ("lora_alpha", '"x"'), ("r", "0"),
        ("r", "-1"), ("r", '"x"'), ("target_modules", "5"), ("target_modules", '"("'), ("target_modules", '["nope"]'),
        ("peft_type", '"NOPE"'), ("peft_type", "null"), ("megatron_config", "{}"), ("init_lora_weights", '"pissa_niter_4"'),
    ]  # fmt: skip

    def raw(key: str, value: str, here: Path) -> None:
        _json(here / at, **{key: "@"})
        (here / at).write_text((here / at).read_text().replace('"@"', value))

    note = "ad/shear_ir_adapter.json"
    good = {"format": "shear-ir adapter 1", "base_digest": "0" * 16, "base": ""}
    return [
        *(Case(f"adapter: its base is {str(base)[:20]!r}", ADAPTER, changed(at, base_model_name_or_path=base), said)
          for base, said in bases),
        *(Case(f"adapter: {key} is {value}", ADAPTER, partial(raw, key, value)) for key, value in odd),
        Case("adapter: a pattern that backtracks", ADAPTER, changed(at, target_modules="([a-z._0-9]+)+X"), "takes more than"),
        Case("adapter: ranks by a pattern that backtracks", ADAPTER, changed(at, rank_pattern={"([a-z._0-9]+)+X": 4}), "takes more than"),
        Case("adapter: ranks by no pattern", ADAPTER, changed(at, rank_pattern={"(": 4}), "is no pattern"),
        Case("adapter: of another base", ADAPTER, text(note, json.dumps(good)), "made for another base"),
        Case("adapter: a note without a digest", ADAPTER, text(note, json.dumps({**good, "base_digest": "x"})), "damaged"),
        Case("adapter: a note that is a pipe", ADAPTER, pipe(note), "damaged"),
        Case("adapter: no weights", ADAPTER, gone("ad/adapter_model.safetensors"), "has no adapter_model.safetensors"),
        Case("adapter: broken weights", ADAPTER, text("ad/adapter_model.safetensors", b"x"), "safetensors"),
        Case("adapter: pickled weights", ADAPTER, _both(gone("ad/adapter_model.safetensors"), text("ad/adapter_model.bin", b"x")), "not read"),
        Case("adapter: no numbers", ("prune", "ad", "--ratio", "0.2", "-o", "out"), tensors(
            "ad/adapter_model.safetensors", lambda t: next(iter(t.values())).fill_(float("nan"))), "not finite"),
    ]  # fmt: skip


def _plans() -> list[Case]:
    def cut(**change: Any) -> Edit:
        def edit(here: Path) -> None:
            plan = json.loads((here / "plan.json").read_text())
            plan["cuts"][0].update(change)
            (here / "plan.json").write_text(json.dumps(plan))

        return edit

    def many(number: int) -> Edit:
        cuts = [{"group": f"g{i}", "kind": "ffn", "size": 2**24, "kept": [[0, 2**24]]} for i in range(number)]
        return changed("plan.json", cuts=cuts)

    costs = {"parameters": 0, "bytes": 1, "flops": 1, "kv_bytes": 1}
    return [
        Case("plan: another format", PLAN, changed("plan.json", format="shear-ir plan 9"), "not a plan"),
        Case("plan: of another model", PLAN, changed("plan.json", digest="0" * 16), "another model"),
        Case("plan: no digest", PLAN, changed("plan.json", "digest"), "digest"),
        Case("plan: more than it has", PLAN, changed("plan.json", run="evil"), "run"),
        Case("plan: nothing before", PLAN, changed("plan.json", before=costs), "before.parameters"),
        Case("plan: a dim that is none", PLAN, changed("plan.json", kept={"lm_head.weight": {"x": [[0, 1]]}}), "not a plan"),
        Case("plan: a tensor that is not there", PLAN, changed("plan.json", kept={"a": {"0": [[0, 1]]}})),
        Case("plan: a router of dim -1", PLAN, changed("plan.json", routers={"a": -1}), "routers"),
        Case("plan: what is gone has no number", PLAN, changed("plan.json", gone=["a.b"]), "gone"),
        Case("plan: options without bottom", PLAN, changed("plan.json", options=json.loads(_deep(300))), "nested"),
        Case("plan: intervals out of order", PLAN, cut(kept=[[3, 4], [0, 1]]), "out of order"),
        Case("plan: an interval that ends before it begins", PLAN, cut(kept=[[3, 1]]), "out of order"),
        Case("plan: a negative unit", PLAN, cut(kept=[[-1, 1]]), "greater than or equal to 0"),
        Case("plan: a unit beyond all", PLAN, cut(size=2**40), "less than or equal"),
        Case("plan: a group that is not there", PLAN, cut(group="nope")),
        Case("plan: a group of half a letter", PLAN, cut(group="\ud800"), "Unicode"),
        Case("plan: a group of 20 MB", PLAN, cut(group="x" * 20_000_000)),
        Case("plan: a thousand groups of all indices", PLAN, many(1000), "keeps more than 67,108,864 indices"),
        Case("plan: it is not there", PLAN, gone("plan.json"), "cannot be read: No such file or directory"),
    ]  # fmt: skip


def _records() -> list[Case]:
    gather = {"module": "model", "argument": "x", "dim": 0, "period": 4, "kept": [1]}
    norm = {"module": "model.norm", "eps": 1e-6, "parameter": "weight", "offset": 0.0, "factor": 2.0}
    fit = {"module": "model", "rank": 2, "places": [0], "old": [4], "new": [2]}
    odd: list[tuple[str, Any]] = [
        ("format", "shear-ir record 9"), ("model_class", "Nope"), ("model_class", "evil:Model"), ("model_class", 5),
        ("config", None), ("config", {}), ("config", {"model_type": "nope"}), ("attributes", []),
        ("attributes", {"nowhere": {"a": 1}}), ("attributes", {"model": {"nothing": 1}}),
        ("attributes", {"model": {"_modules": 1}}), ("attributes", {"model": {"training": 1}}),
        ("attributes", {"model": {"vocab_size": -1}}), ("attributes", {"model": {"vocab_size": 2**40}}),
        ("attributes", {"lm_head": {"forward": [1]}}), ("attributes", {"model": {"config.x.y": 1}}),
        ("gathers", [{**gather, "module": "nowhere"}]), ("gathers", [{**gather, "period": 0}]),
        ("gathers", [{**gather, "kept": [9]}]), ("gathers", [{**gather, "kept": []}]), ("gathers", [{**gather, "kept": [-1]}]),
        ("norms", [{**norm, "factor": 0.5}]), ("norms", [{**norm, "factor": 1e300}]), ("norms", [{**norm, "power": -3}]),
        ("norms", [{**norm, "eps": 5.0}]), ("norms", [{**norm, "module": "nowhere"}]),
        ("fits", [{**fit, "rank": 10**9}]), ("fits", [{**fit, "rank": 0}]), ("fits", [{**fit, "places": [7]}]),
        ("fits", [{**fit, "new": [9]}]), ("fits", [{**fit, "old": []}]), ("fits", [{**fit, "module": "nowhere"}]),
        ("casts", {"lm_head.weight": "float16"}), ("casts", {"model.rotary_emb.inv_freq": "evil"}),
        ("shapes", {"lm_head.weight": [1]}), ("shapes", {"lm_head.weight": [2**40, 2]}), ("shapes", {"nowhere": [1]}),
        ("rms_norms", {"norms": {"model.norm": float(7)}}),
    ]  # fmt: skip
    return [
        *(Case(f"record: {key} is {str(value)[:70]}", SMALL, _record(**{key: value})) for key, value in odd),
        Case("record: no plan", SMALL, gone("small/plan.json"), "cannot be read"),
        Case("record: no weights", SMALL, _both(_record(), gone("small/model.safetensors")), "holds no safetensors"),
    ]


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)
)


def _yaml(name: str, kind: tuple[str, ...]) -> list[Case]:
    return [
        Case(
            f"{name} runs something",
            kind,
            text(name, "pruning: !!python/object/apply:os.system ['touch marker']"),
            "no YAML",
        ),
        Case(f"{name} has a thousand million entries", kind, text(name, BOMB), "too many entries"),
        Case(f"{name} holds itself", kind, text(name, "a: &a [*a]"), ""),
        Case(f"{name} has a key twice", kind, text(name, "a: 1\na: 2"), "twice"),
        Case(f"{name} has a date that is none", kind, text(name, "a: 2001-99-99"), "no YAML"),
        Case(f"{name} has an empty number", kind, text(name, "a: !!int ''"), "no YAML"),
        Case(f"{name} has a list as a key", kind, text(name, "? [a]\n: 1"), ""),
        Case(f"{name} is long", kind, sparse(name, 2**20), "no such file has more"),
        Case(f"{name} is not there", kind, gone(name), "cannot be read: No such file or directory"),
    ]


def _recipes() -> list[Case]:
    odd: list[tuple[str, str]] = [
        ("pruning: 5", "mapping"), ("pruning: {nope: 1}", "no option nope"), ("nope: {}", "section nope"),
        ("pruning: {lr: .nan}", ""), ("pruning: {lr: .inf}", ""), ("pruning: {lr: -1}", ""), ("pruning: {rank: 0}", ""),
        ("pruning: {rank: 99999999999999999999999}", ""), ("pruning: {criteria: [a]}", ""), ("pruning: {criteria: {}}", ""),
        ("pruning: {criteria: {'evil:score': 1}}", "only if you trust it"), ("pruning: {criteria: {magnitude: .nan}}", ""),
        ("pruning: {criteria: {magnitude: -1}}", ""), ("pruning: {device: tpu}", "cpu or cuda"),
        ("pruning: {repair: evil}", ""), ("knowledge: {ratios: []}", "at least one ratio"), ("knowledge: {ratios: [2]}", "share"),
        ("knowledge: {rows: 0}", "rows"), ("stages: {nowhere: {}}", "nowhere"), ("stages: []", "mapping"),
        ("recovery: {schedule: evil}", ""), ("recovery: {batch: 0}", ""), ("pruning: {steps: 0}", ""),
    ]  # fmt: skip
    return [Case(f"recipe: {document}", RECIPE, text("recipe.yaml", document), said) for document, said in odd]


def _data() -> list[Case]:
    def source(document: Any) -> Edit:
        return text("data.yaml", yaml.safe_dump(document))

    def of(**options: Any) -> Edit:
        return source({"sources": {"a": options}})

    path = {"path": "rows.jsonl"}
    documents: list[tuple[str, Edit, str]] = [
        ("no sources", source({}), "sources"), ("sources: nothing", source({"sources": {}}), "sources"),
        ("sources: null", source({"sources": {"a": None}}), "sources.a"), ("path: ''", of(path=""), "path"),
        ("path: []", of(path=[]), "path"), ("path: ['']", of(path=[""]), "path"), ("path: a folder", of(path="model"), ""),
        ("path: nowhere", of(path="no.jsonl"), "no file matches"), ("path: 5", of(path=5), "path"),
        ("path: a NUL", of(path="a\0b"), "NUL"), ("path: '**'", of(path="**"), ""), ("path: no kind", of(path="plan"), "no file"),
        ("a source named ..", source({"sources": {"..": path}}), ""), ("a source named a/b", source({"sources": {"a/b": path}}), ""),
        ("a source of 5000 letters", source({"sources": {"x" * 5000: path}}), ""),
        ("length: 1", source({"sources": {"a": path}, "length": 1}), "length"),
        ("length: 10**9", source({"sources": {"a": path}, "length": 10**9}), "length"),
        ("validation: 0", source({"sources": {"a": path}, "validation": 0}), "validation"),
        ("seed: -1", source({"sources": {"a": path}, "seed": -1}), "seed"), ("seed: nan", source({"sources": {"a": path}, "seed": float("nan")}), ""),
        ("folder: /", source({"sources": {"a": path}, "folder": "/"}), "folder"),
        ("stages: []", source({"sources": {"a": path}, "stages": []}), "stages"),
        ("a stage of nothing", source({"sources": {"a": path}, "stages": [{"name": "s", "sources": []}]}), "stages"),
        ("a stage of another source", source({"sources": {"a": path}, "stages": [{"name": "s", "sources": ["b"]}]}), "no source"),
        ("a hub of readers", of(hub="pandas"), "no name of a dataset"), ("a hub of files", of(hub="./model"), "no name of a dataset"),
    ]  # fmt: skip
    rows: list[tuple[str, Edit, str]] = [
        ("null", text("rows.jsonl", '{"text": "a"}\nnull\n'), "line 2 is no object"), ("null alone", text("rows.jsonl", "null"), "no object"),
        ("a list", text("rows.jsonl", '{"text": "a"}\n[1]\n'), "line 2 is no object"), ("a number", text("rows.jsonl", "5\n"), "no object"),
        ("nulls in a list", text("rows.jsonl", '[null, {"text": "a"}]'), "row 1 is no object"),
        ("deep", text("rows.jsonl", '{"text": ' + "[" * 5000 + "]" * 5000 + "}"), "nested"),
        ("deep, open", text("rows.jsonl", '{"text": ' + "[" * 50_000), "line 1"), ("half", text("rows.jsonl", '{"text": "a'), "line 1"),
        ("binary", text("rows.jsonl", b"\x80\x04\xff\n"), "line 1"), ("empty", text("rows.jsonl", ""), "empty"),
        ("blank", text("rows.jsonl", "\n\n\n"), ""), ("of other fields", text("rows.jsonl", '{"other": 1}'), "no field 'text'"),
        ("numbers", text("rows.jsonl", '{"text": 5}'), ""), ("a pipe", pipe("rows.jsonl"), ""), ("without end", link("rows.jsonl", "/dev/zero"), ""),
        ("a folder", folder("rows.jsonl"), "no data file"),
    ]  # fmt: skip
    return [
        *(Case(f"data: {name}", DATA, edit, said) for name, edit, said in documents),
        *(Case(f"rows: {name}", EVAL, edit, said) for name, edit, said in rows),
        Case(
            "rows: a table that is none",
            ("eval", "model", "--data", "a.parquet"),
            text("a.parquet", b"PAR1xxxx"),
            "cannot be read",
        ),
        Case("rows: a text of blanks", ("eval", "model", "--data", "a.txt"), text("a.txt", " \n \n"), ""),
        Case("rows: text that is none", ("eval", "model", "--data", "a.txt"), text("a.txt", b"\xff\xfe\xff"), ""),
        Case("rows: cells that never end", ("eval", "model", "--data", "a.csv"), text("a.csv", 'text\n"abc\n'), ""),
    ]


def _knowledge() -> list[Case]:
    def group(**change: Any) -> Edit:
        def edit(here: Path) -> None:
            read = json.loads((here / "knowledge.json").read_text())
            read["groups"][0].update(change)
            (here / "knowledge.json").write_text(json.dumps(read))

        return edit

    at = "knowledge.json"
    return [
        Case("knowledge: too few deviations", KNOWLEDGE, group(deviations=[0.1]), "1 deviations at 2 ratios"),
        Case("knowledge: too many deviations", KNOWLEDGE, group(deviations=[0.1] * 9), "9 deviations at 2 ratios"),
        Case("knowledge: a size of 0", KNOWLEDGE, group(size=0), "size"),
        Case("knowledge: no number", KNOWLEDGE, group(deviations=[0.1, float("nan")]), "NaN".lower()),
        Case("knowledge: infinite", KNOWLEDGE, group(deviations=[0.1, float("inf")]), "inf"),
        *(Case(f"knowledge: ratios {r}", KNOWLEDGE, changed(at, ratios=r), "ratios")
          for r in ([-1.0, 0.5], [0.5, 2.0], [0.0, 0.5], [])),
        Case("knowledge: a ratio that is no number", KNOWLEDGE, changed(at, ratios=[float("nan"), 0.5]), "nan"),
        Case("knowledge: a ratio twice", KNOWLEDGE, changed(at, ratios=[0.5, 0.5]), "twice"),
        Case("knowledge: a share of 2", KNOWLEDGE, changed(at, share=2.0), "share"),
        Case("knowledge: of another model", KNOWLEDGE, changed(at, digest="0"), "another model"),
        Case("knowledge: no groups", KNOWLEDGE, changed(at, groups=[])),
        Case("knowledge: another format", KNOWLEDGE, changed(at, format="x"), "format"),
    ]  # fmt: skip


def _tokenizers() -> list[Case]:
    config, at = "model/tokenizer_config.json", "model/tokenizer.json"
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}_{% endfor %}{% endfor %}"
    templates = [
        ("loops", loops.replace("_", ""), "takes more than"),
        ("is long", "{{ 'x' * 10**11 }}", "of memory"),
        ("grows", loops.replace("_", "{{ 'x' * 10**8 }}"), "takes more than"),
        ("fails", "{{ 1 // 0 }}", "ZeroDivisionError"),
    ]
    return [
        *(Case(f"tokenizer: a length of {value!r}", EVAL, changed(config, model_max_length=value), "model_max_length")
          for value in ("long", -1, 0, [5])),
        Case("tokenizer: a length that is no number", EVAL, changed(config, model_max_length=float("nan")), "nan"),
        Case("tokenizer: a template of half a letter", EVAL, changed(config, chat_template="\ud800"), "Unicode"),
        *(Case(f"tokenizer: a template that {what}", DATA, changed(config, chat_template=template), said)
          for what, template, said in templates),
        Case("tokenizer: no tokenizer", EVAL, _both(gone(at), gone(config)), "tokenizer"),
        Case("tokenizer: another version", EVAL, text(at, '{"version": "9.0"}'), "tokenizer"),
        Case("tokenizer: a model that is none", EVAL, changed(at, model={"type": "Evil"}), "tokenizer"),
        Case("tokenizer: too large", EVAL, sparse(at, 2**30), "no such file has more"),
        Case("tokenizer: tokens that are none", EVAL, changed(at, added_tokens=[5]), "tokenizer"),
        Case("tokenizer: special tokens are a pipe", EVAL, pipe("model/special_tokens_map.json"), "no regular file"),
    ]  # fmt: skip


def _outputs() -> list[Case]:
    prune = ("prune", "model", "--ratio", "0.2", "-o")

    def nothing(here: Path) -> None:
        pass

    return [
        Case("out: a file", (*prune, "rows.jsonl", "--force"), nothing, "is not a folder"),
        Case("out: a link", (*prune, "l"), link("l", "model"), "is a link"),
        Case("out: nowhere", (*prune, "no/out"), nothing, "does not exist"),
        Case("out: the model", (*prune, "model", "--force"), nothing, "was not written by shear-ir"),
        Case("out: a name of 300 letters", (*prune, "x" * 300), nothing, "too long"),
        Case("out: where nothing can be put", (*prune, "/proc/out"), nothing, "cannot be written"),
        Case("out: the plan is a folder", (*prune, "out", "--plan-out", "d.json"), folder("d.json"), "is a folder"),
        Case("out: the plan is nowhere", (*prune, "out", "--plan-out", "no/p.json"), nothing, "does not exist"),
        Case("model: a folder that is not there", ("groups", "./no"), nothing, "there is no folder"),
        Case("model: a file", ("groups", "plan.json"), nothing, "is a file"),
        Case("model: a name that moves the cursor", ("groups", "\x1b[2J"), nothing, "there is no folder"),
        Case("model: a name of 5000 letters", ("groups", "./" + "x" * 5000), nothing, ""),
    ]  # fmt: skip


def _losses() -> list[Case]:
    odd = (
        "{}",
        '{"texts": NaN, "asked": 1}',
        '{"texts": "x"}',
        '{"texts": true}',
        '{"other": 1}',
        '{"sources": []}',
        '{"texts": 1e999}',
    )
    return [Case(f"losses: {document}", LOSSES, text("losses.json", document)) for document in odd]


CASES = [
    *_nowhere("model/config.json", GROUPS, "config.json"), *_configs(), *_indices(), *_weights(),
    *_nowhere("model/generation_config.json", GROUPS, "generation_config.json"),
    *_nowhere("ad/adapter_config.json", ADAPTER, "adapter_config.json"), *_adapters(),
    *_nowhere("plan.json", PLAN, "plan"), *_plans(), *_nowhere("small/shear_ir.json", SMALL, "shear_ir.json"), *_records(),
    *_yaml("recipe.yaml", RECIPE), *_recipes(), *_yaml("data.yaml", DATA), *_data(),
    *_nowhere("knowledge.json", KNOWLEDGE, "knowledge"), *_knowledge(),
    *_nowhere("model/tokenizer_config.json", EVAL, "tokenizer"), *_nowhere("model/tokenizer.json", EVAL, "tokenizer"), *_tokenizers(),
    *_nowhere("losses.json", LOSSES, "losses"), *_losses(), *_nowhere("inputs.safetensors", INPUTS, "inputs"), *_outputs(),
]  # fmt: skip
