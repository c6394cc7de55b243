"""The commands and what they share: ``shear-ir --help``, ``--version``, ``--debug``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from shear_ir import __version__
from shear_tools.cli.dump import dump
from shear_tools.cli.eval import eval
from shear_tools.cli.explain import explain
from shear_tools.cli.groups import groups
from shear_tools.cli.knowledge import knowledge
from shear_tools.cli.lorashear import lorashear
from shear_tools.cli.opt import opt
from shear_tools.cli.project import project
from shear_tools.cli.prune import prune
from shear_tools.cli.recover import recover
from shear_tools.cli.sweep import sweep
from shear_tools.cli.verify import verify
from shear_tools.cli.visualize import visualize

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example:\n\n\b\n  shear-ir prune ./my-llama --ratio 0.2 --round-to 64 -o ./my-llama-small",
)

_EXAMPLES: dict[Callable[..., None], tuple[str, str]] = {
    visualize: ("Draw a model and its groups.", "./my-llama --group ffn0 --layers 0-1 -o ffn0.svg"),
    groups: ("List what can be removed together.", "./my-llama --kind ffn"),
    explain: ("Say what ties slices together, or froze them.", "./my-llama kv0 -o kv0.svg"),
    dump: ("Print a model as text.", "./my-llama -o program.txt"),
    prune: ("Write a smaller model.", "./my-llama --ratio 0.2 --round-to 64 -o ./my-llama-small"),
    verify: ("Compare a smaller model with its original.", "./my-llama ./my-llama-small"),
    opt: ("Run passes.", "./my-llama -p 'select-uniform{ratio=0.2 round_to=8},shear,dead-code' --time-passes"),
    knowledge: ("Say where the knowledge lies.", "./my-llama --data data.yaml -o knowledge.json --plot knowledge.svg"),
    lorashear: ("Prune while training, and recover.", "./my-llama --ratio 0.2 --data data.yaml -o ./my-llama-small"),
    recover: (
        "Train a smaller model on what it forgot.",
        "./my-llama-small --dense ./my-llama --data data.yaml -o ./my-llama-recovered",
    ),
    sweep: ("Try several ratios and criteria.", "./my-llama --data data.yaml --importance flap --importance taylor"),
    eval: ("Measure a model on held-out text and tasks.", "./my-llama-small --data data.yaml"),
    project: ("Cut an adapter for a smaller base.", "./my-adapter --plan ./my-llama-small -o ./my-adapter-small"),
}

for _command, (_short, _example) in _EXAMPLES.items():
    _epilog = f"Example:\n\n\b\n  shear-ir {_command.__name__} {_example}"
    app.command(short_help=_short, epilog=_epilog)(_command)


def _version(asked: bool) -> None:
    if asked:
        print(f"shear-ir {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and all warnings.")] = False,
) -> None:
    """Make transformers physically smaller: see what can be removed together, remove it, check the result."""
