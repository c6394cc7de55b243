"""Models on disk for the command line, and ``shear``, which runs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shear_tools.cli import main
from tests.traces import shared_traces
from tests.zoo import build

TOKENIZER = {
    "tokenizer.json": '{"version": "1.0"}\n',
    "tokenizer_config.json": '{"model_max_length": 67}\n',
    "chat_template.jinja": "{{ messages }}\n",
}


@dataclass
class Ran:
    """What one run of the command line ended with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, all of it, as JSON."""
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """What a refusal says: one line on stderr, nothing on stdout, exit code 2."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("error: "), self
        assert self.err.count("\n") == 1, self
        assert self.err.endswith("\n"), self
        return self.err.removeprefix("error: ").removesuffix("\n")


Shear = Callable[..., Ran]


@pytest.fixture(scope="module", autouse=True)
def traced_for_all() -> Iterator[None]:
    """Fixtures of a module, too."""
    with shared_traces():
        yield


@pytest.fixture
def shear(capfd: pytest.CaptureFixture[str]) -> Shear:
    """Run the command line in this process."""

    def run(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Ran(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, tokenizer files, and things that are no part of a model."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    build("llama_gqa").save_pretrained(folder)
    for name, text in {**TOKENIZER, "code.py": "raise SystemExit\n", "notes.md": "x"}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="session")
def config_only(llama: Path) -> Path:
    """A folder with the config of the tiny Llama and nothing else."""
    folder = llama.parent / "config"
    folder.mkdir()
    (folder / "config.json").write_text((llama / "config.json").read_text())
    return folder


@pytest.fixture(scope="session")
def pruned(llama: Path) -> Path:
    """What ``prune --ratio 0.2`` makes of the tiny Llama."""
    out = llama.parent / "pruned"
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(llama), "--ratio", "0.2", "-o", str(out)])
    assert ended.value.code == 0
    return out
