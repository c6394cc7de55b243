"""The bench of the real model: what it measures of a process, and its table; the runs themselves take half an hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import real


def found(**changed: Any) -> dict[str, Any]:
    """What one cell would have measured."""
    checked = {"gap": 2.71e-12, "noise": 0.00124, "bound": 2.3e-9, "judge": "numbers", "sound": True}
    return {"exit": 0, "seconds": 213.6, "peak": 2_000_000_000, "checkpoint": 500_000_000, "verified": checked,
            "stock": True, "writes": "' whales'", "error": ""} | changed  # fmt: skip


def test_memory_is_told_in_checkpoints_above_the_imports() -> None:
    assert real.line(("fp32", 0.2, "flap"), found(), 400_000_000) == (
        "| fp32 | 0.2 | flap | 0 | yes | yes | numbers | 2.7e-12 | 0.0012 | 2.3e-09 | 3.2 | 214 |"
    )


def test_what_is_refused_is_told_below_the_table() -> None:
    refused = found(exit=2, verified=None, stock=None, writes=None, error="loading\nerror: it differs")
    text = real.markdown(
        {("fp32", 0.2, "flap"): found(), ("bf16", 0.3, "magnitude"): refused},
        {"flap": 500_000_000, "magnitude": 400_000_000},
    )
    assert "(flap: 500 MB, magnitude: 400 MB)" in text
    assert "| bf16 | 0.3 | magnitude | 2 | no | no | – | – | – | – | 3.2 | 214 |" in text
    assert "\n- bf16 0.3 magnitude: error: it differs\n" in text


def test_a_process_is_measured_to_its_end(tmp_path: Path) -> None:
    code = "import sys; held = bytearray(300_000_000); print('said'); print('told', file=sys.stderr); sys.exit(3)"
    done = real.measured(["-c", code], tmp_path / "one.log")
    assert (done["exit"], done["said"]) == (3, "said\n")
    assert (tmp_path / "one.log").read_text() == "told\n"
    assert done["peak"] > 300_000_000
    assert 0.0 < done["seconds"] < 60.0
