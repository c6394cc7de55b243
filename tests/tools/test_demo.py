"""The demo: its first half as it runs, and what it says where the second is not at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import demo
from fetch_models import FetchError


def test_megabytes_count_tied_weights_once() -> None:
    model = nn.ModuleDict({"one": nn.Linear(1000, 500, bias=False), "other": nn.Linear(1000, 500, bias=False)})
    assert demo.megabytes(model) == 4.0
    model["other"].weight = model["one"].weight
    assert demo.megabytes(model) == 2.0
    assert demo.megabytes(model.to(torch.bfloat16)) == 1.0


@pytest.mark.slow
def test_without_the_real_model_the_first_half_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Path:
        raise FetchError(f"no network for {name}")

    monkeypatch.setattr(demo, "fetch", missing)
    monkeypatch.setattr(demo, "draw", lambda program, groups, path, plan: path)  # dot may not be installed
    monkeypatch.setattr(demo, "ROWS", 2)
    demo.main(tmp_path / "out", small=False, as_json=False)
    said = capsys.readouterr().out
    assert "SmolLM2 is left out: no network for smollm2" in said
    found = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert list(found) == ["small", "seconds"]
    assert found["small"]["parameters"] == {"dense": 3885504, "pruned": 3107904}
    assert found["small"]["megabytes"] == {"dense": 15.542016, "pruned": 12.431616}
    assert found["small"]["stock"] is True
    assert list(found["small"]["perplexity"]) == ["code", "docs", "topics"]
    for losses in found["small"]["perplexity"].values():
        assert losses["dense"] < losses["pruned"]
    assert (tmp_path / "out" / "tiny-llama" / "model.safetensors").is_file()


def test_a_refused_command_leaves_the_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer import Exit

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text("earlier")
    monkeypatch.setattr(demo, "small_model", lambda out: {})
    monkeypatch.setattr(demo, "fetch", lambda name: tmp_path / "nothing")
    monkeypatch.setattr(demo, "make", lambda: tmp_path / "data.yaml")
    with pytest.raises(Exit):
        demo.main(tmp_path / "out", small=False, as_json=False)
    assert (tmp_path / "out" / "demo.json").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
