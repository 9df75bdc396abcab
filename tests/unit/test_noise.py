import math
from itertools import product

import pytest
import torch

from progrpo.rollout.noise import INITIAL, NoiseKey, mix, mix_rows

KEY = NoiseKey(seed=3, iteration=5)
SHAPE = (4, 8, 8)


def keys(*rows: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    slot_N, member_N = torch.tensor(rows).T
    return slot_N, member_N


ROWS = [(slot, member) for slot in (0, 1, 7) for member in range(5)]


def test_shape_dtype_and_the_global_generator():
    state = torch.get_rng_state()
    noise = KEY.draw(*keys(*ROWS), 2, SHAPE)
    assert noise.shape == (15, *SHAPE)
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
    assert KEY.draw(*keys(*ROWS[:1]), 2, ()).shape == (1,)
    empty = torch.empty(0, dtype=torch.long)
    assert KEY.draw(empty, empty, 2, SHAPE).shape == (0, *SHAPE)


def test_equal_keys_draw_equal_noise():
    first, second = (NoiseKey(3, 5).draw(*keys(*ROWS), 2, SHAPE) for _ in range(2))
    assert torch.equal(first, second)


def test_noise_does_not_know_the_batch_or_its_order():
    slot_N, member_N = keys(*ROWS)
    together = KEY.draw(slot_N, member_N, 2, SHAPE)
    for rows in (torch.tensor([7]), torch.tensor([14, 0, 3]), torch.randperm(15), torch.arange(0, 15, 2)):
        assert torch.equal(KEY.draw(slot_N[rows], member_N[rows], 2, SHAPE), together[rows])


def test_noise_is_a_function_of_its_values_not_of_their_type():
    slot_N, member_N = keys(*ROWS)
    assert torch.equal(
        KEY.draw(slot_N.int(), member_N.int(), 2, SHAPE), KEY.draw(slot_N.long(), member_N.long(), 2, SHAPE)
    )


def test_every_key_draws_its_own():
    """Each of the five numbers of a key matters, also where two of them change places."""
    firsts = [
        NoiseKey(seed, iteration).draw(*keys((slot, member)), step, (8,))[0]
        for seed, iteration, slot, member, step in product(
            (0, 1, 2), (0, 1, 2), (0, 1, 2), (0, 1, 2), (INITIAL, 0, 1, 2)
        )
    ]
    assert len(torch.unique(torch.stack(firsts), dim=0)) == len(firsts) == 324


def test_moments_are_those_of_the_standard_normal():
    slot_N, member_N = keys(*product(range(50), range(20)))
    x = NoiseKey(0, 0).draw(slot_N, member_N, INITIAL, (100,)).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.square().mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs(x.pow(3).mean()) < 4 * math.sqrt(15 / n)
    assert abs(x.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs((x.sign().mean(1)).std() - 0.1) < 0.01  # rows scatter as independent ones do


def test_neighbouring_keys_are_uncorrelated():
    """Slots, members, steps and iterations that differ by one."""
    slot_N, member_N = keys(*product(range(10), range(10)))
    base = KEY.draw(slot_N, member_N, 1, (400,)).double()
    for other in (
        KEY.draw(slot_N + 1, member_N, 1, (400,)),
        KEY.draw(slot_N, member_N + 1, 1, (400,)),
        KEY.draw(slot_N, member_N, 2, (400,)),
        NoiseKey(3, 6).draw(slot_N, member_N, 1, (400,)),
        NoiseKey(4, 5).draw(slot_N, member_N, 1, (400,)),
    ):
        assert abs((base * other.double()).mean()) < 4 / math.sqrt(base.numel())


def test_lengths_must_agree():
    for members in (1, 2):
        with pytest.raises(ValueError, match=f"3 slots for {members} members"):
            KEY.draw(torch.arange(3), torch.arange(members), 0, SHAPE)


# --- mix --------------------------------------------------------------------------------------------------------------


def test_mix_has_no_collisions_on_a_grid():
    keys = torch.tensor([*product(range(2), range(10), range(50), range(-1, 9), range(-1, 9))])
    seeds = set(mix_rows(*keys.T))
    assert len(seeds) == 2 * 10 * 50 * 10 * 10 == 100_000
    assert all(0 <= s < 2**63 for s in seeds)


def test_mix_knows_the_order_and_the_number_of_its_keys():
    assert len({mix(), mix(0), mix(0, 0), mix(1, 2), mix(2, 1), mix(1, 2, 0)}) == 6


def test_mix_is_the_same_everywhere():
    """Runs are resumed on other machines, so these numbers are part of what is promised."""
    assert mix(0) == splitmix(0x9E3779B97F4A7C15 ^ 0) >> 1
    assert mix(-1) == splitmix(0x9E3779B97F4A7C15 ^ (2**64 - 1)) >> 1


def splitmix(state: int) -> int:
    """One draw of Vigna's splitmix64 from a state, in plain arithmetic modulo 2^64."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z // 2**30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z // 2**27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z // 2**31)


def test_half_of_the_bits_of_a_seed_turn_with_one_bit_of_a_key():
    turned = [(mix(3, i) ^ mix(3, i ^ (1 << b))).bit_count() for i in range(50) for b in range(20)]
    assert sum(turned) / len(turned) == pytest.approx(63 / 2, abs=0.5)


# --- selectors' seeds -------------------------------------------------------------------------------------------------


def test_group_seeds():
    slot_P = torch.arange(100)
    seeds = KEY.group_seeds(slot_P, 4)
    assert seeds.dtype == torch.int64
    assert len(seeds.unique()) == 100
    assert (seeds >= 0).all()
    assert torch.equal(KEY.group_seeds(slot_P.flip(0), 4), seeds.flip(0))
    for other in (
        KEY.group_seeds(slot_P, 5),
        NoiseKey(3, 6).group_seeds(slot_P, 4),
        NoiseKey(4, 5).group_seeds(slot_P, 4),
    ):
        assert not torch.isin(other, seeds).any()


def test_group_seeds_are_no_members_noise():
    seeds = KEY.group_seeds(torch.arange(20), 4)
    members = [mix(3, 5, slot, member, 4) for slot in range(20) for member in range(48)]
    assert not set(seeds.tolist()) & set(members)
