"""ADM's .npz: read and written as a stream, and every file that cannot be right refused before anything is computed."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from eqvae_jax.evaluation.gaussians import Gaussian, load_statistics
from eqvae_jax.evaluation.samples import checked_images, open_samples, read_images, write_npz


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)


def everything(path, rows=4):
    return np.concatenate(list(read_images(open_samples(path), rows)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read_back_in_pieces(tmp_path, images, save):
    save(tmp_path / "s.npz", images)
    samples = open_samples(tmp_path / "s.npz")
    assert (samples.count, samples.image_size, samples.made_with) == (23, (6, 5), None)
    pieces = list(read_images(samples, 7))
    assert [len(piece) for piece in pieces] == [7, 7, 7, 2]
    np.testing.assert_array_equal(np.concatenate(pieces), images)


def test_numpy_reads_what_is_written_in_pieces(tmp_path, images, rng):
    root = rng.normal(size=(9, 4))
    pool, spatial = Gaussian(rng.normal(size=4), np.cov(root, rowvar=False), 9), Gaussian(root[0], root.T @ root, 9)
    pieces = [images[:10], images[10:11], images[11:]]
    write_npz(tmp_path / "r.npz", pieces, 23, statistics=pool, spatial=spatial,
              made_with={"features": "inception", "count": 9})  # fmt: skip
    with np.load(tmp_path / "r.npz") as file:  # as ADM's evaluator does, without pickles
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["sigma_s"], spatial.sigma)
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file)
    np.testing.assert_array_equal(load_statistics(tmp_path / "r.npz").mu, pool.mu)
    assert open_samples(tmp_path / "r.npz").made_with == {"features": "inception", "count": 9}
    np.testing.assert_array_equal(everything(tmp_path / "r.npz"), images)


def test_statistics_of_a_classifier_are_under_no_name_that_other_tools_read(tmp_path, images):
    gaussian = Gaussian(np.ones(2), np.eye(2), 9)
    write_npz(tmp_path / "r.npz", [images], 23, statistics=gaussian, made_with={"features": "fashion-cnn"})
    assert {"mu", "sigma"}.isdisjoint(open_samples(tmp_path / "r.npz").members)
    assert load_statistics(tmp_path / "r.npz", suffix="(fashion-cnn)").mu.tolist() == [1, 1]


@pytest.mark.parametrize("count", [22, 24])
def test_a_count_that_was_not_kept_leaves_no_file(tmp_path, images, count):
    with pytest.raises(ValueError, match=f"23 images came, {count} were announced"):
        write_npz(tmp_path / "r.npz", [images], count)
    assert list(tmp_path.iterdir()) == []


def test_images_pass_through_flat_memory(tmp_path):
    batch = np.full((50, 64, 64, 3), 7, np.uint8)  # 0.6 MB of 61 MB
    tracemalloc.start()
    write_npz(tmp_path / "r.npz", (batch for _ in range(100)), 5000)
    total = sum(len(images) for images in read_images(open_samples(tmp_path / "r.npz"), 50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 5000 and peak < 6e6


def saved(tmp_path, **arrays):
    np.savez(tmp_path / "s.npz", **arrays)
    return tmp_path / "s.npz"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), "images are float32: metrics compare 8-bit images"),
        (np.zeros((4, 8, 8, 3), np.int64), "int64"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"channels last, and these are \(1, 3, 8, 8\)"),
        (np.zeros((4, 8, 8), np.uint8), "channels last"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"empty, of shape \(0, 8, 8, 3\)"),
        (np.zeros((4, 0, 8, 3), np.uint8), r"\(1, 0, 8, 3\)"),
        (np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8)), "columns first"),
        (np.array([None, 1], object), "object"),
    ],
    ids=["float", "int64", "channels first", "gray", "empty", "no height", "fortran", "pickle"],
)
def test_arrays_that_are_no_images_are_refused_by_their_header(tmp_path, array, message):
    path = saved(tmp_path, arr_0=array)
    with pytest.raises(ValueError, match=message) as caught:
        open_samples(path)
    assert str(path) in str(caught.value)


def test_nan_is_named_where_floats_are_refused():
    images = np.zeros((5, 4, 4, 3), np.float32)
    images[[1, 3], 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="2 of these 5 images hold NaN"):
        checked_images(images)


@pytest.mark.parametrize("size", [1000, 300, 10, 0])
def test_a_file_that_is_cut_short_is_refused_at_once(tmp_path, images, size):
    path = saved(tmp_path, arr_0=images)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="cut short") as caught:
        open_samples(path)
    assert str(path) in str(caught.value)


def test_fewer_bytes_than_the_header_says_are_refused_at_once(tmp_path, images):
    content = io.BytesIO()
    np.save(content, images)
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue()[:-100])
    with pytest.raises(ValueError, match="1970 of the 2070 bytes of its 23 images"):
        open_samples(tmp_path / "s.npz")


def test_a_changed_byte_is_noticed(tmp_path, images):
    path = saved(tmp_path, arr_0=images)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="CRC"):
        everything(path)


def test_files_without_images_or_statistics_and_no_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_samples(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match=r"neither images \(arr_0\) nor statistics"):
        open_samples(saved(tmp_path, latents=np.zeros(3)))
    np.save(tmp_path / "a.npz.npy", np.zeros(3))
    with pytest.raises(ValueError, match="zip"):
        open_samples(tmp_path / "a.npz.npy")


def test_a_file_of_statistics_alone_is_one(tmp_path):
    samples = open_samples(saved(tmp_path, mu=np.zeros(2), sigma=np.eye(2)))
    assert samples.count == 0 and samples.image_size is None
