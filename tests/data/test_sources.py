"""Every form of reference: what it yields, and what it says when it cannot."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from eqvae_jax.data import photos
from eqvae_jax.data.decoding import decode
from eqvae_jax.data.preparation import write_arrayrecord
from eqvae_jax.data.records import pack, write_shard
from eqvae_jax.data.sources import BrokenExample, open_source


def noise(seed, height=6, width=7):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.mark.parametrize("reference, says", [
    ("", "folder:DIR"), ("imagenet", "folder:DIR"), ("s3:bucket", "not a reference to images"),
    ("folder:", "names nothing"), ("folder:/no/such/place", "does not exist"),
    (f"folder:{__file__}", "is a file"), ("photos:validation", "train, test, all"),
    ("arrayrecord:/no/such/*.array_record", "eqvae_jax.data.preparation"),
    ("idx:/no/such/place", "no such folder"),
    ("tfds:[oops]", "not of the form"), ("tfds:no_such_dataset", "tfds build no_such_dataset"),
])
def test_references_that_name_nothing(reference, says):
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        open_source(reference)


def test_folder(tmp_path):
    images = {name: noise(k) for k, name in enumerate(["b/2.png", "a/deep/1.PNG", "b/10.png", "c/0.webp"])}
    for name in images:
        save(tmp_path / name, images[name])
    save(tmp_path / ".cache/0.png", noise(9))
    save(tmp_path / "a/._1.png", noise(9))
    (tmp_path / "a/notes.txt").write_text("not an image")
    (tmp_path / "aa").mkdir()  # empty: no class
    source = open_source(f"folder:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == ["a/deep/1.PNG", "b/10.png", "b/2.png", "c/0.webp"]
    assert [source[i]["label"] for i in range(4)] == [0, 1, 1, 2]
    assert all(np.array_equal(source[i]["image"], images[source.name(i)]) for i in range(3))
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source) and np.array_equal(copy[2]["image"], images["b/2.png"])


def test_folder_without_classes_and_with_a_link_in_a_circle(tmp_path):
    save(tmp_path / "0.png", noise(0))
    save(tmp_path / "sub/1.png", noise(1))
    (tmp_path / "sub/up").symlink_to(tmp_path)
    source = open_source(f"folder:{tmp_path}")
    found = [(source.name(i), source[i]["label"]) for i in range(len(source))]
    assert found == [("0.png", 0), ("sub/1.png", 0)]


def test_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no image file"):
        open_source(f"folder:{tmp_path}")


def test_folder_with_broken_and_vanished_files(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"\xff\xd8 no more")
    save(tmp_path / "1.png", noise(1))
    source = open_source(f"folder:{tmp_path}")
    (tmp_path / "1.png").unlink()
    for i, name in enumerate(["0.jpg", "1.png"]):
        with pytest.raises(BrokenExample) as caught:
            source[i]
        assert caught.value.name == name


def test_reduced_decoding(tmp_path):
    y, x = np.mgrid[:256, :320]
    save(tmp_path / "0.jpg", np.stack([x // 2, y // 2, x // 4], -1).astype(np.uint8))
    source = open_source(f"folder:{tmp_path}")
    assert source.at_least(64)[0]["image"].shape == (64, 80, 3)
    assert source.at_least(65)[0]["image"].shape == (128, 160, 3)
    assert source[0]["image"].shape == (256, 320, 3)  # the original is as it was


def test_photos():
    train, test, everything = (open_source(f"photos:{split}") for split in ("train", "test", "all"))
    assert repr(open_source("photos")) == repr(train)
    assert len(train) + len(test) == len(everything) >= 10 and 2 <= len(test) <= 3
    names = [source.name(i) for source in (train, test) for i in range(len(source))]
    assert len(set(names)) == len(names)  # no photograph is in both
    sizes = {everything.name(i): everything[i]["image"].shape for i in range(len(everything))}
    assert sizes["photo chelsea"] == (300, 451, 3) and sizes["photo camera"] == (512, 512, 3)
    assert all(min(shape[:2]) >= 300 for shape in sizes.values())
    assert everything[0]["image"] is everything[0]["image"]  # decoded once
    assert len(pickle.dumps(everything)) < 5000  # and not sent to workers


def test_photos_import_none_of_the_packages():
    code = ("import sys; from eqvae_jax.data.sources import open_source; open_source('photos:all'); "
            "print({'skimage', 'sklearn', 'matplotlib', 'tensorflow_datasets'} & sys.modules.keys())")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert out.stdout.strip() == "set()"


def test_photos_that_are_missing(monkeypatch):
    monkeypatch.setitem(photos.PHOTOS["test"], "chelsea", ("no_such_package", "cat.png"))
    monkeypatch.setitem(photos._PIP, "no_such_package", "no-such-package")
    with pytest.raises(ValueError, match="no-such-package, which is not installed; pip install scikit-image"):
        open_source("photos:test")
    monkeypatch.setitem(photos.PHOTOS["test"], "chelsea", ("skimage", "data/no_cat.png"))
    with pytest.raises(ValueError, match=r"scikit-image [\d.]+ has no data/no_cat.png"):
        open_source("photos:test")


def write_idx(folder, split="train", gz=False, images=None, labels=None):
    images = noise(0, 5, 28)[..., 0].reshape(5, 4, 7) if images is None else images
    labels = np.array([3, 1, 4, 1, 5], np.uint8) if labels is None else labels
    for what, x in ("images", images), ("labels", labels):
        data = struct.pack(f">{1 + x.ndim}I", 0x800 + x.ndim, *x.shape) + x.tobytes()
        name = f"{split}-{what}-idx{x.ndim}-ubyte" + ".gz" * gz
        (folder / name).write_bytes(gzip.compress(data) if gz else data)
    return images


@pytest.mark.parametrize("gz", [False, True])
def test_idx(tmp_path, gz):
    images = write_idx(tmp_path, gz=gz)
    held_out = noise(1, 2, 6)[..., 1].reshape(2, 2, 3)
    write_idx(tmp_path, "t10k", gz, held_out, np.array([7, 0], np.uint8))
    for reference in f"idx:{tmp_path}", f"idx:{tmp_path}:train":
        source = pickle.loads(pickle.dumps(open_source(reference)))
        assert [source[i]["label"] for i in range(len(source))] == [3, 1, 4, 1, 5]
        assert np.array_equal(source[2]["image"], np.stack([images[2]] * 3, -1))
    test = open_source(f"idx:{tmp_path}:test")
    assert np.array_equal(test[1]["image"][..., 0], held_out[1]) and test[0]["label"] == 7


def test_idx_that_is_damaged(tmp_path):
    def opening(says, spoil, name="train-images-idx3-ubyte", gz=False):
        for file in tmp_path.iterdir():
            file.unlink()
        write_idx(tmp_path, gz=gz)
        path = tmp_path / (name + ".gz" * gz)
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(ValueError, match=says):
            open_source(f"idx:{tmp_path}")

    opening("starts with 0x00000802, not 0x00000803", lambda b: b"\0\0\x08\x02" + b[4:])
    opening("announces 156; it is truncated", lambda b: b[:-1])
    opening("announces 156; it is truncated", lambda b: b + b"\0")
    opening("too few for a header", lambda b: b[:9])
    opening("announces [0-9]+ bytes; it is damaged", lambda b: b[:4] + b"\xff" * 12 + b[16:])
    opening("5 images but 4 labels", lambda b: b[:4] + struct.pack(">I", 4) + b[8:-1],
            "train-labels-idx1-ubyte")
    opening("cannot be read: ", lambda b: b[:-20], gz=True)
    opening("cannot be read: Not a gzipped file", lambda b: b"no" + b[2:], gz=True)
    opening("announces 140 bytes of data, but there are 139",
            lambda b: gzip.compress(gzip.decompress(b)[:-1]), gz=True)
    opening("announces 140 bytes of data, but there are more",
            lambda b: gzip.compress(gzip.decompress(b) + b"\0"), gz=True)
    with pytest.raises(ValueError, match="lacks t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz"):
        open_source(f"idx:{tmp_path}:test")


def test_arrayrecord_round_trip(tmp_path):
    examples = [{"image": noise(k, 5 + k, 9), "label": 2 * k, "name": f"n{k}"} for k in range(5)]
    assert write_arrayrecord(examples[:3], tmp_path / "x-0.array_record") == 3
    jpeg = io.BytesIO()
    Image.fromarray(examples[4]["image"]).save(jpeg, "JPEG")
    stored = {"image": jpeg.getvalue(), "label": 7}
    write_arrayrecord([examples[3], stored], tmp_path / "x-1.array_record")
    source = pickle.loads(pickle.dumps(open_source(f"arrayrecord:{tmp_path}/x-*.array_record")))
    assert [source[i]["label"] for i in range(len(source))] == [0, 2, 4, 6, 7]
    for i in range(4):
        assert np.array_equal(source[i]["image"], examples[i]["image"])
    assert np.array_equal(source[4]["image"], decode(jpeg.getvalue(), "x"))


def test_arrayrecord_that_is_damaged(tmp_path):
    path = tmp_path / "a.array_record"
    write_arrayrecord([{"image": noise(0, 80, 80), "label": 0}] * 3, path)
    with pytest.raises(ValueError, match="is a folder; name the shards"):
        open_source(f"arrayrecord:{tmp_path}")
    for part in path.read_bytes()[:-40], b"not a shard at all" * 9, b"":
        path.write_bytes(part)
        with pytest.raises(ValueError, match="a.array_record is not a complete ArrayRecord file"):
            open_source(f"arrayrecord:{path}")
    write_shard([b"junk", pack(b"no image", 3, "cat.jpg")], path)
    source = open_source(f"arrayrecord:{path}")
    with pytest.raises(BrokenExample, match="record 0 of .*unreadable record"):
        source[0]
    with pytest.raises(BrokenExample, match=r"record 1 of .*\(cat.jpg\): not a readable image"):
        source[1]


def test_tfds(tmp_path, monkeypatch):
    """Written and read by tfds itself, without TensorFlow: encoded images need none."""
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    images = [noise(k, 5 + k, 7) for k in range(6)]

    # Not registered: like anyone's own data set, it is found by its files.
    class EqvaeTiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # nothing to download: tfds looks for no checksums beside this file

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=9)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for k, image in enumerate(images):
                file = io.BytesIO()
                Image.fromarray(image).save(file, "PNG")
                file.seek(0)
                yield k, {"image": file, "label": k}

    with pytest.raises(ValueError, match="(?s)there is no .*tfds build mnist --file_format=array_record"):
        open_source("tfds:mnist")
    EqvaeTiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = pickle.loads(cloudpickle.dumps(open_source("tfds:eqvae_tiny")))  # as Grain sends it to workers
    examples = [source[i] for i in range(len(source))]
    assert sorted(example["label"] for example in examples) == list(range(6))
    assert all(np.array_equal(example["image"], images[example["label"]]) for example in examples)
    assert len(open_source("tfds:eqvae_tiny:1.0.0:train[:50%]")) == 3
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        open_source("tfds:eqvae_tiny:test")
