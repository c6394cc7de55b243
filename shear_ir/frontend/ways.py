"""Ways through forward that a trace does not see: what training mode does otherwise, arguments that were not given,
and parameters that nothing read.

The first is looked for on shapes alone, and only where a module's ``training`` was read while it was traced.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shear_ir.frontend.feeds import call, tensors_in, uncached
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.shapes import on_shapes
from shear_ir.nodes import module_stack
from shear_ir.paths import parent
from shear_ir.program import Held, Program


def other_ways(model: nn.Module, program: Program, feed: Inputs, readers: set[str]) -> dict[str, Held]:
    """The modules by path whose forward computes something else where a trace with ``feed`` did not look, and why.

    ``program``: the trace; ``readers``: the modules that asked for their mode in it.
    """
    training = _in_training(model, feed) if readers else {}
    return {**_unread(model, program), **training, **_not_given(model, feed)}


def _unread(model: nn.Module, program: Program) -> dict[str, Held]:
    """The modules that may read a parameter on a way that was not traced: there, sizes that it has stay as they are."""
    used = [param for node in program.nodes if node.users and (param := program.param(node)) is not None]
    read = {name for param in used for name in (param.name, *param.aliases)}
    running = {path for node in program.calls() for path in module_stack(node)}
    found: dict[str, Held] = {}
    for name, parameter in model.named_parameters():
        if name in read:
            continue
        path = parent(name)
        adapts = _is_adapter(model.get_submodule(path))
        while path and path not in running:
            path = parent(path)
            adapts = adapts or _is_adapter(model.get_submodule(path))
        if adapts:  # what an adapter stands in for, and those that are not active, follow it
            continue
        why = f"no way through {_told(path, model.get_submodule(path))} that was traced reads {name}, and another may"
        before = found.get(path)
        sizes = frozenset(parameter.shape) - {1} | (frozenset() if before is None else before.sizes or frozenset())
        found[path] = Held(why if before is None else before.reason, sizes)
    return found


@contextlib.contextmanager
def mode_readers(model: nn.Module) -> Iterator[set[str]]:
    """The paths of the modules whose code asks inside whether it is trained; torch's own modules are known."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: set[str] = set()

    class Training:
        def __get__(self, module: Any, kind: type | None = None) -> Any:
            if module is None:
                raise AttributeError("training")
            if id(module) in paths and not _is_torch(module):
                found.add(paths[id(module)])
            return vars(module)["training"]

        def __set__(self, module: Any, mode: bool) -> None:
            vars(module)["training"] = mode

    nn.Module.training = Training()  # type: ignore[assignment]
    try:
        yield found
    finally:
        del nn.Module.training


def _told(path: str, module: nn.Module) -> str:
    return f"{path or 'the model'} ({type(module).__name__})"


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _in_training(model: nn.Module, feed: Inputs) -> dict[str, Held]:
    """The modules that call other operators in training mode than in evaluation, dropout left out."""
    try:
        with on_shapes(model, feed) as (copy, given, _):
            calls = [_calls(copy().train(training), given) for training in (False, True)]
    except Exception:  # a model that cannot be run on shapes in both modes is judged by its trace alone
        return {}
    modules = dict(model.named_modules())
    return {
        path: Held(f"the forward of {_told(path, modules[path])} takes another way in training mode")
        for path in calls[0].keys() | calls[1].keys()
        if path in modules and not _is_torch(modules[path]) and calls[0][path] != calls[1][path]
    }


@dataclass(frozen=True)
class _Call:
    """A call that a module made by itself; ``read``: what it reads and is told, another call by its number.

    ``acts``: something comes of it beside the tensors that it makes: it writes, or tells numbers.
    """

    module: str
    func: Any
    read: tuple[int | str, ...]
    shape: Any
    acts: bool


def _calls(model: nn.Module, feed: Inputs) -> dict[str, list[Any]]:
    """What each module calls by itself, in order: operators, what they read and are told, and the shapes they make.

    A value is known by the module that made it, and in that module by its number, so that what one module does
    otherwise is no other way of the next. Calls that nothing comes of are left out.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    running: list[str] = []
    made: list[_Call] = []
    named: dict[int, int | str] = {id(t): name for name, t in _tensors_of(model, feed)}
    alive: list[Any] = []  # so that no id is given twice

    def enter(module: nn.Module, args: Any) -> None:
        running.append(paths.get(id(module), running[-1] if running else ""))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        running.pop()

    class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            # Batch norms are told their mode, and work channel by channel in both.
            leaves = () if "batch_norm" in str(func) else pytree.tree_leaves((args, kwargs))
            read = tuple([named.get(id(leaf), "") if isinstance(leaf, Tensor) else str(leaf) for leaf in leaves])
            values = pytree.tree_leaves(result)
            for value in values:
                named.setdefault(id(value), len(made))
                alive.append(value)
            tells = func.namespace != "prim" and not any(isinstance(value, Tensor) for value in values)
            shape = getattr(result, "shape", None)
            made.append(_Call(running[-1] if running else "", func, read, shape, tells or func._schema.is_mutable))
            return result

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        with _WithoutDropout(), Record():  # type: ignore[no-untyped-call]  # as above
            output = call(model, feed, **uncached(model))
    finally:
        for hook in hooks:
            hook.remove()
    return _by_module(made, {named.get(id(leaf), "") for leaf in pytree.tree_leaves(output)})


def _by_module(made: Sequence[_Call], wanted: set[int | str]) -> dict[str, list[Any]]:
    """Those of the calls that something comes of: what is ``wanted`` in the end, or a write."""
    stays: list[int] = []
    for number in range(len(made) - 1, -1, -1):
        one = made[number]
        if number in wanted or one.acts:
            wanted.update(one.read)
            stays.append(number)
    found: dict[str, list[Any]] = defaultdict(list)
    place: dict[int, int] = {}
    for number in reversed(stays):
        one = made[number]
        told = [_told_apart(source, one.module, made, place) for source in one.read]
        place[number] = len(found[one.module])
        found[one.module].append((one.func, told, one.shape))
    return found


def _told_apart(source: int | str, here: str, made: Sequence[_Call], place: Mapping[int, int]) -> Any:
    if isinstance(source, str):
        return source
    return (here, place[source]) if made[source].module == here else made[source].module


def _tensors_of(model: nn.Module, feed: Inputs) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    yield from ((f"input {name}", tensor) for name, tensor in tensors_in(feed).items())


class _WithoutDropout(TorchFunctionMode):
    """Dropout is what it reads: it has the same zeros in each channel, and none at all in evaluation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = str(getattr(func, "__name__", ""))
        if name.rstrip("_123d").endswith("dropout"):
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            kwargs = {k: v for k, v in kwargs.items() if k != "dropout_p"}
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return func(*args, **kwargs)


