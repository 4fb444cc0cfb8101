import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
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
    out = sharding.state_shardings(mesh, state, ml_collections.ConfigDict({"min_shard_size": 1000, "rules": ()}))
    for name, (_, split) in expected.items():
        assert out.params[name].spec == out.opt_state["mu"][name].spec == PartitionSpec(*split), name
        assert out.buffers["mean"][name].spec == PartitionSpec()
    assert out.ema is None and out.step.spec == out.skipped.spec == PartitionSpec()


def ruled(*rules):
    """The shardings of a small transformer's state under rules, else by size, on 2 x 4 devices."""
    mesh = AbstractMesh((2, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 2)
    params = {"generator": {"blocks": {"qkv": {"kernel": jax.ShapeDtypeStruct((8, 16, 48), jnp.float32),
                                               "bias": jax.ShapeDtypeStruct((8, 48), jnp.float32)}},
                            "embedding": jax.ShapeDtypeStruct((12, 20), jnp.float32)}}
    state = TrainState.create(params, {"generator": optax.adam(1e-3).init(params["generator"])}, ema=params)
    return sharding.state_shardings(mesh, state, ml_collections.ConfigDict({"min_shard_size": 100, "rules": rules}))


def test_the_first_rule_that_fits_a_path_decides_also_on_its_copies():
    out = ruled(("^generator/blocks/.*kernel$", (None, ("fsdp"))), ("blocks", ()), ("kernel|embedding", ("fsdp",)))
    adam = out.opt_state["generator"][0]
    for tree in out.params["generator"], adam.mu, adam.nu, out.ema["generator"]:
        assert tree["blocks"]["qkv"]["kernel"].spec == PartitionSpec(None, "fsdp")
        assert tree["blocks"]["qkv"]["bias"].spec == PartitionSpec()       # by size it would be split
        assert tree["embedding"].spec == PartitionSpec("fsdp")             # by size along its 20 columns
    assert adam.count.spec == PartitionSpec()
    assert ruled().params["generator"]["embedding"].spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize("rule, message", [
    (("decoder", ("fsdp",)), "'decoder' fits no parameter"),
    (("embedding", ("model",)), "names 'model'; the axes are data, fsdp, and None"),
    (("embedding", (None, None, "fsdp")), r"to generator/embedding, which has the shape \(12, 20\)"),
    (("embedding", ("data", "data")), "names 'data' twice"),
    (("generator", (None, None, "fsdp")), r"gives \(None, None, 'fsdp'\) to generator/"),
])
def test_rules_that_do_not_fit_are_refused_by_name(rule, message):
    with pytest.raises(ValueError, match=message):
        ruled(rule)


def test_over_several_slices_what_is_split_stays_within_one():
    """As of TPU pods: devices of two slices come in any order."""
    devices = [_OfSlice(i, i % 2) for i in range(8)]
    config = ml_collections.ConfigDict({"data": -1, "fsdp": 2})
    mesh = sharding.make_mesh(config, devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert mesh.axis_names == ("data", "fsdp") and slices.shape == (4, 2)
    assert (slices[:, 0] == slices[:, 1]).all() and len({device.id for device in mesh.devices.flat}) == 8
    with pytest.raises(ValueError, match="fsdp is 8, and 2 slices have 4 devices each"):
        sharding.make_mesh(ml_collections.ConfigDict({"data": -1, "fsdp": 8}), devices)


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


@dataclasses.dataclass(frozen=True)
class _OfSlice:
    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def coords(self):
        return self.id // 2 % 2, self.id // 4, 0

    @property
    def process_index(self):
        return self.slice_index


class _EightDevices:
    size, local_devices = 8, [None] * 8
