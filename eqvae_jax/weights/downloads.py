"""Files of weights from the network: into the user's cache, checked before they appear under their name."""

import hashlib
import http.client
import logging
import os
import pathlib
import shutil
import urllib.request

from eqvae_jax.atomic import whole
from eqvae_jax.weights.errors import WeightsError

logger = logging.getLogger(__name__)


def cache_directory(name):
    """Where downloads of one kind are kept: eqvae_jax/NAME in $XDG_CACHE_HOME or ~/.cache."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "eqvae_jax" / name


def checksum(path, kind):
    """A file's hash in hexadecimal; kind: "sha256", "md5" and the like."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def fetch(path, addresses, kind, beginning):
    """Downloads one file, unless it is there, from the first of its addresses that has it; returns its path.

    kind, beginning: its hash, or as many of its first digits as are known. Raises WeightsError, with what happened at
    each address, without a network or with a wrong hash.
    """
    path, failures = pathlib.Path(path), []
    if path.is_file():
        return path
    for address in addresses:
        try:
            logger.info("downloading %s to %s", address, path.parent)
            with whole(path) as partial:
                with urllib.request.urlopen(address, timeout=30) as response, partial.open("wb") as file:
                    shutil.copyfileobj(response, file, 2**20)
                if not checksum(partial, kind).startswith(beginning):
                    raise OSError(f"what arrived does not have the {kind} {beginning}")
            return path
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{address} ({error})")
    raise WeightsError(f"could not download {', nor '.join(failures)}.")
