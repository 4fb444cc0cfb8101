"""How well an autoencoder reconstructs, and how far it is from commuting with tau, over a set of images.

`encode(params, x)` returns a posterior with `.mode()` and `.sample(key, index)`, or a VQ model's Features before
quantisation, which have nothing to sample; `decode(params, z)` returns images. Both are static arguments of the few
programs below, so they must be the same objects from call to call: `functions(model)` returns them, and equal models
share them, and with them every compiled program.

An encoder and a decoder are compiled once per image size, not once per transform: a turned square image has
the shape of the image, so the 2 x 6 networks of the paper's six transforms need 2 x 4 programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from eqvae_jax import equivariance
from eqvae_jax.autoencoders.objective import to_float
from eqvae_jax.autoencoders.vq import Features
from eqvae_jax.evaluation import metrics
from eqvae_jax.evaluation.rfid import Pairs
from eqvae_jax.evaluation.transforms import family_means
from eqvae_jax.features.lpips import lpips as lpips_distance
from eqvae_jax.training.metrics import to_host
from eqvae_jax.training.sharding import devices_for, replicate, scatter


@functools.cache
def functions(model):
    """(encode, decode) of a linen autoencoder, as functions of (params, array)."""

    def encode(params, x):
        return model.apply({"params": params}, x, method=model.encode)

    def decode(params, z):
        return model.apply({"params": params}, z, method=model.decode)

    return encode, decode


@functools.cache
def assignment(model):
    """(codes, K) of a model with a codebook: the function of (params, z) that gives indices (B,h,w), and their number.

    None for a model without a codebook.
    """
    if not hasattr(model, "codebook_size"):
        return None

    def codes(params, z):
        return model.apply({"params": params}, z, method=model.quantize).indices

    return codes, model.codebook_size


def latent_size(encode, decode, params, image_size):
    """(h, w) of the latent of an image of (H, W) = `image_size`, found without computing anything.

    Raises:
      ValueError: the autoencoder does not give back an image of the size that went in.
    """
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    latent = jax.eval_shape(lambda p, x: encode(p, x).mode(), params, image)
    decoded = jax.eval_shape(decode, params, latent)
    if decoded.shape != image.shape:
        raise ValueError(
            f"{image_size[0]} x {image_size[1]} images come back as {decoded.shape[1]} x {decoded.shape[2]}: "
            f"choose sides that are multiples of the autoencoder's downsampling factor, "
            f"{decoded.shape[1] // latent.shape[1]}."
        )
    return latent.shape[1:3]


@functools.partial(jax.jit, static_argnums=0)
def _encode(encode, params, x, key, number):
    """x (B,H,W,3) -> {"mode"[, "sample"]} (B,h,w,C); an image's noise comes from `key` and its `number`."""
    posterior = encode(params, x)
    if isinstance(posterior, Features):
        return {"mode": posterior.mode()}
    return {"mode": posterior.mode(), "sample": posterior.sample(key, number)}


def _chosen(latents, posterior):
    """The latent that is decoded: without noise to sample, the mode."""
    return latents.get(posterior, latents["mode"])


@functools.partial(jax.jit, static_argnums=0)
def _run(function, params, z):
    return function(params, z)


@functools.partial(jax.jit, static_argnames=("transform", "method", "antialias"))
def _move(x, z, transform, method, antialias):
    """tau x and tau z, for images x and a dict of latents z."""
    options = {"turns": transform.turns, "method": method, "antialias": antialias}
    moved = {
        name: equivariance.apply_tau(latent, size=transform.size, **options) for name, latent in z.items()
    }
    return equivariance.apply_tau(x, size=transform.image_size, **options), moved


@functools.partial(jax.jit, static_argnames=("uint8", "ssim_range", "ssim_border"))
def _reconstruction_scores(x, y, uint8, ssim_range, ssim_border, lpips):
    shown_x, shown_y = metrics.as_displayed(x, uint8), metrics.as_displayed(y, uint8)
    # The range of the image itself is the released evaluation's choice, which takes it of the unclipped decode.
    pair = (x, y) if ssim_range is None else (shown_x, shown_y)
    scores = {
        "psnr": metrics.psnr(shown_x, shown_y),
        "ssim": metrics.ssim(*pair, data_range=ssim_range, border=ssim_border),
        "l1": metrics.l1(shown_x, shown_y),
        "mse": metrics.mse(shown_x, shown_y),
    }
    if lpips is not None:
        scores["lpips"] = lpips_distance(lpips, x, y)  # on the unclipped decode, as the released evaluation
    return scores


