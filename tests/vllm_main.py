"""A process that is started as a vLLM server is, with the same arguments; a model of chance computes."""

import argparse
import json
import os
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from farflung.engine.local import LocalEngine
from vllm_server import StandIn


class Health(StandIn):
    """One that says where it is."""

    def answer(self, path, body):
        return (200, {}) if path == "/health" else super().answer(path, body)


def main() -> None:
    made = argparse.ArgumentParser(allow_abbrev=False)
    made.add_argument("--model", type=Path)
    made.add_argument("--port", type=int)
    made.add_argument("--host")
    asked, rest = made.parse_known_args(sys.argv[1:])
    if os.environ.get("FAKE_VLLM_FAILS"):
        raise SystemExit("CUDA out of memory, or so")
    assert asked.host == "127.0.0.1"
    assert os.environ["VLLM_SERVER_DEV_MODE"] == "1"
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**json.loads((asked.model / "config.json").read_text()))
    )
    server = Health(LocalEngine(model.eval()), asked.port)
    server.sampler.has_processor = "farflung.engine.vllm_noise:SeededNoise" in rest
    server.flaws.noise = "another" if server.sampler.has_processor else "seeded"
    server.serve_forever(0.05)


main()
