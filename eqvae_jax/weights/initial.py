"""Random weights to start from: torch's distributions, and a calmer beginning for small autoencoders."""

import flax
import numpy as np


def random_parameters(shapes, seed):
    """Parameters as model.init draws them in distribution (torch's default), without compiling for half a minute.

    shapes: tree of what to fill, as `tables.parameter_shapes` gives it. Returns float32 NumPy arrays.
    """
    rng, params = np.random.default_rng(seed), {}
    flat = flax.traverse_util.flatten_dict(shapes)
    for path, leaf in flat.items():
        kernel = flat.get((*path[:-1], "kernel"))
        if path[-1] == "codebook":                           # (K, C), taming's: all codes begin close to zero
            params[path] = uniform(rng, leaf.shape, 1 / leaf.shape[0])
        elif kernel is None:                                 # a normalisation
            params[path] = np.full(leaf.shape, path[-1] == "scale", np.float32)
        else:
            params[path] = uniform(rng, leaf.shape, np.prod(kernel.shape[:-1]) ** -0.5)
    return flax.traverse_util.unflatten_dict(params)


def uniform(rng, shape, bound):
    return (rng.random(shape, np.float32) * 2 - 1) * np.float32(bound)


def calm(model, params):
    """The same parameters with residual branches that begin at zero, and a narrow posterior or spread codes.

    Training a small autoencoder from torch's initialisation first has to undo both: after 250 steps of the quickstart
    its reconstructions of unseen photographs are 1.7 dB worse. And codes that all begin within 1 / K of zero are slow
    to spread: after 300 steps of a small VQ-GAN the mean error on unseen photographs is 0.28 instead of 0.23.
    """
    flat = flax.traverse_util.flatten_dict(params)
    for path in flat:
        if path[-2:-1] in (("conv2",), ("out",)):            # a ResnetBlock's last convolution, attention's output
            flat[path] = np.zeros_like(flat[path])
    if model.kind == "kl":
        bias = flat["quant_conv", "bias"] if model.quant else flat["encoder", "conv_out", "bias"]
        bias[model.latent_channels:] = -5.0                  # log-variance: a standard deviation of 0.08
    else:                                                    # about as wide as a fresh encoder's features
        flat["codebook",] *= np.float32(0.15) / flat["codebook",].std()
    return flax.traverse_util.unflatten_dict(flat)
