"""``shear-ir project``: an adapter of the dense base, cut for the sheared one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shear_ir.errors import PlanError
from shear_tools.cli import console, options

if TYPE_CHECKING:
    from shear_ir.plans import Plan


def project(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", show_default=False, help="A LoRA adapter folder, as PEFT saves it.")
    ],
    plan: Annotated[
        Path,
        typer.Option("--plan", metavar="PLAN", show_default=False, help="A plan.json, or the folder that prune wrote."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="OUT", help="The folder to write; there whole or not at all.", show_default=False
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", show_default="as ADAPTER names it", help="The dense base; its config alone will do."
        ),
    ] = None,
    force: options.ForceOption = False,
    trust_remote_code: options.TrustOption = False,
    json: options.JsonOption = False,
) -> None:
    """Cut ADAPTER, which was trained on the dense base, so that it fits the base that PLAN shears.

    OUT is an adapter folder that PEFT loads. It carries the digest of the sheared base's shapes, which shear-ir checks
    before it loads the adapter. No weights of the base are read.
    """
    from shear_backends.store.folder import refuse_existing
    from shear_ir.frontend.adapter_files import adapter_tensors, base_of
    from shear_tools.api import pipeline
    from shear_tools.cli.models import open_model

    refuse_existing(out, force)
    read, sheared = _plan(plan)
    with console.Steps("loading", "projecting") as step:
        with step("loading"):
            adapter_tensors(adapter)
            dense = open_model(base or base_of(adapter), trust_remote_code, weights=False)
        with step("projecting"):
            done = pipeline.project(adapter, read, out, base=dense.model, sheared=sheared, force=force)
    if json:
        console.put_json({"adapter": str(adapter), **asdict(done), "path": str(done.path), "seconds": step.seconds})
        return
    console.put_lines(
        f"cut    {done.cut} of {done.tensors} tensors, {done.before:,} to {done.after:,} parameters",
        f"base   digest {done.base_digest}",
        f"wrote  {done.path}",
    )


def _plan(path: Path) -> tuple[Plan, Path | None]:
    """The plan in a file or in a folder that prune wrote, and that folder."""
    from shear_backends.store.record_file import PLAN_FILE
    from shear_ir.frontend.files import CONFIG
    from shear_ir.plans import Plan

    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / PLAN_FILE).is_file():
        raise PlanError(f"{path} holds no {PLAN_FILE}")
    return Plan.load(folder / PLAN_FILE if path.is_dir() else path), folder if (folder / CONFIG).is_file() else None
