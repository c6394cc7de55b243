"""One measurement in a process of its own, so that its peak memory is its own: JSON in, JSON out.

    python tools/bench/measure.py '{"subject": "shear-ir", "shape": {...}}'

``subject``: ``export`` (bare torch.export), ``shear-ir`` or ``torch-pruning``. Every stage is measured in CPU seconds
of the process, which neighbours on a busy machine disturb least, and in seconds on the wall; ``peak`` is the largest
resident set so far in MiB, Python and libraries included. Weights are on the meta device, or on the CPU for
``"device": "cpu"``, where their values are left to chance.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

T = TypeVar("T")

BATCH, LENGTH = 3, 11
RATIO = 0.2


class Clock:
    """Collects what each stage took."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}

    def run(self, stage: str, work: Callable[[], T]) -> T:
        """Do ``work`` and keep its seconds and the peak after it."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        if stage in ("export", "trace"):
            gc.collect()  # what an export leaves behind is collected at its own cost, not at that of a later stage
        self.stages[stage] = {
            "cpu": time.process_time() - cpu,
            "wall": time.perf_counter() - wall,
            "peak": peak(),
        }
        return result


def peak() -> float:
    """The largest resident set of this process so far, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def llama(shape: dict[str, int], device: str) -> nn.Module:
    """A Llama of the given sizes, in bfloat16 without drawing weights."""
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocab"],
        use_cache=False,
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return (model if device == "meta" else model.to_empty(device=device)).eval()


def tokens(device: str) -> Tensor:
    """Token ids, shape ``(BATCH, LENGTH)``."""
    return torch.zeros(BATCH, LENGTH, dtype=torch.long, device=device)


class Logits(nn.Module):
    """What torch.export needs to take a model of transformers: tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.model(input_ids=input_ids).logits
        return logits


def bare_export(clock: Clock, model: nn.Module, device: str) -> dict[str, Any]:
    """torch.export alone."""
    wrapped = Logits(model)
    exported = clock.run("export", lambda: torch.export.export(wrapped, (tokens(device),), strict=False))
    return {"nodes": len(exported.graph.nodes)}


def shear_ir(clock: Clock, model: nn.Module, device: str) -> dict[str, Any]:
    """Each stage from the model to cut tensors; the plan is made from shapes, so that no criterion is timed."""
    import shear_ir as sir
    from shear_backends.graph.module import named_tensors
    from shear_ir.verifier import verify_program
    from shear_passes.analysis.infer_axes import InferAxes
    from shear_passes.rewrite.shear import cut_tensors, shear_program

    feed = {"input_ids": tokens(device)}
    program = clock.run("trace", lambda: sir.trace(model, feed))
    manager = sir.analyses(program)
    clock.run("axes", lambda: manager.get(InferAxes()))
    groups = clock.run("groups", lambda: sir.groups(program))
    plan = clock.run("plan", lambda: sir.plan(program, ratio=RATIO, importance="order"))
    small = clock.run("rewrite", lambda: shear_program(groups, plan))
    clock.run("check", lambda: verify_program(small, blame="shear"))
    clock.run("cut", lambda: cut_tensors(named_tensors(model), plan.kept))
    return {"nodes": len(program.nodes), "groups": len(groups), "removed": plan.ratio}


def torch_pruning(clock: Clock, model: nn.Module, device: str) -> dict[str, Any]:
    """Model to groups, then one step of its pruner on heads and MLP channels, told which modules hold heads."""
    import torch_pruning as tp

    feed = {"input_ids": tokens(device)}
    config: Any = model.config
    linear = [nn.Linear, nn.Embedding]
    graph = clock.run("trace", lambda: tp.DependencyGraph().build_dependency(model, example_inputs=feed))
    groups = clock.run("groups", lambda: list(graph.get_all_groups(root_module_types=linear)))
    heads = {}
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            heads[module] = config.num_attention_heads
        elif name.endswith(("k_proj", "v_proj")):
            heads[module] = config.num_key_value_heads
    before = sum(p.numel() for p in model.parameters())
    pruner = clock.run(
        "plan",
        lambda: tp.pruner.BasePruner(
            model,
            feed,
            importance=tp.importance.RandomImportance(),
            pruning_ratio=RATIO,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=0.25,
            ignored_layers=[model.get_submodule("lm_head"), model.get_submodule("model.embed_tokens")],
        ),
    )
    clock.run("step", pruner.step)
    after = sum(p.numel() for p in model.parameters())
    runs = True
    try:
        model(**feed)
    except RuntimeError:
        runs = False
    return {"groups": len(groups), "removed": 1 - after / before, "runs": runs}


SUBJECTS: dict[str, Callable[[Clock, nn.Module, str], dict[str, Any]]] = {
    "export": bare_export,
    "shear-ir": shear_ir,
    "torch-pruning": torch_pruning,
}


def main() -> None:
    """Read the request from the command line, print the answer."""
    request = json.loads(sys.argv[1])
    device = request.get("device", "meta")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    imported = peak()
    model = llama(request["shape"], device)
    clock = Clock()
    built = peak()
    facts = SUBJECTS[request["subject"]](clock, model, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"stages": clock.stages, "imported": imported, "built": built, "parameters": parameters, **facts}))


if __name__ == "__main__":
    main()
