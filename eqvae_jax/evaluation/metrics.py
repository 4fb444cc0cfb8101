"""What an image pair is worth: PSNR, SSIM, L1, MSE, masked means of them, and how a codebook is used.

Every metric takes batches and returns one value per image, (B,) float32, so that averages are taken once, at
the end, over real images only. Images are (B, H, W, C) in [-1, 1].
"""

import jax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.training.metrics import to_host

# How a float image becomes the 8-bit image a viewer sees. "round" is clip(127.5 x + 128) cut to an integer:
# half-up rounding, used by ADM, DiT and the released EQ-VAE evaluation. "truncate" is 127.5 (x + 1) cut to an
# integer, LDM's own writer: half a grey level darker on average; the 2^-12 added here lets images that were 8-bit stay
# what they are, as x = u / 127.5 - 1 is rounded and a fused multiplication and addition shows it. "none" only clips.
UINT8_CONVENTIONS = {"round": 128.0, "truncate": 127.5 + 2**-12, "none": None}

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Wang et al. 2004
SSIM_K1, SSIM_K2 = 0.01, 0.03


def _levels(x, offset):
    """Grey levels 0 .. 255 of images that are clipped already, as float32."""
    return jnp.clip(jnp.floor(127.5 * x + offset), 0.0, 255.0)


def as_displayed(x, uint8="round"):
    """Clips (B, H, W, C) to [-1, 1] and rounds it to 8 bits by one of UINT8_CONVENTIONS; still float32."""
    x = jnp.clip(x.astype(jnp.float32), -1.0, 1.0)
    offset = UINT8_CONVENTIONS[uint8]
    return x if offset is None else _levels(x, offset) / 127.5 - 1.0


def to_bytes(x, uint8="round"):
    """The 8-bit images of `as_displayed`, uint8 (B, H, W, C); `uint8` is "round" or "truncate"."""
    return _levels(jnp.clip(x.astype(jnp.float32), -1.0, 1.0), UINT8_CONVENTIONS[uint8]).astype(jnp.uint8)


def l1(x, y):
    """Mean absolute difference over pixels and channels, (B,), in units of the [-1, 1] range."""
    return jnp.mean(jnp.abs(x - y), axis=(1, 2, 3))


def mse(x, y):
    """Mean squared difference over pixels and channels, (B,)."""
    return jnp.mean(jnp.square(x - y), axis=(1, 2, 3))


def psnr(x, y, uint8="none"):
    """Peak signal-to-noise ratio in dB, (B,), of images in [-1, 1] (peak 2); +inf for identical images.

    uint8: one of UINT8_CONVENTIONS, applied to both first. On 8-bit images this is 20 log10(255 / rmse), the
      released evaluation's PSNR.
    """
    difference = mse(as_displayed(x, uint8), as_displayed(y, uint8))
    return 10.0 * (jnp.log10(4.0) - jnp.log10(difference))


def _window_means(length):
    """(length - 10, length): row i averages positions i .. i + 10 with Gaussian weights that sum to one."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * np.square(offsets / SSIM_SIGMA))
    weights /= weights.sum()
    rows = length - SSIM_WINDOW + 1
    matrix = np.zeros((rows, length), np.float32)
    for row in range(rows):
        matrix[row, row : row + SSIM_WINDOW] = weights
    return matrix


def ssim(x, y, data_range=2.0, border="valid"):
    """Structural similarity (Wang et al. 2004), (B,): Gaussian 11 x 11 window, sigma 1.5, K1 = .01, K2 = .03.

    With the defaults only windows that lie inside the image count (5 pixels are lost on each side), with the
    population variance, and channels are averaged: scikit-image's `structural_similarity` with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False. Values are not clipped here.

    Args:
      data_range: of the values; None for the larger of the two images' own ranges, as in the released evaluation
        (torchmetrics' default, one image at a time).
      border: "valid", which is also that of torchmetrics up to 1.4.1, or "reflect", that of later versions.

    Raises:
      ValueError: an image side is below 11 pixels, or another border.
    """
    if border not in ("valid", "reflect"):
        raise ValueError(f'border is {border!r}; it must be "valid" or "reflect".')
    height, width = x.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {height} x {width}.")
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    if data_range is None:
        spread = lambda image: jnp.ptp(image, axis=(1, 2, 3))[:, None, None, None]
        data_range = jnp.maximum(spread(x), spread(y))
    if border == "reflect":
        half = SSIM_WINDOW // 2
        x, y = (jnp.pad(image, ((0, 0), (half, half), (half, half), (0, 0)), mode="reflect") for image in (x, y))
        height, width = x.shape[1:3]
    vertical, horizontal = _window_means(height), _window_means(width)

    def smooth(image):  # the window is separable: two banded matrix products per channel
        return jnp.einsum(
            "ih,bhwc,jw->bijc", vertical, image, horizontal, precision=jax.lax.Precision.HIGHEST
        )

    mean_x, mean_y = smooth(x), smooth(y)
    variance_x = smooth(x * x) - mean_x * mean_x
    variance_y = smooth(y * y) - mean_y * mean_y
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


class Means:
    """Averages of per-image values over batches; sums and counts travel together, in float64 on the host."""

    def __init__(self):
        self._sums, self._counts = {}, {}

    def add(self, values, mask=None):
        """values: dict name -> (B,); mask: (B,) bool, False for padding, whose values are never looked at."""
        for name, value in values.items():
            value = to_host(value).astype(np.float64)
            real = value if mask is None else value[np.asarray(mask, bool)]
            self._sums[name] = self._sums.get(name, 0.0) + float(real.sum())
            self._counts[name] = self._counts.get(name, 0) + real.size

    def result(self):
        """dict name -> mean. A value that is not finite makes its mean so: a broken image must not hide.

        Raises:
          ValueError: nothing was averaged.
        """
        empty = [name for name, count in self._counts.items() if not count]
        if empty or not self._counts:
            raise ValueError("There is no image to average over: the evaluation set is empty.")
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def count(self):
        """How many images were averaged."""
        return max(self._counts.values(), default=0)


class CodeCounts:
    """How often each of `size` codes is used over a set of images, in whole numbers on the host."""

    def __init__(self, size):
        self._counts = np.zeros(size, np.int64)

    def add(self, indices, mask=None):
        """indices: (B, h, w) in 0 .. size - 1; mask: (B,) bool, False for padding, whose codes are not counted."""
        indices = to_host(indices)
        real = indices if mask is None else indices[np.asarray(mask, bool)]
        self._counts += np.bincount(real.ravel(), minlength=len(self._counts))

    def result(self):
        """{"codebook_usage": share of the codes used at least once, "codebook_perplexity": exp(-sum p log p)}.

        p is a code's share of all assignments of the set. The perplexity is the size of a codebook that, used
        evenly, would say as much: 1 where one code does all, `size` where all are equally frequent.

        Raises:
          ValueError: nothing was counted.
        """
        used = self._counts[self._counts > 0]
        if not used.size:
            raise ValueError("There is no image to count codes of: the evaluation set is empty.")
        p = used / used.sum()
        return {
            "codebook_usage": used.size / self._counts.size,
            "codebook_perplexity": float(np.exp(-np.sum(p * np.log(p)))),
        }
