"""The main job on a real language model, by the command that users type: ``pytest -m real`` (half an hour)."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import real
from fetch_models import tensor_digest

pytestmark = [pytest.mark.real, pytest.mark.slow]
TEXTS = real.ROOT / "tools/assets/tiny-llama/data.yaml"


@pytest.mark.parametrize("how", real.HOW)
@pytest.mark.parametrize("ratio", real.RATIOS)
@pytest.mark.parametrize("dtype", real.DTYPES)
def test_it_is_pruned_proved_saved_as_stock_and_generates(
    dtype: str, ratio: float, how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dense: Path = request.getfixturevalue({"fp32": "smollm2", "bf16": "smollm2_bf16"}[dtype])
    before = tensor_digest(dense / "model.safetensors")
    found = real.run(dense, TEXTS, ratio, how, tmp_path)
    assert found["exit"] == 0, found["error"]
    assert found["verified"]["sound"] is True
    assert found["verified"]["moved"] > 0.0
    assert found["ratio"] == pytest.approx(ratio, abs=0.005)
    assert found["stock"] is True
    assert found["writes"]
    assert tensor_digest(dense / "model.safetensors") == before
