"""Worker, validator and relay: versions of the weights on this machine's disk, every byte checked before it is kept.

Shards are kept in a folder under their digest, written beside and renamed when whole and right.
A node patches a version together from one that is here, or the nearest anchor, and the deltas since, whichever is fewer
bytes, or from a base and adapters, and keeps the result, and the base; a relay keeps what others need for that.
"""

import asyncio
import errno
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from farflung.net.session import Session
from farflung.protocol.digest import file_digest
from farflung.protocol.errors import BadSignature, FarflungError, NotFound, WeightsError
from farflung.protocol.identity import Signed
from farflung.protocol.messages import Manifest, Shard
from farflung.weights.download import PART, Downloads
from farflung.weights.manifest import check_follows, open_manifest
from farflung.weights.plan import FetchPlan, Link, best_plan, wants_more
from farflung.weights.sharing import FETCHING, WANTED, Sharing

log = logging.getLogger(__name__)
SPARE_BYTES = 256 << 20
"""Disk that is never filled."""
LONGEST_CHAIN = 1000
WHOLE = ".whole"
Patch = Callable[[FetchPlan, Callable[[str], Path], Callable[[str], Path]], None]
"""Makes the last version of a plan; given where patched versions and where shards are. Raises WeightsError."""


class Versions:
    """The versions of one run's weights that this node has, the newest used ones kept.

    `limit_bytes` bounds what the folder may hold: older versions go to make room for a newer one, and one that would
    need more by itself is refused before a byte is fetched. `upstream` are relays to fetch from instead of those that
    the run lists. Without `patch` shards are kept and none is applied: that is a relay. `share` numbers the processes
    of one machine that use the same folder.
    """

    def __init__(
        self,
        session: Session,
        folder: Path,
        *,
        keep: int = 3,
        limit_bytes: int = 0,
        use_relays: bool = True,
        upstream: Sequence[str] = (),
        patch: Patch | None = None,
        share: int | None = None,
    ) -> None:
        self.session, self.folder, self.keep, self.limit_bytes = session, folder, keep, limit_bytes
        self._patch = patch
        self._known: dict[str, Manifest] = {}
        self._plans: dict[str, FetchPlan] = {}
        """How each version came here, while it is on its way or kept for others."""
        self._locks: dict[str, asyncio.Lock] = {}
        self._ahead: asyncio.Task[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._sharing = None if share is None else Sharing(folder, share)
        with self._alone_or_not() as is_alone:
            for draft in folder.glob("*.draft") if is_alone else ():
                session.stats.last_error = f"a crash left version {draft.name[:12]} half patched; it is patched anew"
                draft.unlink()
        self._downloads = Downloads(session, folder, use_relays=use_relays, upstream=upstream)

    async def fetch(self, digest: str) -> Manifest:
        """Have a version on disk, safe to call twice at once. Raises WeightsError, BadSignature, NotFound."""
        async with self._locks.setdefault(digest, asyncio.Lock()):
            if digest not in self._known:
                try:
                    async with self._sharing.alone() if self._sharing else nullcontext():
                        self._known[digest] = await self._fetch(digest)
                        self._say_wanted()
                except (WeightsError, BadSignature) as error:
                    self.session.stats.last_error = str(error)
                    raise
        return self._use(digest)

    @contextmanager
    def _alone_or_not(self) -> Iterator[bool]:
        """Whether no other process changes the folder meanwhile."""
        is_alone = self._sharing is None or self._sharing.try_alone()
        try:
            yield is_alone
        finally:
            if is_alone and self._sharing is not None:
                self._sharing.let_go()

    def _say_wanted(self) -> None:
        """Tell the other processes what must stay."""
        if self._sharing is not None:
            self._sharing.want(self._wanted())

    def prefetch(self) -> None:
        """Start fetching the run's latest version beside what the node does, unless one is on its way."""
        digest = self.session.latest.manifest
        if digest and (self._ahead is None or self._ahead.done()):
            self._ahead = asyncio.create_task(self._fetch_quietly(digest))

    async def _fetch_quietly(self, digest: str) -> None:
        try:
            await self.fetch(digest)
        except FarflungError as error:
            log.warning("prefetch failed manifest=%s because=%s", digest[:12], error)

    async def close(self) -> None:
        """Leave off fetching ahead, and hang up on all relays."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.gather(self._ahead, return_exceptions=True)
        await self._downloads.close()
        if self._sharing is not None:
            self._sharing.close()

    def known(self, digest: str) -> Manifest:
        """A manifest that was fetched. Raises WeightsError."""
        if digest not in self._known:
            raise WeightsError(f"manifest {digest[:12]} was not fetched, or dropped for newer ones; fetch it first")
        return self._known[digest]

    def has(self, digest: str) -> bool:
        """Whether a manifest was fetched and is still here."""
        return digest in self._known

    def discard(self, digest: str) -> None:
        """Give up a version that the disk lost or changed, with all that it was made of; it is fetched anew."""
        manifest = self._known.pop(digest, None)
        self._plans.pop(digest, None)
        is_base_sound = manifest is not None and manifest.adapters and self.whole(digest).exists()
        self._lose(digest, [] if manifest is None or is_base_sound else manifest.shards)

    def _lose(self, digest: str, shards: Sequence[Shard]) -> None:
        for path in (self.whole(digest), *(self.path(shard.digest) for shard in shards)):
            path.unlink(missing_ok=True)

    def _lose_damaged(self, shards: Sequence[Shard]) -> None:
        """Delete what the disk changed: a base is kept for long, and is not fetched anew for another's mistake."""
        for path in (self.path(shard.digest) for shard in shards):
            if path.exists() and not _has_name(path):
                path.unlink(missing_ok=True)

    def is_wanted(self, shard: str) -> bool:
        """Whether a shard belongs to a version that is here or on its way."""
        return any(shard == name for name in self._wanted())

    def size_bytes(self, shard: str) -> int:
        """Bytes of a shard that is here or on its way; 0 if it is neither."""
        plans = (
            one for plan in self._plans.values() for one in (*self._leading(plan), *plan.start[1].shards, *plan.shards)
        )
        return next((one.size_bytes for one in plans if one.digest == shard), 0)

    def partial(self, shard: str) -> Path:
        """Where the bytes of a shard are that have come so far."""
        return self.folder / f"{shard}{PART}"

    def path(self, shard: str) -> Path:
        """Where a shard is, or will be."""
        return self.folder / shard

    def whole(self, digest: str) -> Path:
        """Where a patched version is, or will be."""
        return self.folder / f"{digest}{WHOLE}"

    def _wanted(self) -> Iterator[str]:
        """Names of all files that belong to a version that is here or on its way."""
        for digest, manifest in self._known.items():
            yield self.whole(digest).name
            if manifest.adapters:
                yield from (shard.digest for shard in manifest.shards[: manifest.base_shards])
        for plan in self._plans.values():
            yield from (shard.digest for shard in (*self._leading(plan), *plan.start[1].shards, *plan.shards))
            yield self.whole(plan.start[0]).name

    def _leading(self, plan: FetchPlan) -> list[Shard]:
        """The deltas that lead to where a plan starts: a relay has them for nodes that come from the step before."""
        return plan.start[1].deltas if self._patch is None else []

    def _is_held(self, digest: str, manifest: Manifest) -> bool:
        """Whether a version is here whole; a relay starts from anchors alone, which others may need."""
        if self._patch is None:
            return False
        is_whole = bool(manifest.shards) and not manifest.adapters
        has_shards = is_whole and all(self.path(shard.digest).exists() for shard in manifest.shards)
        return has_shards or self.whole(digest).exists()

    def _use(self, digest: str) -> Manifest:
        """Mark a version as the one used last, and forget those not used for longest."""
        self._known[digest] = self._known.pop(digest)
        for old in list(self._known)[: -self.keep]:
            self._forget(old)
        self._sweep()
        return self._known[digest]

    def _forget(self, digest: str) -> None:
        del self._known[digest]
        self._plans.pop(digest, None)

    def _sweep(self) -> None:
        """Delete the files of versions that are not here any more, unless another process is about to add some."""
        self._say_wanted()
        with self._alone_or_not() as is_alone:
            if is_alone:
                self._delete_unwanted()

    def _delete_unwanted(self) -> None:
        wanted = {*self._wanted(), *(self._sharing.wanted_by_others() if self._sharing else ())}
        for path in self.folder.iterdir():
            is_ours = path.suffix == ".draft" or path.name.startswith((FETCHING, WANTED))
            if not is_ours and path.name.removesuffix(PART) not in wanted:
                path.unlink(missing_ok=True)

    # --- ways --------------------------------------------------------------------------------------------------------

    async def _fetch(self, digest: str) -> Manifest:
        lineage = await self._lineage(digest)
        held = {one for one, manifest in lineage if self._is_held(one, manifest)}
        try:
            await self._follow(_plan(lineage, held))
        except NotFound as error:
            if not held:
                raise
            log.warning("deltas are gone, starting from an anchor because=%s", error)
            lineage = await self._lineage(digest, uses_held=False)
            await self._follow(_plan(lineage, set()))
        return lineage[0][1]

    async def _follow(self, plan: FetchPlan) -> None:
        """Fetch what a plan needs and, unless this is a relay, patch the version together."""
        digest, manifest = plan.last
        is_patched = self._patch is not None and plan.is_put_together
        self._plans[digest] = plan
        self._say_wanted()
        try:
            self._evict(digest, manifest, plan)
        except WeightsError:
            del self._plans[digest]
            raise
        begins = plan.start[1].step
        size_bytes = sum(one.size_bytes for one in plan.shards if not self.path(one.digest).exists())
        log.info("fetching step=%d from=%d held=%s bytes=%d", manifest.step, begins, plan.is_held, size_bytes)
        try:
            await self._downloads.fetch([*self._leading(plan), *plan.shards])
            if self._patch is not None and is_patched:
                await asyncio.to_thread(self._patch, plan, self.whole, self.path)
        except WeightsError:
            if plan.is_held:
                self.discard(plan.start[0])  # the weights here may be damaged: start from an anchor next time
            elif plan.start[1].adapters:
                await asyncio.to_thread(self._lose_damaged, plan.start[1].shards)
            raise
        finally:
            if is_patched:
                del self._plans[digest]

    async def _lineage(self, digest: str, *, uses_held: bool = True) -> list[Link]:
        """The version and its ancestors, as far back as a better plan could begin. Raises WeightsError at a gap."""
        lineage = [(digest, await self._manifest(digest))]
        known = dict(lineage)

        def is_held(one: str) -> bool:
            return uses_held and self._is_held(one, known[one])

        may_hold = uses_held and self._patch is not None
        while parent := wants_more(lineage, is_held, may_hold=may_hold):
            if len(lineage) == LONGEST_CHAIN:
                raise WeightsError(f"no anchor in {LONGEST_CHAIN} steps before step {lineage[0][1].step}")
            known[parent] = await self._manifest(parent)
            check_follows(lineage[-1][1], known[parent])
            lineage.append((parent, known[parent]))
        return lineage

    def _evict(self, digest: str, manifest: Manifest, plan: FetchPlan) -> None:
        """Let go of the versions used longest ago until this one fits. Raises WeightsError if it cannot."""
        patched = manifest.full_bytes if self._patch is not None and plan.is_put_together else 0
        needed = {shard.digest: shard.size_bytes for shard in (*self._leading(plan), *plan.shards)}
        total = sum(needed.values()) + patched
        if self.limit_bytes and total > self.limit_bytes:
            raise WeightsError(
                f"step {manifest.step} takes {total:,} bytes of disk, this node allows {self.limit_bytes:,}"
            )
        missing = patched + sum(size for one, size in needed.items() if not self.path(one).exists())
        for old in [one for one in self._known if one not in (digest, plan.start[0])]:
            if self._fits(missing):
                break
            log.info("making room step=%d for=%d", self._known[old].step, manifest.step)
            self._forget(old)
            self._sweep()
        free = shutil.disk_usage(self.folder).free - SPARE_BYTES
        if missing > free:
            raise WeightsError(
                f"step {manifest.step} needs {missing:,} bytes more disk, {max(free, 0):,} are free in {self.folder}"
            ) from OSError(errno.ENOSPC, "too little room on the disk")  # a trainer waits for some

    def _fits(self, more_bytes: int) -> bool:
        held = sum(path.stat().st_size for path in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free - SPARE_BYTES
        return more_bytes <= free and not 0 < self.limit_bytes < held + more_bytes

    async def _manifest(self, digest: str) -> Manifest:
        if digest in self._known:
            return self._known[digest]
        signed = await self.session.client.get(self.session.path(f"manifests/{digest}"), Signed)
        keys = await self.session.keys("weights", signed)
        return open_manifest(signed, keys, self.session.run, digest)


def _has_name(path: Path) -> bool:
    """Whether a file is what its name, a digest, says."""
    return file_digest(path) == path.name


def _plan(lineage: list[Link], held: set[str]) -> FetchPlan:
    plan = best_plan(lineage, held.__contains__)
    if plan is None:
        raise WeightsError(
            f"no anchor leads to step {lineage[0][1].step}; its lineage ends at step {lineage[-1][1].step}"
        )
    return plan
