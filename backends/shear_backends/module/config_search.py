"""The search for the config fields that give a model the shapes of a sheared one, by building it on the meta device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from shear_backends.module.config_builds import Shapes, asked_for, built_shapes
from shear_backends.module.config_fields import Changes, FieldPath, changed, fields_of, objection

_BUILDS = 96
_TOGETHER = 24
_GUESSES = 64


def changed_shapes(model: nn.Module, changes: Mapping[FieldPath, int]) -> Shapes | None:
    """The shapes of a model of this class with the given fields changed; None when the class refuses them."""
    try:
        config = changed(model.config, changes)
    except Exception:  # a config class may refuse a field before any constructor does
        return None
    return built_shapes(type(model), config)


class Search:
    """Descends from the config in which every field follows its dim to the least changes that give the target shapes.

    ``sizes``: the sizes that an old size has become. ``depth``: fields that make the model shorter while searching.
    """

    def __init__(
        self, model: nn.Module, target: Shapes, sizes: Mapping[int, set[int]], depth: Changes | None = None
    ) -> None:
        self.model = model
        self.sizes = sizes
        self.depth = depth or {}
        self.builds: dict[frozenset[tuple[FieldPath, int]], Shapes | None] = {}
        self.base = self._build({})
        self.target = {n: s for n, s in target.items() if n in (self.base or ())} if depth else target
        self.fields = dict(fields_of(model.config))

    def fits(self, changes: Mapping[FieldPath, int]) -> bool:
        """Whether the changes give exactly the target shapes."""
        return self._distance(changes) == 0.0

    def run(self) -> Changes | None:
        """The fewest fields to change; None when no change of fields gives the shapes.

        Where the class objects to them, fields that it checks against these are changed with them, if that helps.
        """
        if self.base is None:
            return None
        pins = self._pins(self._silent(), probing=True)
        found = self._found(pins)
        if found is None:
            pins |= self._pins([p for p in self._silent() if p not in pins], probing=False)
            found = self._found(pins, alone=False)
        return None if found is None else self._accepted(found, pins)

    def guess(self, like: Mapping[FieldPath, int]) -> Changes | None:
        """Changes of these fields alone that the class accepts and that give the shapes, each to what its size became.

        Quick, for sizes beside others of which ``like`` is the answer; None where no such guess fits.
        """
        news: list[list[int | None]] = []
        for path, told in like.items():
            old = self.fields.get(path)
            if isinstance(old, int):
                news.append([*sorted(self.sizes.get(old, set()) - {old}), None])
            else:
                news.append([told, *sorted(self.sizes.get(told, set()) - {told})])
        for picks in itertools.islice(itertools.product(*news), _GUESSES) if like else ():
            changes = {path: new for path, new in zip(like, picks, strict=True) if new is not None}
            if not objection(changed(self.model.config, changes)) and self.fits(changes):
                return changes
        return None

    def also(self, found: Mapping[FieldPath, int]) -> Iterator[Changes]:
        """Changes that give the shapes as ``found`` does, and each change one number more that has such a size.

        For a number that no shape tells, such as the heads of a width that they only share out.
        """
        for path, value in self.fields.items():
            if isinstance(value, int) and path not in found:
                for new in sorted(self.sizes.get(value, set()) - {value}):
                    if self.fits({**found, path: new}):
                        yield {**found, path: new}

    def _found(self, pins: Changes, alone: bool = True) -> Changes | None:
        """``alone``: only fields that move dims by themselves, or that the class does not let be changed alone."""
        options: dict[FieldPath, list[int]] = {}
        for path, value in {**self.fields, **pins}.items():
            news = sorted(n for n in self.sizes.get(value, ()) if n != value) if isinstance(value, int) else []
            news = [n for n in news if self._helps({**pins, path: n}, alone)]
            if news:
                options[path] = news
        changes = self._descend({**pins, **{path: news[0] for path, news in options.items()}}, options, pins)
        return _least(changes, [*pins, *changes], self.fits) if self.fits(changes) else None

    def _accepted(self, found: Changes, pins: Mapping[FieldPath, int]) -> Changes:
        """``found`` with what the class wants changed together with it; as it is where nothing pleases the class."""

        def pleases(changes: Mapping[FieldPath, int]) -> bool:
            return not objection(changed(self.model.config, changes)) and self.fits(changes)

        if pleases(found):
            return found
        ways: list[Changes] = [{**found, path: pins[path]} for path in pins if path not in found]
        ways += [*self.also(found)][:_TOGETHER]
        ways.append({path: value for way in reversed(ways) for path, value in way.items()})
        way = next((way for way in ways if pleases(way)), None)
        return found if way is None else _least(way, [p for p in way if p not in found], pleases)

    def _descend(self, changes: Changes, options: Mapping[FieldPath, list[int]], pins: Changes) -> Changes:
        """One field at a time to the value nearest to the target, until none helps; its old value is one of them."""
        best = self._distance(changes)
        better, most = True, len(self.builds) + _BUILDS
        while better and best > 0.0 and len(self.builds) < most:
            better = False
            for path, news in options.items():
                kept = {p: v for p, v in changes.items() if p != path or path in pins}
                tries = [{**kept, path: pins[path]} if path in pins else kept]
                tries += [{**kept, path: new} for new in news if new != changes.get(path)]
                found, nearest = min(((self._distance(t), i) for i, t in enumerate(tries)), default=(best, 0))
                if found < best:
                    changes, best, better = tries[nearest], found, True
        return changes

    def _silent(self) -> list[FieldPath]:
        """Fields that were not set (``head_dim=None``, ``n_inner=None``) or that the constructor only asked for."""
        missed = asked_for(type(self.model), changed(self.model.config, self.depth))
        unset = [path for path, value in self.fields.items() if value is None]
        return [*unset, *((name,) for name in missed if (name,) not in self.fields)]

    def _pins(self, silent: list[FieldPath], *, probing: bool) -> Changes:
        """Silent fields, each at the value that changes nothing, so that a field it was derived from can change alone.

        With ``probing`` those of which a probe moves shapes; else those that a class does not let be probed.
        """
        probe = 1 + max(self.sizes, default=0)
        pins: Changes = {}
        for path in silent:
            probed = self._build({path: probe})
            if probed == self.base or (probed is None) == probing:
                continue
            moved = list(self._moved(probed or {}))
            likely = {old * probe // new for old, new in moved if old * probe % new == 0}
            for value in (*sorted(likely), *sorted(set(self.sizes) - likely)):
                if self._build({path: value}) == self.base:
                    pins[path] = value
                    break
        return pins

    def _helps(self, changes: Changes, alone: bool) -> bool:
        """Whether a change moves dims, and only such as have to move; a build that fails says nothing against it."""
        shapes = self._build(changes)
        if shapes is None:
            return True
        assert self.base is not None
        if set(shapes) != set(self.base) or any(len(shapes[n]) != len(self.base[n]) for n in shapes):
            return False
        moved = [(n, d) for n, shape in shapes.items() for d, s in enumerate(shape) if s != self.base[n][d]]
        return (bool(moved) or not alone) and all(self.target[n][d] != self.base[n][d] for n, d in moved)

    def _moved(self, shapes: Shapes) -> Iterator[tuple[int, int]]:
        """Old and new size of every dim that differs from the base."""
        assert self.base is not None
        for name, shape in shapes.items():
            for old, new in zip(self.base.get(name, ()), shape, strict=False):
                if old != new:
                    yield old, new

    def _distance(self, changes: Mapping[FieldPath, int]) -> float:
        """How far the built shapes are from the target; 0 only for the target itself.

        Logarithms, so that a dim that two fields make together (heads x head_dim) comes nearer by either of them.
        """
        shapes = self._build(changes)
        if shapes is None or {n: len(s) for n, s in shapes.items()} != {n: len(s) for n, s in self.target.items()}:
            return math.inf
        pairs = (p for n, shape in shapes.items() for p in zip(shape, self.target[n], strict=True))
        return sum(abs(math.log(a / b)) if a and b else 1.0 for a, b in pairs if a != b)

    def _build(self, changes: Mapping[FieldPath, int]) -> Shapes | None:
        """The shapes of a model built with ``changes``; None when the class refuses them."""
        key = frozenset(changes.items())
        if key not in self.builds:
            self.builds[key] = changed_shapes(self.model, {**changes, **self.depth})
        return self.builds[key]


def _least(
    changes: Changes, able: list[FieldPath], holds: Callable[[Mapping[FieldPath, int]], bool]
) -> Changes:  # fmt: skip
    """``changes`` without those of ``able`` that ``holds`` does not need."""
    for path in dict.fromkeys(able):
        without = {p: v for p, v in changes.items() if p != path}
        if path in changes and holds(without):
            changes = without
    return changes
