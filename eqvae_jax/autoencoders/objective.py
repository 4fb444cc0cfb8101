"""EQ-VAE's objective around an autoencoder: losses and gradients of one micro-batch under one transform.

It is five small programs instead of one large one, so that the ~50 sizes tau can take share what does not depend
on them:

    encode     image -> posterior            one program a size of the encoded image (1 + low-resolution sizes)
    transform  posterior -> tau(z), tau(x)   cheap, one a tau
    decode     z -> losses, gradients        one a size of the decoded image
    pull       z's cotangent -> posterior's -> encoder's gradients

The paper's explicit alternative adds one, `gap`: ||tau E(x) - E(tau x)||^2 between two encodings, beside plain
reconstruction. Scale equivariance, which is not the paper's, adds `decode_reduced`: the same image once more, from a
smaller latent. The cotangents between them are `jax.vjp`'s, passed across program boundaries as pytrees.
"""

from functools import partial

import jax
import jax.numpy as jnp

from eqvae_jax import equivariance
from eqvae_jax.autoencoders import losses
from eqvae_jax.autoencoders.blocks import padded
from eqvae_jax.autoencoders.discriminator import PatchDiscriminator
from eqvae_jax.autoencoders.kl import latent_noise
from eqvae_jax.features.lpips import lpips as lpips_distance
from eqvae_jax.training.programs import call
from eqvae_jax.training.sharding import whole

ENCODER_PARTS = ("encoder", "quant_conv")
# equivariance.objective -> (explicit, E(tau x) is a constant); "implicit" is EQ-VAE's own.
EXPLICIT = {"explicit": (True, False), "explicit_stop_gradient": (True, True)}
OBJECTIVES = ("implicit", *EXPLICIT)


def to_float(image):
    """uint8 -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def split_params(params):
    """The autoencoder's parameters as (what encoding reads, what decoding reads)."""
    decoding = {name: part for name, part in params.items() if name not in ENCODER_PARTS}
    # flax asks for the parameters that a model itself declares, a codebook, in every method.
    return {name: part for name, part in params.items() if name in (*ENCODER_PARTS, "codebook")}, decoding


def make_discriminator(config, model, devices=1):
    """The PatchGAN that `config.loss` describes, None where its weight is 0; devices: how many share a batch."""
    loss = config.loss
    if not loss.disc_weight:
        return None
    groups = {"synchronised": 1, "per_device": devices}[loss.disc_batch_norm]
    return PatchDiscriminator(loss.disc_width, loss.disc_layers, model.dtype, groups)


