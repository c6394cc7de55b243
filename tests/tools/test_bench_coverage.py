"""The bench of architectures: its counts and its page from fixed answers, and the road of two types themselves."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import transformers

from bench import coverage, coverage_one, tiny_config
from tests.golden import expect_file, other_versions

SOUND: dict[str, Any] = {
    "built": True, "traced": True, "export_s": 2.0, "trace_s": 2.2, "groups_s": 0.1, "ratio": 1.15, "attention": True,
    "groups": {"ffn": [2, 2], "kv_head": [2, 3], "vocab": [0, 1]}, "sheared": {"ffn": "sound", "heads": "sound"},
    "module": "sound", "graph": "sound", "reloaded": True, "stock": True, "seconds": 9.0, "done": True,
}  # fmt: skip
ANSWERS: list[dict[str, Any]] = [
    {"name": "causal/llama", "class": "LlamaForCausalLM", **SOUND},
    {"name": "causal/shy", "class": "Shy", **SOUND, "sheared": {"ffn": "sound"}, "ratio": 1.05, "stock": False,
     "frozen": {"heads": [["softmax runs over the axis", 2]]}},
    {"name": "masked/wrong", "class": "Wrong", **SOUND, "sheared": {"ffn": "unsound", "heads": "sound"}, "stock": False,
     "each": {"ffn": {"module": "unsound", "module_diff": 0.25}}},
    {"name": "image/conv", "class": "Conv", **SOUND, "attention": False, "sheared": {"ffn": "sound"}, "stock": False},
    {"name": "image/branches", "class": "Branches", "built": True, "seconds": 3.0,
     "failure": {"stage": "trace", "cause": "TraceError: branches on data"}},
    {"name": "image/huge", "seconds": 1.0, "failure": {"stage": "build", "cause": "no size | of it is small"}},
]  # fmt: skip


def test_the_page() -> None:
    expect_file(coverage.markdown(ANSWERS, {"torch": "2.13"}, 9), "coverage.md")


def test_a_share_is_of_those_that_got_so_far() -> None:
    counts = coverage.summary(ANSWERS)
    assert (counts["architectures"], counts["built"], counts["traced"]) == (6, 5, 4)
    assert counts["sheared soundly in ffn and heads"] == 2
    assert counts["unsound"] == ["masked/wrong"]
    assert counts["analysis over export"] == pytest.approx(1.15)


def test_an_architecture_all_of_mixers_needs_heads_alone() -> None:
    mixers = {**SOUND, "groups": {"query_group": [2, 2]}, "sheared": {"heads": "sound"}}
    assert coverage.whole_road(mixers)
    assert not coverage.whole_road({**mixers, "barriers": [["no axis rule", 1]]})
    assert not coverage.whole_road({**mixers, "groups": {"query_group": [2, 2], "ffn": [0, 2]}})
    assert not coverage.whole_road({**mixers, "attention": False})


def test_answers_of_other_versions_are_measured_anew(tmp_path: Any) -> None:
    store = coverage.Store(tmp_path)
    store.put(ANSWERS[0])
    assert store.get("causal/llama") == ANSWERS[0]
    store.versions = {"torch": "1.0"}
    assert store.get("causal/llama") is None


def test_a_tiny_config_keeps_a_layer_of_each_kind() -> None:
    base = transformers.Qwen3NextConfig()
    values = next(tiny_config.proposals(tiny_config.knobs_of(base)))
    small = transformers.Qwen3NextConfig(**tiny_config.arguments(values, {}))
    assert len(small.layer_types) == small.num_hidden_layers == 2
    assert set(small.layer_types) == set(base.layer_types)
    assert small.hidden_size < 64


@pytest.mark.parametrize(
    "name",
    [
        "causal/cohere_compass_text",  # rotary parameters of each kind of layer
        "causal/dbrx",  # a field that the model reads and its config class does not have
        "causal/deepseek_v2",  # as many kv heads as heads
        "causal/dots3_note_text",  # sizes of one layer's own
        "causal/lfm2_moe",  # no types of layers
        "causal/musicgen",  # a row for each codebook
        "causal/reformer",  # the parts of a width
        "causal/xmod",  # a default among choices
        "image/efficientnet",  # a multiplier of all widths
        "seq2seq/vibevoice_asr",  # a window of which only the class's own fits
    ],
)
def test_what_a_class_leaves_open_is_filled_in(name: str) -> None:
    if other_versions():
        pytest.skip("what classes leave open differs from release to release")
    model, refusal = coverage_one.build(name)
    assert refusal == ""
    assert sum(p.numel() for p in model.parameters()) < 3_000_000


def road(name: str) -> dict[str, Any]:
    return list(coverage_one.Road(name).stages())[-1]


def test_bert_goes_the_whole_road() -> None:
    answer = road("masked/bert")
    assert answer["sheared"] == {"ffn": "sound", "heads": "sound"}
    assert coverage.whole_road(answer)
    assert answer["reloaded"]


def test_a_type_that_no_config_builds_says_why() -> None:
    if other_versions():
        pytest.skip("what classes leave open differs from release to release")
    answer = road("causal/gemma4_assistant")
    assert answer["failure"]["stage"] == "build"
    assert "hidden_size" in answer["failure"]["cause"]


class Slow:
    """A process that has sent one stage and works on."""

    def __init__(self) -> None:
        self.exitcode: int | None = None

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        self.exitcode = -9

    def join(self) -> None:
        assert self.exitcode is not None, "waits for a process that nobody ends"


def test_the_limit_holds_after_the_first_stage_too() -> None:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    sending.send({"name": "causal/slow", "built": True, "stage": "trace"})
    job = coverage.Job("causal/slow", Slow(), receiving)
    assert coverage.answer_of(job, limit=60.0) is None
    job.started -= 61.0
    answer = coverage.answer_of(job, limit=60.0)
    assert answer is not None
    assert answer["failure"] == {"stage": "trace", "cause": "not done after 60 s"}
    assert answer["built"]
