"""Ways through forward that a trace does not see: what training mode does otherwise, arguments that were not given,
and parameters that nothing read.

The first is looked for on shapes alone, and only where a module's ``training`` was read while it was traced.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shear_ir.frontend.feeds import call
from shear_ir.frontend.inputs import Inputs
from shear_ir.frontend.shapes import on_shapes
from shear_ir.program import Held, Program, module_path


def other_ways(model: nn.Module, program: Program, feed: Inputs, readers: set[str]) -> dict[str, Held]:
    """The modules by path whose forward computes something else where a trace with ``feed`` did not look, and why.

    ``program``: the trace; ``readers``: the modules that asked for their mode in it.
    """
    found = {**_unread(model, program), **(_in_training(model, feed) if readers else {})}
    asked = _not_given(model, feed)
    if asked:
        why = f"the forward of {type(model).__name__} does something else with {asked}, which was not given"
        found[""] = Held(why)
    return found


def _unread(model: nn.Module, program: Program) -> dict[str, Held]:
    """The modules that may read a parameter on a way that was not traced: there, sizes that it has stay as they are."""
    used = [param for node in program.nodes if node.users and (param := program.param(node)) is not None]
    read = {name for param in used for name in (param.name, *param.aliases)}
    running = {module_path(node) for node in program.calls()}
    found: dict[str, Held] = {}
    for name, parameter in model.named_parameters():
        if name in read:
            continue
        path = name.rpartition(".")[0]
        adapts = _is_adapter(model.get_submodule(path))
        while path and path not in running:
            path = path.rpartition(".")[0]
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


def _calls(model: nn.Module, feed: Inputs) -> dict[str, list[Any]]:
    """What each module calls by itself, in order: operators, what they are told, and the shapes of what they make."""
    fixed = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    paths = {id(module): path for path, module in model.named_modules()}
    running: list[str] = []
    found: dict[str, list[Any]] = defaultdict(list)

    def enter(module: nn.Module, args: Any) -> None:
        running.append(paths.get(id(module), running[-1] if running else ""))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        running.pop()

    class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            # Batch norms are told their mode, and work channel by channel in both.
            leaves = () if "batch_norm" in str(func) else pytree.tree_leaves((args, kwargs))
            told = [str(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
            found[running[-1] if running else ""].append((func, told, getattr(made, "shape", None)))
            return made

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        with _WithoutDropout(), Record():  # type: ignore[no-untyped-call]  # as above
            call(model, feed, **fixed)
    finally:
        for hook in hooks:
            hook.remove()
    return found


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


def _not_given(model: nn.Module, feed: Inputs) -> str:
    """An argument that a user's own forward asks for (``if gate is not None``) and that the trace was not given."""
    if hasattr(model, "main_input_name") or _is_torch(model) or hasattr(model, "peft_config"):
        return ""
    optional = {
        p.name for p in inspect.signature(model.forward).parameters.values() if p.default in (None, False, True)
    } - feed.keys()
    if not optional:
        return ""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(model).forward)))
    except (OSError, TypeError, SyntaxError):  # there is no source to look at
        return ""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp)):
            asked = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)} & optional
            if asked and not _only_defaults(node, asked):
                return min(asked)
    return ""


def _only_defaults(node: ast.If | ast.IfExp, asked: set[str]) -> bool:
    """Whether a branch only gives an argument that is missing a value, or says that it is."""
    if isinstance(node, ast.IfExp) or node.orelse:
        return False
    for statement in node.body:
        if isinstance(statement, ast.Raise):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if not targets or any(not isinstance(t, ast.Name) or t.id not in asked for t in targets):
            return False
    return True
