"""tau, the transform EQ-VAE is about: how it is drawn, how it acts on images and latents, and how far an
encoder is from commuting with it.

tau scales, may shift, then turns by quarter turns. All act on the two spatial axes of an NHWC array, so the same
function serves images and latents; only sizes and shifts differ, by the autoencoder's downsampling factor.

Source: EQ-VAE (arXiv 2502.09509), section 3 and appendix C.3. Where the released code and the paper differ
(interpolation, meaning of `p_prior`, which sizes), the defaults here are the released code's. Shifts are not EQ-VAE's:
AF-LDM (arXiv 2503.09419).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LATENT, IMAGE, NONE = "latent", "image", "none"

# (method, antialias) -> jax.image's name. torch's bicubic uses Keys' a = -0.75 without antialias and
# a = -0.5 with it; jax keeps the two apart under two names.
_RESIZE = {
    ("bilinear", False): "linear",
    ("bilinear", True): "linear",
    ("bicubic", False): jax.image.ResizeMethod.CUBIC_PYTORCH,
    ("bicubic", True): "cubic",
}


class Tau(NamedTuple):
    """One drawn transform, the same for a whole batch.

    where: "latent" (encode, transform the latent, decode, compare with the transformed image), "image"
      (shrink the image first: prior preservation at low resolution) or "none" (plain reconstruction).
    height, width: side lengths in latent pixels after scaling and before turning; None for "none".
    turns: clockwise quarter turns, 0..3.
    shift: (down, right) between scaling and turning, in whole image pixels, so that the image is moved exactly; the
      latent moves by this over the downsampling factor. None for none.
    reduction: for "none", how many times smaller the image is reconstructed a second time; None for not at all.
    """

    where: str
    height: int | None = None
    width: int | None = None
    turns: int = 0
    shift: tuple[int, int] | None = None
    reduction: int | None = None

    def image_size(self, factor: int) -> tuple[int, int] | None:
        """(height, width) of the scaled image, for an autoencoder that downsamples by `factor`."""
        return None if self.height is None else (self.height * factor, self.width * factor)


def draw_tau(seed: int, draw: int, *, sizes, turns=(1, 2, 3), p_equivariance=0.5, p_low_resolution=0.25,
             anisotropic=False, max_shift=0, reductions=()) -> Tau:
    """Draws the transform of one (micro-)step on the host, from `(seed, draw)` alone.

    Every host therefore draws the same one, and a restarted run replays it.

    Args:
      sizes: side lengths in latent pixels to choose from. The released grid for a 32 x 32 latent is
        8..31; a tuple holding just the full side gives rotation only.
      turns: quarter turns to choose from; (0,) gives scaling only.
      p_equivariance: probability of the equivariance branch ("latent"). It is `p_prior` in the released
        code (whatever its README says) and 1 - p_alpha in the paper.
      p_low_resolution: probability of the low-resolution branch ("image"), given that the equivariance
        branch was not taken. 0.25 in the released code, 0 in the paper.
      anisotropic: draw height and width independently (equivariance branch only, as released).
      max_shift: how far at most the equivariance branch shifts the image up, down, left or right, in pixels; 0 for
        not at all.
      reductions: what to choose the second, smaller reconstruction of the plain branch from; () for none.
    """
    rng = np.random.default_rng((seed, draw, 2))  # 2: a stream apart from the crops' (data/images.py)
    branch, low_resolution = rng.random(2)
    height, width = (int(size) for size in rng.choice(np.asarray(sizes), size=2))
    turn = int(rng.choice(np.asarray(turns)))
    *place, reduction = rng.random(3)  # last, and whether used or not: an option changes no other draw
    if branch < p_equivariance:
        shift = tuple(int((2 * max_shift + 1) * u) - max_shift for u in place) if max_shift else None
        return Tau(LATENT, height, width if anisotropic else height, turn, shift)
    if low_resolution < p_low_resolution:
        return Tau(IMAGE, height, height)
    return Tau(NONE, reduction=reductions[int(len(reductions) * reduction)] if reductions else None)


def resize(x, size, method="bilinear", antialias=False):
    """Resizes (B, H, W, C) to (B, *size, C); torch's `interpolate` to <= 1e-5 for every method here.

    Computed in float32 whatever the input's type, since bf16 coordinates would move pixels.
    """
    if tuple(size) == x.shape[1:3]:
        return x
    shape = (x.shape[0], *size, x.shape[3])
    kind = _RESIZE[method, bool(antialias)]
    return jax.image.resize(x.astype(jnp.float32), shape, kind, antialias=antialias).astype(x.dtype)


def quarter_turns(x, turns):
    """Turns (B, H, W, C) clockwise: `torch.rot90(x, turns, dims=[-1, -2])` on NCHW.

    `turns` may be traced when H == W: one program then serves all four. Otherwise it must be an int.
    """
    rotations = [lambda y, k=k: jnp.rot90(y, k, axes=(2, 1)) for k in range(4)]
    if isinstance(turns, (int, np.integer)):
        return rotations[turns % 4](x)
    if x.shape[1] != x.shape[2]:
        raise ValueError(f"turns must be a Python int for a {x.shape[1]} x {x.shape[2]} map: its shape depends on "
                         "it.")
    return jax.lax.switch(turns % 4, rotations, x)


def shifted(x, shift, method="bilinear"):
    """Moves (B, H, W, C) down and right by shift = (dy, dx) pixels; what leaves on one side comes in on the other.

    Two integers move exactly, anything else interpolates as `resize` does, in float32; both may be traced. The border
    is circular as in AF-LDM's training, which interpolates by an ideal low-pass filter instead and leaves what came
    in out of its loss.
    """
    if all(jnp.issubdtype(jnp.result_type(by), jnp.integer) for by in shift):
        return jnp.roll(x, shift, axis=(1, 2))
    shift = jnp.stack([jnp.asarray(by, jnp.float32) for by in shift])
    whole = jnp.floor(shift)
    rolled = jnp.roll(x.astype(jnp.float32), tuple(whole.astype(jnp.int32)), axis=(1, 2))
    margin = 3  # more than any kernel reaches
    framed = jnp.pad(rolled, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="wrap")
    moved = jax.image.scale_and_translate(framed, framed.shape, (1, 2), jnp.ones(2), shift - whole,
                                          _RESIZE[method, False], antialias=False)
    return moved[:, margin:-margin, margin:-margin].astype(x.dtype)


def apply_tau(x, size=None, turns=0, method="bilinear", antialias=False, shift=None):
    """tau(x): (B, H, W, C) scaled to `size` = (h, w), None for no scaling, shifted, then turned clockwise.

    method: "bilinear" (released code) or "bicubic" (paper); antialias: off in the released code, so a
    shrunken target is aliased. shift: as `shifted` takes it, in pixels of the scaled x; None for none. Returns
    (B, h, w, C), or (B, w, h, C) after an odd number of turns.
    """
    scaled = x if size is None else resize(x, size, method, antialias)
    return quarter_turns(scaled if shift is None else shifted(scaled, shift, method), turns)


def relative_error(moved, encoded):
    """||tau E(x) - E(tau x)||^2 / ||E(tau x)||^2 of each image, (B,), from the two latents (B, h, w, C).

    Raises ValueError if they differ in shape.
    """
    if moved.shape != encoded.shape:
        raise ValueError(f"tau E(x) is {moved.shape} but E(tau x) is {encoded.shape}: the image's side must be a "
                         "multiple of the autoencoder's downsampling factor, before and after scaling.")
    squared = lambda z: jnp.sum(jnp.square(z.astype(jnp.float32)), axis=(1, 2, 3))
    return squared(moved - encoded) / squared(encoded)


def error(encode: Callable, x, *, factor: int, size=None, turns=0, method="bilinear", antialias=False):
    """Equivariance error ||tau E(x) - E(tau x)||^2 / ||E(tau x)||^2 of each image, shape (B,).

    Averaged over images, this is the paper's R(theta) for turns 1, 2, 3 and S(s) for sizes s * side
    (appendix C.3: a mean of per-image ratios of squared norms, normalised by the encoding of tau x).

    Args:
      encode: (B, H, W, 3) -> unscaled latents (B, h, w, C); a shift would change the ratio, a scale not.
      factor: the encoder's downsampling factor, H / h.
      size: (height, width) in latent pixels after scaling; None for rotation only.
    """
    image_size = None if size is None else (size[0] * factor, size[1] * factor)
    moved = apply_tau(encode(x), size, turns, method, antialias)
    encoded = encode(apply_tau(x, image_size, turns, method, antialias))
    return relative_error(moved, encoded)
