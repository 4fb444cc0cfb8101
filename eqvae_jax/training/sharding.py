"""The mesh, where each part of the state lives on it, and how a host batch gets there."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(config, devices=None):
    """Returns a Mesh with axes ("data", "fsdp") over `devices` (default: all of them, on all hosts).

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
    # Since jax 0.9 the default axis type is Explicit, under which plain reshapes raise ShardingTypeError.
    return jax.make_mesh((data, config.fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def state_shardings(mesh, shapes, min_size):
    """Returns a TrainState of NamedSharding: large arrays split over "fsdp", the rest on every device.

    shapes: TrainState of arrays or ShapeDtypeStruct. An array of `params`, `opt_state` or `ema` with at least
    `min_size` elements is split along its largest dimension that the fsdp axis divides (the last of equals:
    the output channels of a convolution kernel); where none does, and for every other field, it is
    replicated.
    """
    fsdp = mesh.shape["fsdp"]
    replicated = NamedSharding(mesh, PartitionSpec())

    def split(array):
        dimensions = [d for d, size in enumerate(array.shape) if size % fsdp == 0]
        if fsdp == 1 or array.size < min_size or not dimensions:
            return replicated
        largest = max(dimensions, key=lambda d: (array.shape[d], d))
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "fsdp"))

    whole = jax.tree.map(lambda _: replicated, shapes)
    return whole.replace(**{field: jax.tree.map(split, getattr(shapes, field))
                            for field in ("params", "opt_state", "ema")})


def scatter(array, sharding):
    """The global array of a numpy array that every process holds whole: each gives its own devices their part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def replicate(mesh, arrays):
    """The arrays on every device, once: as host arrays they would travel at every step.

    ShapeDtypeStructs, with which a step is planned on devices that may not be there, are returned as they are.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    put = lambda array: array if isinstance(array, jax.ShapeDtypeStruct) else jax.device_put(array, everywhere)
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
