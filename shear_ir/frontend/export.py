"""torch.export to Program: the only room that imports torch.export."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, is_concrete_int
from torch.utils import _pytree as pytree

from shear_ir.errors import TraceError
from shear_ir.frontend.feeds import call, inputs_of, kept, tensors_in, uncached
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.kept import forget_kept
from shear_ir.frontend.opaque import Opaque
from shear_ir.frontend.regions import GraphCopier
from shear_ir.frontend.unchanged import unchanged
from shear_ir.frontend.ways import mode_readers, other_ways
from shear_ir.nodes import module_path
from shear_ir.program import ModuleInfo, Param, Program, TensorKind

_ROOT = "root"
_LARGEST_OPAQUE = 0.5  # of the parameters: beyond it, a model that was traced would not be one that can be pruned
_CALLS = ("_call_impl", "_wrapped_call_impl", "__call__")
_LISTED = ("past_key_values", "hidden_states", "attentions")
_KEPT = ("past_key_values", "mems", "state", "cache_params")
_KINDS: dict[InputKind, TensorKind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}


def trace(model: nn.Module, inputs: Any = None, *, dynamic: bool = False, ways: bool = False) -> Program:
    """Trace ``model`` into a Program; the model is not changed and no weight is kept.

    ``inputs``: forward arguments by name, or a tensor, or a sequence; when None, those that the model was last given,
    or else made from the signature and config. An argument may be any nesting of lists, tuples and dicts of tensors.
    ``dynamic``: keep batch and length symbolic, so that the graph runs at other sizes (about twice the time). ``ways``:
    hold what forward may do otherwise than was traced, in training mode or with arguments that were not given.
    Raises ``TraceError`` naming the module in which tracing failed and what can be done.
    """
    feed = inputs_of(model, inputs)
    with _quiet(model):
        with mode_readers(model) as readers:
            program = _program(model, _export(model, feed, dynamic), feed, dynamic)
        return replace(program, held=other_ways(model, program, feed, readers)) if ways else program


class _Logits(nn.Module):
    """Calls the model with the tensors of a feed and returns its tensors, without caches and output classes."""

    def __init__(self, root: nn.Module, feed: Inputs) -> None:
        super().__init__()
        self.root = root
        leaves, self.structure = pytree.tree_flatten(feed)
        self.others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self.fixed = uncached(root)

    def forward(self, *args: Tensor) -> Any:
        given = iter(args)
        leaves = [next(given) if other is None else other[0] for other in self.others]
        return output_tensors(call(self.root, pytree.tree_unflatten(leaves, self.structure), **self.fixed))


def output_tensors(output: Any) -> tuple[Tensor, ...]:
    """The tensors of a model's output that count: all, but for caches and states and attentions that are listed.

    Beside logits, no state of an encoder either.
    """
    if isinstance(output, Tensor):
        return (output,)
    if dataclasses.is_dataclass(output) and not isinstance(output, dict):
        output = vars(output)
    if isinstance(output, dict):
        logits = isinstance(output.get("logits"), Tensor)
        named = {str(name): value for name, value in output.items()}
        if not logits:
            return _tensors([v for name, v in named.items() if name not in _LISTED])
        return (output["logits"], *_tensors([v for n, v in named.items() if n != "logits" and not _is_beside(n)]))
    return _tensors(list(output)) if isinstance(output, (tuple, list)) else ()


def _tensors(values: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(t for value in values for t in output_tensors(value))


def _is_beside(name: str) -> bool:
    """Whether an output beside logits only shows what they were made from, or is kept for the next call."""
    return name in _KEPT or any(part in name for part in ("hidden_state", "attentions"))


def _export(model: nn.Module, feed: Inputs, dynamic: bool) -> ExportedProgram:
    """By the first way that works: as the model stands, with transformers' patches, with modules not looked into."""
    wrapper, given = _Logits(model, feed), tuple(tensors_in(feed).values())
    shapes = {"args": tuple({d: Dim.AUTO for d in range(min(v.dim(), 2))} for v in given)} if dynamic else None

    def attempt() -> ExportedProgram:
        return _settled(_unbatched(export(wrapper, given, dynamic_shapes=shapes, strict=False)))

    failure: Exception
    for patches in (contextlib.nullcontext, _transformers_patches):
        try:
            with patches():
                return attempt()
        except Exception as raised:  # whatever forward raises under torch.export
            failure = raised
    hidden: tuple[type[nn.Module], ...] = ()
    while (kind := _opaque_class(model, failure, hidden)) is not None:
        hidden = (*hidden, kind)
        opaque = Opaque(model, hidden)
        try:
            with opaque.seen(), torch.no_grad():
                wrapper(*given)
            with _transformers_patches(), opaque.hidden():
                return attempt()
        except Exception as raised:
            failure = raised
    raise _trace_error(model, failure) from failure


