"""Generator weights from one format into another, for convert.py."""

import functools
import pathlib

from eqvae_jax.run.conversion import parameter_table, show

FILES = ("dit", "sit", "repa", "maskgit")
OF_AUTOENCODERS = ("scale", "shift", "latent_stats")


def is_generator(source, target):
    """Whether references are of a generator; a run says so in its config."""
    if source.kind in FILES or (target and target.kind in FILES):
        return True
    if source.kind != "workdir":
        return False
    from eqvae_jax.training.workdir import saved_value

    return saved_value(source.rest, "task") == "generator"


def convert_generator(options, source, target):
    """Describes, writes and verifies; raises ValueError for options and formats that generators do not have."""
    from eqvae_jax import weights

    if unused := [f"--{name}" for name in OF_AUTOENCODERS if getattr(options, name) is not None]:
        raise ValueError(f"{', '.join(unused)}: autoencoders have it; a generator's latents are its run's.")
    if target and target.kind not in FILES:
        raise ValueError(f"{target}: {source} is a generator; write {', '.join(f'{kind}:FILE' for kind in FILES)}.")
    told = {name: getattr(options, name) for name in weights.GENERATOR_OPTIONS}
    model, params, spec = weights.load_generator(str(source), **told)
    before = [name for name in ("patch", "time_in", "time_out", "labels", "tokens", "positions") if name in params]
    blocks = [name for name in params if name.startswith("block_")]
    after = [name for name in params if name not in {*before, *blocks}]
    show(describe(model, spec), parameter_table(params, (*before, *blocks, *after), options.verbose))
    if target:
        pathlib.Path(target.rest).parent.mkdir(parents=True, exist_ok=True)
        weights.save_generator(str(target), model, params, spec)
        show([f"wrote       {target}", verify(target, model, params, spec)])


def describe(model, spec):
    """Lines that say what a generator is and what it learnt."""
    from eqvae_jax.generators.networks import latent_shape

    processes = {"dit": "Gaussian diffusion", "sit": "an interpolant", "repa": "an interpolant, aligned",
                 "maskgit": "masked tokens", "maskgit-original": "masked tokens, the original network"}
    tokens = spec.kind.startswith("maskgit")
    patches = "" if tokens else f", patches of {model.patch_size}"
    gives = f"{model.codes:,} codes" if tokens else f"the network gives {model.out_channels} channels"
    latents = spec.latents and (f"{spec.latents['reference']} (hash {spec.latents['hash']}), times "
                                f"{spec.latents['scale']:.6g} after - {spec.latents['shift']:.6g}")
    return [
        f"reference   {spec.source}",
        f"kind        {spec.kind}, {processes[spec.kind]} {spec.process or ''}".rstrip(),
        f"network     {model.depth} blocks of {model.width}, {model.heads} heads{patches}",
        f"latent      {' x '.join(map(str, latent_shape(model)))}; {gives}",
        f"latents of  {latents or 'an autoencoder that the file does not name'}",
        f"classes     {model.classes:,}",
        f"hash        {spec.hash}",
    ]


def verify(target, model, params, spec):
    """Reads the target back; returns a line that says how far its network's output is from the original's.

    Raises ValueError where it is more than rounding.
    """
    import jax
    import numpy as np

    from eqvae_jax import weights
    from eqvae_jax.generators.networks import latent_shape, predict

    advice = "Do not use it; write it again, and if that does not help, to another disk."
    try:
        told = {"prediction": spec.process.get("prediction")} if target.kind == "sit" else {}
        told |= {"codes": model.codes, "heads": model.heads} if target.kind == "maskgit" else {}
        back, read, _ = weights.load_generator(str(target), **told)
    except (ValueError, OSError) as error:
        raise ValueError(f"{target} was written but cannot be read back: {error}\n{advice}") from error
    rng = np.random.default_rng(0)
    shape = (3, *latent_shape(model))
    x = rng.integers(0, model.codes + 1, shape) if len(shape) == 3 else rng.normal(size=shape).astype(np.float32)
    t, labels = np.array([0.1, 0.5, 0.9], np.float32), np.array([0, model.classes - 1, model.null or 0], np.int32)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(functools.partial(predict, model))(params, x, t, labels).prediction
        theirs = jax.jit(functools.partial(predict, back))(read, x, t, labels).prediction
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    scale = np.abs(ours).max()
    difference = np.abs(ours - theirs).max()
    if ours.shape != theirs.shape or not difference <= 1e-4 * scale:
        raise ValueError(f"{target} was written but its network says otherwise, by {difference:.3g} of {scale:.3g}.\n"
                         f"{advice}")
    return f"verified    read back; its outputs differ by at most {difference:.2g}, of {scale:.3g}"
