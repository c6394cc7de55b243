"""The bench of the analysis: its arithmetic and tables; the measurements themselves take minutes."""

from __future__ import annotations

import pytest
import typer

from bench import analysis
from tests.golden import expect

SHAPE = analysis.MODELS["tiny"]


def answer(**cpu: float) -> dict[str, object]:
    """What tools/bench/measure.py would print."""
    stages = {stage: {"cpu": seconds, "wall": 2 * seconds, "peak": 400.0} for stage, seconds in cpu.items()}
    facts = {"parameters": 220480, "nodes": 209, "removed": 0.2, "runs": True}
    return {"stages": stages, "imported": 335.0, "built": 340.0, **facts}


def ours(**cpu: float) -> analysis.Row:
    """A row of shear-ir with the given seconds; stages not given take 0.1 s."""
    stages = {**dict.fromkeys(analysis.STAGES, 0.1), **cpu}
    return analysis.combine("tiny", "shear-ir", SHAPE, [answer(**stages)])


def test_the_median_of_the_repeats_counts() -> None:
    row = analysis.combine("tiny", "export", SHAPE, [answer(export=3.0), answer(export=1.0), answer(export=2.0)])
    assert (row.cpu["export"], row.wall["export"]) == (2.0, 4.0)


def test_one_failure_fails_the_row() -> None:
    row = analysis.combine("tiny", "export", SHAPE, [answer(export=3.0), "not done after 5 s"])
    assert row.failure == "not done after 5 s"
    assert not row.cpu


def test_a_model_is_compared_with_its_bare_export() -> None:
    bare = analysis.combine("tiny", "export", SHAPE, [answer(export=2.0)])
    cells = analysis.road_table([bare, ours(trace=2.2)])
    expect(
        analysis.markdown("Models", cells),
        """
        **Models**

        | model | parameters | nodes | torch.export | trace | axes | groups | plan | rewrite | check | cut | trace / export | rest / export | peak MiB |
        |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
        | tiny | 0.22 M | 209 | 2.00 | 2.20 | 0.100 | 0.100 | 0.100 | 0.100 | 0.100 | 0.100 | 1.10 | 0.30 | 400 (+65) |
        """,
    )


def test_a_rival_that_does_not_finish_is_shown_so() -> None:
    theirs = analysis.combine("tiny", "torch-pruning", SHAPE, ["not done after 240 s"])
    cells = analysis.rival_table([ours(), theirs])
    assert cells[1] == ["tiny", "0.30", "not done after 240 s", "", "0.30", "", "", "20.0%", ""]


def test_an_unknown_size_is_refused_before_anything_runs() -> None:
    with pytest.raises(typer.Exit) as refused:
        analysis.main(sizes="llama-9t")
    assert refused.value.exit_code == 2