def _unbatched(exported: ExportedProgram) -> ExportedProgram:
    """The program with every ``vmap`` worked out: its calls, read as they stand, have one dim less than their values.

    Torch's own way to do that traces the whole program anew, and hands out what was written in place as more outputs.
    """
    if not any(getattr(node.target, "__name__", "") == "_add_batch_dim" for node in exported.graph.nodes):
        return exported
    made: ExportedProgram = exported.run_decompositions({})
    signature = made.graph_signature
    written = (signature.buffers_to_mutate, signature.user_inputs_to_mutate, signature.parameters_to_mutate)
    names = [name for each in written for name in each.values()]
    if names:
        raise TraceError(f"beside a vmap, {names[0].removeprefix(_ROOT + '.')} is written to in place")
    return made


class _UnsettledError(Exception):
    """A tensor's size is read out of another tensor; ``path``: the module that does."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(f"the size of {node.name} is read out of a tensor: {tuple(node.meta['val'].shape)}")
        self.path = module_path(node).removeprefix(_ROOT).lstrip(".")


def _settled(exported: ExportedProgram) -> ExportedProgram:
    """The program, all of whose sizes follow from those of its inputs; raises ``_UnsettledError`` otherwise."""
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and any(free_unbacked_symbols(size) for size in value.shape):
            raise _UnsettledError(node)
    return exported


def _opaque_class(model: nn.Module, failure: Exception, hidden: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    """The class of the innermost module whose forward failed, where enough is left to prune without it.

    Within a layer it may hold most of the parameters, as experts do; a stack of layers may not.
    """
    running = _failing_modules(model, failure)
    if not running or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return None
    path, module = running[-1]
    if isinstance(module, hidden) or any(isinstance(m, hidden) for m in module.modules()):
        return None
    within = any(part.isdigit() for part in path.split(".")[:-1])
    return type(module) if within or Opaque(model, (*hidden, type(module))).share() <= _LARGEST_OPAQUE else None


def _trace_error(model: nn.Module, failure: Exception) -> TraceError:
    text = next((line.strip() for line in str(failure).splitlines() if line.strip()), "").rstrip(".")
    return TraceError(
        f"{type(model).__name__} cannot be traced: {_failing_module(model, failure)}{type(failure).__name__}: {text}. "
        "Pass inputs={name: tensor} that the model accepts, or a model whose forward does not branch on data."
    )


def _failing_module(model: nn.Module, failure: Exception) -> str:
    found = _failing_modules(model, failure)
    return f"in module {found[-1][0]} ({type(found[-1][1]).__name__}), " if found else ""


def _failing_modules(model: nn.Module, failure: Exception) -> list[tuple[str, nn.Module]]:
    """The modules below the root whose forward was running, the innermost last."""
    if isinstance(failure, _UnsettledError):
        return [(failure.path, model.get_submodule(failure.path))] if failure.path else []
    paths = {id(module): path for path, module in model.named_modules()}
    found: list[tuple[str, nn.Module]] = []
    frame = failure.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        running = frame.tb_frame.f_code.co_name not in _CALLS  # forward, or what was put around it
        again = bool(found) and found[-1][1] is owner
        if running and isinstance(owner, nn.Module) and paths.get(id(owner)) and not again:
            found.append((paths[id(owner)], owner))
        frame = frame.tb_next
    return found


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Trace in evaluation mode, without torch's warnings for correct models and its log of what ``TraceError`` says.

    What forward writes to attributes and buffers, which would be tensors of the trace, is put back.
    """
    silent = logging.root.manager.disable
    try:
        # torch prints the graph that it could not finish.
        with unchanged(model), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            forget_kept(model)
            model.eval()
            logging.disable(max(silent, logging.ERROR))
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(silent)


