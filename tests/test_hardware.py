"""The chips' table: its units, and how JAX's names lead into it."""

import types

import pytest

from eqvae_jax import hardware


@pytest.mark.parametrize("kind, name", [
    ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"),
])
def test_a_device_kind_leads_to_its_chip(kind, name):
    assert hardware.chip_of(kind) is hardware.CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-PCIE-40GB",
                                  "NVIDIA GeForce RTX 4090"])
def test_unknown_chips_have_no_peak(kind):
    assert hardware.chip_of(kind) is None
    assert hardware.peak_flops(types.SimpleNamespace(device_kind=kind)) is None


def test_a_device_has_the_peak_of_its_chip():
    assert hardware.peak_flops(types.SimpleNamespace(device_kind="TPU v5 lite")) == 197e12


def test_numbers_are_in_bytes_and_seconds_and_agree_with_each_other():
    for chip in hardware.CHIPS.values():
        assert 1e14 < chip.flops < 1e16 and 1.5e10 < chip.hbm < 2e11
        assert chip.link_bandwidth < chip.hbm_bandwidth < chip.flops / 100
        if chip.clock:  # four units of 128 x 128 multipliers in each core, and one or two cores
            assert chip.flops / chip.clock / (2 * 4 * 128**2) == pytest.approx(1 if chip.name == "v5e" else 2, rel=0.01)
        chips = [eval(name.replace("x", "*")) for name in chip.slices]
        assert chips == sorted(chips)
