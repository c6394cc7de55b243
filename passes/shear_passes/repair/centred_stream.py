"""A residual stream that is centred when it is written needs no LayerNorm: an RMS norm of it is the same (SliceGPT).

``LayerNorm(x) = w * c / rms(c) + b`` with ``c = x - mean(x)``. Where all that is added to the stream is linear in
parameters, these can lose their mean over the channels, so that the stream is c; what reads the norm carries w and b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from shear_ir.axes import Axis, resolve
from shear_ir.errors import PlanError
from shear_ir.nodes import module_path
from shear_ir.paths import inside
from shear_ir.program import Param
from shear_passes.analysis.find_groups import Group, Groups
from shear_passes.ops.registry import Vanish, op_name

_COPIES = {"aten.to.dtype", "aten.to.dtype_layout", "aten._to_copy", "aten.alias", "aten.detach", "aten.clone"}
_TURNS = {"aten.t", "aten.numpy_T", "aten.transpose.int"}
_WRITES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "aten.embedding": ((0, 1),),
    "aten.linear": ((1, 0), (2, 0)),
    "aten.addmm": ((2, 1), (0, 0)),
    "aten.mm": ((1, 1),),
    "aten.matmul": ((1, 1),),
    "aten.conv1d": ((1, 0), (2, 0)),
    "aten.conv2d": ((1, 0), (2, 0)),
    "aten.conv3d": ((1, 0), (2, 0)),
}
"""The places of an operator's parameters, and the dim of each that is the last of the result, or a convolution's."""
_READS: Mapping[str, tuple[int, int, int, int | None]] = {
    "aten.linear": (0, 1, 1, 2),
    "aten.addmm": (1, 2, 0, 0),
    "aten.mm": (0, 1, 0, None),
    "aten.matmul": (0, 1, 0, None),
}
"""The places of value and weight, the dim of the weight that is summed over, and the place of the bias."""


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm of the stream: the module it is, and the parameters of its scale and shift, if it has them."""

    module: str
    eps: float
    weight: str | None
    bias: str | None


@dataclass(frozen=True)
class StreamRead:
    """A product with the result of ``norm``: ``weight`` is summed over its ``dim``; ``module`` makes the product."""

    module: str
    weight: str
    dim: int
    bias: str | None
    norm: LayerNorm


@dataclass
class Stream:
    """What writes to a stream that only layer norms read: ``writes`` has the dim of each parameter, or of several."""

    size: int
    norms: dict[fx.Node, LayerNorm] = field(default_factory=dict)
    writes: dict[str, set[int]] = field(default_factory=dict)
    reads: dict[fx.Node, StreamRead] = field(default_factory=dict)

    def tied(self, params: Mapping[str, Param]) -> tuple[str, ...]:
        """Parameters that both write to the stream and read a norm of it, along one dim: they have to be untied."""
        found = dict.fromkeys(r.weight for r in self.reads.values() if r.dim in self.writes.get(r.weight, ()))
        for name in found:
            if not params[name].aliases:
                raise PlanError(f"{name} is both written to the residual stream and reads it: it cannot be untied")
        return tuple(found)


def layer_normed(groups: Groups) -> Stream | None:
    """The widest residual stream that layer norms hold; None where there is none.

    Raises ``PlanError`` where something else than layer norms reads it, or it is not linear in what is written to it.
    """
    program, axes = groups.program, groups.axes
    over: dict[Axis, list[fx.Node]] = {}
    for node in program.calls():
        if op_name(node) == "aten.layer_norm" and isinstance(node.args[0], fx.Node):
            dim = resolve(axes.dims(node.args[0])[-1])
            if isinstance(dim, Axis) and node.args[1] == [dim.size]:
                over.setdefault(dim, []).append(node)
    held: list[Group] = [g for g in groups if g.kind == "residual" and resolve(g.axis) in over]
    if not held:
        return None
    axis = resolve(max(held, key=lambda g: g.parameters_per_unit * g.size).axis)
    assert isinstance(axis, Axis)
    return _Walk(groups, axis, over[axis]).run()


