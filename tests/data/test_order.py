"""Positions and orders, one by one and a batch at a time."""

import numpy as np
import pytest
from memory_source import pretend

from eqvae_jax.data.order import Positions, Shuffled


def test_many_positions_are_what_single_ones_are():
    order, where = Shuffled(5, seed=3), np.arange(3, 26)  # five epochs, the first and the last in part
    assert order.records(where).tolist() == [order[int(p)] for p in where]
    assert order.records(where).dtype == np.int32
    assert sorted(order.records(np.arange(5, 10))) == list(range(5))


def test_coins_are_fair_and_depend_on_seed_epoch_and_place_alone():
    where = np.arange(4000)
    coins = Shuffled(1000, seed=3).coins(where)
    assert 0.45 < coins.mean() < 0.55
    epochs = coins.reshape(4, 1000)
    assert 400 < (epochs[0] != epochs[1]).sum() < 600
    assert 1800 < (coins != Shuffled(1000, seed=4).coins(where)).sum() < 2200
    np.testing.assert_array_equal(Shuffled(1000, seed=3).coins(where[1500:2500]), coins[1500:2500])
    # The coins must not follow the order: else always the same images would be mirrored.
    records = Shuffled(1000, seed=3).records(where).reshape(4, 1000)
    first, second = (np.argsort(records[k]) for k in (0, 1))
    assert 400 < (epochs[0][first] != epochs[1][second]).sum() < 600


@pytest.mark.parametrize("process", [0, 1])
def test_positions_of_a_process_are_its_slice_of_every_batch(monkeypatch, process):
    pretend(monkeypatch, process, 2)
    positions, first = Positions.of_process(6, start_step=5), 30 + 3 * process
    assert [positions[i] for i in range(6)] == [first, first + 1, first + 2, first + 6, first + 7, first + 8]
    assert positions.batch(1).tolist() == [first + 6, first + 7, first + 8]
    with pytest.raises(ValueError, match="batch_size=5 does not divide over 2 processes"):
        Positions.of_process(5)
