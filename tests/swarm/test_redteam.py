"""Three adversaries against a real swarm: two are caught, each by its own layer, and a lie gains nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]


def test_three_adversaries_end_as_they_must(tmp_path):
    command = [sys.executable, "-m", "farflung", "redteam", str(ROOT / "examples" / "redteam.toml")]
    settings = ["--attacks", "other-prompt,nan,forged-logp", "--run.dir", str(tmp_path)]
    settings += ["--run.steps", "4", "--learn.groups", "8"]
    settings += ["--generate.temperature", "1"]  # which the profiles of the package are for: none is made at the start
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["attack"]: row for row in json.loads((tmp_path / "redteam-redteam.json").read_text())}
    assert (rows["nan"]["outcome"], rows["nan"]["layer"], rows["nan"]["tokens_kept"]) == ("caught", "sanity", 0)
    assert rows["other-prompt"]["outcome"] == "caught"
    assert rows["other-prompt"]["poisoned_tokens_trained"] == 0
    assert rows["forged-logp"]["outcome"] == "worthless"
    assert rows["forged-logp"]["reward_shift"] == 0
