"""A generator in a process of its own that was told to do without the processor's newest instructions.

The instructions that torch and oneDNN compute with are chosen once, when a process starts; so a machine that has
AVX-512 can be an older one only in another process. One call, one process: requests go in and completions come out as
msgpack.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from farflung.engine.base import Completion, Request
from farflung.protocol.errors import ConfigError
from farflung.protocol.numerics import Quantiser

OLDER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}
TIMEOUT_S = 1800.0


class Job(msgspec.Struct):
    """The input of such a process."""

    model: str
    dtype: str
    quantiser: Quantiser
    rows: int
    requests: list[Request]


class OlderEngine:
    """Generates only."""

    def __init__(self, model: str, dtype: str, quantiser: Quantiser = "") -> None:
        self.model, self.dtype, self.max_rows = model, dtype, 16
        self.quantiser: Quantiser = quantiser

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate every request, in order. Raises ConfigError where such a process ends in an error."""
        job = msgspec.msgpack.encode(Job(self.model, self.dtype, self.quantiser, self.max_rows, list(requests)))
        command = [sys.executable, "-m", "farflung.ops.older_engine"]
        done = subprocess.run(command, input=job, capture_output=True, env=os.environ | OLDER, timeout=TIMEOUT_S)
        if done.returncode:
            why = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
            raise ConfigError(f"generating with older instructions ({OLDER}) failed: {why}")
        return msgspec.msgpack.decode(done.stdout, type=list[Completion])


def _main() -> None:
    """Read a `Job`, write completions."""
    from farflung.ops.calibrate import engine_of
    from farflung.tasks.create_run import Model

    job = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Job)
    engine = engine_of(Model(job.model), job.dtype, threads=1, quantiser=job.quantiser)
    engine.max_rows = job.rows
    sys.stdout.buffer.write(msgspec.msgpack.encode(engine.generate(job.requests)))


if __name__ == "__main__":
    _main()
