"""Passes as text: ``select-uniform{ratio=0.2 round_to=8}``, the spelling that they print.

Names and options are those of the classes: every concrete Analysis or Rewrite has a spelling, and its dataclass fields
are its options. A name is known once its class is imported: ``shear_passes.pipelines`` reads whole pipelines.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from shear_ir.errors import PlanError
from shear_ir.manager import Analysis, Pass, Rewrite

P = TypeVar("P", bound=Pass)

_OPENING, _CLOSING = "{[", "}]"
_SPELLED = re.compile(r"(?P<name>[A-Za-z][\w-]*)\s*(?:\{(?P<options>.*)\})?", re.DOTALL)


def known_passes() -> Mapping[str, type[Pass]]:
    """Every pass of ours that is imported, by the name it is spelled with, sorted."""
    ours = [
        cls
        for cls in (*_below(Analysis), *_below(Rewrite))
        if cls.__module__.startswith(("shear_passes.", "shear_backends."))
    ]
    found = {cls.name(): cls for cls in ours if not getattr(cls.run, "__isabstractmethod__", False)}
    return types.MappingProxyType(dict(sorted(found.items())))


def parse_pass(text: str) -> Pass:
    """One pass, as in ``select-uniform{ratio=0.2 kinds=[ffn,kv_head]}``; raises ``PlanError``."""
    spelled = _SPELLED.fullmatch(text.strip())
    if spelled is None:
        raise PlanError(f"'{text}' is not a pass: write name or name{{option=value option=value}}")
    cls = known_passes().get(spelled["name"])
    if cls is None:
        raise PlanError(f"there is no pass '{spelled['name']}'; {_near(spelled['name'], known_passes())}")
    return with_options(cls, spelled["options"] or "")


def with_options(cls: type[P], text: str) -> P:
    """A pass with the options that ``text`` spells, as in ``ratio=0.2 kinds=[ffn,kv_head]``; raises ``PlanError``."""
    options: dict[str, Any] = {}
    for option in filter(None, split_outside(text, None)):
        key, equals, value = option.partition("=")
        if not equals:
            raise PlanError(f"'{option}' is not an option of {cls.name()}: write name=value")
        if key in options:
            raise PlanError(f"{cls.name()} is given {key} twice")
        options[key] = _value(cls, key, value)
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in options]
    if missing:
        raise PlanError(f"{cls.name()} needs {missing[0]}: write {cls.name()}{{{missing[0]}=value}}")
    return cls(**options)


def _below(cls: type[Analysis[Any] | Rewrite]) -> Iterable[type[Analysis[Any] | Rewrite]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _below(sub)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(cls: type[Pass], key: str, text: str) -> Any:
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    if key not in fields:
        said = _near(key, fields) if fields else "it has none"
        raise PlanError(f"{cls.name()} has no option '{key}'; {said}")
    wanted = typing.get_type_hints(cls)[key]
    try:
        return _read(text, wanted)
    except ValueError as failure:
        raise PlanError(f"{cls.name()} takes {key}={_word(wanted)}, not {key}={text}") from failure


def _read(text: str, wanted: Any) -> Any:
    """``text`` as a value of the type ``wanted``; raises ``ValueError`` where it is none."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return _read_any(text, sorted(arguments, key=lambda t: t is str))
    if origin is typing.Literal:
        return {str(choice): choice for choice in arguments}[text] if text in map(str, arguments) else _refuse(text)
    if origin in (tuple, list, frozenset):
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError(text)
        return origin(_read(item, arguments[0]) for item in split_outside(text[1:-1], ",") if item)
    if wanted is bool:
        return {"True": True, "False": False}[text] if text in ("True", "False") else _refuse(text)
    if wanted is type(None):
        return None if text == "None" else _refuse(text)
    if isinstance(wanted, type) and issubclass(wanted, Pass):
        # A bare word stays a word: ``importance=magnitude`` is the name of a criterion.
        made = parse_pass(text) if "{" in text else _refuse(text)
        return made if isinstance(made, wanted) else _refuse(text)
    if wanted is str and text.startswith('"'):
        return json.loads(text)
    return wanted(text) if wanted in (int, float, str) else _refuse(text)


def _read_any(text: str, choices: Iterable[Any]) -> Any:
    for choice in choices:
        try:
            return _read(text, choice)
        except ValueError:
            continue
    return _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _word(wanted: Any) -> str:
    """A type as a person would write a value of it."""
    if typing.get_origin(wanted) in (tuple, list, frozenset):
        item = _word(typing.get_args(wanted)[0])
        return f"[{item},{item}]"
    if choices := typing.get_args(wanted):
        return "|".join(_word(c) if isinstance(c, type) or typing.get_args(c) else str(c) for c in choices)
    words = {bool: "True|False", int: "NUMBER", float: "NUMBER", str: "WORD"}
    return words.get(wanted) or str(wanted.__name__).lower()


def split_outside(text: str, at: str | None) -> list[str]:
    """``text`` cut at ``at`` (white space when None) outside of brackets and quotes; raises ``PlanError``."""
    parts, start, depth, quoted = [], 0, [], False
    place = 0
    while place < len(text):
        sign = text[place]
        if sign == '"':
            quoted = not quoted
        elif quoted and sign == "\\":
            place += 1
        elif not quoted and sign in _OPENING:
            depth.append(_CLOSING[_OPENING.index(sign)])
        elif not quoted and sign in _CLOSING and (not depth or depth.pop() != sign):
            raise PlanError(f"'{text}' has a '{sign}' that closes nothing")
        elif not quoted and not depth and (sign == at if at else sign.isspace()):
            parts.append(text[start:place])
            start = place + 1
        place += 1
    if depth or quoted:
        raise PlanError(f"'{text}' lacks a closing {'quote' if quoted else depth[-1]}")
    return [*parts, text[start:]]


def _near(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
