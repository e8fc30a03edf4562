"""What tells of the owner, against real ones: a bus of the test's own, an X server, processes that compute."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("jeepney")
from farflung.config.idle import IdleSection
from farflung.idle.sensors import Sensors
from farflung.idle.sources import Missing
from farflung.idle.sources.others import CpuOfOthers, own_root, running
from farflung.idle.sources.system_bus import Logind, MeteredNetwork, SystemBus
from farflung.idle.sources.user import X11, UserIdle
from system_bus import FakeBus
from system_bus import system_bus as system_bus

HOG = "import sys; sys.stdout.write('on'); sys.stdout.flush()\nwhile True: pass"


def test_logind_and_networkmanager_are_read_from_the_bus(system_bus: FakeBus) -> None:
    bus = SystemBus()
    idle, metered = Logind(bus), MeteredNetwork(bus)
    system_bus.set_idle(None)
    assert idle() == 0.0
    system_bus.set_idle(300.0)
    assert idle() == pytest.approx(300.0, abs=5)
    for word, is_metered in ((1, 1), (2, 0), (3, 1), (4, 0), (0, 0)):
        system_bus.properties["Metered"] = ("u", word)
        assert metered() == is_metered
    bus.close()


def test_an_odd_answer_or_a_bus_that_ends_is_no_answer_and_a_new_one_is_found(system_bus: FakeBus, tmp_path) -> None:
    bus = SystemBus()
    idle = Logind(bus)
    system_bus.is_odd = True
    assert isinstance(idle(), Missing)
    assert "not a value of type 'b'" in idle().why  # type: ignore[union-attr]
    system_bus.is_odd = False
    assert idle() == pytest.approx(0.0, abs=5)
    system_bus.close()
    found = idle()
    assert isinstance(found, Missing)
    assert "does not answer" in found.why
    (tmp_path / "bus").unlink(missing_ok=True)
    other = FakeBus(tmp_path)
    other.set_idle(77.0)
    assert idle() == pytest.approx(77.0, abs=5)
    other.close()
    bus.close()


def test_what_no_source_tells_is_said_once_with_what_helps(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nowhere")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(psutil, "users", lambda: [])
    sensors = Sensors()
    facts = sensors.read(IdleSection(when_idle=True))
    assert facts.user_idle_s is None
    assert facts.is_metered is None
    assert {"user_idle_s", "is_metered"} <= set(sensors.missing)
    assert "logind: the system bus does not answer" in sensors.missing["user_idle_s"].why
    assert "no longer seen" not in caplog.text
    sensors.close()


def test_a_source_that_falls_silent_is_said_once(system_bus: FakeBus, monkeypatch, caplog) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(psutil, "users", lambda: [])
    sensors, rules = Sensors(), IdleSection(when_idle=True)
    assert sensors.read(rules).user_idle_s == pytest.approx(0.0, abs=5)
    system_bus.close()
    for _ in range(3):
        assert sensors.read(rules).user_idle_s is None
    assert caplog.text.count("no longer seen: keys and mouse") == 1
    sensors.close()


def test_a_terminal_tells_when_it_was_typed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farflung.idle.sources import user

    (tmp_path / "pts").mkdir()
    typed = tmp_path / "pts" / "7"
    typed.touch()
    os.utime(typed, (time.time() - 40, time.time()))
    monkeypatch.setattr(user, "DEV", tmp_path)
    found = [psutil._ntuples.suser("ada", name, "", 0.0, 1) for name in ("pts/7", "../../etc", ":0")]
    monkeypatch.setattr(psutil, "users", lambda: found)
    assert user.terminals() == pytest.approx(40, abs=2)


# --- load ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hog(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes, at the priority that the test asks for."""
    command = ["nice", "-n", str(request.param), sys.executable, "-c", HOG]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(2)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def measured(root: int) -> tuple[float, float]:
    """Percent of others as seen from a process, and as it would be if none of its own were left out."""
    of_others, of_all = CpuOfOthers(root), CpuOfOthers(2**22 + 1)
    time.sleep(2.0)
    return of_others(), of_all()


@pytest.mark.parametrize("hog", [0], indirect=True)
def test_own_processes_are_no_load_of_others(hog: subprocess.Popen[bytes]) -> None:
    before = psutil.Process(hog.pid).cpu_times().user
    others, everything = measured(os.getpid())
    used = psutil.Process(hog.pid).cpu_times().user - before
    assert used > 0.2
    share = 100 * used / 2.0 / (psutil.cpu_count() or 1)
    assert everything - others > 0.6 * share


@pytest.mark.parametrize("hog", [0], indirect=True)
def test_a_process_of_another_program_is(hog: subprocess.Popen[bytes]) -> None:
    before = psutil.Process(hog.pid).cpu_times().user
    others, _ = measured(2**22 + 1)
    share = 100 * (psutil.Process(hog.pid).cpu_times().user - before) / 2.0 / (psutil.cpu_count() or 1)
    assert others > 0.8 * share > 5


@pytest.mark.parametrize("hog", [19], indirect=True)
def test_work_that_gives_way_by_itself_is_none(hog: subprocess.Popen[bytes]) -> None:
    times = psutil.cpu_times()
    found = CpuOfOthers(2**22 + 1)
    time.sleep(1.0)
    percent, after = found(), psutil.cpu_times()
    normal = after.user - times.user + after.system - times.system + after.softirq - times.softirq
    assert after.nice > times.nice
    assert percent == pytest.approx(100 * normal / (psutil.cpu_count() or 1), abs=15)


def test_named_programs_are_found_by_their_file(tmp_path: Path) -> None:
    program = tmp_path / "Some.Long-Name-Of-A-Game"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    wanted = ("some.long-name-of-a-game", "other", "sh.exe")
    assert program.name not in running((program.name,))
    with subprocess.Popen([program, "30"]) as process:
        assert running(wanted[:2]) == {wanted[0]}
        process.kill()
    assert running(()) == frozenset()


def test_this_process_is_the_root_of_a_node_alone() -> None:
    assert own_root() == os.getpid()


# --- an X server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def x_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Xvfb on a display that was free."""
    pytest.importorskip("Xlib")
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed")
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "320x200x8", "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as file:
        number = file.readline().strip()
    assert re.fullmatch(r"\d+", number), "Xvfb did not start"
    monkeypatch.setenv("DISPLAY", f":{number}")
    yield f":{number}"
    server.terminate()
    server.wait()


def test_a_key_in_x11_is_input_and_silence_counts_up(x_server: str) -> None:
    from Xlib import X
    from Xlib.display import Display
    from Xlib.ext.xtest import fake_input

    found = X11()
    time.sleep(1.5)
    idle_s = found()
    assert not isinstance(idle_s, Missing), idle_s
    assert idle_s > 1.0
    typist = Display(x_server)
    for kind in (X.KeyPress, X.KeyRelease):
        fake_input(typist, kind, 38)
    typist.sync()
    after_s = found()
    assert not isinstance(after_s, Missing)
    assert after_s < 0.5
    typist.close()
    user = UserIdle(lambda: 1e6)
    assert user.each()["x11"] < 60
    assert user() < 60
    user.close()
    found.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Xlib closes none that it tried
def test_an_x_server_that_is_not_there_is_told(x_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = X11()
    assert not isinstance(found(), Missing)
    found.close()
    monkeypatch.setenv("DISPLAY", ":9999")
    lost = X11()()
    assert isinstance(lost, Missing)
    assert ":9999" in lost.why
