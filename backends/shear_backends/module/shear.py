"""The module backend: the same class hierarchy with smaller layers: whatever knew the model still knows it."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shear_backends.graph.module import named_tensors
from shear_backends.module import attributes
from shear_backends.module.attributes import Overrides, apply_attributes
from shear_backends.module.config_inference import infer_config
from shear_backends.module.fits import Fit, find_fits, install_fits, needed, watch_fits
from shear_backends.module.gathers import Gather, find_gathers, install
from shear_backends.module.judge import Judge
from shear_backends.module.layers import drop_layers, moved, plain, stays
from shear_backends.module.rms_norms import RmsNorms, rms_norms_of
from shear_backends.verify.numbers import evaluation, run
from shear_backends.verify.structure import Structure
from shear_ir.axes import Axis, Mask
from shear_ir.errors import PlanError, ShearingError
from shear_ir.frontend.inputs import Inputs, as_inputs, example_inputs
from shear_ir.frontend.kept import forget_kept
from shear_ir.frontend.quantised import quantised_module
from shear_ir.frontend.unchanged import copied, unchanged
from shear_ir.nodes import module_path
from shear_ir.plans import Plan
from shear_passes.analysis.find_groups import Groups
from shear_passes.rewrite.cuts import checked
from shear_passes.rewrite.rescale_gains import gained
from shear_passes.rewrite.rescale_norm import NormFix
from shear_passes.rewrite.shear import cut_tensor

RECORD = "shear_record"

_LIKELY = 8


@dataclass(frozen=True, eq=False)
class Record:
    """How a sheared model came about, kept on it as ``shear_record``: enough to build it again from its dense class.

    ``plan``: all cuts so far as one. ``config``: the dense model's config. ``attributes``, ``norms``, ``gathers``,
    ``fits``: what differs from the dense modules beside the tensors. ``stock``: whether the model's own config builds
    it. ``proof``: what structure said when it was made, of modules that were in ``state``. ``skeleton``: the dense
    model without the numbers of its weights, for classes that no config builds. ``rms_norms``: layer norms of the dense
    class that had become RMS norms before the first cut.
    """

    plan: Plan
    config: dict[str, Any] | None
    stock: bool
    attributes: Overrides = field(default_factory=dict)
    norms: tuple[NormFix, ...] = ()
    gathers: tuple[Gather, ...] = ()
    fits: tuple[Fit, ...] = ()
    proof: Structure | None = None
    state: int = 0
    skeleton: nn.Module | None = None
    rms_norms: RmsNorms | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        """Itself: nothing of it changes."""
        return self


def of_transformers(model: nn.Module) -> bool:
    """Whether the class of ``model`` can be found again by its name and built from its config."""
    return _config_of(model) is not None and type(model).__module__.startswith("transformers.")


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and saved buffers are on the meta device."""
    state = {id(t) for t in model.state_dict(keep_vars=True).values()}
    empty = {id(t): t.detach().to("meta") for t in named_tensors(model).values() if id(t) in state}
    kept = {id(p): nn.Parameter(empty[id(p)], p.requires_grad) for p in model.parameters() if id(p) in empty}
    skeleton = copied(model, {**empty, **kept})
    vars(skeleton).pop(RECORD, None)
    return skeleton


def shear_module(model: nn.Module, groups: Groups, plan: Plan, inputs: Any = None) -> nn.Module:
    """A new model of the same class with the plan applied; ``model`` is not changed and shares no tensor with it.

    Raises ``PlanError`` for a plan of another model and ``ShearingError`` when no setting of the modules' attributes
    computes the sheared graph's function.
    """
    recipe = find_changes(model, groups, plan, inputs)
    small = build(model, with_copies(model, cut_by_id(model, plan, recipe.norms)), recipe)
    require_apart(small, model, example_inputs(model) if inputs is None else as_inputs(model, inputs))
    return recorded(small, model, plan, recipe)