def _not_given(model: nn.Module, feed: Inputs) -> dict[str, Held]:
    """The modules of a user whose forward decides by an argument that was not given (``if gate is not None``).

    Their source is read: an argument that has its default may be given a value, be handed on to another module, or to
    torch, which takes it as it is; whatever else is done with it may be another way.
    """
    if hasattr(model, "peft_config"):
        return {}
    found: dict[str, Held] = {}
    defaults = _defaults(model, feed)
    for path, module in model.named_modules():
        names = defaults.get(path, frozenset())
        asked = _decides_by(module, names) if names else ""
        if asked:
            found[path] = Held(
                f"the forward of {_told(path, module) if path else type(module).__name__} does something else with "
                f"{asked}, which was not given"
            )
    return found


def _defaults(model: nn.Module, feed: Inputs) -> dict[str, frozenset[str]]:
    """By path, the arguments of forward that have their default in every call of a user's module on ``feed``."""
    found: dict[str, frozenset[str]] = {}
    if not any(map(_is_users, model.modules())):
        return found

    def watch(path: str, parameters: Mapping[str, inspect.Parameter]) -> Any:
        places = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = {**dict(zip(places, args, strict=False)), **kwargs}
            names = {
                n for n, p in parameters.items() if p.kind is p.VAR_KEYWORD and not kwargs.keys() - parameters.keys()
            }
            for name, p in parameters.items():
                if p.default is not p.empty and (name not in given or given[name] is p.default):
                    names.add(name)
            found[path] = found.get(path, frozenset(names)) & names

        return enter

    try:
        with on_shapes(model, feed) as (copy, given, _):
            copied = copy().eval()
            for path, module in copied.named_modules():
                if _is_users(module):
                    parameters = inspect.signature(module.forward).parameters
                    module.register_forward_pre_hook(watch(path, parameters), with_kwargs=True)
            call(copied, given)
    except Exception:  # a model that cannot be run on shapes is judged by its trace alone
        pass
    return found


def _is_users(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] not in ("torch", "transformers", "peft")


def _decides_by(module: nn.Module, names: frozenset[str]) -> str:
    """The first of ``names`` by which the forward of ``module`` may decide; empty where there is none."""
    forward = type(module).forward
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # there is no source to look at
        return ""
    harmless: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.Assert) or _only_defaults(node, names):
            harmless |= {id(each) for each in ast.walk(node)}
        if isinstance(node, ast.Call) and _hands_on(node.func, module, forward.__globals__):
            handed = [each.value if isinstance(each, ast.keyword | ast.Starred) else each
                      for each in (*node.args, *node.keywords)]  # fmt: skip
            harmless |= {id(each) for each in handed}
    asked = (
        name.id for node in ast.walk(tree) if isinstance(node, _DECIDING)
        for name in ast.walk(_asked_in(node))
        if isinstance(name, ast.Name) and name.id in names and id(name) not in harmless
    )  # fmt: skip
    return min(asked, default="")


_DECIDING = (ast.If, ast.IfExp, ast.While, ast.Match, ast.Compare, ast.BoolOp, ast.Subscript, ast.Call)


def _asked_in(node: Any) -> ast.AST:
    """The part of an expression or a statement that decides."""
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return node.test
    if isinstance(node, ast.Match):
        return node.subject
    if isinstance(node, ast.Subscript):
        return node.slice
    return node  # type: ignore[no-any-return]


def _hands_on(function: ast.AST, module: nn.Module, known: Mapping[str, Any]) -> bool:
    """Whether a call is one of another module, which is looked at by itself, or of torch's functions."""
    parts: list[str] = []
    while isinstance(function, ast.Attribute | ast.Subscript):
        parts += [function.attr] if isinstance(function, ast.Attribute) else []
        function = function.value
    if not isinstance(function, ast.Name):
        return False
    if function.id == "self" and parts:
        return isinstance(getattr(module, parts[-1], None), nn.Module)
    value = known.get(function.id, getattr(builtins, function.id, None))
    # A local name that is called is a module of a loop.
    if value is None or value is range:
        return True
    home = value if isinstance(value, ModuleType) else inspect.getmodule(value)
    return getattr(home, "__name__", "").partition(".")[0] == "torch"


def _only_defaults(node: ast.AST, names: frozenset[str]) -> bool:
    """Whether a branch only gives an argument that is missing a value, or says that it is."""
    if isinstance(node, ast.IfExp):
        return any(isinstance(side, ast.Name) and side.id in names for side in (node.body, node.orelse))
    if not isinstance(node, ast.If) or node.orelse:
        return False
    for statement in node.body:
        if isinstance(statement, ast.Raise):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if not targets or any(not isinstance(t, ast.Name) or t.id not in names for t in targets):
            return False
    return True
