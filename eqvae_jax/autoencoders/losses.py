"""The losses of LDM's autoencoders: reconstruction, adversarial, and the weight that balances them.

A step needs one forward pass of the discriminator on the reconstruction y and one backward pass of the decoder:

    nll_y = d nll / d y,   g_y = d generator_loss / d y          cotangents at the reconstruction (B, H, W, 3)
    d     = balance(kernel_vjp, nll_y, g_y)                      kernel_vjp: cotangent of y -> of the last conv's kernel
    decoder_vjp(nll_y + disc_weight * d * disc_factor * g_y)     the only pass through the decoder
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def reconstruction_loss(x, y, lpips=0.0, perceptual_weight=1.0, logvar=0.0, reduction="sum"):
    """Negative log likelihood of a Laplace decoder with a perceptual term, up to a constant: a float32 scalar.

    x, y: (B, H, W, C) in [-1, 1]. lpips: (B,) distance of each pair (or 0 when there is none). logvar: log of the
    decoder's scale, a constant 0 in every released recipe. reduction "sum" adds up the values of an image and averages
    over the batch (KL models); "mean" averages over everything (VQ models). Raises ValueError on another reduction.
    Source: LPIPSWithDiscriminator and VQLPIPSWithDiscriminator of latent-diffusion and taming-transformers.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" (KL models) or "mean" (VQ models), not {reduction!r}')
    absolute = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).mean((1, 2, 3))      # B
    # LPIPS is one number an image, added to each of its values: hence weight 1 beside the mean absolute error.
    nll = ((absolute + perceptual_weight * lpips) / jnp.exp(logvar)).mean() + logvar
    values_per_image = x.size // x.shape[0]
    return nll * values_per_image if reduction == "sum" else nll


def codebook_loss(z, codes, beta=0.25, legacy=True):
    """Pulls codes to features and, a commitment, features to codes; a float32 scalar, the mean over all elements.

    z: features before quantisation, codes: their nearest codes, both (B, h, w, C). The corrected form weighs the
    commitment with beta, as VQ-VAE defines it; the legacy one weighs the codebook's part instead, and is what every
    released VQ-GAN was trained with. Source: VectorQuantizer2 of taming-transformers.
    """
    z, codes = z.astype(jnp.float32), codes.astype(jnp.float32)
    commitment = jnp.square(jax.lax.stop_gradient(codes) - z).mean()
    codebook = jnp.square(codes - jax.lax.stop_gradient(z)).mean()
    return commitment + beta * codebook if legacy else beta * commitment + codebook


def codebook_metrics(indices, size):
    """How many of `size` codes a batch uses, as a share, and the perplexity of their distribution, 1 to size."""
    counts = jnp.bincount(indices.reshape(-1), length=size)
    p = counts / indices.size
    entropy = -jnp.sum(jnp.where(counts > 0, p * jnp.log(jnp.maximum(p, 1e-10)), 0.0))
    return {"codebook_usage": jnp.mean(counts > 0), "codebook_perplexity": jnp.exp(entropy)}


def explicit_loss(moved, encoded, stop_gradient=False, reduction="sum"):
    """||tau E(x) - E(tau x)||^2 of latents (B, h, w, C), averaged over the batch; a float32 scalar.

    stop_gradient: E(tau x) is a constant. reduction: over an image's latent, as `reconstruction_loss` over its pixels,
    so that one weight suits both. Source: the paper's explicit regularisation, appendix A.1, which does not say.
    """
    encoded = jax.lax.stop_gradient(encoded) if stop_gradient else encoded
    mean = jnp.square(moved - encoded).mean()
    return mean * (moved.size // moved.shape[0]) if reduction == "sum" else mean


def generator_loss(logits_fake):
    """-E[D(y)]: what the autoencoder minimises against the discriminator, under either discriminator loss."""
    return -logits_fake.astype(jnp.float32).mean()


def hinge_discriminator_loss(logits_real, logits_fake):
    """(E[relu(1 - D(x))] + E[relu(1 + D(y))]) / 2."""
    real, fake = logits_real.astype(jnp.float32), logits_fake.astype(jnp.float32)
    return 0.5 * (nn.relu(1.0 - real).mean() + nn.relu(1.0 + fake).mean())


def adaptive_weight(nll_kernel_grad, gan_kernel_grad, maximum=1e4):
    """|nll's gradient| / (|generator's gradient| + 1e-4) at the decoder's last kernel, in [0, maximum], as a constant.

    Arguments are gradients of any tree structure. The cap comes before the multiplication with disc_weight.
    Source: VQ-GAN (Esser et al. 2021), section 3.2; released code of taming-transformers.
    """
    weight = frobenius_norm(nll_kernel_grad) / (frobenius_norm(gan_kernel_grad) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(weight, 0.0, maximum))


def balance(kernel_vjp, nll_cotangent, generator_cotangent, maximum=1e4):
    """Adaptive weight from the two losses' cotangents at the reconstruction.

    kernel_vjp maps a cotangent of the reconstruction (B, H, W, 3) to that of the decoder's last convolution kernel: it
    is what `jax.vjp` of this convolution, as a function of its kernel alone, returns. The decoder's body is never
    entered.
    """
    return adaptive_weight(kernel_vjp(nll_cotangent), kernel_vjp(generator_cotangent), maximum)


def frobenius_norm(tree):
    return jnp.sqrt(sum(jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(tree)))
