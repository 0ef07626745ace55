"""What ``thresher doctor`` finds."""

from pathlib import Path

import pytest

from thresher.launch import doctor
from thresher.launch.doctor import Check
from thresher.pins import PINS


def test_old_python_fails() -> None:
    assert doctor.check_python((3, 10, 2)) == Check("python", "fail", "3.10.2", "use Python 3.11 or newer")
    assert doctor.check_python((3, 12, 0)).state == "ok"


def test_pins_differ_as_a_warning_with_the_tested_version() -> None:
    found = PINS | {"ray": "", "numpy": "1.0"}
    checks = {check.name: check for check in doctor.check_pins(found.__getitem__)}
    assert set(checks) == {"ray", "deepspeed", "numpy"}
    assert (checks["ray"].state, checks["ray"].found) == ("warn", "absent")
    assert checks["numpy"].fix == f"tested with {PINS['numpy']}; 'make setup' installs it"
    assert checks["deepspeed"].state == "ok"


def test_compiler_and_space(tmp_path: Path) -> None:
    assert doctor.check_compiler(lambda _: None).state == "warn"
    assert doctor.check_compiler(lambda name: f"/bin/{name}").found == "/bin/c++"
    assert doctor.check_space("disk", tmp_path, 1, "fix").state == "ok"
    assert doctor.check_space("disk", tmp_path, 1 << 60, "fix").fix == "fix"
    assert doctor.check_space("disk", tmp_path / "nowhere", 1, "fix").found.endswith("is absent")


def test_a_trial_that_crashes_or_hangs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.tried("x", "print('fine')", "fix") == Check("x", "ok", "fine")
    crashed = doctor.tried("x", "import os; os.abort()", "fix")
    assert (crashed.state, crashed.found) == ("fail", "exit code -6: no output")
    assert doctor.tried("x", "import no_such_module", "fix").found.endswith("No module named 'no_such_module'")
    monkeypatch.setattr(doctor, "LIMIT_S", 1)
    assert doctor.tried("x", "import time; time.sleep(60)", "fix").found == "no answer within 1 s"


def test_kernels_that_were_not_built_or_are_stale_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, state in [("compiled, AVX2", "ok"), ("not built, a slow reference works; install g++", "warn")]:
        monkeypatch.setattr(doctor, "KERNELS_TRIAL", f"print({said!r})")
        check = doctor.check_kernels()
        assert check.state == state
    assert (check.found, check.fix) == ("not built, a slow reference works", "install g++")
    monkeypatch.undo()
    assert doctor.check_kernels().found.startswith("compiled, ")


def test_processes_that_cannot_talk_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    check = doctor.check_processes()
    assert check.state == "fail"
    assert "did not meet" in check.found
    assert "GLOO_SOCKET_IFNAME" in check.fix


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_exit_code_tells_failure(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "all_checks", lambda: [Check("fish", state, "found", "mend it")])
    assert doctor.diagnose() == code
    assert "mend it" in capsys.readouterr().out
