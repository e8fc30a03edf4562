"""`farflung doctor ADDRESS`: try this machine's arithmetic on a run, as a worker does before it works."""

from pathlib import Path

from farflung.audits import self_test
from farflung.engine.arithmetic import Own, choose, dtype_of
from farflung.engine.fit import longest, slots_on
from farflung.engine.local import LocalEngine
from farflung.net.session import Session
from farflung.numerics.devices import pick
from farflung.protocol.messages import SelfTest
from farflung.weights.cache import Versions
from farflung.weights.loaded import Loaded
from farflung.weights.patch import patch
from farflung.weights.tensors import fetch_model_config, fetch_stops


async def attempt(session: Session, folder: Path, manifest: str) -> self_test.Tried | None:
    """The newest version with a self-test, fetched to where `join` would; None if there is none to try.

    Raises WeightsError, ConfigError, Refusal, Unreachable.
    """
    versions = Versions(session, folder / "weights", patch=patch)
    try:
        test, manifest = await _newest(session, versions, manifest)
        device = pick("auto")
        name = choose(session.info, Own("torch", device.type))
        profile = self_test.profile_in(session, test, name) if test else None
        if test is None or profile is None:
            return None
        dtype = dtype_of(profile)
        config = await fetch_model_config(session)
        slots_on(device, config, dtype, longest(session.info))
        ending = {"eos_ids": session.info.eos_ids, "stops": await fetch_stops(session)}
        engine = LocalEngine.from_folder(config, dtype=dtype, device=device, **ending)
        Loaded(engine, versions).ensure(manifest)
        return self_test.attempt(engine, test, profile)
    finally:
        await versions.close()


async def _newest(session: Session, versions: Versions, manifest: str) -> tuple[SelfTest | None, str]:
    """The self-test of a version or of the nearest before it, with the version fetched."""
    for _ in range(self_test.EVERY):
        found = await versions.fetch(manifest) if manifest else None
        if found is None:
            break
        if (test := await self_test.fetch(session, manifest)) is not None:
            return test, manifest
        manifest = found.parent
    return None, ""
