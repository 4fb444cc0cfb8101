"""Hostile pickles: what must never happen when a file of torch is read, and how it is refused."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.pickles import Placeholder, read_pickle
from eqvae_jax.weights.torch_files import read_torch_file

FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def save(torch, value, path, new=True):
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


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
