"""Pictures: everything that can go is in them, what cannot says why, and they stay small."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shear_backends.draw import draw, picture, source
from shear_backends.draw.palette import DIMMED, FROZEN, HUES, RED, SHADES, contrast, ink, lighter
from shear_ir.axes import atoms
from shear_ir.errors import PlanError, SaveError, ShearError
from shear_ir.frontend.export import trace
from shear_ir.manager import AnalysisManager
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.cost import MeasureCosts
from shear_passes.analysis.find_groups import FindGroups, Groups
from shear_passes.rewrite.cuts import build_plan

VOCAB, HIDDEN, HEADS, HEAD_DIM, FFN = 19, 12, 3, 4, 30

Analysed = tuple[Program, Groups, Callable[..., Plan]]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, FFN), nn.Linear(HIDDEN, FFN)
        self.down = nn.Linear(FFN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.inner = inner()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Tiny(nn.Module):
    """A language model whose blocks are made by ``kinds``; its head is tied to its embedding."""

    def __init__(self, *kinds: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block(kind) for kind in kinds)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def analysed(model: nn.Module, inputs: Tensor | None = None) -> Analysed:
    """The program, its groups, and a function from group names to the units that go to a plan."""
    program = trace(model, torch.zeros(2, 7, dtype=torch.long) if inputs is None else inputs)
    analyses = AnalysisManager(program)
    groups = analyses.get(FindGroups())

    def plan(**gone: list[int]) -> Plan:
        kept = {groups.by_name[n]: np.setdiff1d(np.arange(groups.by_name[n].size), go) for n, go in gone.items()}
        return build_plan(groups, analyses.get(MeasureCosts()), kept)

    return program, groups, plan


@pytest.fixture(scope="module")
def tiny() -> Analysed:
    return analysed(Tiny(Attention, GatedMLP))


@pytest.fixture(scope="module")
def deep() -> Analysed:
    return analysed(Tiny(*[GatedMLP] * 6))


def nodes(text: str) -> dict[str, str]:
    """Node to what it is: the path of a box, the label of an operator."""
    boxes = re.findall(r'^ *(n\d+) \[shape=box, label=<.*>, tooltip="(.*?)"', text, re.MULTILINE)
    return dict(boxes) | dict(re.findall(r'^ *(n\d+) \[label="(.*?)"', text, re.MULTILINE))


def lines(text: str) -> set[tuple[str, str]]:
    """The lines that are seen, by what they join."""
    names = nodes(text)
    drawn = re.findall(r"^ *(n\d+) -> (n\d+)(.*)", text, re.MULTILINE)
    return {(names[a], names[b]) for a, b, look in drawn if "invis" not in look}


def box(text: str, path: str) -> str:
    """The label of one box."""
    found = re.search(rf'^ *n\d+ \[shape=box, label=<(.*)>, tooltip="{re.escape(path)}"', text, re.MULTILINE)
    assert found is not None, f"no box {path}"
    return found[1]


def cells(label: str) -> list[str]:
    """What the coloured cells of a box say, from left to right."""
    return re.findall(r'COLOR="#\w+">((?:[a-z]+\d* )?\d+(?: → [\d–]+)?)</FONT></TD>', label)


def test_every_group_is_in_the_legend_with_its_cost(tiny: Analysed) -> None:
    program, groups, _ = tiny
    legend = source(program, groups).partition("node [")[0]
    assert [g.name for g in groups if not re.search(rf"\b{g.name}\b", legend)] == []
    assert "prunable" in legend
    assert f"{groups.by_name['ffn'].parameters_per_unit:,}" in legend
    assert f"{program.parameter_count:,} parameters" in legend


def test_a_fused_projection_shows_its_three_segments(tiny: Analysed) -> None:
    program, groups, _ = tiny
    weight = box(source(program, groups), "blocks.0.inner.qkv").partition(">weight<")[2].partition(">bias<")[0]
    assert cells(weight) == ["kv 3", "d0 4", "kv 3", "d0 4", "kv 3", "d1 4", "h 12"]


def test_a_bias_stands_below_the_dim_it_shares() -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = Transposed(5, 8)
            self.down = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)))

    class Transposed(nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(rows, columns)), nn.Parameter(torch.ones(columns))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    program, groups, _ = analysed(Flipped(), torch.zeros(2, 5))
    bias = box(source(program, groups), "up").rpartition("<TR>")[2].partition(">bias<")[2]
    assert bias.index("<TD></TD>") < bias.index("ffn")


def test_a_frozen_axis_is_grey_and_says_why(tiny: Analysed) -> None:
    program, groups, _ = tiny
    weight = box(source(program, groups), "blocks.1.inner.gate")
    frozen = re.search(rf'<TD BGCOLOR="{FROZEN}"[^>]*TITLE="([^"]*)"[^>]*><FONT[^>]*>h 12<', weight)
    assert frozen is not None
    assert "frozen: layer normalisation" in frozen[1]


def test_lines_follow_the_data(tiny: Analysed) -> None:
    program, groups, _ = tiny
    attention, mlp = "blocks.0.inner", "blocks.1.inner"
    assert lines(source(program, groups)) == {
        ("tokens", "embed"),
        ("embed", "blocks.0.norm"),
        ("embed", "+"),
        ("blocks.0.norm", f"{attention}.qkv"),
        (f"{attention}.qkv", "attention"),
        ("attention", f"{attention}.out"),
        (f"{attention}.out", "+"),
        ("+", "blocks.1.norm"),
        ("+", "+"),
        ("blocks.1.norm", f"{mlp}.gate"),
        ("blocks.1.norm", f"{mlp}.up"),
        (f"{mlp}.gate", "×"),
        (f"{mlp}.up", "×"),
        ("×", f"{mlp}.down"),
        (f"{mlp}.down", "+"),
        ("+", "head"),
        ("head", "output"),
    }


def test_an_operator_says_where_it_stands_but_not_where_files_are_kept(tiny: Analysed) -> None:
    tooltips = re.findall(r'label="attention".* tooltip="(.*?)"', source(*tiny[:2]))
    assert len(tooltips) == 1
    assert re.search(r"&#10;test_draw\.py:\d+: mixed = F", tooltips[0])


def test_a_tied_weight_is_drawn_where_it_is_read(tiny: Analysed) -> None:
    program, groups, _ = tiny
    assert "= embed.weight" in box(source(program, groups), "head")


def test_a_barrier_is_red_and_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.renorm(self.up(x), 2, 0, 1.0))

    program, groups, _ = analysed(Odd(), torch.zeros(2, 9, 5))
    text = source(program, groups)
    barrier = re.search(r'^ *n\d+ \[label="aten.renorm".*', text, re.MULTILINE)
    assert barrier is not None
    assert f'fillcolor="{RED}"' in barrier[0]
    assert "barrier: no axis rule for aten.renorm" in barrier[0]
    assert {("up", "aten.renorm"), ("aten.renorm", "down")} <= lines(text)


def test_a_scan_laid_open_is_drawn_without_its_steps() -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.decay, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            values, decay = self.into(x), self.decay(x)
            state = torch.zeros_like(values[:, 0])
            for step in range(x.shape[1]):
                state = state * decay[:, step] + values[:, step]
            return self.out(state)

    program, groups, _ = analysed(Scan(), torch.zeros(2, 9, 5))
    assert lines(source(program, groups)) == {
        ("x", "into"), ("x", "decay"), ("into", "out"), ("decay", "out"), ("out", "output"),
    }  # fmt: skip


def test_shared_blocks_are_drawn_once_with_the_way_back() -> None:
    class Looped(Tiny):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.blocks[0](self.blocks[0](self.embed(tokens))))

    program, groups, _ = analysed(Looped(GatedMLP))
    text = source(program, groups)
    assert sorted(nodes(text).values()).count("×") == 1
    assert {("embed", "blocks.0.norm"), ("+", "blocks.0.norm")} <= lines(text)


def test_a_plan_marks_what_goes(tiny: Analysed) -> None:
    program, groups, plan = tiny
    made = plan(ffn=[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], kv=[1])
    text = source(program, groups, plan=made)
    assert f"−{100 * made.ratio:.1f} %" in text
    assert cells(box(text, "blocks.1.inner.up")) == ["ffn 30 → 20", "h 12", "ffn 30 → 20"]
    assert "390 → " in box(text, "blocks.1.inner.up")
    assert ">260<" in box(text, "blocks.1.inner.up")
    assert "20 stay, 10 go: 3–12" in text
    assert RED not in box(text, "blocks.0.norm")


def test_heads_are_marked_one_by_one(tiny: Analysed) -> None:
    program, groups, plan = tiny
    head = box(source(program, groups, plan=plan(kv=[1])), "blocks.0.inner.out")
    bars = re.findall(r'<TD BGCOLOR="(#\w+)" WIDTH="\d+" HEIGHT="4">', head)
    assert [colour == RED for colour in bars] == [False, True, False]


def test_blocks_that_lose_other_units_show_the_share_alone(deep: Analysed) -> None:
    program, groups, plan = deep
    text = source(program, groups, plan=plan(**{f"ffn{n}": [n, n + 1] for n in range(6)}))
    assert "<B>blocks 0–5</B>" in text
    assert "28 stay; which ones differs from block to block" in text


def test_a_plan_of_another_model_is_refused(tiny: Analysed, deep: Analysed) -> None:
    with pytest.raises(PlanError, match="made for another model"):
        source(*deep[:2], plan=tiny[2](kv=[1]))


def test_repeated_blocks_fold_into_the_first(deep: Analysed) -> None:
    text = source(*deep[:2])
    assert "<B>blocks 0–5</B>" in text
    assert "6 × Block" in text
    assert {n for n in nodes(text).values() if n.startswith("blocks.")} == {
        "blocks.0.norm", "blocks.0.inner.gate", "blocks.0.inner.up", "blocks.0.inner.down",
    }  # fmt: skip
    assert ("+", "head") in lines(text)
    assert ("+", "blocks.0.norm") not in lines(text)


def test_two_blocks_are_drawn_in_full() -> None:
    text = source(*analysed(Tiny(GatedMLP, GatedMLP))[:2])
    assert {"blocks.0.norm", "blocks.1.norm"} <= set(nodes(text).values())


def test_blocks_that_take_turns_fold_as_a_turn() -> None:
    text = source(*analysed(Tiny(*[Attention, GatedMLP] * 3))[:2])
    assert "<B>blocks 0, 2, 4</B>" in text
    assert "<B>blocks 1, 3, 5</B>" in text
    assert "3 × Block" in text
    assert ("+", "blocks.1.norm") in lines(text)


def test_layers_unfold_and_the_rest_stays_folded(deep: Analysed) -> None:
    text = source(*deep[:2], layers="0,2")
    assert [title for title in re.findall(r"<B>(blocks[^<]*)</B>", text)] == [
        "blocks.0", "blocks.1", "blocks.2", "blocks 3–5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("first", "layers 'first' is not a range: write one number or first-last, as in 0-1 or 0,30-31"),
        ("3-1", "layers '3-1' is not a range: 1 comes before 3"),
        ("0-6", "layers '0-6': there is no block 6; the model has blocks.0–5"),
    ],
)
def test_layers_that_are_not_there_are_an_error(deep: Analysed, layers: str, message: str) -> None:
    with pytest.raises(ShearError) as failure:
        source(*deep[:2], layers=layers)
    assert str(failure.value) == message


def test_layers_of_a_model_without_blocks_are_an_error() -> None:
    program, groups, _ = analysed(Attention(), torch.zeros(2, 7, HIDDEN))
    with pytest.raises(ShearError, match="the model has no repeated blocks"):
        source(program, groups, layers="0")


def test_blocks_that_lose_different_numbers_do_not_fold(deep: Analysed) -> None:
    program, groups, plan = deep
    text = source(program, groups, plan=plan(ffn0=[1], ffn1=[2, 3], ffn2=[4], ffn3=[0], ffn4=[7], ffn5=[1]))
    assert re.findall(r"<B>(blocks[^<]*)</B>", text) == ["blocks.0", "blocks.1", "blocks 2–5"]


def test_a_crowd_of_unequal_blocks_folds_with_ranges(deep: Analysed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "CROWD_OF_GROUPS", 10)
    program, groups, plan = deep
    text = source(program, groups, plan=plan(ffn0=[1], ffn1=[2, 3], ffn2=[4, 5, 6], ffn3=[0], ffn4=[7], ffn5=[1]))
    assert "<B>blocks 0–5</B>" in text
    assert cells(box(text, "blocks.0.inner.up"))[0] == "ffn0 30 → 27–29"
    assert "390 → " in box(text, "blocks.0.inner.up")
    assert ">351–377<" in box(text, "blocks.0.inner.up")


def test_a_group_is_shown_with_all_its_slices_and_nothing_else(tiny: Analysed) -> None:
    program, groups, _ = tiny
    text = source(program, groups, group="ffn")
    group = groups.by_name["ffn"]
    assert set(nodes(text).values()) == {p.rpartition(".")[0] for p in group.parameters} | {"×"}
    assert lines(text) == {
        ("blocks.1.inner.gate", "×"), ("blocks.1.inner.up", "×"), ("×", "blocks.1.inner.down"),
    }  # fmt: skip
    assert "5 slices of 5 tensors" in text


def test_a_group_across_few_blocks_is_not_folded(deep: Analysed) -> None:
    program, groups, _ = deep
    text = source(program, groups, group="h")
    assert {p.rpartition(".")[0] for p in groups.by_name["h"].parameters} <= set(nodes(text).values())


def test_an_axis_of_buffers_alone_is_shown_when_asked_for() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(5, 8)
            self.register_buffer("table", torch.ones(3, 9))

        def forward(self, x: Tensor) -> Tensor:
            return self.map(x) * self.table.sum()

    program, groups, _ = analysed(Buffered(), torch.zeros(2, 5))
    name = groups.label(next(atoms(groups.axes.of_param["table"][1])))
    assert "table" not in source(program, groups)
    assert f"<B>{name}</B>" not in source(program, groups)
    assert "table" in nodes(source(program, groups, group=name)).values()


def test_an_unknown_group_names_those_near_it(deep: Analysed) -> None:
    with pytest.raises(ShearError, match=r"the model has no group 'fnn3'; near names: ffn3, ffn\d"):
        source(*deep[:2], group="fnn3")


def test_the_same_model_gives_the_same_bytes(tiny: Analysed, tmp_path: Path) -> None:
    again = analysed(Tiny(Attention, GatedMLP))
    assert source(*tiny[:2]) == source(*again[:2])
    first, second = draw(*tiny[:2], tmp_path / "a.svg"), draw(*again[:2], tmp_path / "b.svg")
    assert first.read_bytes() == second.read_bytes()


def test_an_svg_is_xml_with_tooltips_and_leads_nowhere(tiny: Analysed, tmp_path: Path) -> None:
    root = ElementTree.parse(draw(*tiny[:2], tmp_path / "groups.svg")).getroot()
    titles = {e.text for e in root.iter("{http://www.w3.org/2000/svg}title")}
    assert any(t and t.startswith("ffn: ffn, 30 units") for t in titles)
    assert list(root.iter("{http://www.w3.org/2000/svg}a")) == []


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("dot", b"digraph")])
def test_the_extension_says_the_format(tiny: Analysed, tmp_path: Path, kind: str, start: bytes) -> None:
    assert draw(*tiny[:2], tmp_path / f"groups.{kind}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("groups.jpeg", r"its extension must be one of \.svg, \.png, \.pdf, \.dot"),
        ("missing/groups.svg", "there is no folder"),
    ],
)
def test_a_file_that_cannot_be_is_an_error(tiny: Analysed, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(SaveError, match=message):
        draw(*tiny[:2], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_graphviz_the_error_says_what_to_do(
    tiny: Analysed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SaveError, match="the program dot, which is not installed: install graphviz"):
        draw(*tiny[:2], tmp_path / "groups.svg")
    assert list(tmp_path.iterdir()) == []
    draw(*tiny[:2], tmp_path / "groups.dot")


def test_text_can_be_read_on_every_colour() -> None:
    fills = [FROZEN, DIMMED, *(lighter(hue, shade) for hue in HUES.values() for shade in SHADES)]
    assert min(contrast(ink(fill), fill) for fill in fills) >= 4.5


@pytest.mark.slow
def test_a_llama_of_many_layers_is_a_small_picture(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=10,
        vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    program = trace(model)
    groups = AnalysisManager(program).get(FindGroups())
    assert len(nodes(source(program, groups))) < 40
    assert draw(program, groups, tmp_path / "groups.svg").stat().st_size < 200_000
    assert len(nodes(source(program, groups, layers="0-1"))) < 200
    assert set(nodes(source(program, groups, group="r")).values()) == {
        "model.rotary_emb", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "attention",
    }  # fmt: skip
