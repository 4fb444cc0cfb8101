"""What the command lines of evaluate and report offer, by name: they explain themselves without importing JAX."""

import os
import pathlib

METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid")  # of generated images
PROTOCOLS = ("adm", "torch-fidelity", "pytorch-fid")  # features.inception.PROTOCOLS
UINT8 = ("round", "truncate", "none")  # metrics.UINT8_CONVENTIONS


def default_cache():
    """The user's directory for features."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "eqvae_jax" / "features"
