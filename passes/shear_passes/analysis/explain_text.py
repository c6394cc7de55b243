"""An explanation as text: what froze an axis first, then a paragraph for each slice that says what ties it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shear_ir.printer import numbers

if TYPE_CHECKING:  # an Explanation prints itself
    from shear_passes.analysis.explanation import At, Chain, Explanation, Proof, Step

_WIDEST = 88
"""Characters of a line of code."""


def text(explanation: Explanation) -> str:
    """The whole explanation, one proof below the other."""
    if not explanation.proofs:
        return f"{explanation.name} has no axis: a dim of size 1 cannot lose its only index"
    return "\n\n\n".join("\n".join(_proof(proof)).rstrip() for proof in explanation.proofs)


def title(proof: Proof) -> str:
    """``ffn0: 44 ffn units in 3 slices, prunable``."""
    state = "held by a norm, which an exact rescaling lifts" if proof.rescalable else "frozen" if proof.reason else ""
    slices = f"{proof.slices} slice" + "s" * (proof.slices != 1)
    return f"{proof.group}: {proof.size:,} {proof.kind} units in {slices}, {state or 'prunable'}"


def reason(proof: Proof) -> str:
    """Why an axis is frozen, without the call, which the chain names."""
    return re.sub(r" at %\w+ = [\w.]+$", "", proof.reason)


def likewise(chain: Chain) -> str:
    """``likewise in layers.1–31``, where only the number of a layer differs; else how many more read the same."""
    if not chain.alike:
        return ""
    names = [re.split(r"(\d+)", one.end.value) for one in (chain, *chain.alike)]
    differ = [place for place, parts in enumerate(zip(*names, strict=True)) if len(set(parts)) > 1]
    if len(differ) != 1:
        return f"likewise {len(chain.alike)} more, the last of them {chain.alike[-1].end}"
    before = names[0][differ[0] - 1].rpartition(".")[0].rpartition(".")[2].lstrip("@%")
    return f"likewise in {before}.{numbers(sorted({int(parts[differ[0]]) for parts in names[1:]}))}"


def short(name: str, module: str) -> str:
    """A name without the module that the whole proof is about: ``@.up_proj.weight``."""
    return name[0] + name[len(module) + 1 :] if module and name[1:].startswith(f"{module}.") else name


def where(at: At, module: str) -> str:
    """A dim, its value under its short name."""
    return f"{short(at.value, module)}{str(at).removeprefix(at.value)}"


def operator(step: Step, before: At, module: str) -> str:
    """The operator, with the value it makes where neither side of the tie nor the operator names it."""
    named = [at.value.partition("[")[0] for at in (before, step.to) if at is not None]
    made = short(step.value, module)
    plain = step.value in named or made in ("", "%." + step.operator.rpartition(".")[2])
    remark = ": removed entries are not zero after it" if step.spoils else ""
    return step.operator + ("" if plain else f" ({made})") + remark


def _proof(proof: Proof) -> Iterator[str]:
    yield title(proof)
    if proof.reason:
        yield f"frozen: {reason(proof)}"
    if proof.module:
        yield f"names that begin with a dot are in {proof.module}"
    if proof.reason and proof.freeze is None and not proof.blocks:
        yield f"operators that meet it: {', '.join(proof.seen) or 'none'}"
    if proof.freeze is not None:
        yield ""
        yield f"from {_titled(proof.freeze.start, proof.module)} to what freezes it:"
        yield from _steps(proof.freeze, proof.module)
    yield ""
    if proof.blocks:
        yield "from what enters each unit, over the sums of its blocks, to what leaves it:"
        yield from _numbered(proof)
        return
    if proof.slices == 1 and not proof.chains:
        yield f"{_titled(proof.root, proof.module)} is its only slice"
        return
    yield f"tied to {_titled(proof.root, proof.module)}:"
    yield from _numbered(proof)
    if proof.apart:
        yield ""
        yield "tied by no chain of single operators:"
        yield from (f"     {_titled(at, proof.module)}" for at in proof.apart)


def _numbered(proof: Proof) -> Iterator[str]:
    for number, chain in enumerate(proof.chains, 1):
        more = likewise(chain)
        yield ""
        yield f"{number}. {_titled(chain.end, proof.module)}" + (f"   ({more})" if more else "")
        if chain.reason:
            yield f"     it stays: {chain.reason}"
        yield from _steps(chain, proof.module, "->" if proof.blocks else "=")


def _titled(at: At, module: str) -> str:
    return where(at, module) + (f" [{at.axes}]" if at.axes else "")


def _steps(chain: Chain, module: str, sign: str = "=") -> Iterator[str]:
    rows = [(where(chain.start, module), "", "")]
    before, shown = chain.start, None
    for step in chain.steps:
        code = "" if step.line == shown else _code(step)
        shown = step.line
        rows.append(
            (f"{sign} {where(step.to, module)}" if step.to else "x frozen", operator(step, before, module), code)
        )
        before = step.to or before
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for to, by, code in rows:
        yield f"     {to:{widths[0]}}  {by:{widths[1]}}  {code}".rstrip()


def _code(step: Step) -> str:
    said = str(step.line or "")
    return said if len(said) <= _WIDEST else said[: _WIDEST - 1].rstrip() + "…"
