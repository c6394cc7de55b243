"""Repair without training, on modules: what a plan takes from a model is brought back before it is sheared."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shear_backends.graph.module import named_tensors
from shear_backends.module.biases import with_biases as give_biases
from shear_backends.module.rms_norms import RmsNorms, exchange
from shear_backends.module.shear import RECORD
from shear_backends.module.untied import untied
from shear_backends.verify.numbers import difference, evaluation, run
from shear_ir.errors import CostWarning, PlanError
from shear_ir.frontend.base import has_adapters, unwrapped
from shear_ir.frontend.feeds import inputs_of
from shear_ir.frontend.unchanged import copied
from shear_ir.plans import Plan
from shear_ir.program import Program
from shear_passes.analysis.consumers import FindConsumers
from shear_passes.analysis.find_groups import Groups
from shear_passes.importance.base import collect
from shear_passes.importance.calibration import Progress
from shear_passes.importance.scoring import prepared
from shear_passes.importance.statistics import ReadStatistics
from shear_passes.repair import FlapBias, LeastSquares, Repair
from shear_passes.repair.base import losing
from shear_passes.repair.centred_stream import layer_normed, rms_normed
from shear_passes.repair.rotate_heads import rotated_heads
from shear_passes.repair.rotate_residual import principal_basis, rotated_stream, tied_readers, with_plain_norms
from shear_passes.select.choose import DEFAULT_KINDS
from shear_tools.api.pipeline import analyses, groups, planned_program, trace

Rotation = Literal["residual", "heads"]
REPAIRS: Mapping[str, type[Repair]] = {cls.name(): cls for cls in (LeastSquares, FlapBias)}


_AT_ONCE = 1 << 26
"""Bytes of statistics that are kept at once, however small a model is."""


def repair(
    model: nn.Module, plan: Plan, *repairs: Repair | str, data: Iterable[Any], inputs: Any = None,
    progress: Progress | None = None,
) -> nn.Module:  # fmt: skip
    """A copy of ``model`` whose weights are prepared for ``plan``; shear and verify that copy instead of ``model``.

    ``repairs``: what is done, by name or as objects, one after the other; least squares when none is named. ``data``:
    batches of model inputs, of which a pass takes statistics; several passes where those would take more memory than
    half of the model. Shapes stay as they are, and what the plan leaves
    alone stays bit for bit. Raises ``PlanError`` for a plan of another model, adapters that are not merged, and
    repairs that the model has no room for.
    """
    model = unwrapped(model)
    _require_merged(model)
    program = planned_program(model, plan, inputs)
    asked, batches = [named(each) for each in repairs] or [LeastSquares()], list(data)
    consumers = analyses(program).get(FindConsumers())
    limit = max(_AT_ONCE, sum(p.numel() * p.element_size() for p in model.parameters()) // 2)
    changed: dict[str, Tensor] = {}
    for part in losing(groups(program), plan, consumers, limit):
        changed |= Repairs(model, program, asked, batches, progress, part).changed(plan)
    # All that was read is gone before a copy of the model is there.
    return _with(model, changed)


class Repairs:
    """Repairs of one model for any number of plans, by one pass over ``data``; of readers of ``only``, where given."""

    def __init__(
        self, model: nn.Module, program: Program, repairs: Sequence[Repair], data: Iterable[Any],
        progress: Progress | None = None, only: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.model, self.repairs, self.groups, self.only = model, repairs, groups(program), only
        self.manager = prepared(analyses(program), [], weights=None, model=model, data=data, progress=progress)
        collect([each.statistics(self.only) for each in repairs], self.manager)

    def __call__(self, plan: Plan) -> nn.Module:
        """A copy of the model, repaired for ``plan``."""
        return _with(self.model, self.changed(plan))

    def changed(self, plan: Plan) -> dict[str, Tensor]:
        """The tensors that a repair for ``plan`` changes."""
        weights, changed = _weights(self.model, self.groups), dict[str, Tensor]()
        consumers = self.manager.get(FindConsumers())
        for each in self.repairs:
            statistics = self.manager.get(each.statistics(self.only))
            changed |= each.repaired({**weights, **changed}, self.groups, plan, consumers, statistics)
        return changed


def with_biases(model: nn.Module, inputs: Any = None) -> nn.Module:
    """A copy of ``model`` in which all that reads a prunable group has a bias, zero where it is new.

    The same function in another architecture, which its config class has to have a switch for (Llama: attention_bias,
    mlp_bias). Make the plan for that copy. Raises ``PlanError`` where there is no such switch.
    """
    model = unwrapped(model)
    _require_merged(model)
    found = groups(trace(model, inputs))
    consumers = analyses(found.program).get(FindConsumers())
    reading = {c.parameter for g in found.prunable if g.kind in DEFAULT_KINDS for c in consumers.of(g)}
    return _checked(model, give_biases(model, reading), inputs)


def with_rms_norms(model: nn.Module, inputs: Any = None) -> nn.Module:
    """A copy of ``model`` whose residual stream is centred, and is read through RMS norms instead of layer norms.

    The same function (SliceGPT, section 3.2): what writes to the stream loses its mean over the channels, what reads it
    carries scale and shift of the norm. Embeddings that are tied to the head are untied, and a head without a bias may
    get one, both warned of with their cost. Stock classes do not build such norms; ``save`` keeps them in its record. A
    model without layer norms over its stream is returned as it is. Raises ``PlanError`` where something else than
    layer norms reads the stream, as after post-norm blocks, or what is written to it is not linear in parameters.
    """
    model = unwrapped(model)
    _require_merged(model)
    if any(p.is_meta for p in model.parameters()):
        raise PlanError(f"{type(model).__name__} has only its shapes, no weights: there are no norms to fold into them")
    if _halves(model):
        single = copied(model).float()
        exact = with_rms_norms(single, inputs)
        return model if exact is single else _rounded(exact, model)
    found = groups(trace(model, inputs))
    stream = layer_normed(found)
    if stream is None:
        return model
    if RECORD in vars(model):
        raise PlanError(f"this {type(model).__name__} has been sheared: give its layer norms up before it is cut")
    tied = stream.tied(found.program.params)
    if tied:
        model = _untied(model, tied, "since it alone reads a norm, whose scale moves into it")
        found = groups(trace(model, inputs))
        stream = layer_normed(found)
        assert stream is not None
    changed, biases = rms_normed(_weights(model, found), stream)
    made = _with(model, changed)
    norms = {norm.module: norm.eps for norm in stream.norms.values()}
    exchange(made, RmsNorms(norms, tuple(biases)), biases)
    if biases:
        more = sum(bias.numel() for bias in biases.values())
        warnings.warn(
            f"{', '.join(biases)} gets a bias, since the shift of the norm that it reads moves there: "
            f"{more:,} parameters more",
            CostWarning,
            stacklevel=2,
        )
    return _checked(model, made, inputs)


def rotate(
    model: nn.Module, what: Rotation, *, data: Iterable[Any] | None = None, inputs: Any = None,
    progress: Progress | None = None,
) -> nn.Module:  # fmt: skip
    """A copy of ``model`` in another basis: the same function, in which the first units of a kind matter most.

    ``residual``: the stream in its principal directions over ``data`` (SliceGPT, with one basis for all blocks;
    layer norms become RMS norms first, see ``with_rms_norms``; embeddings that are tied to the head are untied, which
    costs a second table and is warned of); then cut ``kinds=("residual",), importance="order"``. ``heads``: the values
    of each head by singular values of what they write (Olica), which needs no data; then cut ``kinds=("head_dim",),
    importance="order"``. Stock classes load what comes of the first, but where layer norms were exchanged. Raises
    ``PlanError`` where the model does not allow it.
    """
    model = unwrapped(model)
    _require_merged(model)
    if any(p.is_meta for p in model.parameters()):
        raise PlanError(f"{type(model).__name__} has only its shapes, no weights: there is nothing to rotate")
    if _halves(model):  # turned and compared in fp32, and rounded once, at the end
        single = rotate(copied(model).float(), what, data=data, inputs=inputs, progress=progress)
        return _rounded(single, model)
    if what == "heads":
        found = groups(trace(model, inputs))
        consumers = analyses(found.program).get(FindConsumers())
        return _checked(model, _with(model, rotated_heads(_weights(model, found), found, consumers)), inputs)
    if what != "residual":
        raise PlanError(f"there is no rotation '{what}'; there are residual and heads")
    if data is None:
        raise PlanError("the principal directions of the stream are those of data: pass data=batches (--data FILE)")
    own = _ready(model, inputs)
    found = groups(trace(own, inputs))
    plain = with_plain_norms(_weights(own, found), found, analyses(found.program).get(FindConsumers()))
    folded = _with(own, plain)
    found = groups(trace(folded, inputs))
    manager = prepared(
        analyses(found.program), [], weights=None, model=folded, data=data, progress=progress
    )  # fmt: skip
    consumers, statistics = manager.get(FindConsumers()), manager.get(ReadStatistics(gram=True))
    turned = rotated_stream(_weights(folded, found), found, principal_basis(found, consumers, statistics))
    return _checked(model, _with(folded, turned), inputs)


def _ready(model: nn.Module, inputs: Any) -> nn.Module:
    """``model``, or a copy whose stream is read through RMS norms alone, by tensors that nothing else is tied to."""
    found = groups(trace(model, inputs))
    if not any(g.kind == "residual" and (g.prunable or g.rescalable) for g in found):
        changed = with_rms_norms(model, inputs)
        if changed is not model:
            return changed
    tied = tied_readers(found, analyses(found.program).get(FindConsumers()))
    if not tied:
        return model
    return _untied(model, tied, "since it alone reads a norm, whose scale moves into it")


def _untied(model: nn.Module, tied: Sequence[str], why: str) -> nn.Module:
    """A copy of ``model`` with tensors of their own for ``tied``; the cost is warned of."""
    made, added = untied(model, tied)
    share = 100 * added / sum(p.numel() for p in model.parameters())
    warnings.warn(
        f"{', '.join(tied)} is untied, {why}: the changed {type(model).__name__} has {added:,} parameters more "
        f"({share:.1f} %)",
        CostWarning,
        stacklevel=3,
    )
    return made


def _halves(model: nn.Module) -> dict[str, torch.dtype]:
    """The tensors of ``model`` in half precision."""
    return {n: t.dtype for n, t in named_tensors(model).items() if t.dtype in (torch.bfloat16, torch.float16)}


def _rounded(made: nn.Module, model: nn.Module) -> nn.Module:
    """``made``, which is in fp32, with the dtypes that ``model`` has; what is new in it is in half precision."""
    types, own = _halves(model), named_tensors(model)
    other = next(iter(types.values()))
    for name, tensor in named_tensors(made).items():
        if name in types or name not in own:
            tensor.data = tensor.data.to(types.get(name, other))
    return made


def _require_merged(model: nn.Module) -> None:
    if has_adapters(model):
        raise PlanError("base weights would change, which the adapters were trained on: merge them first (merge=True)")


def _weights(model: nn.Module, found: Groups) -> dict[str, Tensor]:
    own = named_tensors(model)
    return {name: own[name] for name in found.program.params if name in own}


def _checked(model: nn.Module, rotated: nn.Module, inputs: Any) -> nn.Module:
    """``rotated``, which has to compute what ``model`` does; raises ``PlanError`` where it does not."""
    feed = inputs_of(model, inputs)
    with evaluation(model), evaluation(rotated), torch.no_grad():
        expected = run(model, feed)
        gap = difference(expected, run(rotated, feed))
    scale = max([1.0, *(float(t.abs().max()) for t in expected if t.numel())])
    if not gap <= 1e-4 * scale:
        raise PlanError(
            f"{type(model).__name__} cannot be rotated: something between its products does not allow another basis "
            f"(outputs would differ by {gap:.3g})"
        )
    return rotated


def named(wanted: Repair | str) -> Repair:
    """A repair by its name; raises ``PlanError`` where there is none."""
    if isinstance(wanted, Repair):
        return wanted
    if wanted not in REPAIRS:
        raise PlanError(f"there is no repair '{wanted}'; there are {', '.join(REPAIRS)}")
    return REPAIRS[wanted]()


def _with(model: nn.Module, changed: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` with the ``changed`` tensors in the place of its own."""
    own = named_tensors(model)
    new = {id(own[n]): nn.Parameter(t, requires_grad=own[n].requires_grad) for n, t in changed.items()}
    return copied(model, new)
