"""The autoencoder's task for the one training loop: EQ-VAE's objective around an AutoencoderKL.

A step is five small programs instead of one large one, so that the ~50 sizes tau can take share what does not
depend on them:

    encode     image -> posterior            one program a size of the encoded image (1 + low-resolution sizes)
    transform  posterior -> tau(z), tau(x)   cheap, one a tau
    decode     z -> losses, all gradients    one a size of the decoded image
    pull       z's cotangent -> encoder's    as encode
    update     gradients -> state            one

The cotangents between them are `jax.vjp`'s, passed across program boundaries as pytrees.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from eqvae_jax import equivariance
from eqvae_jax.autoencoders import losses
from eqvae_jax.autoencoders.discriminator import PatchDiscriminator
from eqvae_jax.features.lpips import lpips as lpips_distance
from eqvae_jax.training.loop import Task
from eqvae_jax.training.optimizer import ema_update, guarded, make_optimizer
from eqvae_jax.training.sharding import state_shardings
from eqvae_jax.training.state import TrainState

ENCODER_PARTS = ("encoder", "quant_conv")


def to_float(image):
    """uint8 -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def split_params(params):
    """The autoencoder's parameters as (what encoding reads, what decoding reads)."""
    encoding = {name: part for name, part in params.items() if name in ENCODER_PARTS}
    return encoding, {name: part for name, part in params.items() if name not in ENCODER_PARTS}


def check(config, model, mesh):
    """Raises ValueError, naming the config's field, where sizes do not fit together; before anything is compiled."""
    factor, side, sizes = model.downsampling, config.data.image_size, config.equivariance.sizes
    if side % factor:
        raise ValueError(f"data.image_size is {side}; this autoencoder needs a multiple of {factor}.")
    if not sizes or min(sizes) < 1 or max(sizes) > side // factor:
        raise ValueError(f"equivariance.sizes is {tuple(sizes)}; it must name latent sides of 1 to {side // factor} "
                         f"({side} pixels / {factor}).")
    if not config.equivariance.turns or set(config.equivariance.turns) - {0, 1, 2, 3}:
        raise ValueError(f"equivariance.turns is {tuple(config.equivariance.turns)}; it must name quarter turns 0 to 3.")
    if config.equivariance.method not in ("bilinear", "bicubic"):
        raise ValueError(f'equivariance.method is {config.equivariance.method!r}; it must be "bilinear" or "bicubic".')
    micro = mesh.size * config.training.accumulate
    if config.data.batch_size % micro:
        raise ValueError(f"data.batch_size is {config.data.batch_size}; it must be a multiple of {mesh.size} devices x "
                         f"training.accumulate {config.training.accumulate} = {micro}.")
    uses_tau = config.equivariance.p_equivariance or config.equivariance.p_low_resolution
    smallest = (min(sizes) if uses_tau else side // factor) * factor
    for used, needed, name in ((config.loss.disc_weight, 3 * 2**config.loss.disc_layers, "the discriminator"),
                               (config.loss.perceptual_weight, 16, "LPIPS")):
        if used and smallest < needed:
            raise ValueError(f"{name} needs images of {needed} pixels, but equivariance.sizes go down to {smallest} pixels; "
                             "leave out the smallest sizes, or set its weight to 0.")


def call(program, *args, **static):
    return program(*args, **static)


def compile_only(program, *args, **static):
    """Compiles a jitted program for arguments given as shapes, and returns the shapes of its results.

    The executable lands where a later call with such arguments finds it.
    """
    lowered = program.lower(*args, **static)
    place = lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)
    return jax.tree.map(place, lowered.out_info, lowered.compile().output_shardings)