@functools.partial(jax.jit, static_argnames=("transform", "uint8"))
def _equivariance_scores(transform, target, moved, encoded, decoded, floor, uint8):
    target, decoded, floor = (metrics.as_displayed(image, uint8) for image in (target, decoded, floor))
    family, label = transform.family, transform.label
    names = {"mode": family, "sample": f"{family}_sample"}
    return {
        f"{names[kind]}/{label}": equivariance.relative_error(moved[kind], encoded[kind]) for kind in moved
    } | {
        f"pixel_l1/{label}": metrics.l1(decoded, target),
        f"pixel_psnr/{label}": metrics.psnr(decoded, target),
        f"floor_l1/{label}": metrics.l1(floor, target),
        f"floor_psnr/{label}": metrics.psnr(floor, target),
    }


def reconstruct(
    encode, decode, params, batches, *, assign=None, lpips=None, extractor=None, references=None, posterior="mode",
    uint8="round", ssim_range=2.0, ssim_border="valid", seed=0, progress=True,
):
    """Means over a set of images of the errors of D(E(x)), and which codes E(x) uses.

    Args:
      batches: iterable of {"image": uint8 (B,H,W,3), "mask": bool (B,)}, as data.images.evaluation_batches.
      assign: from `assignment`; None for a model without a codebook.
      lpips: parameters of features.lpips, or None to leave LPIPS out.
      extractor: the features of rFID, as evaluation.feature_sets.Extractor, or None to leave rFID out.
      references: as rfid.Pairs, for several autoencoders on the same images.
      posterior: "mode" or "sample", the latent that is decoded. The released evaluation samples.
      uint8: one of metrics.UINT8_CONVENTIONS; PSNR, SSIM, L1 and MSE are those of the 8-bit images, with
        differences in units of the [-1, 1] range.
      ssim_range, ssim_border: as metrics.ssim. A range of None is the released evaluation's SSIM, of images that
        are neither clipped nor 8-bit.

    Returns:
      {"psnr", "ssim", "l1", "mse"[, "lpips"]: float, "count": images measured}, with an extractor "rfid" (its key as
      feature_sets.label), and with a codebook "codebook_usage" and "codebook_perplexity" of the whole set, as
      metrics.CodeCounts.
    """
    codes, size = assign or (None, 0)
    means, counts, key = metrics.Means(), metrics.CodeCounts(size), jax.random.key(seed)
    pairs = Pairs(extractor, uint8, references) if extractor else None
    with jax.default_matmul_precision("highest"):  # the accelerators' default is TF32 or bf16
        for x, number, mask, placed in placed_batches(batches, params, progress, "reconstruction"):
            z = _chosen(_encode(encode, placed, x, key, number), posterior)
            y = _run(decode, placed, z)
            means.add(_reconstruction_scores(x, y, uint8, ssim_range, ssim_border, lpips), mask)
            if pairs:
                pairs.add("", x, y, mask)
            if codes:
                counts.add(_run(codes, placed, z), mask)
    sets = (counts.result() if codes else {}) | (pairs.result() if pairs else {})
    return means.result() | sets | {"count": means.count()}


