import numpy as np
import pytest
import scipy.linalg
from toy_autoencoder import PARAMS, Posterior, batches_of, photographs, pooling, ramping, upsampling

from eqvae_jax import equivariance
from eqvae_jax.evaluation import comparison, reconstruction, rfid, transforms
from eqvae_jax.evaluation.feature_sets import Extractor

PROJECTION = np.random.default_rng(7).normal(size=(9, 5)) / 3


def features(images):
    """(B, 5): three pixels, mixed; not the same after a turn."""
    pixels = np.asarray(images, np.float64)[:, [0, 1, -1], [0, 2, 1]].reshape(len(images), 9) / 255
    return np.tanh(pixels @ PROJECTION)


class Network:
    """A hand-made extractor that remembers what it was shown."""

    def __init__(self, name="fashion-cnn"):
        self.shown = []
        self.extractor = Extractor(name, "0123", "as it is", self.extract)

    def extract(self, images):
        self.shown.append(np.asarray(images))
        assert self.shown[-1].dtype == np.uint8
        return {"pool": features(images), "logits": features(images)}


def distance(reference, generated):
    """Fréchet distance of two sets of 8-bit images, by the textbook's formula."""
    a, b = features(reference), features(generated)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)


def as_bytes(x, offset=128.0):
    return np.clip(np.floor(127.5 * np.asarray(x, np.float64) + offset), 0, 255).astype(np.uint8)


def dull(params, z):
    """Not half way between two grey levels, as plain averages often are: compiled or not, all round the same way."""
    return 0.973 * upsampling(params, z)


def identity(params, x):
    return Posterior(x, np.zeros_like(x) if isinstance(x, np.ndarray) else x * 0)


@pytest.fixture
def images(rng):
    """Forty noisy images of different colours: enough for five features."""
    tint = rng.integers(0, 200, (40, 1, 1, 3))
    return np.clip(tint + rng.integers(0, 60, (40, 12, 12, 3)), 0, 255).astype(np.uint8)


def under(encode, decode, images, network, turns=(1, 2), scales=(0.5,), factor=2, batch=16, **options):
    size = reconstruction.latent_size(encode, decode, PARAMS, images.shape[1:3])
    chosen = transforms.choose(size, factor, turns, scales)
    return reconstruction.equivariance_errors(
        encode, decode, PARAMS, batches_of(images, batch), chosen, extractor=network.extractor, **options
    )


def test_plain_rfid_is_the_distance_of_8_bit_decodes_from_the_images_without_padding(images):
    x = images.astype(np.float32) / 127.5 - 1
    decoded = np.asarray(dull(PARAMS, ramping(PARAMS, x).mode()))
    for convention, offset in {"round": 128.0, "truncate": 127.5 + 2**-12}.items():
        result = reconstruction.reconstruct(
            ramping, dull, PARAMS, batches_of(images, 16), extractor=Network().extractor, uint8=convention
        )
        expected = distance(images, as_bytes(decoded, offset))
        assert result["rfid(fashion-cnn)"] == pytest.approx(expected, rel=1e-6) and expected > 1e-3
        assert result["count"] == 40


def test_rfid_under_tau_compares_what_was_moved_then_decoded_with_the_moved_image(images):
    result = under(ramping, dull, images, Network("inception"), method="bicubic")
    x = images.astype(np.float32) / 127.5 - 1
    z = ramping(PARAMS, x).mode()
    options = {"90": {"turns": 1}, "180": {"turns": 2}, "0.5": {"size": (3, 3)}}
    expected = {}
    for label, tau in options.items():
        moved = dull(PARAMS, equivariance.apply_tau(z, method="bicubic", **tau))
        tau = {"size": (6, 6)} if "size" in tau else tau
        expected[label] = distance(as_bytes(equivariance.apply_tau(x, method="bicubic", **tau)), as_bytes(moved))
        assert result[f"rfid/{label}"] == pytest.approx(expected[label], rel=1e-5), label
    assert result["rfid_R"] == pytest.approx((expected["90"] + expected["180"]) / 2, rel=1e-5)
    assert result["rfid_S"] == result["rfid/0.5"] and len(set(expected.values())) == 3
    assert "rfid" not in result


def test_an_autoencoder_that_commutes_and_reconstructs_has_no_distance(images):
    result = under(identity, lambda params, z: z, images, Network(), scales=(), factor=1)
    assert result["rfid(fashion-cnn)_R"] == pytest.approx(0, abs=1e-9)


def test_the_next_autoencoder_finds_the_reference_sets_measured(images):
    references, first, second, alone = {}, Network(), Network(), Network()
    under(pooling, upsampling, images, first, references=references)
    shared = under(ramping, upsampling, images, second, references=references)
    assert len(second.shown) == len(first.shown) / 2
    expected = under(ramping, upsampling, images, alone)
    assert shared == {key: pytest.approx(value, rel=1e-9) for key, value in expected.items()}


def test_a_decode_that_is_not_finite_has_no_rfid_and_padding_may_be_anything(images):
    broken = lambda params, z: upsampling(params, z) / (z.mean() * 0)
    result = reconstruction.reconstruct(
        pooling, broken, PARAMS, batches_of(images, 20), extractor=Network().extractor
    )
    assert np.isnan(result["rfid(fashion-cnn)"])
    pairs = rfid.Pairs(Network().extractor, "round")
    x = images.astype(np.float32) / 127.5 - 1
    y = x[:, ::-1].copy()
    y[30:] = np.nan
    pairs.add("", x, y, np.arange(40) < 30)
    assert pairs.result()["rfid(fashion-cnn)"] == pytest.approx(distance(images[:30], images[:30, ::-1]), rel=1e-6)
    pairs.add("", x[:1], y[30:31])
    assert np.isnan(pairs.result()["rfid(fashion-cnn)"])


def test_one_image_has_no_covariance_and_so_no_rfid(rng):
    result = reconstruction.reconstruct(
        pooling, upsampling, PARAMS, batches_of(photographs(rng, 1, 12), 2), extractor=Network().extractor
    )
    assert np.isnan(result["rfid(fashion-cnn)"]) and np.isfinite(result["psnr"])


def test_features_are_added_by_the_hundred_without_losing_any(images, monkeypatch):
    expected = under(ramping, upsampling, images, Network(), batch=8)
    monkeypatch.setattr(rfid._Set, "ROWS", 17)  # the third batch makes it full
    found = under(ramping, upsampling, images, Network(), batch=8)
    assert found == {key: pytest.approx(value, rel=1e-9) for key, value in expected.items()}


def test_rfid_without_8_bit_images_is_refused():
    protocol = comparison.Protocol("photos:test", 16, uint8="none")
    with pytest.raises(ValueError, match="8-bit images: take uint8=round or truncate instead of none"):
        comparison.check({}, protocol, extractor=Network().extractor)
    comparison.check({}, protocol)