@contextlib.contextmanager
def _transformers_patches() -> Iterator[None]:
    """transformers' own patches for models whose forward cannot be exported as it stands."""
    try:
        from transformers.exporters import exporter_dynamo
        from transformers.exporters.utils import apply_patches
    except ImportError:
        yield
        return
    del exporter_dynamo  # imported because it registers the patches
    with apply_patches("dynamo"):
        yield


def _program(model: nn.Module, exported: ExportedProgram, feed: Inputs, dynamic: bool) -> Program:
    names, names_fed = _canonical_names(model), tuple(tensors_in(feed))
    signature = exported.graph_signature
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    copier = GraphCopier(exported.graph_module, strip=_ROOT)
    params: dict[str, Param] = {}
    of_placeholder: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    placeholders_of: dict[str, fx.Node] = {}
    # Before anything asks for a size as a number, which settles it for good.
    fed = [n for n, spec in zip(placeholders, signature.input_specs, strict=True) if spec.kind not in _KINDS]
    fixed = {name: _fixed_dims(node) for name, node in zip(names_fed, fed, strict=True)}
    feeds = iter(names_fed)
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        kind = _KINDS.get(spec.kind)
        if kind is None:
            copier.placeholder(node, next(feeds))
            continue
        target = (spec.target or "").removeprefix(_ROOT + ".")
        name = names.get(target, target)
        if name in params:
            copier.reuse(node, placeholders_of[name])
            continue
        if kind == "constant":
            constants[name] = exported.constants[spec.target or ""]
        label = ("c_" if kind == "constant" else "p_") + name.replace(".", "_")
        copy = placeholders_of[name] = copier.placeholder(node, label, constants.get(name))
        of_placeholder[copy.name] = name
        aliases = tuple(other for other, first in names.items() if first == name and other != name)
        persistent = spec.persistent is not False
        params[name] = Param(name, kind, copier.types[copy.name][0], aliases, persistent)
    copier.body()
    modules = {p: ModuleInfo(p, f"{type(m).__module__}.{type(m).__qualname__}") for p, m in model.named_modules()}
    config = getattr(model, "config", None)
    return Program(
        graph=copier.graph,
        types=copier.types,
        params=params,
        of_placeholder=of_placeholder,
        modules=modules,
        constants=constants,
        caches=bool(getattr(config, "use_cache", False)),
        dynamic=dynamic,
        fixed=fixed,
        guards=_guards(exported, names_fed) if dynamic else (),
        owner=type(model).__name__,
        feed=kept(model, feed),
    )


def _guards(exported: ExportedProgram, names: Sequence[str]) -> tuple[str, ...]:
    """What torch's own module for the program asks of its inputs before it runs, by the names that they have here."""
    found: list[str] = []
    for code in exported._guards_code:
        named = re.sub(r"L\['args'\]\[(\d+)\]", lambda m: names[int(m[1])], code.replace("\n", " "))
        found.append(ast.unparse(ast.parse(re.sub(r"\.size\(\)\[(\d+)\]", r".shape[\1]", named), mode="eval")))
    return tuple(found)


def _fixed_dims(node: fx.Node) -> tuple[int, ...]:
    """The dims of an input whose sizes are numbers in the graph."""
    return tuple(dim for dim, size in enumerate(node.meta["val"].shape) if is_concrete_int(size))


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every tensor name of the model to the first name of the same tensor."""
    first: dict[int, str] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
