"""Checkpoints written without torch: what torch itself, mapped or not, and our own reader find in them."""

import zipfile

import ml_dtypes
import numpy as np
import pytest

from eqvae_jax.weights import WeightsError
from eqvae_jax.weights.torch_files import read_torch_file
from eqvae_jax.weights.torch_writer import write_torch_file


@pytest.fixture
def tensors(rng):
    floats = rng.normal(size=(3, 5, 2))
    kinds = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.bool_)
    return {
        **{np.dtype(kind).name: (4 * floats).astype(kind) for kind in kinds},
        "uint8": (abs(floats) * 9).astype(np.uint8), "transposed": floats.astype(np.float32).T,
        "number": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float32),
        "sliced": floats[::2, 1:], "big-endian": floats.astype(">f4"), "naïve.名": np.arange(3),
    }


@pytest.mark.parametrize("options", [{}, {"mmap": True}])
def test_torch_loads_what_we_write_with_its_safest_options(torch, tensors, tmp_path, options):
    write_torch_file(tmp_path / "x.ckpt", tensors)
    content = torch.load(tmp_path / "x.ckpt", weights_only=True, map_location="cpu", **options)
    assert list(content) == ["state_dict"] and list(content["state_dict"]) == list(tensors)
    for name, value in tensors.items():
        theirs = content["state_dict"][name]
        assert tuple(theirs.shape) == value.shape and theirs.is_contiguous() and not theirs.requires_grad
        if theirs.dtype == torch.bfloat16:
            theirs, value = theirs.float(), value.astype(np.float32)
        np.testing.assert_array_equal(theirs.numpy(), value, err_msg=name)
    torch.nn.Linear(5, 2).load_state_dict({"weight": content["state_dict"]["float32"][0].T.float(),
                                           "bias": content["state_dict"]["float32"][0, 0]})


def test_our_own_reader_finds_the_same(tensors, tmp_path):
    write_torch_file(tmp_path / "x.ckpt", tensors)
    ours = read_torch_file(tmp_path / "x.ckpt")["state_dict"]
    assert ours.keys() == tensors.keys()
    for name, value in tensors.items():
        assert ours[name].shape == value.shape
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_entries_are_stored_aligned_and_the_same_each_time(tensors, tmp_path):
    for name in ("x.ckpt", "y.ckpt"):
        write_torch_file(tmp_path / name, tensors)
    content = (tmp_path / "x.ckpt").read_bytes()
    assert content == (tmp_path / "y.ckpt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.testzip() is None                                 # every checksum is right
        entries = {entry.filename: entry for entry in archive.infolist()}
        assert archive.read("archive/byteorder") == b"little" and archive.read("archive/version") == b"3\n"
    assert len(entries) == len(tensors) + 3
    for i, value in enumerate(tensors.values()):
        entry = entries[f"archive/data/{i}"]
        begin = entry.header_offset + 30 + len(entry.filename) + len(entry.extra)
        assert entry.compress_type == zipfile.ZIP_STORED and begin % 64 == 0
        little = np.asarray(value, value.dtype.newbyteorder("<"), order="C")
        assert content[begin:begin + entry.file_size] == little.tobytes()


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"before")

    class Broken(dict):
        def values(self):
            yield np.ones(3, np.float32)
            raise OSError("No space left on device")

    with pytest.raises(WeightsError, match="x.ckpt: could not be written .No space left"):
        write_torch_file(path, Broken(a=np.ones(3, np.float32), b=np.ones(2)))
    with pytest.raises(WeightsError, match="x.ckpt: .*no tensors of type complex128"):
        write_torch_file(path, {"a": np.ones(3, np.complex128)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"] and path.read_bytes() == b"before"
