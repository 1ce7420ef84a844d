"""The systemd unit, as systemd itself reads it, and that its times fit each other and the server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.hub.conductor import ALIVE_S
from server.settings import Settings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "lowkey.service"
GPU = UNIT.with_name("gpu.conf")
MOST_EXPOSED = 2.0
"""The highest exposure that the unit may have, on the scale of `systemd-analyze security`, which ends at 10."""


@pytest.fixture
def installed(tmp_path):
    """A copy of the unit that starts what there is here, with a drop-in for GPUs."""
    unit = tmp_path / UNIT.name
    here = Path(sys.executable).parent / "lowkey-serve"
    unit.write_text(UNIT.read_text().replace("/opt/lowkey/bin/lowkey-serve", str(here)))
    return unit


def analyze(*arguments):
    done = subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (apt install systemd)"
)


@needs_systemd
@pytest.mark.parametrize("gpus", [False, True])
def test_systemd_knows_every_line(installed, gpus):
    if gpus:
        drop_ins = installed.with_name(f"{installed.name}.d")
        drop_ins.mkdir()
        shutil.copy(GPU, drop_ins)
    assert analyze("verify", installed) == (0, "")
    installed.write_text(installed.read_text().replace("ProtectHome=", "ProtectHouse="))
    assert "ProtectHouse" in analyze("verify", installed)[1], "the check above can fail"


@needs_systemd
def test_the_service_has_few_rights(installed):
    code, said = analyze("security", "--offline=yes", f"--threshold={MOST_EXPOSED * 10:.0f}", installed)
    assert code == 0, said


def value(name):
    """The only value of a setting of the unit."""
    (found,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return found


def test_it_is_ended_after_it_has_drained_and_watched_more_slowly_than_it_speaks():
    environment = dict(re.findall(r"(LOWKEY_[A-Z_]+)=(\S+)", UNIT.read_text()))
    assert {name.removeprefix("LOWKEY_").lower() for name in environment} <= set(Settings.model_fields)
    drain = float(environment["LOWKEY_DRAIN_DELAY_S"]) + float(environment["LOWKEY_DRAIN_S"])
    assert float(value("TimeoutStopSec")) >= drain + 10
    assert float(value("WatchdogSec")) >= 10 * ALIVE_S
    assert value("ExecReload") == "/bin/kill -HUP $MAINPID" and value("KillMode") == "mixed"


def test_what_the_server_writes_is_writable():
    directories = {"%S/lowkey": value("StateDirectory"), "%C/lowkey": value("CacheDirectory")}
    assert set(directories.values()) == {"lowkey"}
    written = re.findall(
        r"(?:HOME|XDG_CACHE_HOME|HF_HOME|TRITON_CACHE_DIR|STATE_DIR)=(\S+)", UNIT.read_text()
    )
    assert len(written) == 5
    assert all(path.startswith(tuple(directories)) for path in written)


def test_a_model_that_fails_is_tried_again_and_settings_that_are_wrong_are_not():
    """2 is what lowkey-serve exits with where settings are no good (tests/server/test_start.py)."""
    assert value("Restart") == "on-failure" and value("RestartPreventExitStatus") == "2"