def eq_gradients(config, model, devices=1, shardings=None):
    """Returns gradients(params, buffers, lpips, batch, tau, key, step) -> (gradients, metrics, buffers).

    params: {"autoencoder"[, "discriminator"]}. buffers: the discriminator's batch statistics. lpips: parameters of
    `features.lpips`, or None. batch: {"image": uint8 (B, H, W, 3), "index": (B,)}. tau: an `equivariance.Tau`. step:
    compared with loss.disc_start. Both sides of the GAN come from one forward pass, at the same parameters; the
    released code makes two, with a new tau for each. devices: how many share a batch. shardings: of params, where those
    may be split over devices.
    """
    loss, discriminator, variational = config.loss, make_discriminator(config, model, devices), model.kind == "kl"
    explicit, constant_target = EXPLICIT.get(config.equivariance.objective, (False, False))
    explicit_weight, scale_weight, noise = loss.explicit_weight, loss.scale_equivariance_weight, loss.latent_noise
    # KL models add up the values of an image and weigh the posterior; VQ models average and weigh the codebook.
    reduction = "sum" if variational else "mean"
    kl_weight, no_kl = jnp.float32(loss.kl_weight if variational else 0.0), jnp.float32(0.0)
    interpolation = dict(method=config.equivariance.method, antialias=config.equivariance.antialias)

    def gathered(params, role="autoencoder"):
        if shardings is None:
            return params
        return whole(params, {name: shardings[role][name] for name in params})

    def on_latent(shift):
        return shift and tuple(by / model.downsampling for by in shift)

    def reconstruction(lpips, x, y, reduction):
        p = lpips_distance(lpips, x, y) if loss.perceptual_weight else jnp.zeros(len(x))
        return losses.reconstruction_loss(x, y, p, loss.perceptual_weight, loss.logvar, reduction), p.mean()

    @partial(jax.jit, static_argnames=("size", "static_turns"))
    def encode(encoding, image, turns, shift, size, static_turns):
        turns = turns if static_turns is None else static_turns
        x = equivariance.apply_tau(to_float(image), size, turns, shift=shift, **interpolation)  # (B, H, W, 3)
        posterior, pull = jax.vjp(lambda p: model.apply({"params": gathered(p)}, x, method="encode"), encoding)
        return x, posterior, pull

    @partial(jax.jit, static_argnames=("size", "image_size", "static_turns"))
    def transform(posterior, x, key, index, turns, shift, size, image_size, static_turns):
        turns = turns if static_turns is None else static_turns
        tau = lambda array, side, by: equivariance.apply_tau(array, side, turns, shift=by, **interpolation)

        def path(posterior):
            z = tau(posterior.sample(key, index), size, on_latent(shift))  # (B, h, w, C)
            z = latent_noise(z, noise, key, index) if noise else z
            return z, posterior.kl().mean() if variational else jnp.zeros(())

        (z, kl), pull = jax.vjp(path, posterior)
        return z, tau(x, image_size, shift), kl, pull

    @partial(jax.jit, static_argnames=("size", "static_turns"))
    def gap(posterior, encoded, turns, shift, size, static_turns):
        turns = turns if static_turns is None else static_turns

        def distance(posterior, encoded):  # of the modes: two samples differ by their noise whatever the encoder does
            moved = equivariance.apply_tau(posterior.mode(), size, turns, shift=on_latent(shift), **interpolation)
            return explicit_weight * losses.explicit_loss(moved, encoded.mode(), constant_target, reduction)

        return jax.value_and_grad(distance, argnums=(0, 1))(posterior, encoded)

    @jax.jit
    def decode(decoding, critic, lpips, z, x, step):
        def decoder(p, z):
            y, features, quantized = model.apply({"params": gathered(p)}, z, method="decode_with_features")
            if variational:
                return (y, jnp.zeros(())), (features, {})
            codebook = losses.codebook_loss(z, quantized.codes, loss.codebook_beta, loss.codebook_legacy)
            metrics = {"codebook": codebook} | losses.codebook_metrics(quantized.indices, model.codebook_size)
            return (y, codebook), (features, metrics)

        (y, _), pull_decoder, (features, metrics) = jax.vjp(decoder, decoding, z, has_aux=True)
        compare = lambda y: reconstruction(lpips, x, y, reduction)
        (nll, p), nll_y = jax.value_and_grad(compare, has_aux=True)(y)
        metrics |= {"nll": nll, "l1": jnp.abs(x - y).mean()}
        metrics |= {"lpips": p} if loss.perceptual_weight else {}
        metrics |= {"scale_equivariance": jnp.zeros(())} if scale_weight else {}  # of every micro-batch; some add to it
        cotangent, critic_grads, buffers = nll_y, {}, {}
        if discriminator:
            weight, g_y, critic_grads, buffers, extra = adversary(critic, decoding, features, x, y, nll_y)
            on = (step >= loss.disc_start).astype(jnp.float32)
            cotangent = nll_y + on * loss.disc_factor * loss.disc_weight * weight * g_y
            critic_grads = jax.tree.map(lambda g: on * loss.disc_factor * g, critic_grads)
            metrics |= extra
        codebook_weight = jnp.float32(0.0 if variational else loss.codebook_weight)
        decoding_grads, z_cotangent = pull_decoder((cotangent, codebook_weight))
        return decoding_grads, critic_grads, z_cotangent, buffers, metrics

    @jax.jit
    def decode_reduced(decoding, lpips, z, x):
        # Only what compares images. The mean counts for as many values as the full image has, so that the weight is
        # that of a pixel here to a pixel there, however much smaller x is.
        values = 3 * config.data.image_size**2 if variational else 1

        def distance(p, z):
            y = model.apply({"params": gathered(p)}, z, method="decode")
            return scale_weight * values * reconstruction(lpips, x, y, "mean")[0]

        return jax.value_and_grad(distance, argnums=(0, 1))(decoding, z)

    def adversary(critic, decoding, features, x, y, nll_y):
        """Both sides of the GAN from one pass over the real and one over the reconstructed images."""
        def judge(params, image, running):  # separate calls: batch statistics of real and fake must not mix
            return discriminator.apply({"params": gathered(params, "discriminator"), "batch_stats": running}, image,
                                       train=True, mutable=["batch_stats"])

        judge_fake = lambda params, y: judge(params, y, critic["batch_stats"])
        fake, pull_fake, new = jax.vjp(judge_fake, critic["params"], y, has_aux=True)
        judge_real = lambda params: judge(params, x, new["batch_stats"])
        real, pull_real, new = jax.vjp(judge_real, critic["params"], has_aux=True)
        g, g_logits = jax.value_and_grad(losses.generator_loss)(fake)
        g_y = pull_fake(g_logits)[1]

        # The adaptive weight compares the two gradients at the last kernel alone: a function of the features it sees.
        kernel = decoding["decoder"]["conv_out"]["kernel"].astype(features.dtype)
        framed, rest = padded(features, ((1, 1), (1, 1)), model.padding)
        last = lambda k: jax.lax.conv_general_dilated(framed, k, (1, 1), rest,
                                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))
        pull_kernel = jax.vjp(last, kernel)[1]
        weight = losses.balance(lambda ct: pull_kernel(ct.astype(features.dtype)), nll_y, g_y)

        d, (real_ct, fake_ct) = jax.value_and_grad(losses.hinge_discriminator_loss, argnums=(0, 1))(real, fake)
        grads = jax.tree.map(jnp.add, pull_real(real_ct)[0], pull_fake(fake_ct)[0])
        metrics = {"generator": g, "discriminator": d, "adaptive_weight": weight,
                   "logits_real": real.mean(), "logits_fake": fake.mean()}
        return weight, g_y, grads, new["batch_stats"], metrics

    @jax.jit
    def pull(vjp, cotangent):
        return vjp(cotangent)[0]

    @jax.jit
    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def gradients(params, buffers, lpips, batch, tau, key, step, run=call):
        latent, image = tau.where == equivariance.LATENT, tau.where == equivariance.IMAGE
        size, image_size = (tau.height, tau.width), tau.image_size(model.downsampling)
        static_turns = None if tau.height == tau.width else tau.turns
        encoding, decoding = split_params(params["autoencoder"])
        critic = {"params": params.get("discriminator"), "batch_stats": buffers.get("discriminator")}
        move = latent and not explicit  # the explicit objective decodes what was encoded
        shift = tau.shift if move else None

        shrunk = image_size if image and image_size != batch["image"].shape[1:3] else None
        x, posterior, pull_encoder = run(encode, encoding, batch["image"], 0, None, size=shrunk, static_turns=0)
        z, x, kl, pull_tau = run(
            transform, posterior, x, key, batch["index"], tau.turns if move else 0, shift, size=size if move else None,
            image_size=image_size if move else None, static_turns=static_turns if move else 0)
        decoding_grads, critic_grads, dz, stats, metrics = run(decode, decoding, critic, lpips, z, x, step)
        dposterior = run(pull, pull_tau, (dz, kl_weight))
        distance = 0.0
        if latent and explicit:
            turned = dict(static_turns=static_turns)
            drawn = (tau.turns, tau.shift)
            _, encoded, pull_encoded = run(encode, encoding, batch["image"], *drawn, size=image_size, **turned)
            distance, (dmoved, dencoded) = run(gap, posterior, encoded, *drawn, size=size, **turned)
            dposterior = run(add, dposterior, dmoved)
        if tau.reduction:
            image_size = tuple(side // tau.reduction for side in x.shape[1:3])
            size = tuple(side // model.downsampling for side in image_size)
            z, x, _, pull_reduction = run(transform, posterior, x, key, batch["index"], 0, None, size=size,
                                          image_size=image_size, static_turns=0)
            metrics["scale_equivariance"], (more, dz) = run(decode_reduced, decoding, lpips, z, x)
            decoding_grads = run(add, decoding_grads, more)
            dposterior = run(add, dposterior, run(pull, pull_reduction, (dz, no_kl)))
        encoding_grads = run(pull, pull_encoder, dposterior)
        if latent and explicit and not constant_target:
            encoding_grads = run(add, encoding_grads, run(pull, pull_encoded, dencoded))

        grads = {"autoencoder": encoding_grads | decoding_grads}
        if discriminator:
            grads["discriminator"], buffers = critic_grads, {"discriminator": stats}
        metrics |= ({"kl": kl} if variational else {}) | ({"explicit": distance} if explicit else {})
        metrics |= {"branch_equivariance": float(latent), "branch_low_resolution": float(image)}
        return grads, metrics, buffers

    return gradients
