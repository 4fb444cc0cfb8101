"""Caches of latents: what is read is what was written, and every kind of damage is refused by name."""

import json
import struct
import zlib

import latent_folder
import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from latent_folder import SHAPE, batches, label_of, moments_of, tokens_of, write
from memory_source import joined

from eqvae_jax.data import latent_cache, latent_records
from eqvae_jax.data.latent_batches import train_batches
from eqvae_jax.data.latents import LatentSpace, open_latents


def shards(folder):
    return sorted(folder.glob("*.array_record"))


def edit(folder, change):
    """Changes a manifest: change(dict)."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_read_is_what_was_written(tmp_path, dtype):
    write(tmp_path / "cache", dtype=dtype)
    latents = open_latents(f"latents:{tmp_path / 'cache'}", verify=True)
    assert len(latents) == 10 and latents.shape == SHAPE and latents.manifest["classes"] == 3
    assert latents.nbytes == 10 * 4 * 24 * (4 if dtype == "float32" else 2)
    for i in 0, 3, 4, 9:
        found, (image, mirror) = latents[i], moments_of(i)
        assert found["label"] == label_of(i) and found["index"] == 2 * i
        for name, expected in zip(("mean", "std", "mirror_mean", "mirror_std"), (*image, *mirror), strict=True):
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], expected)
    assert latents.space == LatentSpace(0.5, 0.25, "aa", "workdir:A")
    with pytest.raises(IndexError, match="latent 10 of 10"):
        latents[10]


def test_a_record_can_be_read_without_this_program(folder):
    reader = array_record_module.ArrayRecordReader(str(shards(folder)[1]))
    fields = msgpack.unpackb(reader.read([1])[0])
    reader.close()
    data = moments_of(5).astype("<f4").tobytes()
    assert fields == {"index": 10, "label": 2, "moments": data,
                      "crc": zlib.crc32(struct.pack("<qq", 10, 2) + data)}


def test_a_record_without_the_image_that_was_to_be_kept_is_refused_by_shard(tmp_path):
    write(tmp_path / "cache")
    edit(tmp_path / "cache", lambda manifest: manifest["preprocessing"].update(images=True))
    with pytest.raises(ValueError, match=r"latents-00000-of-00003.array_record: latent 2 .*it has no image"):
        open_latents(tmp_path / "cache")[2]


def test_tokens_are_read_as_they_were_written(tmp_path):
    write(tmp_path / "cache", dtype="uint16")
    latents = open_latents(tmp_path / "cache")
    assert latents.is_tokens and latents.shape == SHAPE[:2] and latents.nbytes == 10 * 2 * 6 * 2
    found = latents[9]
    np.testing.assert_array_equal(found["tokens"], tokens_of(9)[0])
    np.testing.assert_array_equal(found["mirror_tokens"], tokens_of(9)[1])
    assert found["tokens"].max() > 2**15                      # they are not signed
    x = joined(batches(latents, 5, mirror=False))
    assert x["tokens"].dtype == np.int32 and x["tokens"].shape == (20, *SHAPE[:2])
    which = (x["tokens"][:, 0, 0] - 64_600) // 100
    np.testing.assert_array_equal(x["tokens"], [tokens_of(i)[0] for i in which])
    with pytest.raises(ValueError, match="encode again with --keep_images"):
        train_batches(latents, batch_size=2, seed=0, images=True)


def test_scale_and_shift_are_those_of_the_field_and_other_weights_are_refused():
    space, z = LatentSpace(0.5, 0.25, "aa", "workdir:A"), np.array([1.25, -3.0])
    np.testing.assert_array_equal(space.to_model(z), [0.5, -1.625])  # (z - shift) * scale, as diffusers' SD3
    np.testing.assert_array_equal(space.to_autoencoder(space.to_model(z)), z)
    space.require(space._replace(reference="elsewhere"))
    with pytest.raises(ValueError, match=r"workdir:A \(hash aa\), and ldm:B is another autoencoder \(hash bb\)"):
        space.require(LatentSpace(0.5, 0.25, "bb", "ldm:B"))
    with pytest.raises(ValueError, match="scaled by 0.5 after - 0.25, those of workdir:A by 1 after - 0.25"):
        space.require(space._replace(scale=1.0))


def test_a_flipped_byte_is_refused_by_the_name_of_its_shard(folder):
    path = shards(folder)[1]
    data = bytearray(path.read_bytes())
    where = data.find(moments_of(4).astype("<f4").tobytes()[200:260])  # the shard's first latent
    assert where > 0
    data[where + 30] ^= 1
    path.write_bytes(data)
    latents = open_latents(folder)  # of its true size, so nothing is noticed yet
    latents[3], latents[5]
    says = r"latents-00001-of-00003.array_record: latent 4 cannot be read .*delete it and give the command"
    with pytest.raises(ValueError, match=says):
        latents[4]
    for in_memory in True, False:
        with pytest.raises(ValueError, match=says):
            batches(latents, 4, in_memory=in_memory)
    with pytest.raises(ValueError, match="latents-00001-of-00003.array_record is damaged, its SHA-256"):
        open_latents(folder, verify=True)


def test_the_checksum_of_a_record_covers_all_of_it():
    record = latent_records.pack(7, 2, moments_of(1), "float32")
    assert latent_records.unpack(record, SHAPE, "float32")[:2] == (7, 2)
    fields = msgpack.unpackb(record)
    for change in {"index": 8}, {"label": 1}, {"moments": fields["moments"][:-1] + b"\0"}, {"crc": 1}:
        with pytest.raises(ValueError, match="checksum does not match"):
            latent_records.unpack(msgpack.packb(fields | change), SHAPE, "float32")
    for other in b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"index": 1}), record[:-3]:
        with pytest.raises(ValueError, match="not a record of a latent"):
            latent_records.unpack(other, SHAPE, "float32")
    with pytest.raises(ValueError, match=r"384 bytes are no moments of shape \(2, 3, 5\)"):
        latent_records.unpack(record, (2, 3, 5), "float32")


def test_missing_truncated_and_exchanged_shards_are_refused(folder):
    first, second, third = shards(folder)
    data = third.read_bytes()
    third.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"00002-of-00003.array_record has \d+ bytes instead of \d+: delete it"):
        open_latents(folder)
    third.unlink()
    with pytest.raises(ValueError, match="latents-00002-of-00003.array_record is missing; give the command"):
        open_latents(folder)
    third.write_bytes(data)
    first.write_bytes(second.read_bytes())  # of the same size, with good records
    with pytest.raises(ValueError, match="latents-00000-of-00003.array_record is damaged"):
        open_latents(folder, verify=True)


def test_other_versions_and_what_is_no_cache_are_refused(folder, tmp_path):
    edit(folder, lambda manifest: manifest.update(version=2))
    with pytest.raises(ValueError, match="manifest.json is of format 'eqvae_jax latents', version 2; this program"):
        open_latents(folder)
    edit(folder, lambda manifest: manifest.update(version=1, format="other"))
    with pytest.raises(ValueError, match="format 'other'"):
        open_latents(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is not readable JSON"):
        open_latents(folder)
    (folder / "manifest.json").rename(folder / "encoding.json")
    with pytest.raises(ValueError, match="is an unfinished cache: it has no manifest.json.*give its command again"):
        open_latents(folder)
    with pytest.raises(ValueError, match="holds no cache of latents"):
        open_latents(tmp_path)


def test_statistics_of_parts_are_those_of_the_whole(rng):
    mean, std = rng.normal(50, 2, (7, 2, 5, 3, 4)), rng.uniform(1, 2, (7, 2, 5, 3, 4))
    stored = np.stack([mean, std], 2)
    parts = [latent_cache.statistics_of(stored[part]) for part in (slice(0, 1), slice(1, 4), slice(4, 7))]
    nested = latent_cache.combine([latent_cache.combine(parts[:2]), parts[2]])
    found = latent_cache.summary(nested)
    variance = mean.var((0, 1, 2, 3)) + np.square(std).mean((0, 1, 2, 3))
    np.testing.assert_allclose(found["mean"], mean.mean((0, 1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found["std"], np.sqrt(variance), rtol=1e-12)
    np.testing.assert_allclose(found["overall_std"], np.sqrt(mean.var() + np.square(std).mean()), rtol=1e-12)
    assert nested["values"] == 7 * 2 * 5 * 3


def test_statistics_of_tokens_are_how_often_each_is_there():
    first, second = np.array([[[[3, 3]], [[10, 3]]]], np.uint16), np.array([[[[10, 10]], [[10, 2]]]], np.uint16)
    whole = latent_cache.combine([latent_cache.statistics_of(part) for part in (first, second)])
    assert list(whole["codes"].items()) == [("2", 1), ("3", 3), ("10", 4)]
    share = np.array([1, 3, 4]) / 8
    found = latent_cache.summary(whole)
    assert found["codes_used"] == 3 and found["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_shards_without_a_manifest_are_not_taken_over(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds latents-00000-of-00003.array_record, but neither manifest.json"):
        latent_folder.write(folder)
