"""Mutation testing by area: a fault is put into a copy of the code, and the tests of its area must fail.

    python tools/mutate.py                # all of them
    python tools/mutate.py --only resize  # of one area
    python tools/mutate.py --sample 3     # some, drawn by --seed, as CI does

What is here are faults that would make a wrong result and not a crash. One that survives is a test that is missing.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PARTS = (".", "passes", "backends", "tools")
OPS, ANALYSIS = "passes/shear_passes/ops", "passes/shear_passes/analysis"
CUTS = "passes/shear_passes/rewrite/cuts.py"
SQUARES = "passes/shear_passes/repair/least_squares.py"
LHSPG = "backends/shear_training/lhspg.py"
AREAS: Mapping[str, tuple[str, ...]] = {
    "rules": ("tests/ops",),
    "zeros": ("tests/ops", "tests/analysis", "tests/oracle/test_found.py"),
    "resize": ("tests/ops/test_resize.py",),
    "cuts": ("tests/passes/test_checked_plan.py", "tests/test_axes.py", "tests/ops/test_resize.py"),
    "lhspg": ("tests/training/test_lhspg.py",),
    "repair": ("tests/passes/test_repair.py",),
}
"""The tests of each area."""


@dataclass(frozen=True)
class Mutation:
    """``old`` stands once in ``file`` and becomes ``new``; ``what``: the fault in words."""

    area: str
    what: str
    file: str
    old: str
    new: str


MUTATIONS = (
    Mutation("rules", "linear does not tie its input to the columns", f"{OPS}/linear.py",
             "    out, in_ = weight\n    site.equate(x[-1], in_)\n    if bias", "    out, in_ = weight\n    if bias"),
    Mutation("rules", "linear forgets that its bias is added", f"{OPS}/linear.py",
             "[(0, x[:-1]), (1, [out])], added=[2])\n    return (*x[:-1], out)",
             "[(0, x[:-1]), (1, [out])])\n    return (*x[:-1], out)"),
    Mutation("rules", "a transpose swaps nothing", f"{OPS}/shape.py", "dims[a], dims[b] = dims[b], dims[a]", "pass"),
    Mutation("rules", "the rows of an embedding may go", f"{OPS}/embedding.py",
             'site.freeze(weight[:1], "rows are chosen by the values of the input")\n    return (*indices',
             "return (*indices"),
    Mutation("rules", "a layer norm holds nothing", f"{OPS}/norm.py",
             'site.freeze(normed, "layer normalisation runs', 'site.freeze((), "layer normalisation runs'),
    Mutation("rules", "entries may be flipped under a cut", f"{OPS}/select.py",
             'site.freeze([x[d] for d in dims], "the axis is reversed")', "pass"),
    Mutation("rules", "sigmoid is taken to be zero at zero", f"{OPS}/elementwise.py",
             'row("sigmoid exp", total', 'row("sigmoid exp", FIRST, total'),
    Mutation("rules", "a product loses its zeros", f"{OPS}/elementwise.py",
             '"mul multiply", ANY_OF,', '"mul multiply", ALL,'),
    Mutation("zeros", "a sum is zero where one term is", f"{ANALYSIS}/vanish.py",
             "return frozenset.intersection(*sets) if sets else _NOTHING", "return frozenset().union(*sets)"),
    Mutation("zeros", "a bias is not looked at", f"{ANALYSIS}/vanish.py",
             "found &= self._aligned(addend, out)", "pass"),
    Mutation("zeros", "a sum over what is not zero holds nothing", f"{ANALYSIS}/vanish.py",
             "if not any(atom in self.zero.get(o.node.name, _NOTHING) for o in contraction.operands):", "if False:"),
    Mutation("zeros", "a division by nothing holds nothing", f"{ANALYSIS}/poles.py",
             "if not has_value(node, known):", "if False:"),
    Mutation("zeros", "copies are zero where their counted axis is cut", f"{ANALYSIS}/vanish.py",
             "return stays - self._counted_copies(node) if stays else stays", "return stays"),
    Mutation("zeros", "a difference of two that are minus infinity is one, too", f"{ANALYSIS}/losing.py",
             "return mine - self._of_operand(args[1], out)", "return mine"),
    Mutation("zeros", "a softmax makes zeros of all its rows", f"{ANALYSIS}/losing.py",
             "return mine & frozenset(atoms(self.axes.dims(first)[node.args[1]]))", "return mine"),
    Mutation("resize", "attention is scaled by the new width", f"{OPS}/attention.py",
             "1.0 / math.sqrt(width.size)", "1.0 / math.sqrt(change.size(width))"),
    Mutation("resize", "a mean is over what is left", f"{OPS}/reduce.py",
             "    if factor != 1.0:\n        change.after(aten.mul.Tensor, factor)", "    return"),
    Mutation("resize", "an eps does not follow its norm", f"{OPS}/norm.py", "rest[0], eps * factor)", "rest[0], eps)"),
    Mutation("resize", "a norm is not scaled to what is left", f"{OPS}/norm.py",
             "change.after(aten.mul.Tensor, math.sqrt(factor))", "pass"),
    Mutation("resize", "a slice keeps its beginning", f"{OPS}/select.py",
             "    first = change.size(before[0])\n    change.set(2, first)",
             "    first = start\n    change.set(2, first)"),
    Mutation("resize", "a sequence starts anew", f"{OPS}/factory.py",
             "    if change.changed(change.out[0]):\n        change.take(0)",
             "    if change.changed(change.out[0]):\n        change.sizes(0)"),
    Mutation("resize", "groups of a convolution stay as many", f"{OPS}/conv.py",
             "    if before != after:", "    if False:"),
    Mutation("cuts", "an edited plan is believed", CUTS,
             "if mine.keys() != given.keys() or any(", "if False and any("),
    Mutation("cuts", "two kept indices are exchanged", CUTS,
             "stays[cut.kept] = True", "stays[np.roll(cut.kept, 1)[:-1]] = True"),
    Mutation("lhspg", "a group loses more than its own count", LHSPG,
             "    room -= torch.bincount(group[self.redundant], minlength=len(self.units.groups))[group]\n",
             "    pass\n"),
    Mutation("lhspg", "units shrink without what their adapters learned", LHSPG,
             "new = new if delta is None else new + delta", "pass"),
    Mutation("lhspg", "a merge keeps the moments of what it merged", LHSPG,
             "self._fill(b, 0, torch.arange(b.shape[0], device=b.device))", "b.zero_()"),
    Mutation("lhspg", "the most salient units go", LHSPG,
             "order = free[torch.argsort(score[free], stable=True)]",
             "order = free[torch.argsort(score[free], stable=True, descending=True)]"),
    Mutation("repair", "the regression goes the wrong way", SQUARES,
             "turned[..., stays] += gone @ solution.to(turned).T",
             "turned[..., stays] -= gone @ solution.to(turned).T"),
    Mutation("repair", "what is left of a mean is lost", SQUARES,
             "found[loss.bias] = (bias.double() + shift).to(bias.dtype)", "found[loss.bias] = bias"),
    Mutation("repair", "a tied table changes with its reader", SQUARES,
             "if not loss.consumer.sole:", "if False:"),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the tests of the area said of a mutation; ``killed`` None where they could not run."""

    mutation: Mutation
    killed: bool | None
    seconds: float
    by: str = ""


