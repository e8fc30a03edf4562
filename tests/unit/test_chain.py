"""Which way leads to a version, what a difference may follow, and which shards nobody needs any more."""

import msgspec
import pytest

from farflung.protocol.digest import digest_of
from farflung.protocol.errors import WeightsError
from farflung.protocol.messages import Manifest, Shard, Tensor
from farflung.weights.manifest import check_follows, target_digest
from farflung.weights.plan import Link, best_plan, wants_more
from farflung.weights.shard_gc import needless

WHOLE, DELTA = 1000, 100


def name(kind: str, step: int) -> str:
    return digest_of(f"{kind} {step}".encode())


def version(step: int, *, is_anchor: bool, delta_bytes: int = DELTA) -> Manifest:
    tensors = [Tensor(name="a", dtype="bfloat16", shape=[500], digest="11" * 32, shard=0)]
    return Manifest(
        run="demo",
        step=step,
        base_step=max(0, step - 1),
        parent=name("manifest", step - 1) if step else "",
        digest=target_digest(tensors),
        tensors=tensors,
        shards=[Shard(digest=name("whole", step), size_bytes=WHOLE)] if is_anchor else [],
        deltas=[Shard(digest=name("delta", step), size_bytes=delta_bytes)] if step else [],
        secret_commitment="0" * 64,
        made_at=0.0,
        expires_at=1.0,
    )


def chain(last: int, anchors: set[int], **options: int) -> list[Link]:
    """From the last step back to the first."""
    steps = range(last, -1, -1)
    return [(name("manifest", step), version(step, is_anchor=step in anchors, **options)) for step in steps]


def walked(links: list[Link], held: set[int], *, may_hold: bool = True) -> list[Link]:
    """What is looked at of a chain, as a node walks it."""
    is_held = {name("manifest", step) for step in held}.__contains__
    seen = links[:1]
    while wants_more(seen, is_held, may_hold=may_hold):
        seen.append(links[len(seen)])
    return seen


@pytest.mark.parametrize(
    ("anchors", "held", "start", "steps", "size"),
    [
        ({0}, {8}, 8, [9], DELTA),
        ({0, 8}, set(), 8, [9], WHOLE + DELTA),
        ({0, 9}, set(), 9, [], WHOLE),
        ({0, 9}, {8}, 8, [9], DELTA),
        ({0, 8}, {2}, 2, [3, 4, 5, 6, 7, 8, 9], 7 * DELTA),
        ({0}, {9}, 9, [], 0),
    ],
    ids=["the usual", "a late joiner", "joins at an anchor", "follows over an anchor", "was away", "has it"],
)
def test_the_way_with_the_fewest_bytes(
    anchors: set[int], held: set[int], start: int, steps: list[int], size: int
) -> None:
    way = best_plan(walked(chain(9, anchors), held), {name("manifest", step) for step in held}.__contains__)
    assert way is not None
    assert (way.start[1].step, [manifest.step for _, manifest in way.steps]) == (start, steps)
    assert (way.is_held, way.size_bytes) == (start in held, size)


def test_a_long_absence_ends_where_a_whole_copy_is_less() -> None:
    links = chain(60, {0, 48}, delta_bytes=200)
    seen = walked(links, {2})
    way = best_plan(seen, {name("manifest", 2)}.__contains__)
    assert way is not None
    assert (way.start[1].step, way.is_held) == (48, False)
    assert len(seen) < 25


def test_nobody_looks_beyond_an_anchor_without_anything_at_hand() -> None:
    assert [manifest.step for _, manifest in walked(chain(9, {0, 7}), set(), may_hold=False)] == [9, 8, 7]


def test_a_gap_in_the_chain_is_an_error() -> None:
    with pytest.raises(WeightsError, match="difference to step 7, but its parent is step 6"):
        check_follows(version(8, is_anchor=False), version(6, is_anchor=True))


def test_a_difference_to_other_tensors_is_an_error() -> None:
    parent = version(7, is_anchor=True)
    other = msgspec.structs.replace(parent.tensors[0], shape=[250, 2])
    with pytest.raises(WeightsError, match="step 7 has other tensors"):
        check_follows(version(8, is_anchor=False), msgspec.structs.replace(parent, tensors=[other]))


def test_shards_go_when_no_version_from_the_oldest_in_use_on_needs_them() -> None:
    manifests = {manifest.step: manifest for _, manifest in chain(9, {0, 4, 8})}
    dead, first = needless(manifests, oldest=7)
    assert first == 4
    assert set(dead) == {name("whole", 0), *(name("delta", step) for step in range(1, 4))}
    assert needless(manifests, oldest=3) == ([], 0)


def test_a_shard_that_a_live_version_shares_stays() -> None:
    manifests = {manifest.step: manifest for _, manifest in chain(6, {0, 4})}
    shared = manifests[2].deltas
    manifests[6] = msgspec.structs.replace(manifests[6], deltas=shared)
    assert shared[0].digest not in needless(manifests, oldest=6)[0]
