"""Leases in proportion to a node's speed."""

from hypothesis import given
from hypothesis import strategies as st

from farflung.protocol.messages import MAX_SAMPLES
from farflung.tasks.lease_size import LeaseSize

SIZE = LeaseSize(least=16, seconds=30.0, mean_tokens=100.0)


def test_a_fast_node_gets_work_for_as_long_as_others() -> None:
    assert SIZE.rollouts(1000.0, is_new=False) == 300
    assert SIZE.rollouts(1e9, is_new=False) == MAX_SAMPLES


def test_none_is_smaller_than_the_first_for_a_batch_that_shrinks_makes_its_node_slower_still() -> None:
    assert SIZE.rollouts(1.0, is_new=False) == 16
    assert SIZE.rollouts(0.0, is_new=False) == 16


def test_on_probation_and_before_anything_is_known_all_are_alike() -> None:
    assert SIZE.rollouts(1000.0, is_new=True) == 16
    assert LeaseSize(16, 30.0, 0.0).rollouts(1000.0, is_new=False) == 16
    assert LeaseSize(16, 0.0, 100.0).rollouts(1000.0, is_new=False) == 16


@given(st.floats(0, 1e12), st.floats(0, 3600), st.floats(0, 131072), st.booleans())
def test_it_is_always_between_the_first_and_what_a_message_holds(speed, seconds, mean, is_new) -> None:
    assert 16 <= LeaseSize(16, seconds, mean).rollouts(speed, is_new=is_new) <= MAX_SAMPLES


def test_the_next_lease_of_a_trusted_node_that_proved_fast_is_larger(make_house) -> None:
    house = make_house(lease={"rollouts": 4, "target_s": 30.0}, learn={"groups": 32})

    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("ada")  # its submissions come ten milliseconds after their leases
        larger = await house.lease("ada", slots=64)
        assert sum(len(group.samples) for group in larger.groups) == 64, "as many as it has slots"
        new = await house.lease("bob", slots=64)
        assert sum(len(group.samples) for group in new.groups) == 4

    house.run(scenario)
