"""The restricted reader of torch files: what it must rebuild, and what must never happen."""

import collections
import io
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.pickles import Placeholder, read_pickle
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


# ---- hostile files

class Run:
    """Pickles into a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker):
    return {
        "os.system": Run(os.system, f"touch {marker}"),
        "eval": Run(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Run(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Run(getattr, Run(__import__, "os"), "system"),
        "nested": {"a": [({"b": Run(os.system, f"touch {marker}")},)]},
        "build": Run(type, "x", (), {"__setstate__": Run(eval, f"open({str(marker)!r}, 'w')")}),
    }


@pytest.mark.parametrize("kind", list(hostile("")))
@FORMATS
def test_calls_in_a_file_never_run(torch, tmp_path, kind, new):
    marker = tmp_path / "marker"
    attack = hostile(marker)[kind]
    path = save(torch, {"weight": torch.arange(3.0), "attack": attack}, tmp_path / "x.ckpt", new)
    ours = read_torch_file(path)
    np.testing.assert_array_equal(ours["weight"], [0, 1, 2])
    assert not marker.exists() and not (tmp_path / "x").exists()
    with pytest.raises((AttributeError, TypeError)):                    # what was called is inert, not callable
        ours["attack"]()

    # The attack is real: Python's own unpickler falls for it.
    if kind == "os.system":
        pickle.loads(pickle.dumps(attack))
        assert marker.exists()


def archive(path, pickled, **entries):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for name, content in entries.items():
            file.writestr(f"x/{name.replace('_', '/')}", content)
    return path


def tensor_pickle(size=(2, 3), stride=(3, 1), offset=0, numel=6, key="0", storage="FloatStorage"):
    """A pickle of one tensor, with any numbers in it, assembled by hand."""

    def ints(values):
        return b"(" + b"".join(b"L%dL\n" % v for v in values) + b"t"

    identifier = f"(V{'storage'}\nctorch\n{storage}\nV{key}\nVcpu\nL{numel}L\ntQ".encode()
    return (b"\x80\x02}Vw\nctorch._utils\n_rebuild_tensor_v2\n(" + identifier + b"L%dL\n" % offset + ints(size)
            + ints(stride) + b"\x89ccollections\nOrderedDict\n)RtRs.")


def test_the_handmade_tensor_is_right_before_it_is_broken(tmp_path):
    data = np.arange(6, dtype=np.float32)
    ours = read_torch_file(archive(tmp_path / "x.pth", tensor_pickle(), data_0=data.tobytes()))
    np.testing.assert_array_equal(ours["w"], data.reshape(2, 3))


@pytest.mark.parametrize("change, message", [
    (dict(size=(3, 3)), "does not fit"),
    (dict(offset=1), "does not fit"),
    (dict(stride=(10**12, 1)), "does not fit"),
    (dict(stride=(-3, 1)), "not sizes"),
    (dict(size=(-2, -3)), "not sizes"),
    (dict(size=(10**6, 10**6), stride=(0, 0)), "does not fit"),         # 4 TB from 24 bytes
    (dict(size=(0, 10**30)), "malformed"),
    (dict(size=(1,) * 40, stride=(1,) * 40), "not sizes"),
    (dict(numel=10**15), "claims 1000000000000000"),
    (dict(numel=-1), "not a number"),
    (dict(key="../../etc/passwd"), "no entry 'x/data/../../etc/passwd'"),
    (dict(storage="UntypedStorage"), "of kind torch.UntypedStorage"),
])
def test_lying_tensors_are_refused(tmp_path, change, message):
    path = archive(tmp_path / "x.pth", tensor_pickle(**change), data_0=bytes(24))
    with pytest.raises(WeightsError, match=message) as error:
        read_torch_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("pickled", [
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",                  # a frame of 2^63 bytes
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",                 # bytes of 2^63
    b"N(.", b".", b"0.", b"", b"N", b"(", b"t.", b"h\x05.", b"}]Ns.", b"(]Nd.", b"\x82\x01.", b"Pabc\n.", b"NNR.",
    b"Nb.",
    b"\x80\x04" + b"I" + b"9" * 5000 + b"\n.",
])
def test_malformed_pickles_are_refused(pickled):
    with pytest.raises(WeightsError):
        read_pickle(io.BytesIO(pickled), {}, lambda i: i)


def test_tricks_on_the_interpreter_cost_nothing():
    read = lambda data: read_pickle(io.BytesIO(data), {}, lambda i: i)  # noqa: E731
    assert read(b"\x80\x02Nr\xff\xff\xff\xff.") is None                 # memo slot 2^32: 64 GB in Python's own
    doubling = read(b"]q\x000" + b"(h\x00h\x00lq\x000" * 2000 + b"h\x00.")       # 2^2000 elements, if ever copied
    assert len(doubling) == 2
    deep = read(b"}" + b")" + b"\x85" * 200_000 + b"Ns.")               # a key whose hash would overflow the stack
    assert [type(key) for key in deep] == [Placeholder]
    assert read(b"cos\nsystem\n(Vx\ntR}Va\nNsb.").of == "os.system"


def test_other_and_damaged_files_are_explained(torch, tmp_path):
    def error(path):
        with pytest.raises(WeightsError) as info:
            read_torch_file(path)
        return str(info.value)

    missing, empty, text = tmp_path / "missing.ckpt", tmp_path / "empty.ckpt", tmp_path / "text.ckpt"
    empty.touch()
    text.write_text("<html>Not found</html>")
    assert "no such file" in error(missing) and "is empty" in error(empty)
    assert "not a file that torch.save wrote" in error(text)

    for new in (True, False):
        whole = save(torch, {"w": torch.randn(1000)}, tmp_path / "whole.ckpt", new).read_bytes()
        cut = tmp_path / "cut.ckpt"
        for length in (len(whole) - 50, len(whole) // 2, 100, 3):
            cut.write_bytes(whole[:length])
            assert str(cut) in error(cut)

    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("a.txt", "a")
    assert "not one that torch.save wrote" in error(other)
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(10_000_000))
    assert "compressed or encrypted" in error(bomb)
    assert "big-endian" in error(archive(tmp_path / "big.ckpt", tensor_pickle(), byteorder="big", data_0=bytes(24)))


@FORMATS
def test_mutated_files_fail_with_our_error_only(torch, tmp_path, rng, new):
    value = {"a": torch.randn(3, 4), "b": [1, 2.5, "x"], "c": Run(os.getcwd)}
    whole = save(torch, value, tmp_path / "x", new).read_bytes()
    path, failures = tmp_path / "mutated.ckpt", 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(len(data))
            kind = rng.integers(4)
            if kind == 0:
                data[at] = rng.integers(256)
            elif kind == 1:
                del data[at:at + rng.integers(1, 20)]
            elif kind == 2:
                data[at:at] = rng.bytes(rng.integers(1, 9))
            else:
                data[at:at + 8] = struct.pack("<q", rng.integers(-2**62, 2**62))
        path.write_bytes(data)
        try:
            read_torch_file(path)
        except WeightsError:
            failures += 1
    assert failures > 300               # mutations do reach the parser