def rms_normed(weights: Mapping[str, Tensor], stream: Stream) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters with which RMS norms compute what layer norms did, and biases of modules that had none.

    Nothing may be tied (``Stream.tied``). Computed in fp64, rounded once.
    """
    changed: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}

    def now(name: str) -> Tensor:
        return changed[name] if name in changed else weights[name].detach().double()

    for read in {r.weight: r for r in stream.reads.values()}.values():
        old, norm = now(read.weight), read.norm
        if norm.bias is not None:
            shift = old.movedim(read.dim, -1) @ weights[norm.bias].detach().double()
            if read.bias is not None:
                changed[read.bias] = now(read.bias) + shift
            elif bool(shift.any()):
                biases[read.module] = shift.to(weights[read.weight].dtype)
        if norm.weight is not None:
            shape = [1] * old.dim()
            shape[read.dim] = -1
            changed[read.weight] = old * weights[norm.weight].detach().double().reshape(shape)
    for name, dims in stream.writes.items():
        for dim in dims:
            changed[name] = now(name) - now(name).mean(dim, keepdim=True)
    return {name: tensor.to(weights[name].dtype) for name, tensor in changed.items()}, biases


class _Walk:
    """Back from the norms to what writes to the stream, then on from all of it to what reads it."""

    def __init__(self, groups: Groups, axis: Axis, norms: list[fx.Node]) -> None:
        self.program, self.axes, self.axis = groups.program, groups.axes, axis
        self.stream = Stream(axis.size)
        self.known: dict[str, set[fx.Node]] = {}
        self.writers: set[fx.Node] = set()
        self.passing: set[fx.Node] = set()
        for node in norms:
            self.stream.norms[node] = self._norm(node, norms)

    def run(self) -> Stream:
        for node, norm in self.stream.norms.items():
            self._read(node, norm)
        stack = [n for norm in self.stream.norms for n in norm.all_input_nodes[:1]]
        while stack:
            node = stack.pop()
            if node not in self.writers | self.passing:
                stack += self._written(node)
        for node in self.writers | self.passing:
            for user in self._users(node):
                if user not in self.passing and not (user in self.stream.norms and user.args[0] is node):
                    self._refuse_reader(user)
        self._require_own()
        return self.stream

    def _norm(self, node: fx.Node, norms: list[fx.Node]) -> LayerNorm:
        args = (*node.args, *[None] * 5)
        path = module_path(node)
        own = [n for n in self.program.calls() if inside(module_path(n), path) and self._live(n)]
        if not path or any(n not in norms and not self._moves(n) for n in own):
            raise self._no(f"the layer normalisation at {path or 'the root'} is no module of its own")
        eps = args[4] if isinstance(args[4], float) else 1e-5
        return LayerNorm(path, eps, self._own(args[2], node), self._own(args[3], node))

    def _own(self, node: object, user: fx.Node) -> str | None:
        """The parameter that ``user`` takes; None where it takes none."""
        if node is None:
            return None
        param = self.program.param(node) if isinstance(node, fx.Node) else None
        if param is None or param.kind != "parameter":
            raise self._no(f"{_told(user)} takes {node}, which is no parameter")
        self.known.setdefault(param.name, set()).add(user)
        return param.name

    def _written(self, node: fx.Node) -> Iterator[fx.Node]:
        """Notes the parameters that ``node`` takes into the stream; yields the parts of the stream it is made of."""
        name, param = op_name(node), self.program.param(node)
        place = self._place(node)
        if param is not None and param.kind == "parameter" and place is not None:
            self.writers.add(node)
            self._write(param.name, place)
            self.known.setdefault(param.name, set()).update(self._users(node))
        elif name in _WRITES and place is not None:
            self.writers.add(node)
            for argument, dim in _WRITES[name]:
                given, turned = self._unturned(node.args[argument] if argument < len(node.args) else None)
                own = self._own(given, node)
                if own is not None:
                    self._write(own, 1 - dim if turned else dim)
        else:
            parts = self._parts(node) if place is not None else []
            if not parts:
                raise self._no(f"{_told(node)} writes to it, which is not linear in parameters alone")
            self.passing.add(node)
            yield from parts

    def _parts(self, node: fx.Node) -> list[fx.Node]:
        """The parts of the stream that ``node`` moves, adds or scales alike; none for any other call."""
        name = op_name(node)
        if self._moves(node):
            parts = list(node.all_input_nodes)
        elif name in ("aten.add.Tensor", "aten.add_.Tensor", "aten.sub.Tensor"):
            parts = [n for n in node.args[:2] if isinstance(n, fx.Node)]
            if len(parts) < 2:
                return []
        elif name in ("aten.mul.Tensor", "aten.div.Tensor"):
            parts, others = node.all_input_nodes[:1], node.all_input_nodes[1:]
            if any(self._type(n)[-1:] not in ((), (1,)) for n in others):
                return []
        else:
            return []
        return parts if all(self._place(n) is not None for n in parts) else []

    def _read(self, node: fx.Node, norm: LayerNorm) -> None:
        for user in self._users(node):
            if self._moves(user) and len(user.all_input_nodes) == 1 and self._place(user) is not None:
                self._read(user, norm)
                continue
            form = _READS.get(op_name(user))
            last = self._place(node) == len(self.axes.dims(node)) - 1
            matrix, turned = self._unturned(user.args[form[1]]) if form else (None, False)
            if form is None or user.args[form[0]] is not node or not last or not self._matrix(matrix):
                raise self._no(f"{_told(user)} reads the result of {norm.module}, and only products may")
            _, _, dim, bias = form
            own = self._own(matrix, user)
            assert own is not None
            dim = 1 - dim if turned else dim
            shift = None if bias is None or bias >= len(user.args) else self._own(user.args[bias], user)
            self.stream.reads[user] = StreamRead(module_path(user), own, dim, shift, norm)

    def _require_own(self) -> None:
        """Raise ``PlanError`` where a parameter is used in a way that is not known, or by norms unlike each other."""
        for name, users in self.known.items():
            for user in self._users(self.program.placeholder_of[name]):
                if user not in users:
                    raise self._no(f"{_told(user)} uses {name} as well")
        seen: dict[str, tuple[object, ...]] = {}
        for read in self.stream.reads.values():
            for own in (read.weight, read.bias):
                scales = (read.norm.weight, read.norm.bias, read.weight)
                if own is not None and seen.setdefault(own, scales) != scales:
                    raise self._no(f"{own} is used with several norms, which may scale unlike each other")

    def _write(self, name: str, dim: int) -> None:
        self.stream.writes.setdefault(name, set()).add(dim)

    def _matrix(self, weight: object) -> bool:
        return isinstance(weight, fx.Node) and self.program.param(weight) is not None and len(self._type(weight)) == 2

    def _unturned(self, given: object) -> tuple[object, bool]:
        """What ``given`` is the transpose of, which is then known to be used so; itself where it is none."""
        if isinstance(given, fx.Node) and op_name(given) in _TURNS and len(given.users) == 1:
            param = self.program.param(given.all_input_nodes[0])
            if param is not None and len(param.type.shape) == 2:
                self.known.setdefault(param.name, set()).add(given)
                return given.all_input_nodes[0], True
        return given, False

    def _place(self, node: fx.Node) -> int | None:
        """The dim of ``node`` that is the stream's channels."""
        if not self.program.type(node):
            return None
        places = [i for i, dim in enumerate(self.axes.dims(node)) if resolve(dim) is self.axis]
        return places[0] if len(places) == 1 else None

    def _type(self, node: fx.Node) -> tuple[int, ...]:
        own = self.program.type(node)
        return () if own is None else own.shape

    def _moves(self, node: fx.Node) -> bool:
        name = op_name(node)
        idle = name == "aten.dropout" and (node.args[1] == 0 or node.args[2] is False)
        return bool(name in _COPIES or idle or self.axes.vanish.get(node.name) is Vanish.MOVED)

    def _live(self, node: fx.Node) -> bool:
        """Whether anything comes of the values of ``node``; asserts and sizes are read by nobody."""
        return node.op == "output" or bool(node.users and self.program.types.get(node.name))

    def _users(self, node: fx.Node) -> Iterator[fx.Node]:
        return (user for user in node.users if self._live(user))

    def _refuse_reader(self, user: fx.Node) -> None:
        while user.op != "output" and self._moves(user) and any(True for _ in self._users(user)):
            user = next(self._users(user))
        raise self._no(f"{_told(user)} reads it without a norm")

    def _no(self, why: str) -> PlanError:
        return PlanError(f"layer norms of the residual stream cannot become RMS norms: {why}")


def _told(node: fx.Node) -> str:
    if node.op == "output":
        return "the output of the model"
    name = op_name(node).removeprefix("aten.").partition(".")[0]
    return f"{name or node.name} at {module_path(node) or 'the root'}"
