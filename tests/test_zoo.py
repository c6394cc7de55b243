"""The zoo keeps what it promises: models that build, run, and have no zero in them."""

from __future__ import annotations

import pytest
import torch

from shear_ir.frontend.export import output_tensors
from shear_ir.frontend.inputs import example_inputs
from tests.traces import _structure
from tests.zoo import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_the_zoo_runs_and_has_no_zero(name: str) -> None:
    model = FAMILIES[name]()
    saved = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    assert [n for n, t in saved.items() if not t.all()] == []
    assert [n for n, t in FAMILIES[name]().state_dict().items() if n in saved and not torch.equal(t, saved[n])] == []
    inputs = example_inputs(model)
    with torch.no_grad():
        (logits,) = output_tensors(model(**inputs))
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    assert sum(p.numel() for p in model.parameters()) < 70_000


def test_two_ways_to_run_experts_do_not_share_a_trace() -> None:
    """They differ by a private setting of the config alone, which its repr leaves out."""
    assert _structure(FAMILIES["mixtral"]()) != _structure(FAMILIES["mixtral_batched"]())
    assert _structure(FAMILIES["mixtral"]()) == _structure(FAMILIES["mixtral"]())
