"""The mesh, where each part of the state lives on it, and how a host batch gets there."""

import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(config, devices=None):
    """Returns a Mesh with axes ("data", "fsdp") over `devices` (default: all of them, on all hosts).

    Of several TPU slices "data" spans the slices, and "fsdp" stays within one.

    config: `data` (-1 = whatever is left) and `fsdp` (over how many devices large arrays are split).
    Raises ValueError unless data x fsdp uses every device.
    """
    devices = jax.devices() if devices is None else list(devices)
    if config.fsdp < 1 or len(devices) % config.fsdp:
        raise ValueError(f"config.mesh.fsdp is {config.fsdp}, which does not divide the {len(devices)} "
                         "devices here")
    data = len(devices) // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != len(devices):
        raise ValueError(f"config.mesh asks for data {data} x fsdp {config.fsdp} = {data * config.fsdp} "
                         f"devices, but there are {len(devices)}; data=-1 uses them all")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":  # hosts of GPUs have numbers of slices too
        # Since jax 0.9 the default axis type is Explicit, under which plain reshapes raise ShardingTypeError.
        return jax.make_mesh((data, config.fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    if data % slices:
        raise ValueError(f"config.mesh.fsdp is {config.fsdp}, and {slices} slices have {len(devices) // slices} "
                         "devices each: what is split over fsdp must stay within a slice, whose links are fast")
    # Hybrid: copies on each slice, whose gradients alone travel between them.
    grid = mesh_utils.create_hybrid_device_mesh((data // slices, config.fsdp), (slices, 1), devices=devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def state_shardings(mesh, shapes, config):
    """Returns a TrainState of NamedSharding: large arrays split over "fsdp", the rest on every device.

    Args:
      shapes: TrainState of arrays or ShapeDtypeStruct.
      config: `rules`, pairs of a regular expression and a tuple of "data", "fsdp" or None for each dimension, () for
        on every device: the first whose expression is found in a path such as "generator/block_0/attn/qkv/kernel"
        decides on an array of `params`, and on its copies in `opt_state` and `ema`. `min_shard_size`: without a rule,
        an array of at least so many elements is split along its largest dimension that the fsdp axis divides (the last
        of equals: the output channels of a convolution kernel); where none does, and for every other field, it is
        replicated.
    Raises:
      ValueError: a rule fits no parameter, or its tuple not the array: it names both.
    """
    fsdp, rules, min_size, used = mesh.shape["fsdp"], config.rules, config.min_shard_size, set()
    replicated = NamedSharding(mesh, PartitionSpec())

    def by_size(array):
        dimensions = [d for d, size in enumerate(array.shape) if size % fsdp == 0]
        if fsdp == 1 or array.size < min_size or not dimensions:
            return replicated
        largest = max(dimensions, key=lambda d: (array.shape[d], d))
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "fsdp"))

    def split(path, array):
        # Without the optimizer's own fields, so that Adam's moments are called as their parameter.
        name = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        for number, (pattern, axes) in enumerate(rules):
            if array.ndim and re.search(pattern, name):  # not the count of steps beside them
                used.add(number)
                return NamedSharding(mesh, _spec(mesh, pattern, axes, name, array))
        return by_size(array)

    whole = jax.tree.map(lambda _: replicated, shapes)
    found = whole.replace(**{field: jax.tree.map_with_path(split, getattr(shapes, field))
                             for field in ("params", "opt_state", "ema")})
    if idle := [pattern for number, (pattern, _) in enumerate(rules) if number not in used]:
        raise ValueError(f"config.mesh.rules: {', '.join(map(repr, idle))} fits no parameter, or none that an earlier "
                         "rule leaves over")
    return found


def _spec(mesh, pattern, axes, name, array):
    axes = tuple(axes)
    if unknown := set(axes) - {None, *AXES}:
        raise ValueError(f"config.mesh.rules: {pattern!r} names {unknown.pop()!r}; the axes are "
                         f"{', '.join(AXES)}, and None")
    named = [axis for axis in axes if axis]
    if twice := {axis for axis in named if named.count(axis) > 1}:
        raise ValueError(f"config.mesh.rules: {pattern!r} names {twice.pop()!r} twice")
    fits = len(axes) <= array.ndim and all(
        axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(axes, array.shape, strict=False))
    if not fits:
        raise ValueError(f"config.mesh.rules: {pattern!r} gives {axes} to {name}, which has the shape {array.shape}; "
                         f"the mesh is {dict(mesh.shape)}")
    return PartitionSpec(*axes)


def whole(params, shardings):
    """Parameters as every device computes with them, for the inside of a jitted loss: those that are split are
    gathered, and their gradients summed into the same shards.

    Left to itself the compiler would rather move activations, whose shards lie across those of a kernel: by plan.py a
    step of DiT-B/2 split over 16 chips of a v5e then sends 5 times as much, and takes 3.7 times the memory.
    """
    return jax.tree.map(_gathered, params, shardings)


def _gathered(array, sharding):
    if sharding.is_fully_replicated:
        return array

    @jax.custom_vjp
    def gather(array):
        return jax.lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, PartitionSpec()))

    def backward(_, cotangent):
        return (jax.lax.with_sharding_constraint(cotangent, sharding),)

    gather.defvjp(lambda array: (gather(array), None), backward)
    return gather(array)


def scatter(array, sharding):
    """The global array of a numpy array that every process holds whole: each gives its own devices their part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def replicate(mesh, arrays):
    """The arrays on every device, once: as host arrays they would travel at every step.

    ShapeDtypeStructs, with which a step is planned on devices that may not be there, are returned as they are.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(array):
        if isinstance(array, jax.ShapeDtypeStruct):
            return array
        if jax.process_count() > 1:  # device_put would gather everyone's copy on each device to compare them
            return scatter(np.asarray(array), everywhere)
        return jax.device_put(array, everywhere)

    return jax.tree.map(put, arrays)


def put(mesh, batch):
    """Returns the global batch, each array split over all devices along axis 0, from this host's rows of it.

    batch: dict of numpy arrays that share their first dimension. Raises ValueError where the devices of this
    host do not divide it.
    """
    rows = len(next(iter(batch.values())))
    local = len(mesh.local_devices)
    if rows % local:
        raise ValueError(f"a batch of {rows * jax.process_count()} does not divide over {mesh.size} devices; "
                         f"choose a multiple of {mesh.size}, or show JAX fewer devices")
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows_of))
            for name, rows_of in batch.items()}


def devices_for(rows):
    """All devices, or the first where they do not divide a batch of so many rows.

    Raises ValueError where that one is not every process's own.
    """
    devices = jax.devices()
    if rows % len(devices) == 0:
        return devices
    if jax.process_count() > 1:
        raise ValueError(f"batches of {rows} do not divide over the {len(devices)} devices of {jax.process_count()} "
                         f"processes: --batch_size={-(-rows // len(devices)) * len(devices)}.")
    return devices[:1]
