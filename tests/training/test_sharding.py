import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import toy_regression as toy
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from eqvae_jax.training import sharding
from eqvae_jax.training.state import TrainState


def test_large_arrays_are_split_along_the_largest_dimension_the_axis_divides():
    mesh = AbstractMesh((2, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 2)
    expected = {  # name: (shape, where it is split)
        "kernel": ((3, 3, 64, 128), (None, None, None, "fsdp")),
        "wide_input": ((3, 3, 128, 64), (None, None, "fsdp")),
        "square": ((3, 3, 64, 64), (None, None, None, "fsdp")),
        "only_small_fits": ((8, 129), ("fsdp",)),
        "odd": ((3, 3, 63, 129), ()),
        "bias": ((64,), ()),
        "scalar": ((), ()),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in expected.items()}
    state = TrainState.create(params=params, opt_state={"mu": params}, buffers={"mean": params})
    out = sharding.state_shardings(mesh, state, min_size=1000)
    for name, (_, split) in expected.items():
        assert out.params[name].spec == out.opt_state["mu"][name].spec == PartitionSpec(*split), name
        assert out.buffers["mean"][name].spec == PartitionSpec()
    assert out.ema is None and out.step.spec == out.skipped.spec == PartitionSpec()


@pytest.mark.parametrize("data, fsdp, message", [
    (-1, 3, "fsdp is 3"), (3, 2, "data 3 x fsdp 2 = 6 devices, but there are 4"), (-1, 0, "fsdp is 0")])
def test_a_mesh_that_does_not_fit(data, fsdp, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(ml_collections.ConfigDict({"data": data, "fsdp": fsdp}), devices=[None] * 4)


def test_put_keeps_the_rows_and_refuses_what_does_not_divide():
    mesh = sharding.make_mesh(toy.get_config().mesh)
    batch = toy.batch_at(3)
    placed = sharding.put(mesh, batch)
    assert mesh.axis_names == ("data", "fsdp")
    for name, rows in batch.items():
        np.testing.assert_array_equal(placed[name], rows)
        assert placed[name].dtype == rows.dtype
        assert placed[name].sharding.spec == PartitionSpec(("data", "fsdp"))
    with pytest.raises(ValueError, match="batch of 10 does not divide over 8 devices"):
        sharding.put(_EightDevices(), {"x": np.arange(10)})


class _EightDevices:
    size, local_devices = 8, [None] * 8
