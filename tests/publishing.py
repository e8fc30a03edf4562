"""The weights of a model as step 0 of a house, published as a trainer does."""

from pathlib import Path

from safetensors.torch import load_file
from tests.conftest import PATH, RUN, House, named

from farflung.protocol import messages as m
from farflung.weights.publish import Publisher


async def publish_base(house: House, folder: Path, step: int = 0) -> None:
    """Claim and commit a step, the first if none is named, with the weights in this folder."""
    batch = await house.claim_step(step)
    assert batch is not None
    trainer = await house.client("trainer")
    before = (await trainer.get(f"{PATH}/latest", m.Latest)).manifest
    publisher = Publisher(trainer, named("trainer"), RUN, 16)
    tensors = load_file(folder / "model.safetensors")
    about = {"commitment": batch.secret_commitment, "now": house.clock()}
    signed = await publisher.publish(tensors.items(), step=step, parent=before, **about)
    commit = m.Commit(manifest=signed, metrics={}, checkpoint="", probe=b"", probe_before=b"", canaries=[])
    await trainer.post(f"{PATH}/steps/{step}/commit", commit, m.Done)