def require_apart(small: nn.Module, model: nn.Module, feed: Inputs) -> None:
    """Raise ``ShearingError`` where ``small`` reads a tensor of ``model``, as by a hook that holds on to it."""
    places = {t.untyped_storage().data_ptr(): name for name, t in named_tensors(model).items() if not t.is_meta}
    places.pop(0, None)
    if not places or any(t.is_meta for t in named_tensors(small).values()):
        return

    class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in pytree.tree_leaves((args, kwargs)):
                ordinary = type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided
                name = places.get(leaf.untyped_storage().data_ptr()) if ordinary else None
                if name is not None:
                    raise ShearingError(
                        f"a copy of {type(model).__name__} reads {name} of the original, as a hook or a function does "
                        "that holds on to it: let it find what it reads in its module"
                    )
            return func(*args, **(kwargs or {}))

    with unchanged(small), evaluation(small), torch.no_grad(), Watched():  # type: ignore[no-untyped-call]  # as above
        run(small, feed)


@dataclass(frozen=True)
class ModuleChanges:
    """What has to change in a copy of the dense modules beside its tensors; with a ``config``, the class's own."""

    config: Any = None
    attributes: Overrides = field(default_factory=dict)
    norms: tuple[NormFix, ...] = ()
    gathers: tuple[Gather, ...] = ()
    fits: tuple[Fit, ...] = ()
    proof: Structure | None = None


def find_changes(model: nn.Module, groups: Groups, plan: Plan, inputs: Any = None) -> ModuleChanges:
    """The first recipe whose result computes the sheared graph's function; raises as ``shear_module`` does."""
    require_exact(model)
    cut = checked(groups, plan)
    masks, norms = cut.masks, cut.norms
    feed = example_inputs(model) if inputs is None else as_inputs(model, inputs)
    judge = Judge(model, groups, plan, feed, rescaled=any(fix.factor != 1 for fix in norms))
    _require_eps(model, groups, norms)
    cuts = cut_by_id(model, plan, norms)
    fits = find_fits(groups, masks)

    def agrees(recipe: ModuleChanges, small: nn.Module | None = None) -> bool:
        small = build(model, cuts, recipe) if small is None else small
        with unchanged(model):  # a hook of the copy may hold on to the model, and the next copy would have what it left
            return judge.agrees(small, lambda dense: build(dense, cut_by_id(dense, plan, norms), recipe))

    for tried, recipe in enumerate(_recipes(model, groups, masks, plan, norms, feed)):
        if agrees(recipe):
            found = recipe if recipe.config is not None else _smallest(model, recipe, agrees)
            return replace(found, proof=judge.accepted)
        # A size left open may be another one without a failure; the likeliest attributes are enough to see that.
        if (judge.failed or tried < _LIKELY) and recipe.config is None and fits:
            fitting = replace(recipe, fits=fits)
            fitted = watch_fits(build(model, cuts, fitting))
            if agrees(fitting, fitted):
                found = _smallest(model, replace(recipe, fits=needed(fitted, fits)), agrees)
                return replace(found, proof=judge.accepted)
    judge.require_trace()
    raise ShearingError(
        f"no setting of {type(model).__name__}'s module attributes computes the sheared function, without "
        f"{_gone(plan)}{judge.why}: use the graph backend, other kinds or sizes (round_to), or leave modules out (skip)"
    )


def _smallest(model: nn.Module, recipe: ModuleChanges, agrees: Callable[[ModuleChanges], bool]) -> ModuleChanges:
    """``recipe`` without the attributes that it need not change, which only had the value of a size."""
    for paths, name in attributes.optional(model, recipe.attributes):
        less = replace(recipe, attributes=attributes.without(recipe.attributes, paths, name))
        if agrees(less):
            recipe = less
    return recipe


def _gone(plan: Plan) -> str:
    """What the plan cuts, in words; of each kind one group."""
    first = {cut.kind: cut for cut in reversed(plan.cuts)}
    return ", ".join(f"{len(cut.removed)} of {cut.size} {kind} units of {cut.group}" for kind, cut in first.items())


