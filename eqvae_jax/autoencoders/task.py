"""The autoencoder's task for the one training loop: EQ fine-tuning, or plain training."""

import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import optax

from eqvae_jax import equivariance
from eqvae_jax.autoencoders.objective import OBJECTIVES, eq_gradients, make_discriminator, to_float
from eqvae_jax.training.flops import FlopCount
from eqvae_jax.training.loop import Task
from eqvae_jax.training.optimizer import ema_update, guarded, make_optimizer
from eqvae_jax.training.programs import Variant, call, compile_only, expected, spread
from eqvae_jax.training.sharding import replicate, state_shardings
from eqvae_jax.training.state import TrainState, state_shapes


def check(config, model, mesh):
    """Raises ValueError, naming the config's field, where sizes do not fit together; before anything is compiled."""
    factor, side, sizes = model.downsampling, config.data.image_size, config.equivariance.sizes
    regulariser = {"kl": "kl_weight", "vq": "codebook_weight"}[model.kind]
    if regulariser not in config.loss:
        raise ValueError(f"{config.init} is a {model.kind.upper()} autoencoder, and this config has no "
                         f"loss.{regulariser}: it is for the other kind. configs/eq_vqgan.py trains VQ models, "
                         "the others KL models.")
    if side % factor or side < 2 * factor:
        raise ValueError(f"data.image_size is {side}; this autoencoder needs a multiple of {factor}, at least "
                         f"{2 * factor}.")
    if not sizes or min(sizes) < 1 or max(sizes) > side // factor:
        raise ValueError(f"equivariance.sizes is {tuple(sizes)}; it must name latent sides of 1 to {side // factor} "
                         f"({side} pixels / {factor}).")
    if not config.equivariance.turns or set(config.equivariance.turns) - {0, 1, 2, 3}:
        raise ValueError(f"equivariance.turns is {tuple(config.equivariance.turns)}; it must name quarter turns, "
                         "0 to 3.")
    if config.equivariance.method not in ("bilinear", "bicubic"):
        raise ValueError(f'equivariance.method is {config.equivariance.method!r}; it must be "bilinear" or "bicubic".')
    if config.equivariance.objective not in OBJECTIVES:
        raise ValueError(f"equivariance.objective is {config.equivariance.objective!r}; it must be one of "
                         f"{', '.join(OBJECTIVES)}.")
    if config.loss.disc_batch_norm not in ("synchronised", "per_device"):
        raise ValueError(f'loss.disc_batch_norm is {config.loss.disc_batch_norm!r}; it must be "synchronised" or '
                         '"per_device".')
    check_options(config, model)
    micro = mesh.size * config.training.accumulate
    if config.data.batch_size % micro:
        raise ValueError(f"data.batch_size is {config.data.batch_size}; it must be a multiple of {mesh.size} devices x "
                         f"training.accumulate {config.training.accumulate} = {micro}.")
    if config.data.evaluation_batch_size < 1:  # it is rounded up to the devices
        raise ValueError(f"data.evaluation_batch_size is {config.data.evaluation_batch_size}; it must be at least 1.")
    uses_tau = config.equivariance.p_equivariance or config.equivariance.p_low_resolution
    smallest = (min(sizes) if uses_tau else side // factor) * factor
    for used, needed, name in ((config.loss.disc_weight, 3 * 2**config.loss.disc_layers, "the discriminator"),
                               (config.loss.perceptual_weight, 16, "LPIPS")):
        if used and smallest < needed:
            raise ValueError(f"{name} needs images of {needed} pixels, but equivariance.sizes go down to {smallest} "
                             "pixels; leave out the smallest sizes, or set its weight to 0.")


def check_options(config, model):
    """Of `check`, what is not the paper's: docs/beyond.md."""
    loss, eq, side = config.loss, config.equivariance, config.data.image_size
    factors, latent_side = loss.scale_equivariance_factors, side // model.downsampling
    if type(eq.max_shift) is not int or not 0 <= eq.max_shift < side:
        raise ValueError(f"equivariance.max_shift is {eq.max_shift!r}; it must be a whole number of image pixels, 0 to "
                         f"{side - 1}.")
    for name in ("scale_equivariance_weight", "latent_noise"):
        if not 0 <= loss[name] < math.inf:
            raise ValueError(f"loss.{name} is {loss[name]}; it must be 0, which is off, or more.")
    if loss.latent_noise and model.kind != "kl":
        raise ValueError(f"loss.latent_noise is {loss.latent_noise}, and this is a {model.kind.upper()} autoencoder: "
                         "noise before quantisation would draw its codes to the noise. It is for KL models; set it "
                         "to 0.")
    if not loss.scale_equivariance_weight:
        return
    if not factors or any(type(k) is not int or k < 2 or latent_side % k for k in factors):
        raise ValueError(f"loss.scale_equivariance_factors is {tuple(factors)}; it must name divisors of the latent "
                         f"side {latent_side}, 2 or more.")
    if loss.perceptual_weight and side // max(factors) < 16:
        raise ValueError("LPIPS needs images of 16 pixels, but loss.scale_equivariance_factors go down to "
                         f"{side // max(factors)}; leave out the largest, or set loss.perceptual_weight to 0.")
    if eq.p_equivariance == 1 or eq.p_low_resolution == 1:
        raise ValueError("loss.scale_equivariance_weight acts beside plain reconstruction, which "
                         "equivariance.p_equivariance and p_low_resolution never leave a step to; lower the one that "
                         "is 1.")


def autoencoder_task(config, model, params, mesh, lpips=None, critic=None) -> Task:
    """EQ fine-tuning (or, with p_equivariance = 0, plain training) of an autoencoder.

    Args:
      config: reads `seed`, `equivariance`, `loss`, `optimizer`, `ema_decay`, `training.{accumulate,steps}`, `mesh`.
      model, params: an autoencoder and the weights to start from; ShapeDtypeStructs for a task to plan with.
      lpips: parameters of `features.lpips`; required unless config.loss.perceptual_weight is 0.
      critic: {"params", "batch_stats"} of a trained discriminator to start from; None for a new one.
    Raises ValueError if the perceptual loss has no weights.
    """
    loss, accumulate = config.loss, config.training.accumulate
    if loss.perceptual_weight and lpips is None:
        raise ValueError("loss.perceptual_weight is not 0 but no LPIPS weights were given; set "
                         "--config.loss.lpips_weights, or --config.loss.perceptual_weight=0.")
    lpips = lpips and replicate(mesh, lpips)
    discriminator = make_discriminator(config, model, mesh.size)
    optimizer, schedule = make_optimizer(config.optimizer, config.training.steps)
    sampling = dict(config.equivariance)
    sampling.pop("objective")
    interpolation = dict(method=sampling.pop("method"), antialias=sampling.pop("antialias"))
    reductions = tuple(loss.scale_equivariance_factors) if loss.scale_equivariance_weight else ()
    draw_tau = partial(equivariance.draw_tau, config.seed, **sampling, reductions=reductions)
    root = jax.random.key(config.seed)

    def init(params, critic, key):
        params = {"autoencoder": jax.tree.map(jnp.asarray, params)}
        buffers = {}
        if discriminator:
            image = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
            variables = critic or discriminator.init(key, image, train=True)
            params["discriminator"], buffers["discriminator"] = variables["params"], variables["batch_stats"]
        opt_state = {role: optimizer.init(weights) for role, weights in params.items()}
        ema = {"autoencoder": jax.tree.map(jnp.array, params["autoencoder"])} if config.ema_decay else None
        return TrainState.create(params, opt_state, ema, buffers)

    init = jax.tree_util.Partial(init, params, critic)
    shardings = state_shardings(mesh, state_shapes(init, root), config.mesh)
    gradients = eq_gradients(config, model, mesh.size, shardings.params)

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
        ema = state.ema and {role: ema_update(old, params[role], config.ema_decay) for role, old in state.ema.items()}
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, buffers=buffers)
        metrics |= {f"gradient_norm_{role}": norm for role, norm in norms.items()}
        return guarded(finite, new, state), metrics | {"learning_rate": schedule(state.step - state.skipped)}

    def train_step(state, batch, step, run=call, tau=None):
        total, buffers = None, state.buffers
        batch = {name: batch[name] for name in ("image", "index")}
        for micro in range(accumulate):
            examples = batch if accumulate == 1 else run(take, batch, micro)
            number = step * accumulate + micro
            drawn, key = tau or draw_tau(number), jax.random.fold_in(root, number)
            grads, metrics, buffers = gradients(state.params, buffers, lpips, examples, drawn, key, state.step, run)
            total = (grads, metrics) if total is None else run(add, total, (grads, metrics))
        return run(update, state, *total, buffers)

    def shape_of(tau):  # turning changes the shape of what is not square
        return tau._replace(shift=None, turns=0 if tau.height == tau.width else tau.turns)

    def variants(draws=4096):
        """A step of each shape of tau, of which all micro-batches have it; how often, by the first draws of a run."""
        first, counts = {}, Counter()
        for tau in map(draw_tau, range(draws)):
            counts[shape_of(tau)] += 1
            first.setdefault(shape_of(tau), tau)
        for shape, tau in first.items():
            height, width = tau.image_size(model.downsampling) or (config.data.image_size,) * 2
            name = "full size" if tau.height is None else f"{tau.where} {height} x {width}"
            name += f", {tau.turns} turns" if tau.height != tau.width else ""
            name += f" and 1/{tau.reduction} of it" if tau.reduction else ""
            group = f"{tau.where} with 1/{tau.reduction}" if tau.reduction else tau.where
            yield Variant(name, group, counts[shape] / draws, height * width, partial(train_step, tau=tau))

    def model_flops():
        """FLOPs of an image in training, the networks of the loss included, averaged over tau."""
        side, every = config.data.image_size, list(variants())
        batch = {"image": jax.ShapeDtypeStruct((accumulate, side, side, 3), jnp.uint8),
                 "index": jax.ShapeDtypeStruct((accumulate,), jnp.int32)}
        state, costs = state_shapes(init, root), {}
        for variant in spread(every, 3):
            counted = FlopCount()
            variant.train_step(state, batch, 0, counted)
            costs[variant.name] = [counted.total / accumulate]
        return float(expected(every, costs)[0])

    def warm_up(state, batch):
        """Compiles ahead: yields (name, thunk) for the programs of each new tau shape, in the order steps need them."""
        batch = {"image": batch["image"], "index": batch["index"]}
        if accumulate > 1:
            batch = compile_only(take, batch, 0)
        seen = set()
        for number in range(config.training.steps * accumulate):
            tau = draw_tau(number)
            if shape_of(tau) not in seen:
                seen.add(shape_of(tau))
                smaller = f" and 1/{tau.reduction}" if tau.reduction else ""
                yield f"tau {tau.where} {tau.height} x {tau.width}{smaller}", partial(
                    gradients, state.params, state.buffers, lpips, batch, tau, root, state.step, run=compile_only)

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

    return Task(init, train_step, eval_step, preview, shardings, warm_up, variants=variants, model_flops=model_flops)
