"""Graphviz source to a file whose extension says what it is, there whole or not at all."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import graphviz

from shear_backends.draw.dot import FONT
from shear_ir.errors import SaveError
from shear_ir.writing import write_bytes

FORMATS = ("svg", "png", "pdf", "dot")
_FAMILY = f"{FONT}, Helvetica, 'Liberation Sans', sans-serif"


def render(text: str, path: Path) -> Path:
    """Write the picture; raises ``SaveError`` for another extension, a missing folder, or a missing ``dot``."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise SaveError(f"{path} cannot be drawn: its extension must be one of .{', .'.join(FORMATS)}")
    if not path.parent.is_dir():
        raise SaveError(f"{path} cannot be written: there is no folder {path.parent}")
    _write(path, text.encode() if kind == "dot" else _drawn(text, kind))
    return path


def _drawn(text: str, kind: str) -> bytes:
    try:
        picture = graphviz.Source(text).pipe(format=kind, quiet=True)
    except graphviz.ExecutableNotFound:
        raise SaveError(
            f"drawing .{kind} takes the program dot, which is not installed: install graphviz "
            "(apt-get install graphviz, brew install graphviz), or write a .dot file and draw it elsewhere"
        ) from None
    except subprocess.CalledProcessError as failure:
        said = (failure.stderr or b"").decode(errors="replace").strip()
        raise SaveError(f"dot failed with exit code {failure.returncode}: {said}") from failure
    assert isinstance(picture, bytes)
    return tidy_svg(picture.decode()).encode() if kind == "svg" else picture


def tidy_svg(text: str) -> str:
    """Graphviz' SVG with tooltips that every browser shows, no links to nowhere, and fonts named once."""
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"<title>(?:n\d+|n\d+&#45;&gt;n\d+|cluster_[^<]*)</title>\n", "", text)
    text = re.sub(r'<g id="a_[^"]*"><a (?:xlink:href="[^"]*" )?xlink:title="([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r"</a>\n</g>", "</g>", text)
    text = text.replace(f' font-family="{FONT}"', "").replace('stroke="transparent"', 'stroke="none"')
    return text.replace("<svg ", f'<svg font-family="{_FAMILY}" ', 1)


def _write(path: Path, content: bytes) -> None:
    try:
        write_bytes(path, content)
    except OSError as failure:
        raise SaveError(f"{path} cannot be written: {failure.strerror}") from failure
