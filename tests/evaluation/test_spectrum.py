import numpy as np
import pytest
import scipy.fft

from eqvae_jax.evaluation.spectrum import SpectrumMeter, dct_matrix, ring_of


def spectrum_of(*batches):
    meter = SpectrumMeter()
    for batch in batches:
        meter.add(batch)
    return meter.result()


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_the_transform_is_scipys_orthonormal_one(rng, size):
    z = rng.normal(size=(size, 9))
    np.testing.assert_allclose(
        dct_matrix(size) @ z @ dct_matrix(9).T, scipy.fft.dctn(z, norm="ortho"), atol=1e-13)


@pytest.mark.parametrize("height, width", [(8, 8), (6, 11), (11, 6)])
def test_energy_over_rings_is_that_of_scipys_transform(rng, height, width):
    latents = rng.gamma(1.0, size=(5, height, width, 3)).astype(np.float32)
    found = spectrum_of(latents[:2], latents[2:])
    power = np.square(scipy.fft.dctn(latents.astype(np.float64), axes=(1, 2), norm="ortho")).mean(0)
    shorter = min(height, width)
    members = {}
    for u in range(height):
        for v in range(width):
            f = np.hypot(u / height, v / width)
            ring = 0 if u == v == 0 else max(1, round(f * shorter))
            members.setdefault(ring, []).append((f, power[u, v]))
    for ring, values in enumerate(members[r] for r in sorted(members)):
        assert found.coefficients[ring] == len(values)
        assert found.frequency[ring] == pytest.approx(np.mean([f for f, _ in values]))
        np.testing.assert_allclose(found.energy[ring], np.mean([p for _, p in values], axis=0), rtol=1e-12)
    assert found.count == 5 and len(found.energy) == len(members)


def test_no_energy_is_lost(rng):
    latents = rng.normal(size=(4, 8, 12, 2)) + 3
    found = spectrum_of(latents)
    assert found.coefficients.sum() == 96
    np.testing.assert_allclose(found.coefficients @ found.energy, np.square(latents).sum((1, 2)).mean(0), rtol=1e-12)


def test_a_wave_has_one_frequency_and_a_constant_none():
    position = np.arange(16) + 0.5
    wave = np.cos(np.pi * 4 * position / 16)[:, None] * np.cos(np.pi * 3 * position / 16)  # u = 4, v = 3: ring 5
    found = spectrum_of(np.stack([wave, np.full((16, 16), 2.0)], -1)[None])
    assert ring_of(16, 16)[4, 3] == 5 and np.flatnonzero(found.energy[:, 0] > 1e-20) == [5]
    assert found.frequency[5] == pytest.approx(5 / 16, rel=0.03)
    np.testing.assert_allclose(found.energy[:, 1], [4 * 256] + [0] * (len(found.energy) - 1), atol=1e-20)


def test_white_noise_is_flat_and_smooth_fields_fall_off(rng):
    noise = 3 * rng.normal(size=(400, 16, 16, 2))
    found = spectrum_of(noise)
    np.testing.assert_allclose(found.energy, 9, rtol=0.25)
    high = found.coefficients[found.frequency > 0.5].sum() / found.coefficients[1:].sum()
    assert found.share_above(0.5) == pytest.approx(high, rel=0.02)
    smooth = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2) + np.roll(noise, (1, 1), (1, 2))) / 4
    assert spectrum_of(smooth).share_above(0.5) < 0.6 * found.share_above(0.5)


def test_share_above_a_frequency_knows_neither_scale_nor_shift(rng):
    latents = rng.gamma(1.0, size=(6, 8, 8, 4))
    share = spectrum_of(latents).share_above(0.4)
    assert spectrum_of(0.18 * latents - 7).share_above(0.4) == pytest.approx(share, rel=1e-10)
    assert spectrum_of(latents).share_above(2.0) == 0 and spectrum_of(latents).share_above(0.0) == pytest.approx(1)


def test_padding_is_never_looked_at(rng):
    latents = rng.normal(size=(5, 8, 8, 4)).astype(np.float32)
    padded = np.concatenate([latents, np.full((3, 8, 8, 4), np.nan, np.float32)])
    meter = SpectrumMeter()
    meter.add(padded, mask=np.arange(8) < 5)
    meter.add(padded[5:], mask=np.zeros(3, bool))
    np.testing.assert_allclose(meter.result().energy, spectrum_of(latents).energy, rtol=1e-12)
    assert meter.result().count == 5


def test_bad_latents_are_refused(rng):
    latents = rng.normal(size=(5, 8, 8, 4))
    meter = SpectrumMeter()
    with pytest.raises(ValueError, match="the set is empty"):
        meter.result()
    with pytest.raises(ValueError, match=r"must be \(B, h, w, C\)"):
        meter.add(latents[0])
    meter.add(latents)
    with pytest.raises(ValueError, match=r"\(8, 6, 4\) after \(8, 8, 4\)"):
        meter.add(latents[:, :, :6])
    with pytest.raises(ValueError, match="5 latents after the first 5 are not finite"):
        meter.add(np.where(latents > 2, np.nan, latents))
    for value in (0.0, 0.7):
        with pytest.raises(ValueError, match="constant"):
            spectrum_of(np.full((5, 8, 8, 4), value)).share_above(0.5)
