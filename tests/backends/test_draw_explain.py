"""Explanations as pictures: a box for each dim on the way, the call that froze the axis in red."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import shear_ir as sir
from shear_backends.draw import draw_explanation, explanation_source
from shear_backends.draw.palette import FROZEN, HUES, RED
from shear_passes.analysis.explanation import Explanation
from tests.analysis.explained import Blocks, GroupedQueries, Summed

STATES, IDS = torch.zeros(2, 7, 10), torch.zeros(2, 7, dtype=torch.long)


def explained(model: nn.Module, name: str, feed: torch.Tensor = STATES) -> Explanation:
    return sir.explain(sir.trace(model, feed), name)


def boxes(source: str, fill: str) -> list[str]:
    """What the boxes of one colour say, without markup."""
    found = [line for line in source.splitlines() if f'fillcolor="{fill}", fontcolor' in line]
    return [re.sub(r"<[^>]*>", " ", line.partition("[label=<")[2].rpartition(">, fillcolor")[0]) for line in found]


def test_every_dim_on_the_way_is_one_box_and_every_tie_one_line() -> None:
    found = explained(GroupedQueries(), "kv")
    source = explanation_source(found)
    (proof,) = found.proofs
    dims = {proof.root, *(step.to for chain in proof.chains for step in chain.steps)}
    assert len(re.findall(r"^    \w+n\d+ \[label", source, re.M)) == len(dims)
    assert source.count(" -> ") == len(dims) - 1
    assert len(boxes(source, HUES["kv_head"])) == proof.slices == 4
    assert source == explanation_source(found)


def test_the_call_that_froze_an_axis_is_red_and_its_slices_are_grey() -> None:
    source = explanation_source(explained(Summed(), "up.weight:0"))
    (red,) = boxes(source, RED)
    assert "aten.sum" in red
    assert "summed over where removed entries need not be zero" in red
    assert re.search(r"explained\.py:\d+: gate = torch\.sigmoid\(self\.up\(x\)\)\.sum", red)
    assert len(boxes(source, FROZEN)) == 3  # weight and bias, and the weight once more where the way to the sum begins


def test_layers_are_folded_and_a_line_from_a_folded_one_says_so() -> None:
    sources = [explanation_source(explained(Blocks(depth), "h", IDS)) for depth in (4, 9)]
    assert [source.count(" -> ") for source in sources] == [sources[0].count(" -> ")] * 2
    assert "likewise in layers.2–8" in sources[1]
    assert re.search(r"style=dashed, label=<.*%layers\.7, dim 2", sources[1])


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_a_picture_is_written(tmp_path: Path) -> None:
    path = draw_explanation(explained(GroupedQueries(), "o.weight:1"), tmp_path / "o.svg")
    text = path.read_text()
    assert "scaled_dot_product_attention" in text
    assert "o.weight" in text
