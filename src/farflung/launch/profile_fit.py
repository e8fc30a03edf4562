"""Numerics profiles that fit an embedded run: those of the package where they do, else made before the run begins.

The machine that starts an embedded run is trusted by it, so it may calibrate: for the model, temperature and length of
the run, on the device that its own nodes compute on. A profile that the operator named by its file is never replaced:
where it does not fit, the coordinator refuses it in a sentence.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from farflung.config import Config, save
from farflung.launch.forkserver import die_with_parent
from farflung.launch.restarts import REFUSED
from farflung.protocol.errors import ConfigError
from farflung.tasks.create_run import misfit
from farflung.trust.evidence import Profile
from farflung.trust.profiles import load_profile, names

TOKENS = 8000
"""Tokens that are generated for a profile, in large batches."""
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/dxg")
"""What a machine with an accelerator has: of NVIDIA, of AMD, of these and Intel, under Windows."""


async def calibrated(config: Config, say: Callable[[str], None]) -> Config:
    """The configuration with profiles that fit, made under the run's folder where none does. Raises ConfigError."""
    profile, *profiles = [await _fitting(config, name, say) for name in (config.model.profile, *config.model.profiles)]
    model = config.model.model_copy(update={"profile": profile, "profiles": tuple(profiles)})
    return config.model_copy(update={"model": model})


async def _fitting(config: Config, name: str, say: Callable[[str], None]) -> str:
    if name not in names():
        return name
    made, profile = config.folder / "profiles" / f"{name}.json", load_profile(name)
    why = misfit(config, profile) or await _other_device(config, profile)
    if why and not made.exists():
        say(f"numerics profile {name} was calibrated for {why}: calibrating on this machine, {TOKENS} tokens")
        await _calibrate(config, name, made)
    return str(made.resolve()) if why else name


async def _other_device(config: Config, profile: Profile) -> str:
    """In words, the device of a profile and the one of this run's own nodes, where they differ."""
    if config.worker.engine != profile.engine or not config.swarm.workers:
        return ""
    device = await _device(config.worker.device)
    return f"{profile.device}, this run's nodes compute on {device}" if device != profile.device else ""


async def _device(setting: str) -> str:
    """The kind of device that a setting means here. Torch is asked, in a process of its own, only where it may be one
    that is not the processor."""
    if setting != "auto":
        return setting.partition(":")[0]
    if sys.platform != "darwin" and not any(Path(driver).exists() for driver in DRIVERS):
        return "cpu"
    command = (sys.executable, "-c", "from farflung.numerics.devices import best; print(best())")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    if process.returncode:
        raise ConfigError("torch cannot say which devices are here (see above); name one in worker.device")
    return said.decode().strip()


async def _calibrate(config: Config, name: str, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = out.with_suffix(".config.json")
    save(config, settings)
    command = (sys.executable, "-m", "farflung.ops.calibrate", str(settings), name, str(out), str(TOKENS))
    log = out.with_suffix(".log")
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, preexec_fn=die_with_parent
        )
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
    if code == REFUSED:  # the last line is its sentence
        raise ConfigError(log.read_text(errors="replace").strip().splitlines()[-1])
    if code:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
        raise ConfigError(f"numerics profile {name} cannot be calibrated on this machine: {last}; its log is {log}")