def _recipes(
    model: nn.Module,
    groups: Groups,
    masks: Mapping[Axis, Mask],
    plan: Plan,
    norms: tuple[NormFix, ...],
    feed: Inputs,
) -> Iterator[ModuleChanges]:
    """Ways to build the sheared model, the stock one first."""
    found = infer_config(model, groups, masks, plan.kept, norms)
    if found.config is not None:
        for config in itertools.chain([found.config], found.others()):
            yield ModuleChanges(config, _attributes_by_config(model, config), norms)
    gathers = tuple(find_gathers(model, groups, masks, feed))
    for overrides in attributes.candidates(model, groups, masks, feed):
        yield ModuleChanges(None, overrides, norms, gathers)


def cut_by_id(model: nn.Module, plan: Plan, norms: tuple[NormFix, ...] = ()) -> dict[int, Tensor]:
    """What each tensor of ``model`` becomes, by the tensor's id; one that loses nothing becomes itself."""
    fixes = {fix.parameter: fix for fix in norms}
    found: dict[int, Tensor] = {}
    tensors = named_tensors(model)
    scaled = gained(tensors, plan.kept, plan.gains)
    for name, tensor in tensors.items():
        if id(tensor) in found:
            continue
        cut = cut_tensor(scaled[name], plan.kept.get(name, {}))
        if name in fixes:
            cut = rescaled(cut, fixes[name])
        if cut is not tensor and isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
        found[id(tensor)] = cut
    return found


