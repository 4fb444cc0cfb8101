"""Devices to plan for: those of a TPU slice that is not there, or this machine's."""

import importlib.util
import os
import re

from eqvae_jax.hardware import CHIPS, chip_of

HERE = "here"
EXAMPLES = "v5e:4x4, v5e:16x16, v4:4x4x4, v5p:2x2x1, v6e:8x8, or here for this machine's devices"
NEEDS_LIBTPU = """Planning for a TPU slice needs its compiler, which runs on any Linux machine without a TPU:
  pip install libtpu        (or pip install -e .[plan])
--topology=here plans for this machine's devices without it."""


def check(name):
    """Raises ValueError where a topology's name is none, or the compiler is not installed; imports no JAX."""
    if name == HERE:
        return
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    chips = {chip.name: len(chip.slices[0].split("x")) for chip in CHIPS.values() if chip.slices}
    if not found or found[1] not in chips:
        raise ValueError(f"topology is {name!r}; it must be a chip ({', '.join(chips)}), a colon and the sides of the "
                         f"slice: {EXAMPLES}.")
    if found[2].count("x") + 1 != chips[found[1]]:
        raise ValueError(f"topology is {name!r}; slices of {found[1]} have {chips[found[1]]} sides, such as "
                         f"{', '.join(CHIPS[found[1]].slices[:4])}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(NEEDS_LIBTPU)


def prepare(name):
    """Sets what JAX and libtpu read when they start: no TPU is looked for, and CPU is the machine planned on."""
    if name != HERE:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # of a metadata server that answers on Google's machines only
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # its lock is for TPUs, and none is touched
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", name.replace(":", "-"))


def open_devices(name):
    """(devices, hardware.Chip or None) of a topology; none is started or touched.

    Raises ValueError where there is no such slice, in libtpu's words.
    """
    check(name)
    import jax
    from jax.experimental import topologies

    if name == HERE:
        return jax.devices(), chip_of(jax.devices()[0].device_kind)
    chip, _, sides = name.partition(":")
    # v4 has two cores a chip, which JAX takes for one device; a slice of one chip is no whole host.
    options = {"chip_config_name": "megacore"} if chip == "v4" else {}
    options |= {"chips_per_host_bounds": [1, 1, 1]} if set(sides) <= set("1x") else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # of several types, some of them jaxlib's
        raise ValueError(f"there is no slice {name}: {str(error).splitlines()[0]}\nSlices of {chip} that there are: "
                         f"{', '.join(CHIPS[chip].slices)}; examples: {EXAMPLES}.") from error
    return devices, CHIPS[chip]
