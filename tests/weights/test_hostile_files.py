"""Hostile and damaged files: archives, safetensors headers, configs, and thousands of random mutations."""

import contextlib
import json
import os
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from parity import refused

from eqvae_jax.weights import WeightsError, load_autoencoder
from eqvae_jax.weights.files import read_tensors

HEADER = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


@contextlib.contextmanager
def memory_below(size):
    """Fails where more than `size` bytes were in use at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def message(path):
    with pytest.raises(WeightsError) as error:
        read_tensors(path)
    assert str(path) in str(error.value)
    return str(error.value)


# ---- safetensors

def safetensors_file(path, header, data=bytes(24), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_the_handmade_safetensors_file_is_right_before_it_is_broken(tmp_path):
    data = np.arange(6, dtype=np.float32)
    tensors = read_tensors(safetensors_file(tmp_path / "x.safetensors", HEADER, data.tobytes()))
    np.testing.assert_array_equal(tensors["w"], data.reshape(2, 3))
    assert not tensors["w"].flags.owndata and not tensors["w"].flags.writeable        # mapped


@pytest.mark.parametrize("change", [
    dict(length=2**63), dict(length=2**40), dict(length=0), dict(length=10), dict(data=bytes(20)), dict(data=bytes(28)),
    dict(header=b"{"), dict(header=b"[]"), dict(header=b"\xff\xfe"), dict(header=b"[" * 100_000), dict(header=b""),
    dict(header={"w": {**HEADER["w"], "shape": [10**6, 10**6]}}),
    dict(header={"w": {**HEADER["w"], "shape": [2**62, 2**62]}}),
    dict(header={"w": {**HEADER["w"], "shape": [-2, -3]}}),
    dict(header={"w": {**HEADER["w"], "data_offsets": [24, 48]}}),
    dict(header={"w": {**HEADER["w"], "data_offsets": [24, 0]}}),
    dict(header={"w": {**HEADER["w"], "data_offsets": [0, 10**15]}}),
    dict(header={"w": {**HEADER["w"], "dtype": "F31"}}),
    dict(header={"w": HEADER["w"], "v": HEADER["w"]}),                                # both in the same bytes
    dict(header={"w": 3}), dict(header={"__metadata__": {"format": "pt"}}, data=b""),
], ids=str)
def test_lying_safetensors_headers_are_refused(tmp_path, change):
    message(safetensors_file(tmp_path / "x.safetensors", **{"header": HEADER} | change))


def test_cut_safetensors_files_are_refused(tmp_path, rng):
    whole = tmp_path / "whole.safetensors"
    safetensors.numpy.save_file({"w": rng.normal(size=(30, 30))}, whole)
    content, path = whole.read_bytes(), tmp_path / "cut.safetensors"
    for length in (0, 3, 8, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "not a readable safetensors file" in message(path)
    assert "no such file" in message(tmp_path / "none.safetensors")


# ---- archives

def test_archives_that_point_outside_write_and_read_nothing(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("outside")
    inside = tmp_path / "inside"
    inside.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for root in ("../x", "/x", "..", str(tmp_path / "x"), "a/../../x", "x"):
        path = tmp_path / "inside" / "x.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{root}/data.pkl", b"\x80\x02}Vw\nNs.")
            archive.writestr("../secret", "overwritten")
            archive.writestr(f"{root}/data/../../../secret", "overwritten")
        message(path)
        path.unlink()
    assert sorted(tmp_path.rglob("*")) == before and secret.read_text() == "outside"


def test_archives_that_inflate_without_end_cost_no_memory(tmp_path):
    path = tmp_path / "bomb.ckpt"
    for entry in ("data.pkl", "data/0"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            if entry != "data.pkl":
                archive.writestr("x/data.pkl", tensor_pickle(2**28), zipfile.ZIP_STORED)
            with archive.open(f"x/{entry}", "w", force_zip64=True) as file:
                for _ in range(16):
                    file.write(bytes(2**24))                              # 256 MiB of zeros in 256 KB
        with memory_below(20e6):
            assert "compressed or encrypted" in message(path)


def tensor_pickle(size):
    integer = b"\x8a\x05" + struct.pack("<q", size)[:5]
    identifier = b"(Vstorage\nctorch\nByteStorage\nV0\nVcpu\n" + integer + b"tQ"
    return (b"\x80\x02}Vw\nctorch._utils\n_rebuild_tensor_v2\n(" + identifier + b"K\x00(" + integer + b"t(K\x01t"
            + b"\x89ccollections\nOrderedDict\n)RtRs.")


def test_one_storage_in_many_misfitting_tensors_is_not_copied(torch, tmp_path):
    """32 MB that 7 parameters claim to be; copies of all would take 235 MB."""
    names = [f"encoder.down.0.block.{j}.{conv}.weight" for j in range(4) for conv in ("conv1", "conv2")]
    shared = torch.zeros(2**23)
    state = {name: shared for name in names} | {names[0]: torch.zeros(32, 32, 3, 3)}
    torch.save({"decoder.conv_in.weight": torch.zeros(32, 4, 3, 3), **state}, tmp_path / "x.ckpt")
    with memory_below(100e6):
        assert "of another shape (7)" in refused(f"ldm:{tmp_path / 'x.ckpt'}")


# ---- configs

@pytest.mark.parametrize("change", [
    {"layers_per_block": 10**5}, {"layers_per_block": 10**9}, {"layers_per_block": -1}, {"layers_per_block": 1.5},
    {"layers_per_block": True},
    {"block_out_channels": []}, {"block_out_channels": [0, 0]}, {"block_out_channels": [10**30, 10**30]},
    {"block_out_channels": [16] * 1000, "down_block_types": ["DownEncoderBlock2D"] * 1000,
     "up_block_types": ["UpDecoderBlock2D"] * 1000},
    {"block_out_channels": "ab"}, {"latent_channels": None}, {"norm_num_groups": 0}, {"norm_num_groups": 7},
    {"down_block_types": 3}, {"scaling_factor": "x"}, {"scaling_factor": [1]}, {"shift_factor": {}},
    {"scaling_factor": float("nan")}, {"scaling_factor": 0},
    {"scaling_factor": 10**400}, {"_class_name": ["VQModel"]}, {"_class_name": "VQModel", "num_vq_embeddings": 10**12},
], ids=str)
def test_lying_configs_are_refused_at_once(torch, tmp_path, change):
    config = {
        "_class_name": "AutoencoderKL", "block_out_channels": [16, 32], "layers_per_block": 1, "latent_channels": 4,
        "norm_num_groups": 8, "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    safetensors.numpy.save_file({"w": np.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    begun = time.perf_counter()
    assert str(tmp_path / "config.json") in refused(f"diffusers:{tmp_path}")
    assert time.perf_counter() - begun < 20


# ---- random damage

class Run:
    def __reduce__(self):
        return os.getcwd, ()


def mutate(rng, whole):
    data = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        at, kind = rng.integers(len(data)), rng.integers(5)
        if kind == 0:
            data[at] = rng.integers(256)
        elif kind == 1:
            del data[at:at + rng.integers(1, 20)]
        elif kind == 2:
            data[at:at] = rng.bytes(rng.integers(1, 9))
        elif kind == 3:
            data[at:at + 8] = struct.pack("<q", rng.integers(-2**62, 2**62))
        else:
            data[at:at + 1] = bytes([data[at] ^ (1 << rng.integers(8))])
        if not data:
            break
    return data


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_mutated_files_fail_with_our_error_only(torch, tmp_path, rng, kind):
    value = {"a": torch.randn(3, 4), "b": torch.randn(2, 2).half()}
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.ckpt")
    if kind == "safetensors":
        safetensors.numpy.save_file({name: tensor.numpy() for name, tensor in value.items()}, path)
    else:
        value |= {"c": [1, 2.5, "x"], "d": Run()}
        torch.save({"state_dict": value, "epoch": 1}, path, _use_new_zipfile_serialization=kind == "zip")
    whole, failures = path.read_bytes(), 0
    for _ in range(1000):
        path.write_bytes(mutate(rng, whole))
        try:
            for tensor in read_tensors(path).values():
                np.array(tensor)                                          # what is mapped can be read
        except WeightsError as error:
            failures += 1
            assert str(path) in str(error)
    assert failures > 300               # mutations do reach the parser


def test_mutated_autoencoders_fail_with_our_error_only(tmp_path, rng):
    """The same through everything that follows the parser: names, shapes, models."""
    from eqvae_jax.weights import AutoencoderSpec, save_autoencoder

    model, params, _ = load_autoencoder("init:smoke")
    save_autoencoder(f"diffusers:{tmp_path}", model, params, AutoencoderSpec("kl", 1.0, 0.0, "", ""))
    config, file = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    whole, failures = {path: path.read_bytes() for path in (config, file)}, 0
    header = 8 + int.from_bytes(whole[file][:8], "little")
    for i in range(300):
        damaged = [config, file][i % 2]
        end = header if damaged == file else len(whole[config])
        damaged.write_bytes(bytes(mutate(rng, whole[damaged][:end])) + whole[damaged][end:])
        try:
            load_autoencoder(f"diffusers:{tmp_path}")
        except WeightsError as error:
            failures += 1
            assert str(tmp_path) in str(error)
        damaged.write_bytes(whole[damaged])
    assert failures > 100
