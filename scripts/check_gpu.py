"""Check farflung on your GPU: about ten minutes, then a table to send back.

    python scripts/check_gpu.py                      # the best device here
    python scripts/check_gpu.py --device cuda:1 --only noise flips

Noise, speed, agreement with the CPU, determinism, memory, publication, and a small run of all roles on the device, each
as `gpu_sections.py` says. A section that fails is a row of the table; the others go on. The table goes to stdout, and
after it one line of JSON with the same rows; progress goes to stderr. Ends with 1 if a section failed or what must hold
did not: the noise's bits, tokens equal but for rounding, the run. `--tiny` measures a tiny model, to see that it all
works. `--device second` is for development: a device that the tests make themselves, computed on the CPU.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("noise", "decode", "replay", "flips", "exact", "step", "publish", "run")
BEGAN = time.monotonic()


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{time.monotonic() - BEGAN:6.1f} s  {text}\n")
    sys.stderr.flush()


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps, xpu; second for development")
    made.add_argument("--tiny", action="store_true", help="a tiny model instead of the largest that fits, up to 1.5B")
    made.add_argument("--only", nargs="+", choices=NAMES, metavar="SECTION", help=f"some of: {', '.join(NAMES)}")
    return made


def main() -> int:
    """Measure, print, and say whether all held that must."""
    asked = parser().parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it where kernels are deterministic
    say("importing torch and transformers")
    import gpu_sections as sections
    from gpu_setup import setup_on

    setup = setup_on(_device(asked.device), is_tiny=asked.tiny)
    facts = _facts(setup)
    say(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows: list[dict[str, Any]] = []
    for name in asked.only or NAMES:
        say(f"{name}: {sections.SECTIONS[name].__doc__}")
        for row in sections.measured(sections.SECTIONS[name], setup):
            say(f"{name}: {row.what}: {row.found}")
            rows.append({"section": name, **row._asdict()})
    sys.stdout.write(f"{table(facts, rows)}\n{json.dumps({**facts, 'rows': rows})}\n")
    return int(any(row["holds"] is False for row in rows))


def _device(name: str) -> Any:
    """The device of a name, in torch's terms."""
    if name == "second":
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from torch import device

        from second_device import FAR as name  # made as it is imported

        return device(name)
    from farflung.numerics.devices import pick
    from farflung.protocol.errors import ConfigError

    try:
        return pick(name)
    except ConfigError as error:
        sys.exit(str(error))


def _facts(setup: Any) -> dict[str, Any]:
    """On what, and with which model, all of it is measured."""
    import torch

    from farflung.numerics.devices import accelerator, name_of

    found = accelerator(setup.device)
    facts = {
        "device": found.name or f"{setup.device} ({platform.processor() or platform.machine()})",
        "memory_gb": round(found.memory_bytes / 1e9, 1),
        "driver": ", ".join(part for part in (found.driver, _nvidia_driver()) if part),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "model": f"{setup.shape.name}, {setup.shape.parameters:,} random parameters",
        "arithmetic": name_of(setup.dtype),
    }
    return {name: value for name, value in facts.items() if value}


def _nvidia_driver() -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else ""


def table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The facts and the rows as people read them, in Markdown."""
    marks = {None: "", True: "yes", False: "NO"}
    lines = [(row["section"], row["what"], row["found"], marks[row["holds"]]) for row in rows]
    cells = [("section", "what", "found", "holds"), *lines]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    shown = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells]
    shown.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join([*(f"{name}: {value}" for name, value in facts.items()), "", *shown])


if __name__ == "__main__":
    raise SystemExit(main())
