"""What the tests of weights share: outputs of a model of ours beside those of a model in torch."""

import flax
import jax
import numpy as np
import pytest

from eqvae_jax.weights import WeightsError, load_autoencoder


def to_nchw(torch, x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def to_nhwc(t):
    return t.detach().permute(0, 2, 3, 1).numpy()


def diffusers_outputs(torch, model, x):
    """The latent's moments (KL) or features (VQ) and the decoded latent, NHWC, from a model of diffusers."""
    with torch.no_grad():
        encoded = model.encode(to_nchw(torch, x))
        if hasattr(encoded, "latents"):
            latent = [encoded.latents]
        else:
            latent = [encoded.latent_dist.mean, encoded.latent_dist.logvar]
        return [to_nhwc(t) for t in (*latent, model.decode(latent[0]).sample)]


def our_outputs(model, params, x):
    def both(params, x):
        latent = model.apply({"params": params}, x, method=model.encode)
        return *jax.tree.leaves(latent), model.apply({"params": params}, latent.mode(), method=model.decode)

    return jax.jit(both)(params, x)


def gaps(ours, theirs):
    """Largest difference of each output, relative to the output's scale."""
    assert [o.shape for o in ours] == [t.shape for t in theirs]
    return [np.abs(np.asarray(o) - t).max() / np.abs(t).max() for o, t in zip(ours, theirs, strict=True)]


def assert_same(a, b):
    a, b = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def refused(reference):
    """The message with which loading a reference is refused."""
    with pytest.raises(WeightsError) as error:
        load_autoencoder(reference)
    return str(error.value)
