"""Help, versions, faults and interrupts: what ``main`` does around every command."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shear_ir
from shear_tools.cli import main
from tests.cli.conftest import Shear

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "visualize", "groups", "explain", "dump", "prune", "verify", "opt", "knowledge", "lorashear", "recover", "sweep", "eval", "project",
]  # fmt: skip
MLP = "tests.cli.factories:mlp"


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "passes"), str(ROOT / "backends"), str(ROOT / "tools")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(shear: Shear, command: str) -> None:
    ran = shear(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Example:\n\n    shear-ir {command} ./my-" in ran.out


def test_help_lists_every_command_and_no_argument_asks_for_it(shear: Shear) -> None:
    ran, bare = shear("--help"), shear()
    commands = ran.out.partition("Commands:\n")[2].partition("\n\n")[0]
    listed = [line.split()[0] for line in commands.splitlines() if line.startswith("  ")]
    assert listed == COMMANDS
    assert (ran.code, bare.code, bare.out) == (0, 2, ran.out)


def test_help_loads_nothing_heavy() -> None:
    code = """
        import sys
        from shear_tools.cli import main
        try:
            main(["prune", "--help"])
        except SystemExit:
            print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
    """
    program = "\n".join(line[8:] for line in code.splitlines())
    ran = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_the_version_is_that_of_the_package(shear: Shear) -> None:
    assert shear("--version").out == f"shear-ir {shear_ir.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prun",), "No such command 'prun'"),
        (("prune",), "Missing argument 'MODEL'; see shear-ir prune --help"),
        (("groups", "a", "b"), "Got unexpected extra argument"),
        (("groups", "a", "--fast"), "No such option: --fast"),
        (("opt", "a"), "Missing option '-p' / '--passes'"),
    ],
)
def test_a_mistyped_command_is_one_sentence(shear: Shear, arguments: tuple[str, ...], said: str) -> None:
    assert said in shear(*arguments).sentence


def test_a_fault_is_one_sentence_and_its_traceback_only_for_debug(
    shear: Shear, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the sky\nfell")

    monkeypatch.setattr("shear_tools.api.pipeline.groups", broken)
    ran = shear("groups", MLP)
    said = "error: shear-ir failed with ZeroDivisionError (the sky fell): please report it with what --debug shows\n"
    assert (ran.code, ran.out, ran.err) == (1, "", said)
    with pytest.raises(SystemExit):
        main(["--debug", "groups", MLP])
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith(said)


def test_a_package_that_is_not_installed_is_named(shear: Shear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "shear_training.lora", raising=False)
    monkeypatch.delitem(sys.modules, "shear_tools.workflow.run", raising=False)
    ran = shear("lorashear", MLP, "--ratio", "0.2", "--data", "README.md", "-o", "nowhere")
    assert ran.code == 2
    assert ran.sentence == "this needs peft, which is not installed: pip install 'shear-ir[train]'"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m shear_tools --help | true; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, check=False)
    assert ran.stderr == ""


SLOW = """
import time
from pathlib import Path
from tests.zoo import MLP

class Slow(MLP):
    def state_dict(self, *args, **kwargs):
        if any(Path("outs").iterdir()):
            Path("saving").touch()
            time.sleep(120)
        return super().state_dict(*args, **kwargs)

def model():
    return Slow().eval()
"""


def test_ctrl_c_while_saving_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "outs").mkdir()
    command = [sys.executable, "-m", "shear_tools", "prune", "slow:model", "--ratio", "0.25", "-o", "outs/small"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that runs the tests in the background may have told its children to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        until = time.monotonic() + 100
        while not (tmp_path / "saving").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert len(list((tmp_path / "outs").iterdir())) == 1
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert list((tmp_path / "outs").iterdir()) == []


@pytest.mark.parametrize(("factory", "number"), [("stopped", signal.SIGTERM), ("hung_up", signal.SIGHUP)])
def test_a_termination_is_an_interrupt(shear: Shear, tmp_path: Path, factory: str, number: signal.Signals) -> None:
    # nohup, under which tests may run, has it ignored, and so it stays.
    around = signal.signal(number, signal.SIG_DFL)
    try:
        ran = shear("prune", f"tests.cli.factories:{factory}", "--ratio", "0.25", "-o", tmp_path / "out")
        assert (ran.code, ran.out, ran.err) == (128 + number, "", "interrupted\n")
        assert list(tmp_path.iterdir()) == []
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, around)


def test_a_run_that_is_killed_while_it_saves_can_be_run_again(
    shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--ratio", "0.25", "-o", tmp_path / "out", "--plan-out", tmp_path / "plan.json")
    with monkeypatch.context() as patched:
        patched.setattr("shear_tools.api.pipeline.save", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        assert shear("prune", MLP, *options).code == 143
    # OUT says that all is done, so the plan is there before it.
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert shear("prune", MLP, *options).code == 0
    assert (tmp_path / "plan.json").read_text() == (tmp_path / "out" / "plan.json").read_text()


def test_a_disk_that_is_full_is_told(shear: Shear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.json")

    monkeypatch.setattr("shear_ir.plans.Plan.to_json", full)
    out = tmp_path / "plan.json"
    ran = shear("prune", "tests.cli.factories:mlp", "--ratio", "0.25", "--dry-run", "--plan-out", out)
    assert ran.sentence == "a.json cannot be used: No space left on device"
