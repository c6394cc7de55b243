"""Colours: one hue per kind of group, told apart by colour-blind eyes, with shades that tell neighbours apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shear_passes.analysis.find_groups import Group
from shear_passes.analysis.roles import Kind

HUES: Mapping[Kind, str] = {
    "ffn": "#e69f00",
    "kv_head": "#0072b2",
    "query_group": "#56b4e9",
    "head_dim": "#009e73",
    "rotary_pair": "#f0e442",
    "residual": "#cc79a7",
    "lora_rank": "#7b3294",
    "expert": "#332288",
    "conv_channel": "#44aa99",
    "vocab": "#999933",
    "block": "#4b0055",
    "attention_block": "#aa4499",
    "mlp_block": "#661100",
    "other": "#a6761d",
}
"""Okabe and Ito's palette, filled up from Paul Tol's; red is left to what goes wrong and to what goes."""

FROZEN = "#dfdfdf"
FROZEN_INK = "#5a5a5a"
DIMMED = "#f6f6f6"
RED = "#c8102e"
LINE = "#8c8c8c"
DARK = "#111111"
LIGHT = "#ffffff"

SHADES = (0.0, 0.3, 0.55)


class Palette:
    """The colour of each group: grey when frozen, else its kind's hue in the shade of its place among its kind.

    Groups that are not given are out of focus: nearly white.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self._fill: dict[str, str] = {}
        places: dict[Kind, int] = {}
        for group in groups:
            if not group.prunable:
                self._fill[group.name] = FROZEN
                continue
            place = places[group.kind] = places.get(group.kind, -1) + 1
            self._fill[group.name] = lighter(HUES[group.kind], SHADES[place % len(SHADES)])

    def fill(self, group: Group) -> str:
        """The background of the group's cells."""
        return self._fill.get(group.name, DIMMED)

    def line(self, group: Group) -> str:
        """The colour of a line that carries the group's axis: its hue, dark enough for white paper."""
        return darker(HUES[group.kind], 0.15) if group.prunable else LINE


def ink(fill: str) -> str:
    """Black or white, whichever is easier to read on ``fill``."""
    if fill in (FROZEN, DIMMED):
        return FROZEN_INK
    return DARK if contrast(DARK, fill) >= contrast(LIGHT, fill) else LIGHT


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2, 1 to 21; text wants 4.5."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lighter(colour: str, share: float) -> str:
    """``colour`` mixed with a share of white."""
    return _mixed(colour, 255, share)


def darker(colour: str, share: float) -> str:
    """``colour`` mixed with a share of black."""
    return _mixed(colour, 0, share)


def _mixed(colour: str, to: int, share: float) -> str:
    return "#" + "".join(f"{round(c + (to - c) * share):02x}" for c in _channels(colour))


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
