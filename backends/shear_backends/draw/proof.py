"""An explanation as a picture: a box for every dim on the way, with the operator and the line that tie it to the last.

Each proof is a frame with the tree of what ties its slices, beside it what froze the axis, with that call in red.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from shear_backends.draw.chips import grey
from shear_backends.draw.dot import FONT
from shear_backends.draw.palette import DARK, FROZEN, HUES, LIGHT, LINE, RED, ink
from shear_backends.draw.render import render
from shear_passes.analysis.explain_text import likewise, operator, reason, title, where
from shear_passes.analysis.explanation import At, Chain, Explanation, Proof, Step

_WIDEST = 64
"""Characters of a line of code."""


def draw_explanation(explanation: Explanation, path: Path) -> Path:
    """Draw the proofs into ``path``: .svg, .png, .pdf or .dot; raises ``SaveError`` where the file cannot be made."""
    return render(explanation_source(explanation), Path(path))


def explanation_source(explanation: Explanation) -> str:
    """The picture as graphviz source; the same explanation gives the same bytes."""
    frames = [line for place, proof in enumerate(explanation.proofs) for line in _frames(f"p{place}", proof)]
    head = f"<B>{escape(explanation.name)}</B> of {escape(explanation.owner)}"
    return "\n".join(
        [
            f'digraph "{escape(explanation.name)}" {{',
            f'  graph [fontname="{FONT}", fontsize=12, rankdir=TB, ranksep=0.2, nodesep=0.2, pad=0.25, bgcolor=white,'
            f" labelloc=t, labeljust=l, label=<{head}>]",
            f'  node [fontname="{FONT}", fontsize=10, fontcolor="{DARK}", shape=box, style="rounded,filled",'
            f' fillcolor=white, color="{LINE}", penwidth=0.8, margin="0.06,0.03"]',
            f'  edge [fontname="{FONT}", color="{LINE}", arrowsize=0.5, penwidth=1.1]',
            *frames,
            "}\n",
        ]
    )


@dataclass
class _Boxes:
    """The boxes of one frame; dims that several chains pass are drawn once, those of folded chains not at all."""

    mark: str
    proof: Proof
    lines: list[str] = field(default_factory=list)
    _ids: dict[At, str] = field(default_factory=dict)
    _folded: dict[At, str] = field(default_factory=dict)

    def root(self, at: At) -> None:
        """The slice that chains start from."""
        if at not in self._ids:
            self._add(at, [_row(_dim(at, self.proof), bold=True)], _fill(self.proof))

    def chain(self, chain: Chain) -> None:
        """What the chain adds to what was drawn."""
        before = chain.start
        if before not in self._folded:
            self.root(before)
        for step in chain.steps:
            self._step(before, step, likewise(chain) if step.to == chain.end else "")
            before = step.to or before
        for other in chain.alike:
            for mine, its in zip(chain.steps, other.steps, strict=True):
                if mine.to and its.to:
                    self._folded.setdefault(its.to, self._ids[mine.to])

    def _step(self, before: At, step: Step, more: str) -> None:
        if step.to in self._ids:
            return
        at = step.to or At("", -1, step.node)
        fill = RED if step.to is None else _fill(self.proof) if step.to.value.startswith("@") else LIGHT
        line = escape(_cut(str(step.line or "")))
        rows = [
            _row(operator(step, before, self.proof.module), bold=step.to is None),
            _cell(grey(line) if fill == LIGHT else f'<FONT POINT-SIZE="9">{line}</FONT>') if line else "",
            _row(self._said(step.to), bold=fill not in (LIGHT, RED)),
            _row(more) if more else "",
        ]
        self._add(at, rows, fill)
        self.lines.append(f"    {self._tail(before)} -> {self._ids[at]} [{self._look(before, step)}]")

    def _tail(self, at: At) -> str:
        return self._ids.get(at) or self._folded[at]

    def _look(self, before: At, step: Step) -> str:
        if step.to is None:
            return f'color="{RED}", penwidth=2'
        # The box stands for a dim of a later layer.
        return "" if before in self._ids else f"style=dashed, label=<{grey(escape(where(before, self.proof.module)))}>"

    def _said(self, at: At | None) -> str:
        if at is None:
            return _cut(reason(self.proof))
        return _dim(at, self.proof) if at.value.startswith("@") else where(at, self.proof.module)

    def _add(self, at: At, rows: Iterable[str], fill: str) -> None:
        name = self._ids[at] = f"{self.mark}n{len(self._ids)}"
        table = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1">{"".join(rows)}</TABLE>'
        text = LIGHT if fill == RED else ink(fill)
        about = escape(f"{at} [{at.axes}]")
        self.lines.append(f'    {name} [label=<{table}>, fillcolor="{fill}", fontcolor="{text}", tooltip="{about}"]')


def _frames(mark: str, proof: Proof) -> Iterator[str]:
    if proof.freeze is not None:
        froze = _Boxes(f"{mark}f", proof)
        froze.root(proof.freeze.start)
        froze.chain(proof.freeze)
        yield from _frame(f"{mark}f", f"what freezes {proof.group}", proof.module, froze.lines)
    tied = _Boxes(f"{mark}t", proof)
    tied.root(proof.root)
    for chain in proof.chains:
        tied.chain(chain)
    yield from _frame(f"{mark}t", title(proof), proof.module, tied.lines)


def _frame(mark: str, head: str, module: str, lines: Iterable[str]) -> Iterator[str]:
    left = '<BR ALIGN="LEFT"/>'
    inside = grey(escape(f"names that begin with a dot are in {module}")) + left if module else ""
    yield f"  subgraph cluster_{mark} {{"
    yield f'    graph [label=<<B>{escape(head)}</B>{left}{inside}>, color="#c9c9c9", style=rounded, margin=10]'
    yield from lines
    yield "  }"


def _row(text: str, *, bold: bool = False) -> str:
    return _cell(f"<B>{escape(text)}</B>" if bold else escape(text))


def _cell(text: str) -> str:
    return f'<TR><TD ALIGN="LEFT">{text}</TD></TR>'


def _dim(at: At, proof: Proof) -> str:
    return where(at, proof.module) + (f"  [{at.axes}]" if at.axes else "")


def _fill(proof: Proof) -> str:
    return FROZEN if proof.reason else HUES[proof.kind]


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1].rstrip() + "…"
