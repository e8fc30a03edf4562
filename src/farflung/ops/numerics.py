"""`farflung doctor ADDRESS`: try this machine's arithmetic on a run, as a worker does before it works."""

from pathlib import Path

from farflung.engine.local import LocalEngine
from farflung.engine.precision import arithmetic
from farflung.protocol.messages import SelfTest
from farflung.protocol.session import Session
from farflung.rollouts import selftest
from farflung.weights.cache import Versions
from farflung.weights.fetch import fetch_model_config, fetch_stops
from farflung.weights.loaded import Loaded
from farflung.weights.patch import patch
from farflung.worker import refuse_oversize


async def attempt(session: Session, folder: Path, manifest: str) -> selftest.Tried | None:
    """The newest version with a self-test, fetched to where `join` would; None if there is none to try.

    Raises WeightsError, ConfigError, Refusal, Unreachable.
    """
    versions = Versions(session, folder / "weights", patch=patch)
    try:
        test, manifest = await _newest(session, versions, manifest)
        profile = selftest.profile_in(session, test, "") if test else None
        if test is None or profile is None:
            return None
        dtype, _ = arithmetic(profile.name)
        config = await fetch_model_config(session)
        refuse_oversize(config, dtype, 0.0)
        ending = {"eos_ids": session.info.eos_ids, "stops": await fetch_stops(session)}
        engine = LocalEngine.from_folder(config, dtype=dtype, **ending)
        Loaded(engine, versions).ensure(manifest)
        return selftest.attempt(engine, test, profile)
    finally:
        await versions.close()


async def _newest(session: Session, versions: Versions, manifest: str) -> tuple[SelfTest | None, str]:
    """The self-test of a version or of the nearest before it, with the version fetched."""
    for _ in range(selftest.EVERY):
        found = await versions.fetch(manifest) if manifest else None
        if found is None:
            break
        if (test := await selftest.fetch(session, manifest)) is not None:
            return test, manifest
        manifest = found.parent
    return None, ""