def tested(area: str, tree: Path, limit: float) -> subprocess.CompletedProcess[str]:
    """The tests of an area over ``tree``, until one fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *AREAS[area]]
    paths = [str(tree / part) for part in PARTS]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CI": "1"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=limit, check=False)


def tried(mutation: Mutation, tree: Path, limit: float) -> Verdict:
    """Put a fault into ``tree``, run the tests of its area until one fails, and mend it again."""
    file, began = tree / mutation.file, time.monotonic()
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return Verdict(
            mutation, None, 0.0, f"what it changes stands {text.count(mutation.old)} times in {mutation.file}"
        )
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        ran = tested(mutation.area, tree, limit)
    except subprocess.TimeoutExpired:
        return Verdict(mutation, None, time.monotonic() - began, f"not done in {limit:.0f} s")
    finally:
        file.write_text(text, encoding="utf-8")
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    by = failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else ""
    return Verdict(mutation, {0: False, 1: True}.get(ran.returncode), time.monotonic() - began, by)


def copied(into: Path) -> Path:
    """The parts of the tree that tests read."""
    for name in ("shear_ir", "passes", "backends", "tools", "tests", "docs"):
        shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("__pycache__", "out"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copyfile(ROOT / name, into / name)
    return into


def verdicts(chosen: Sequence[Mutation], limit: float) -> Iterator[Verdict]:
    """Each in turn; first the tests of their areas without any fault, which have to pass."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        for area in dict.fromkeys(m.area for m in chosen):
            if tested(area, tree, limit).returncode:
                raise typer.BadParameter(f"the tests of {area} fail without any fault: mend that first")
        for mutation in chosen:
            yield tried(mutation, tree, limit)


def main(
    only: Annotated[str | None, typer.Option(help=f"An area: {', '.join(AREAS)}.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="So many, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    limit: Annotated[float, typer.Option(help="Seconds for the tests of one.")] = 600.0,
) -> None:
    """Try mutations and print a table; exit code 1 when one survives."""
    if only is not None and only not in AREAS:
        raise typer.BadParameter(f"there is no area {only}; there are {', '.join(AREAS)}")
    chosen = [m for m in MUTATIONS if only in (None, m.area)]
    if sample is not None:
        chosen = random.Random(seed).sample(chosen, min(sample, len(chosen)))
    console = Console()
    table = Table("area", "fault", "verdict", "by", "s")
    survived = 0
    for found in verdicts(chosen, limit):
        said = {True: "killed", False: "SURVIVED", None: "not tried"}[found.killed]
        survived += found.killed is not True
        table.add_row(found.mutation.area, found.mutation.what, said, found.by, f"{found.seconds:.0f}")
        console.print(f"{said:10} {found.mutation.area}: {found.mutation.what} ({found.seconds:.0f} s) {found.by}")
    console.print(table)
    console.print(f"{len(chosen) - survived} of {len(chosen)} killed")
    raise typer.Exit(1 if survived else 0)


if __name__ == "__main__":
    typer.run(main)