def autoencoder_task(config, model, params, mesh, lpips=None) -> Task:
    """EQ fine-tuning (or, with p_equivariance = 0, plain training) of an autoencoder.

    Args:
      config: reads `seed`, `equivariance`, `loss`, `optimizer`, `ema_decay`, `training.{accumulate,steps}`, `mesh`.
      model, params: an AutoencoderKL and the weights to start from.
      lpips: parameters of `features.lpips`; required unless config.loss.perceptual_weight is 0.
    Raises ValueError if the perceptual loss has no weights.
    """
    loss, accumulate = config.loss, config.training.accumulate
    if loss.perceptual_weight and lpips is None:
        raise ValueError("loss.perceptual_weight is not 0 but no LPIPS weights were given; set --config.loss.lpips_weights, or --config.loss.perceptual_weight=0.")
    adversarial = loss.disc_weight > 0
    discriminator = PatchDiscriminator(loss.disc_width, loss.disc_layers, model.dtype)
    optimizer, schedule = make_optimizer(config.optimizer, config.training.steps)
    root = jax.random.key(config.seed)
    eq = dict(config.equivariance)
    interpolation = dict(method=eq.pop("method"), antialias=eq.pop("antialias"))

    def init(params, key):
        params = {"autoencoder": jax.tree.map(jnp.asarray, params)}
        buffers = {}
        if adversarial:
            image = jnp.zeros((1, 64, 64, 3))
            variables = discriminator.init(key, image, train=True)
            params["discriminator"], buffers["discriminator"] = variables["params"], variables["batch_stats"]
        opt_state = {role: optimizer.init(weights) for role, weights in params.items()}
        ema = {"autoencoder": jax.tree.map(jnp.array, params["autoencoder"])} if config.ema_decay else None
        return TrainState.create(params, opt_state, ema, buffers)

    init, kl_weight = jax.tree_util.Partial(init, params), jnp.float32(loss.kl_weight)
    shardings = state_shardings(mesh, jax.eval_shape(init, root), config.mesh.min_shard_size)

    @partial(jax.jit, static_argnames="size")
    def encode(encoding, image, size):
        x = to_float(image)  # (B, H, W, 3)
        x = x if size is None else equivariance.resize(x, size, **interpolation)
        posterior, pull = jax.vjp(lambda p: model.apply({"params": p}, x, method="encode"), encoding)
        return x, posterior, pull

    @partial(jax.jit, static_argnames=("size", "image_size", "static_turns"))
    def transform(posterior, x, key, index, turns, size, image_size, static_turns):
        turns = turns if static_turns is None else static_turns
        tau = lambda array, side: equivariance.apply_tau(array, side, turns, **interpolation)

        def path(posterior):
            z = posterior.sample(key, index)  # (B, h, w, C)
            return tau(z, size), posterior.kl().mean()

        (z, kl), pull = jax.vjp(path, posterior)
        return z, tau(x, image_size), kl, pull

    @jax.jit
    def decode(decoding, critic, lpips, z, x, step):
        decoder = lambda p, z: model.apply({"params": p}, z, method="decode_with_features")
        y, pull_decoder, features = jax.vjp(decoder, decoding, z, has_aux=True)

        def reconstruction(y):
            p = lpips_distance(lpips, x, y) if loss.perceptual_weight else jnp.zeros(len(x))
            return losses.reconstruction_loss(x, y, p, loss.perceptual_weight, loss.logvar), p.mean()

        (nll, p), nll_y = jax.value_and_grad(reconstruction, has_aux=True)(y)
        metrics = {"nll": nll, "l1": jnp.abs(x - y).mean()}
        metrics |= {"lpips": p} if loss.perceptual_weight else {}
        cotangent, critic_grads, buffers = nll_y, {}, {}
        if adversarial:
            weight, g_y, critic_grads, buffers, extra = adversary(critic, decoding, features, x, y, nll_y)
            on = (step >= loss.disc_start).astype(jnp.float32)
            cotangent = nll_y + on * loss.disc_factor * loss.disc_weight * weight * g_y
            critic_grads = jax.tree.map(lambda g: on * loss.disc_factor * g, critic_grads)
            metrics |= extra
        decoding_grads, z_cotangent = pull_decoder(cotangent)
        return decoding_grads, critic_grads, z_cotangent, buffers, metrics

    def adversary(critic, decoding, features, x, y, nll_y):
        """Both sides of the GAN from one pass over the real and one over the reconstructed images."""
        def judge(params, image):  # separate calls: batch statistics of real and fake must not mix
            return discriminator.apply({"params": params, "batch_stats": critic["batch_stats"]}, image, train=True,
                                       mutable=["batch_stats"])

        fake, pull_fake, _ = jax.vjp(judge, critic["params"], y, has_aux=True)
        real, pull_real, new = jax.vjp(lambda p: judge(p, x), critic["params"], has_aux=True)
        g, g_logits = jax.value_and_grad(losses.generator_loss)(fake)
        g_y = pull_fake(g_logits)[1]

        # The adaptive weight compares the two gradients at the last kernel alone: a function of the features it sees.
        kernel = decoding["decoder"]["conv_out"]["kernel"].astype(features.dtype)
        last = lambda k: jax.lax.conv_general_dilated(features, k, (1, 1), ((1, 1), (1, 1)),
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

    @partial(jax.jit, donate_argnums=0)
    def add(total, new):
        return jax.tree.map(jnp.add, total, new)

    @jax.jit
    def take(batch, micro):  # strided, so that each device keeps its own examples
        pick = lambda a: a.reshape(-1, accumulate, *a.shape[1:])[:, micro]
        return jax.tree.map(pick, batch)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(state, grads, metrics, buffers):
        grads, metrics = jax.tree.map(lambda total: total / accumulate, (grads, metrics))
        norms = {role: optax.global_norm(g) for role, g in grads.items()}
        finite = jnp.isfinite(sum(norms.values()))
        params, opt_state = {}, {}
        for role, g in grads.items():
            change, opt_state[role] = optimizer.update(g, state.opt_state[role], state.params[role])
            params[role] = optax.apply_updates(state.params[role], change)
        ema = state.ema and {"autoencoder": ema_update(state.ema["autoencoder"], params["autoencoder"], config.ema_decay)}
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, buffers=buffers)
        metrics |= {f"gradient_norm_{role}": norm for role, norm in norms.items()}
        return guarded(finite, new, state), metrics | {"learning_rate": schedule(state.step)}

    def gradients(run, state, buffers, batch, draw):
        """Losses and gradients of one micro-batch under transform number `draw`; `run` calls (or compiles) a program."""
        tau = equivariance.draw_tau(config.seed, draw, **eq)
        latent, image = tau.where == equivariance.LATENT, tau.where == equivariance.IMAGE
        size, image_size = (tau.height, tau.width), tau.image_size(model.downsampling)
        static_turns = None if tau.height == tau.width else tau.turns
        encoding, decoding = split_params(state.params["autoencoder"])
        critic = {"params": state.params.get("discriminator"), "batch_stats": buffers.get("discriminator")}
        key = jax.random.fold_in(root, draw)

        x, posterior, pull_encoder = run(encode, encoding, batch["image"], size=image_size if image else None)
        z, x, kl, pull_tau = run(transform, posterior, x, key, batch["index"], tau.turns, size=size if latent else None,
                                 image_size=image_size if latent else None, static_turns=static_turns)
        decoding_grads, critic_grads, dz, stats, metrics = run(decode, decoding, critic, lpips, z, x, state.step)
        encoding_grads = run(pull, pull_encoder, run(pull, pull_tau, (dz, kl_weight)))

        grads = {"autoencoder": encoding_grads | decoding_grads}
        if adversarial:
            grads["discriminator"], buffers = critic_grads, {"discriminator": stats}
        metrics |= {"kl": kl, "branch_equivariance": float(latent), "branch_low_resolution": float(image)}
        return grads, metrics, buffers

    def train_step(state, batch, step):
        total, buffers = None, state.buffers
        for micro in range(accumulate):
            examples = batch if accumulate == 1 else take(batch, micro)
            grads, metrics, buffers = gradients(call, state, buffers, examples, step * accumulate + micro)
            total = (grads, metrics) if total is None else add(total, (grads, metrics))
        return update(state, *total, buffers)

    def warm_up(state, batch):
        """Compiles ahead: yields (name, thunk) for the programs of each new tau shape, in the order steps need them."""
        batch = {"image": batch["image"], "index": batch["index"]}
        if accumulate > 1:
            batch = compile_only(take, batch, 0)
        seen = set()
        for draw in range(config.training.steps * accumulate):
            tau = equivariance.draw_tau(config.seed, draw, **eq)
            if tau[:3] not in seen:
                seen.add(tau[:3])
                yield f"tau {tau.where} {tau.height} x {tau.width}", partial(gradients, compile_only, state, state.buffers, batch, draw)

    def weights(state):
        return (state.ema or state.params)["autoencoder"]

    @jax.jit
    def evaluate(params, image):
        encode = lambda x: model.apply({"params": params}, x, method="encode").mode()
        x = to_float(image)
        z = encode(x)
        y = jnp.clip(model.apply({"params": params}, z, method="decode"), -1.0, 1.0)
        half = (z.shape[1] // 2, z.shape[2] // 2)
        error = partial(equivariance.error, encode, x, factor=model.downsampling, **interpolation)
        per_image = lambda a: jnp.mean(a, axis=(1, 2, 3))
        return {"psnr": 10 * jnp.log10(4.0 / per_image(jnp.square(x - y))), "l1": per_image(jnp.abs(x - y)),
                "rotation_error_90": error(turns=1), "scale_error_0.5": error(size=half)}

    def eval_step(state, batch):
        return evaluate(weights(state), batch["image"])

    @jax.jit
    def show(params, image):
        x = to_float(image)
        z = model.apply({"params": params}, x, method="encode").mode()
        half = (z.shape[1] // 2, z.shape[2] // 2)
        image_half = tuple(side * model.downsampling for side in half)
        decode = lambda z: model.apply({"params": params}, z, method="decode")
        return {"image": x, "reconstruction": decode(z),
                "image_transformed": equivariance.apply_tau(x, image_half, 1, **interpolation),
                "latent_transformed": decode(equivariance.apply_tau(z, half, 1, **interpolation))}

    def preview(state, batch):
        return show(weights(state), batch["image"][:8])

    return Task(init, train_step, eval_step, preview, shardings, warm_up)
