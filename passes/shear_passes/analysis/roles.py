"""What an axis is for: its kind follows from how operators use it, never from the names of modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

from torch import fx

from shear_ir.axes import Axis, Concat, Dim, Freezes, Product, atoms, resolve
from shear_ir.program import Program
from shear_passes.analysis.infer_axes import Axes
from shear_passes.analysis.latents import latents
from shear_passes.analysis.lora import find_lora
from shear_passes.analysis.vanish import Zeros
from shear_passes.ops.registry import Contraction, Operand, Vanish
from shear_passes.ops.traits import Role, traits_of

Kind = Literal[
    "ffn", "kv_head", "query_group", "head_dim", "rotary_pair", "residual", "lora_rank", "expert", "conv_channel",
    "vocab", "block", "attention_block", "mlp_block", "other",
]  # fmt: skip


class _Slice(Protocol):
    @property
    def parameter(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def expression(self) -> Dim: ...


def find_roles(program: Program, axes: Axes, zeros: Zeros, slices: Mapping[Axis, Sequence[_Slice]]) -> dict[Axis, Kind]:
    """The kind of every axis that occurs in a parameter; the first of the roles below that fits."""
    kinds: dict[Axis, Kind] = {}

    def assign(found: Iterable[Axis], kind: Kind) -> None:
        for atom in found:
            if atom in slices:
                kinds.setdefault(atom, kind)

    assign(_vocabulary(program, axes), "vocab")
    assign(_innermost(set(zeros.routers), slices), "expert")
    assign(zeros.routers, "other")
    ranks = _lora_ranks(program, axes)
    assign(ranks, "lora_rank")
    residual = _residual(program, axes)
    attention = _Attention(axes, zeros)
    assign(_innermost(attention.kv_heads, slices), "kv_head")
    assign(attention.kv_heads, "other")
    assign(attention.query_groups, "query_group")
    rotary = {a for a in attention.head_dims if _paired(a, slices.get(a, ()))}
    assign(rotary, "rotary_pair")
    assign(attention.head_dims, "head_dim")
    stored = {a for a, owned in slices.items() if any(program.params[s.parameter].kind == "parameter" for s in owned)}
    assign(residual & stored, "residual")
    made, read, convolved = _made_and_read(axes)
    assign(convolved, "conv_channel")
    between = made & read
    assign(latents(axes, between, Freezes(zeros.frozen)), "other")
    assign(between, "ffn")
    return {atom: kinds.get(atom, "other") for atom in slices}


def _innermost(heads: set[Axis], slices: Mapping[Axis, Sequence[_Slice]]) -> set[Axis]:
    """``heads`` without those that count blocks of other heads, as in ``ranks x heads x head_dim``; experts alike."""
    outer: set[Axis] = set()
    for atom in heads & slices.keys():
        for piece in slices[atom]:
            dim = resolve(piece.expression)
            nested = [f for f in dim.factors if isinstance(f, Axis) and f in heads] if isinstance(dim, Product) else []
            outer.update(nested[:-1])
    return heads - outer


_NEAR = 64
"""Calls between a projection and the product that reads it, with some to spare."""


def _atoms(dims: Iterable[Dim]) -> set[Axis]:
    return {a for dim in dims for a in atoms(dim)}


def _vocabulary(program: Program, axes: Axes) -> set[Axis]:
    found: set[Axis] = set()
    tokens = any(not t.dtype.is_floating_point for t in program.input_types.values())
    for node in program.calls():
        if traits_of(node).role is Role.EMBEDDING:
            table, rows = node.args[:2]
            if isinstance(table, fx.Node) and isinstance(rows, fx.Node) and _given(program, rows):
                found |= _atoms(axes.dims(table)[:1])
        elif tokens and node.op == "call_function" and any(user.op == "output" for user in node.users):
            found |= _atoms(axes.dims(node)[-1:])
    return found


def _given(program: Program, node: fx.Node) -> bool:
    """Whether a value comes from an input by calls on it alone, as token ids do and positions do not."""
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and program.param(node) is None


def _owned(axes: Axes, node: fx.Node) -> bool:
    """Whether a value is a parameter, or one seen through a transpose, a view, a choice of experts or adapters."""
    while isinstance(first := node.args[0] if node.args else None, fx.Node) and (
        axes.vanish.get(node.name) is Vanish.MOVED or traits_of(node).chooses
    ):
        node = first
    param = axes.program.param(node)
    return param is not None and param.kind == "parameter"


def _lora_ranks(program: Program, axes: Axes) -> set[Axis]:
    """What lies between B and A of every low-rank branch, without the experts that stacked adapters count as well."""
    found: set[Axis] = set()
    for made in find_lora(program):
        between = _atoms([axes.dims(branch.a)[0] for branch in made.branches])
        found |= between - _atoms(axes.dims(made.base.weight))
    return found


def _residual(program: Program, axes: Axes) -> set[Axis]:
    """Axes of sums in which one term was made from the other: the stream that blocks add to."""
    order = {node: place for place, node in enumerate(program.nodes)}
    # Products: a norm's own sums map nothing.
    contracting = {c.node for c in axes.contractions if len(c.operands) > 1}
    found: set[Axis] = set()
    for node in program.calls():
        if traits_of(node).role is not Role.SUM:
            continue
        terms = [a for a in node.args[:2] if isinstance(a, fx.Node) and not _owned(axes, a)]
        if len(terms) != 2 or len(axes.dims(terms[0])) != len(axes.dims(terms[1])):
            continue
        earlier, later = sorted(terms, key=order.__getitem__)
        if _mapped_from(later, earlier, order, contracting):
            found |= _atoms(axes.dims(node))
    return found


def _mapped_from(later: fx.Node, earlier: fx.Node, order: Mapping[fx.Node, int], contracting: set[fx.Node]) -> bool:
    """Whether ``later`` was made from ``earlier`` by a contraction, as in a block and not in ``x + x^3``."""
    start = (later, later in contracting)
    stack, seen = [start], {start}
    first = order[earlier]
    while stack:
        node, mapped = stack.pop()
        for source in node.all_input_nodes:
            if source is earlier and mapped:
                return True
            step = (source, mapped or source in contracting)
            if order[source] > first and step not in seen:
                seen.add(step)
                stack.append(step)
    return False


def _is_weight(axes: Axes, made: Contraction, operand: Operand) -> bool:
    """Whether a call maps its other operand by this one: a parameter, or what a layer made its weight from.

    The second operand of a convolution is its weight whatever it is made from, that of a linear map where no input
    went into it.
    """
    if _owned(axes, operand.node):
        return True
    role = traits_of(made.node).role
    if role not in (Role.CONVOLUTION, Role.LINEAR) or made.node.args[1] is not operand.node:
        return False
    return role is Role.CONVOLUTION or operand.node not in axes.from_inputs


def attention_products(axes: Axes, zeros: Zeros) -> tuple[list[Contraction], list[Contraction]]:
    """The products of two activations: scores, which sum over features, and mixes, which sum over positions."""
    scores: list[Contraction] = []
    mixes = [c for c in axes.contractions if c.mixed]
    for made in axes.contractions:
        if len(made.operands) != 2 or any(_is_weight(axes, made, o) for o in made.operands):
            continue
        if not any(o.node in axes.from_inputs for o in made.operands):
            continue  # it makes a weight
        over = _atoms(made.over)
        live = over and all(over <= zeros.of_node.get(o.node.name, frozenset()) for o in made.operands)
        (scores if live else mixes).append(made)
    return scores, mixes


class _Attention:
    """The axes of products of two activations: scores sum over head_dim, heads are shared, values carry theirs."""

    def __init__(self, axes: Axes, zeros: Zeros) -> None:
        self.kv_heads: set[Axis] = set()
        self.query_groups: set[Axis] = set()
        self.head_dims: set[Axis] = set()
        scores, mixes = attention_products(axes, zeros)
        for made in scores:
            self._score(made, zeros)
        self._shared([*scores, *mixes], mixes, zeros)
        for made in mixes:
            self._mix(made, zeros)
        self._normed(axes, mixes)

    def _score(self, made: Contraction, zeros: Zeros) -> None:
        self.head_dims |= _atoms(made.over)
        left, right = (_atoms(o.free) & zeros.of_node.get(o.node.name, frozenset()) for o in made.operands)
        self.kv_heads |= left & right
        self.query_groups |= left ^ right

    def _shared(self, products: Sequence[Contraction], mixes: Sequence[Contraction], zeros: Zeros) -> None:
        """Axes that both factors carry are heads, also where a norm hid the zeros of queries and keys from us.

        The values, which no norm touches, tell kv heads from copies made by expand.
        """
        pairs = [made.operands for made in products if len(made.operands) == 2]
        shared = {a for left, right in pairs for a in _atoms(left.free) & _atoms(right.free)}
        valued = {a for made in mixes for a in zeros.of_node.get(made.operands[-1].node.name, frozenset())}
        self.kv_heads |= (shared & valued) - self.query_groups

    def _normed(self, axes: Axes, products: Sequence[Contraction]) -> None:
        """Heads and features of queries, keys and values of which a norm hid all zeros from us, as in pooled attention.

        What a projection has in its rows is a head where both factors share it, a feature where one product sums over
        it, and a feature of the values where the product with them, which sums over positions, leaves it.
        """
        makers = {c.node: o for c in axes.contractions if len(c.operands) == 2 for o in c.operands
                  if _is_weight(axes, c, o)}  # fmt: skip
        for made in products:
            if len(made.operands) != 2:
                continue
            left, right = ({*_rows(axes, makers, o.node)} for o in made.operands)
            over = _atoms(made.over)
            shared = _atoms(made.operands[0].free) & _atoms(made.operands[1].free) & left & right - over
            if not shared or shared & (self.query_groups | self.head_dims):
                continue
            self.kv_heads |= shared
            features = over & left & right or (_atoms(made.operands[1].free) & right - over)
            self.head_dims |= features - self.kv_heads - self.query_groups

    def _mix(self, made: Contraction, zeros: Zeros) -> None:
        heads = self.kv_heads | self.query_groups
        for operand in made.operands:
            live = _atoms(operand.free) & zeros.of_node.get(operand.node.name, frozenset())
            self.head_dims |= live - heads


def _rows(axes: Axes, makers: Mapping[fx.Node, Operand], node: fx.Node) -> Iterator[Axis]:
    """What the projections behind a value have in their rows; convolutions of what they made are passed."""
    stack, seen = [node], {node}
    while stack and len(seen) < _NEAR:
        current = stack.pop()
        if current in makers:
            yield from _atoms(makers[current].free)
            if traits_of(current).role is not Role.CONVOLUTION:
                continue
        sources = [n for n in current.all_input_nodes if n in axes.from_inputs and n not in seen]
        seen.update(sources)
        stack += sources


def _paired(atom: Axis, owned: Sequence[_Slice]) -> bool:
    """Whether a unit owns two places of a head: laid half by half, or side by side."""
    return any(_pair_in(resolve(s.expression), atom) for s in owned)


def _pair_in(dim: Dim, atom: Axis) -> bool:
    if isinstance(dim, Concat):
        return _adjacent(dim, atom) or any(_pair_in(p, atom) for p in dim.parts)
    if isinstance(dim, Product):
        for place, factor in enumerate(dim.factors[:-1]):
            if factor is atom and _constant(dim.factors[place + 1]):
                return True
        return any(_pair_in(f, atom) for f in dim.factors)
    return False


def _adjacent(dim: Concat, atom: Axis) -> bool:
    return any(a is atom and b is atom for a, b in zip(dim.parts, dim.parts[1:], strict=False))


def _constant(dim: Dim) -> bool:
    return isinstance(dim, Concat) and not any(True for _ in atoms(dim))


def _made_and_read(axes: Axes) -> tuple[set[Axis], set[Axis], set[Axis]]:
    """Axes some parameter makes, axes some parameter sums over, and axes of convolution weights."""
    made: set[Axis] = set()
    read: set[Axis] = set()
    convolved: set[Axis] = set()
    kernels: set[Axis] = set()
    for contraction in axes.contractions:
        for operand in contraction.operands:
            if not _is_weight(axes, contraction, operand) or traits_of(contraction.node).chooses:
                continue
            free = _atoms(operand.free)
            made |= free
            read |= _atoms(contraction.over)
            if traits_of(contraction.node).role in (Role.CONVOLUTION, Role.ADAPTED_CONVOLUTION):
                # Channels only: the later dims of the weight are kernel positions.
                convolved |= _atoms(axes.dims(operand.node)[:2])
                kernels |= _atoms(axes.dims(operand.node)[2:])
    return made - kernels, read, convolved
