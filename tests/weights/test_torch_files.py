"""The restricted reader of torch files: what it must rebuild."""

import collections

import ml_dtypes
import numpy as np
import pytest

from eqvae_jax.weights.pickles import Placeholder
from eqvae_jax.weights.torch_files import read_torch_file

FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def save(torch, value, path, new=True):
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


@FORMATS
def test_every_dtype_and_view_comes_back_bit_for_bit(torch, tmp_path, new):
    torch.manual_seed(0)
    base = torch.randn(6, 10)
    floats = {str(t): (100 * base).to(t) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    ints = {str(t): (50 * base).to(t) for t in (torch.int64, torch.int32, torch.int16, torch.int8, torch.bool)}
    tensors = {
        **floats, **ints, "uint8": (50 * base).abs().to(torch.uint8),
        "transposed": base.T, "strided": base[1::2, 3::3], "reversed dims": base.reshape(2, 3, 10).permute(2, 0, 1),
        "row": base[4], "scalar": base[2, 3], "empty": base[:0], "parameter": torch.nn.Parameter(base[:2] * 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    ours = read_torch_file(save(torch, tensors, tmp_path / "x.pth", new))
    assert ours.keys() == tensors.keys()
    for name, theirs in tensors.items():
        theirs = theirs.detach()
        assert ours[name].shape == tuple(theirs.shape)
        if theirs.dtype == torch.bfloat16:
            assert ours[name].dtype == ml_dtypes.bfloat16
            theirs = theirs.float()
        else:
            assert ours[name].dtype == theirs.numpy().dtype
        np.testing.assert_array_equal(ours[name].astype(theirs.numpy().dtype), theirs.numpy(), err_msg=name)
    # Views of one storage share memory here as well.
    assert np.shares_memory(ours["transposed"], ours["row"])


@FORMATS
def test_containers_scalars_and_module_state_come_back(torch, tmp_path, new):
    layer = torch.nn.BatchNorm2d(3)
    value = {"state_dict": layer.state_dict(), "epoch": 7, "lr": 0.5, "big": 2**70, "list": [1, (2.5, None, True), "é"],
             "numpy": np.float64(1.25), "bytes": b"\x00\xff", "size": torch.Size([3, 4]), "set": {1, 2}}
    ours = read_torch_file(save(torch, value, tmp_path / "x.ckpt", new))
    state = ours.pop("state_dict")
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert state["num_batches_tracked"] == 0 and state["num_batches_tracked"].shape == ()
    placeholder = ours.pop("set")
    assert isinstance(placeholder, Placeholder) and "set" in placeholder.of
    del value["state_dict"], value["set"]
    assert ours == {**value, "size": (3, 4)}


class Callback:                     # stands for Lightning's classes, which a reader does not have
    def __init__(self):
        self.best = [1, 2]


def test_unknown_classes_become_placeholders_also_as_keys(torch, tmp_path):
    weight = torch.arange(4.0)
    value = {"callbacks": {Callback: {"state": Callback()}}, "deque": collections.deque([1, 2]), "weight": weight}
    ours = read_torch_file(save(torch, value, tmp_path / "x.ckpt"))
    (key, held), = ours["callbacks"].items()
    assert str(key).endswith("Callback") and isinstance(held["state"], Placeholder)
    np.testing.assert_array_equal(ours["weight"], weight)


def test_a_file_is_mapped_and_not_read(torch, tmp_path):
    ours = read_torch_file(save(torch, {"w": torch.zeros(1000, 1000)}, tmp_path / "x.pth"))
    assert not ours["w"].flags.owndata and not ours["w"].flags.writeable
