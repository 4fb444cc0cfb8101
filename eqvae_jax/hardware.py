"""What accelerators can do: peak FLOP/s, memory, interconnect. Vendors' numbers, for plans and for MFU."""

import re
from typing import NamedTuple

GB, GIB, TFLOP = 1e9, 2**30, 1e12


class Chip(NamedTuple):
    """One accelerator as JAX counts devices.

    flops: of dense products in bfloat16, a second. hbm: bytes. hbm_bandwidth: bytes a second. link_bandwidth: bytes a
    second that a chip can send to its neighbours over all links together, in one direction.
    slices: topologies that one can have, smallest first, as get_topology_desc names them; () of GPUs.
    clock: of a TPU, Hz: the peak over two FLOPs of each multiplier (four units of 128 x 128 a core).
    """

    name: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    slices: tuple = ()
    clock: float | None = None


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")

# cloud.google.com/tpu/docs gives interconnects in both directions together, but for v4; a chip sends at half of
# that.
CHIPS = {chip.name: chip for chip in (
    # cloud.google.com/tpu/docs/v4: 275 TFLOPs, 32 GiB, 1200 GBps, 2400 Gbps = 6 links x 50 GB/s
    Chip("v4", 275 * TFLOP, 32 * GIB, 1200 * GB, 300 * GB, _CUBES, 1.05e9),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GBps, 400 GBps in both directions
    Chip("v5e", 197 * TFLOP, 16 * GIB, 819 * GB, 200 * GB, _FLAT, 1.5e9),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GiB, 2765 GBps, 1200 GBps in both directions
    Chip("v5p", 459 * TFLOP, 95 * GIB, 2765 * GB, 600 * GB, _CUBES, 1.75e9),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1638 GBps, 800 GBps in both directions
    Chip("v6e", 918 * TFLOP, 32 * GIB, 1638 * GB, 400 * GB, _FLAT),
    # nvidia.com/en-us/data-center/a100 (SXM): 312 TFLOPS dense, NVLink 600 GB/s in both directions
    Chip("A100-40GB", 312 * TFLOP, 40 * GIB, 1555 * GB, 300 * GB),
    Chip("A100-80GB", 312 * TFLOP, 80 * GIB, 2039 * GB, 300 * GB),
    # nvidia.com/en-us/data-center/h100 and h200 (SXM): 1979 TFLOPS with sparsity, NVLink 900 GB/s in both directions
    Chip("H100", 989.5 * TFLOP, 80 * GB, 3350 * GB, 450 * GB),
    Chip("H200", 989.5 * TFLOP, 141 * GB, 4800 * GB, 450 * GB),
)}

# What jax.Device.device_kind says -> chip; the first that matches. A PCIe card is another chip than its SXM namesake.
_KINDS = (
    (r"TPU v4$", "v4"), (r"TPU (v5 lite|v5e)", "v5e"), (r"TPU (v5|v5p)$", "v5p"), (r"TPU (v6 lite|v6e)", "v6e"),
    (r"A100-SXM4-40GB", "A100-40GB"), (r"A100-SXM4-80GB", "A100-80GB"), (r"H200(?! NVL)", "H200"),
    (r"H100(?! PCIe| NVL)", "H100"),
)


def chip_of(kind):
    """The Chip of a device_kind such as "TPU v5 lite"; None where it is not known, as of CPUs."""
    return next((CHIPS[name] for pattern, name in _KINDS if re.search(pattern, kind)), None)


def peak_flops(device):
    """FLOP/s of a jax.Device in dense bfloat16 products; None where its chip is not known, as of CPUs."""
    chip = chip_of(device.device_kind)
    return chip and chip.flops
