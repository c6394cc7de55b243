"""Pipelines as text: what is printed is read back, what is misspelt is named."""

from __future__ import annotations

import pytest

import shear_ir as sir
from shear_ir.errors import PlanError
from shear_ir.manager import Pass, PassManager
from shear_passes.analysis.dump import Dump
from shear_passes.analysis.find_groups import FindGroups
from shear_passes.importance import Order, Random
from shear_passes.pipelines import parse_pipeline
from shear_passes.rewrite import DeadCode, Shear
from shear_passes.select import SelectIsomorphic, SelectUniform
from shear_passes.spelling import known_passes
from tests.zoo import build

PIPELINES: dict[str, list[Pass]] = {
    "find-groups,dump": [FindGroups(), Dump()],
    "select-isomorphic{ratio=0.3 round_to=[ffn=8,expert=2] floor=0.25},shear,dead-code": [
        SelectIsomorphic(ratio=0.3, round_to=("ffn=8", "expert=2"), floor=0.25), Shear(), DeadCode(),
    ],
    "select-uniform{importance=random{seed=3} kinds=[ffn,kv_head] seed=7}": [
        SelectUniform(importance=Random(3), kinds=("ffn", "kv_head"), seed=7),
    ],
    "select-uniform{importance=order skip=[*.layers.[01].mlp,lm_head]}": [
        SelectUniform(importance="order", skip=("*.layers.[01].mlp", "lm_head")),
    ],
    'shear{plan="a, b/{c}.json"},shear{plan="say \\"c:\\\\x\\""}': [Shear("a, b/{c}.json"), Shear('say "c:\\x"')],
}  # fmt: skip


@pytest.mark.parametrize("text", PIPELINES)
def test_text_is_the_passes_it_spells(text: str) -> None:
    assert parse_pipeline(text) == PIPELINES[text]


@pytest.mark.parametrize("text", PIPELINES)
def test_what_passes_print_is_read_back(text: str) -> None:
    printed = str(PassManager(PIPELINES[text]))
    assert parse_pipeline(printed) == parse_pipeline(text)
    assert str(PassManager(parse_pipeline(printed))) == printed


def test_every_pass_of_the_package_has_a_spelling() -> None:
    basic = {"infer-axes", "find-zeros", "find-groups", "measure-costs", "dump", "magnitude", "random", "order",
             "select-uniform", "shear", "dead-code"}  # fmt: skip
    parse_pipeline("shear")  # which imports them all
    assert basic <= set(known_passes())
    assert all(name == cls.name() for name, cls in known_passes().items())


def test_text_and_objects_make_the_same_program() -> None:
    model = build("llama_gqa")
    program = sir.trace(model)
    spelled = "select-uniform{ratio=0.25 importance=order round_to=4},shear,dead-code"
    written = [SelectUniform(ratio=0.25, importance=Order(), round_to=4), Shear(), DeadCode()]
    mine, other = (PassManager(passes).run(program) for passes in (parse_pipeline(spelled), written))
    assert str(mine.program) == str(other.program) != str(program)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sher", "there is no pass 'sher'; did you mean shear?"),
        ("frobnicate", "there is no pass 'frobnicate'; there are "),
        ("select-uniform{ratoi=1}", "select-uniform has no option 'ratoi'; did you mean ratio?"),
        ("dump{wide=True}", "dump has no option 'wide'; it has none"),
        ("select-uniform{ratio=much}", "select-uniform takes ratio=NUMBER, not ratio=much"),
        ("select-uniform{round_to=1.5}", "select-uniform takes round_to=NUMBER|[WORD,WORD], not round_to=1.5"),
        ("select-uniform{budget=time}", "select-uniform takes budget=parameters|bytes|flops|kv_bytes, not budget=time"),
        ("select-uniform{kinds=ffn}", "select-uniform takes kinds=[WORD,WORD], not kinds=ffn"),
        ("select-uniform{importance=randoom{seed=1}}", "there is no pass 'randoom'; did you mean random or wanda?"),
        ("select-uniform{ratio}", "'ratio' is not an option of select-uniform: write name=value"),
        ("shear{plan=a plan=b}", "shear is given plan twice"),
        ("shear,,dump", "the pipeline 'shear,,dump' has an empty place: passes are separated by single commas"),
        ("", "the pipeline '' has an empty place: passes are separated by single commas"),
        ("shear{", "'shear{' lacks a closing }"),
        ("shear]", "'shear]' has a ']' that closes nothing"),
        ('shear{plan="a}', "'shear{plan=\"a}' lacks a closing quote"),
        ("shear dump", "'shear dump' is not a pass: write name or name{option=value option=value}"),
    ],
)
def test_a_misspelt_pipeline_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_pipeline(text)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
