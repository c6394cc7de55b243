"""Options that several commands share, each with its help. An option that is not given is None: the library decides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shear_ir.errors import LoadError, PlanError

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
# Spelled here too, so that --help loads no torch; a test compares them.
Allocation = Literal["uniform", "global", "isomorphic", "by-knowledge"]
BudgetName = Literal["parameters", "bytes", "flops", "kv_bytes", "latency"]
RepairName = Literal["least-squares", "flap-bias"]
RotationName = Literal["residual", "heads"]


def _there(spec: Any) -> Any:
    """Refuse what can be no folder, no name on the hub and no function, before anything large is imported for it."""
    given = str(spec)
    if not Path(given).expanduser().exists() and not re.fullmatch(r"[A-Za-z0-9_][\w./:-]*", given):
        raise LoadError(f"there is no folder {given}")
    return spec


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        callback=_there,
        help="A folder, a folder with only config.json, a name on the Hugging Face Hub, or package.module:factory.",
    ),
]
OutArgument = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", show_default=False, callback=_there, help="A folder that prune or shear_ir.save wrote."
    ),
]

TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that a model folder brings along.")
]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Type of the weights; as saved when not given.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace OUT where shear-ir wrote it.")]

InputsOption = Annotated[
    Path | None,
    typer.Option(
        "--inputs", metavar="FILE", show_default="made from the signature and the config",
        help="Arguments of forward by name, a .safetensors file: the model is traced and compared with them.",
    ),
]  # fmt: skip

RatioOption = Annotated[
    float | None, typer.Option(help="Share of the parameters to remove, between 0 and 1.", show_default=False)
]
PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A plan.json that says what goes.", show_default=False),
]
ImportanceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default="flap with --data, magnitude without, order without weights",
        help="Criterion that says which units matter: wanda, 'taylor{order=mixed}', package.module:function ...",
    ),
]
RoundToOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="N|KIND=N", help="What stays is a multiple of this, heads and experts excepted; repeatable by kind.",
        show_default="1",
    ),
]  # fmt: skip
AllocationOption = Annotated[
    Allocation | None,
    typer.Option(
        help="How layers share what goes: evenly (one config can describe it), by rank, or by measured knowledge.",
        show_default="uniform",
    ),
]
KnowledgeOption = Annotated[
    Path | None,
    typer.Option(
        "--knowledge", metavar="FILE", help="What shear-ir knowledge wrote, for --allocation by-knowledge.",
        show_default=False,
    ),
]  # fmt: skip
BudgetOption = Annotated[
    BudgetName | None,
    typer.Option(help="What --ratio is a share of; latency is measured here.", show_default="parameters"),
]
FloorOption = Annotated[
    float | None,
    typer.Option(help="The share of its units that stays in every layer at least.", show_default="0", min=0, max=1),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Only modules of this path, as in '*.layers.1?.*'; repeatable.", show_default=False
    ),
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Not the modules of this path; repeatable.", show_default=False),
]
KindsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND", help="Cut groups of this kind; repeatable.", show_default="ffn, kv_head"),
]
BlocksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--blocks", metavar="GLOB", show_default=False,
        help="Remove the layers of this path whole, as in 'model.layers.1?'; repeatable.",
    ),
]  # fmt: skip
BlockImportanceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", show_default="block-influence with --data, order without",
        help="Criterion that says which blocks matter, where kinds of blocks are cut beside others.",
    ),
]  # fmt: skip
SeedOption = Annotated[int | None, typer.Option(help="Seed of a random criterion.", show_default="0", min=0)]
BackendOption = Annotated[
    str, typer.Option(metavar="module|graph", help="Write smaller modules of MODEL's class, or a graph.")
]

StockOption = Annotated[
    bool | None,
    typer.Option(
        "--stock/--any-heads",
        help="Leave a number of heads that the model's config class accepts, or any.",
        show_default="stock",
    ),
]

CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FILE", show_default=False,
        help="Text to judge units by: a data.yaml that names sources, or one file of rows (.txt, .jsonl, .parquet).",
    ),
]  # fmt: skip
RepairOption = Annotated[
    RepairName | None,
    typer.Option(
        help="Fold what goes into what stays, from --data, without training; flap-bias needs biases.",
        show_default=False,
    ),
]
RotateOption = Annotated[
    RotationName | None,
    typer.Option(
        help="Turn the residual stream (--data), or the values of heads, so that their last directions matter least.",
        show_default=False,
    ),
]
BiasesOption = Annotated[
    bool, typer.Option("--add-biases", help="Give what reads pruned units a bias: another architecture, for flap-bias.")
]
SamplesOption = Annotated[
    int | None, typer.Option(help="Rows of --data to look at, from all sources alike.", show_default="128", min=1)
]
DataOption = Annotated[
    Path,
    typer.Option(
        "--data", metavar="FILE", help="A data.yaml that names sources, or one file of rows (.txt, .jsonl, .parquet).",
        show_default=False,
    ),
]  # fmt: skip
Device = Literal["cpu", "cuda"]
DeviceOption = Annotated[
    Device | None, typer.Option(help="Where to compute; a GPU where there is one.", show_default=False)
]

KeepWorkOption = Annotated[bool, typer.Option("--keep-work", help="Keep that folder at the end.")]
Bf16Option = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; merges are in float32.")]
GradientCheckpointingOption = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Keep fewer activations: slower, in less memory.")
]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the model for training.")]


def steps(words: list[str] | None) -> int | dict[str, int] | None:
    """What ``--round-to`` says: a number, or numbers by kind. Raises ``PlanError``."""
    if not words:
        return None
    found: dict[str, int] = {}
    for word in words:
        kind, equals, number = word.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or bool(equals) != bool(kind):
            raise PlanError(f"--round-to takes a number from 1 up, as in 64 or ffn=64, not '{word}'")
        found[kind] = int(number)
    return found[""] if set(found) == {""} else found


def require_knowledge(file: Path | None, *allocations: str) -> None:
    """Raise ``PlanError`` where knowledge is given and no allocation looks at it, or the other way round."""
    if ("by-knowledge" in allocations) != (file is not None):
        raise PlanError("--knowledge FILE and --allocation by-knowledge go together: give both or neither")


def given(**options: Any) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in options.items() if value not in (None, [])}