def with_copies(model: nn.Module, cuts: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """``cuts`` with copies of the tensors that lose nothing, so that training one model leaves the other alone."""
    own = {id(t): t for t in named_tensors(model).values()}
    return {key: copy.deepcopy(cut) if cut is own[key] else cut for key, cut in cuts.items()}


def build(model: nn.Module, cuts: Mapping[int, Tensor], recipe: ModuleChanges, gone: Sequence[str] = ()) -> nn.Module:
    """A copy of ``model`` over the tensors of ``cuts``, without the layers ``gone``, with what ``recipe`` sets."""
    small = copied(model, cuts)
    forget_kept(small)
    if gone:
        drop_layers(small, gone, model)
    if recipe.config is not None:
        _adopt(small.config, copy.deepcopy(recipe.config))
    apply_attributes(small, recipe.attributes)
    for fix in recipe.norms:
        _set_eps(small.get_submodule(fix.module), fix)
    install(small, list(recipe.gathers))
    install_fits(small, recipe.fits)
    return small


def rescaled(weight: Tensor, fix: NormFix) -> Tensor:
    """The weight of a norm that lost channels, scaled so that it computes what it did over the others."""
    scale: float = fix.factor**fix.power
    with torch.no_grad():
        return ((weight.double() + fix.offset) * scale - fix.offset).to(weight.dtype)


def _require_eps(model: nn.Module, groups: Groups, norms: Sequence[NormFix]) -> None:
    """Raise ``ShearingError`` for a norm whose eps is no attribute that could follow, however little that changes."""
    means = Counter(module_path(made.node) for made in groups.axes.contractions if made.mean)
    cut = Counter(fix.module for fix in norms)
    for fix in norms:
        if fix.eps and fix.factor != 1 and cut[fix.module] < means[fix.module]:
            raise ShearingError(
                f"of the means in {fix.module or 'the root'}, only some become narrower, and they may share the eps "
                f"{fix.eps:g}: use the graph backend"
            )
        module = model.get_submodule(fix.module)
        unset = isinstance(module, nn.RMSNorm) and module.eps is None
        if fix.eps and fix.factor != 1 and not unset and fix.eps not in _floats(module).values():
            raise ShearingError(
                f"the eps of the norm at {fix.module or 'the root'}, {fix.eps:g}, stands in its code and cannot follow "
                "a narrower axis: use the graph backend"
            )


def _floats(module: nn.Module) -> dict[str, float]:
    return {name: value for name, value in vars(module).items() if isinstance(value, float)}


def _set_eps(module: nn.Module, fix: NormFix) -> None:
    if isinstance(module, nn.RMSNorm) and module.eps is None and fix.eps is not None:
        module.eps = fix.eps  # that of its precision, which is scaled like any other
    for name, value in _floats(module).items():
        if value == fix.eps:
            setattr(module, name, value * fix.factor)


def _attributes_by_config(model: nn.Module, config: Any) -> Overrides:
    """The integer attributes in which modules built from ``config`` differ from those of the dense config.

    Only integers: a float such as attention's scale belongs to the function that was trained and must not change.
    """
    with torch.device("meta"):
        dense, fresh = type(model)(copy.deepcopy(model.config)), type(model)(copy.deepcopy(config))
    before = dict(dense.named_modules())
    found: Overrides = {}
    for path, module in fresh.named_modules():
        old = vars(before[path]) if path in before else {}
        for name, value in vars(module).items():
            sized = isinstance(value, (int, tuple, list)) and not isinstance(value, bool) and not name.startswith("_")
            if sized and isinstance(old.get(name), type(value)) and value != old[name]:
                found.setdefault(path, {})[name] = value
    return found


def _adopt(config: Any, other: Any) -> None:
    """Give ``config`` the values of ``other``, its sub-configs too: modules hold on to the objects they were given."""
    for name, value in vars(other).items():
        mine = vars(config).get(name)
        if hasattr(value, "to_dict") and type(mine) is type(value):
            _adopt(mine, value)
        else:
            vars(config)[name] = value


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def recorded(small: nn.Module, model: nn.Module, plan: Plan, recipe: ModuleChanges) -> nn.Module:
    """``small`` with its record attached, joined with that of earlier cuts."""
    stock = recipe.config is not None
    found_again = RECORD in vars(model) or of_transformers(model) or hasattr(model, "peft_config")
    skeleton = None if found_again else skeleton_of(model)
    record = Record(
        plan, _config_of(model), stock, recipe.attributes, recipe.norms, recipe.gathers, recipe.fits, recipe.proof,
        state_of(small), skeleton, rms_norms_of(model),
    )  # fmt: skip
    # Not getattr: a PEFT model answers with what its base has.
    first: Record | None = vars(model).get(RECORD)
    if first is not None:
        first = _behind(first, plan.gone)
        merged = {path: dict(values) for path, values in first.attributes.items()}
        for path, values in record.attributes.items():
            merged.setdefault(path, {}).update(values)
        record = replace(
            record,
            plan=first.plan.then(plan),
            config=first.config,
            skeleton=first.skeleton,
            stock=first.stock and record.stock,
            attributes=merged,
            norms=(*first.norms, *record.norms),
            gathers=(*first.gathers, *record.gathers),
            fits=(*first.fits, *record.fits),
        )
    object.__setattr__(small, RECORD, record)
    return small


def state_of(model: nn.Module) -> int:
    """A number that is another one when a module of ``model`` is of another class or holds other plain attributes."""
    return hash(tuple((path, *map(repr, plain(module))) for path, module in model.named_modules()))


def _behind(record: Record, gone: Sequence[str]) -> Record:
    """``record`` with the paths that modules have when the layers ``gone`` have left."""
    return replace(
        record,
        attributes={moved(path, gone): values for path, values in record.attributes.items() if stays(path, gone)},
        norms=tuple(
            replace(n, module=moved(n.module, gone), parameter=moved(n.parameter, gone))
            for n in record.norms
            if stays(n.module, gone)
        ),
        gathers=tuple(replace(g, module=moved(g.module, gone)) for g in record.gathers if stays(g.module, gone)),
        fits=tuple(replace(f, module=moved(f.module, gone)) for f in record.fits if stays(f.module, gone)),
    )


def require_exact(model: nn.Module) -> None:
    """Raise ``PlanError`` for a quantised model, whose packed weights have no rows and columns to cut."""
    packed = quantised_module(model)
    if packed:
        raise PlanError(f"the model holds quantised parameters ({packed}): shear the unquantised model")