def equivariance_errors(
    encode, decode, params, batches, chosen, *, extractor=None, references=None, posterior="mode", uint8="round",
    method="bilinear", antialias=False, seed=0, progress=True,
):
    """Means over a set of images of how far the autoencoder is from commuting with each tau.

    Args: as `reconstruct`, and
      chosen: a list from transforms.choose.
      method, antialias: interpolation of images and latents, as `equivariance.apply_tau`.

    Returns a flat dict of floats. For each transform's label (90, 180, 270, 0.25 ...):
      R/label, S/label              the latent error of posterior modes; R_sample/, S_sample/ of samples,
                                    where E(x) and E(tau x) have independent noise; not for VQ models,
                                    which have none
      pixel_l1/label, pixel_psnr/   D(tau E(x)) against tau x: what EQ-VAE trains
      floor_l1/label, floor_psnr/   D(E(tau x)) against tau x: what is left when tau comes first
      rfid/label                    with an extractor, rFID of D(tau E(x)) against tau x, both made 8-bit after
                                    tau: the paper's Figure 3
    the mean over each family's transforms (R, S, R_sample, S_sample, pixel_l1/R, rfid_R ...), "count", and
      excess_l1/R, excess_l1/S      pixel_l1 less floor_l1: what commuting costs beside reconstruction itself;
                                    it can be negative
    """
    means, key = metrics.Means(), jax.random.key(seed)
    pairs = Pairs(extractor, uint8, references) if extractor else None
    with jax.default_matmul_precision("highest"):
        for x, number, mask, placed in placed_batches(batches, params, progress, "equivariance"):
            z = _encode(encode, placed, x, key, number)
            for draw, transform in enumerate(chosen, start=1):
                target, moved = _move(x, z, transform, method, antialias)
                encoded = _encode(encode, placed, target, jax.random.fold_in(key, draw), number)
                decoded = _run(decode, placed, _chosen(moved, posterior))
                floor = _run(decode, placed, _chosen(encoded, posterior))
                means.add(
                    _equivariance_scores(transform, target, moved, encoded, decoded, floor, uint8), mask
                )
                if pairs:
                    pairs.add(transform.label, target, decoded, mask)
    values = means.result() | (pairs.result() if pairs else {})
    return values | family_means(values, chosen) | {"count": means.count()}


def pictures(encode, decode, params, batch, chosen, *, method="bilinear", antialias=False):
    """The images behind the numbers, for one batch (posterior mode), as NumPy arrays.

    Returns:
      {"image": (B,H,W,3), "latent": (B,h,w,C), "reconstruction": (B,H,W,3),
       "target": {label: tau x}, "first": {label: D(E(tau x))}, "moved": {label: D(tau E(x))}},
      images in [-1, 1] as displayed.
    """
    shown = {"target": {}, "first": {}, "moved": {}}
    with jax.default_matmul_precision("highest"):
        for x, number, _, placed in placed_batches([batch], params, False, ""):
            z = _encode(encode, placed, x, jax.random.key(0), number)
            shown |= {"image": x, "latent": z["mode"], "reconstruction": _run(decode, placed, z["mode"])}
            for transform in chosen:
                target, moved = _move(x, z, transform, method, antialias)
                encoded = _encode(encode, placed, target, jax.random.key(0), number)
                shown["target"][transform.label] = target
                shown["first"][transform.label] = _run(decode, placed, encoded["mode"])
                shown["moved"][transform.label] = _run(decode, placed, moved["mode"])
    clipped = lambda image: np.clip(to_host(image), -1.0, 1.0)
    return {
        "image": clipped(shown["image"]),  # 255 comes back from the device as 1.0000001
        "latent": to_host(shown["latent"]),
        "reconstruction": clipped(shown["reconstruction"]),
    } | {
        which: {label: clipped(image) for label, image in shown[which].items()}
        for which in ("target", "first", "moved")
    }


def placed_batches(batches, params, progress, name):
    """Yields (x float32 in [-1, 1], number, mask, params), the batch spread over all devices, also of other processes.

    They all have the whole of it. A batch that the devices of one process do not divide stays on the first. `number` is
    each row's place in the whole pass; a record's index would not do, as several crops share it.
    """
    placed = None
    bar = tqdm(batches, desc=name, unit="batch", leave=False, disable=None if progress else True)
    for step, batch in enumerate(bar):
        rows = len(batch["image"])
        mesh = Mesh(np.array(devices_for(rows)), ("data",))
        if placed is None:
            placed = replicate(mesh, params)
        number = np.arange(step * rows, (step + 1) * rows, dtype=np.int32)
        image, number = (scatter(array, NamedSharding(mesh, PartitionSpec("data")))
                         for array in (batch["image"], number))
        yield to_float(image), number, batch.get("mask"), placed
