"""How a number was made: software, hardware and commit beside it, in JSON that any reader accepts."""

import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess

import jax

from eqvae_jax.atomic import whole

_PACKAGES = ("eqvae_jax", "jax", "jaxlib", "flax", "numpy", "pillow", "grain")


def software():
    """{"python", each package's version, "devices", "commit", "created"} of the running process."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout, or not needed for what is being measured
    devices = jax.devices()
    return {
        **versions,
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "commit": commit(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit():
    """The git commit of this package's checkout, with "-dirty" if it has changes; None outside a checkout."""
    root = pathlib.Path(__file__).resolve().parents[2]

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # installed somewhere inside another project's checkout
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def finite(tree):
    """The same nested dicts and lists with None for the floats that JSON cannot hold (NaN, infinities)."""
    if isinstance(tree, dict):
        return {str(key): finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree


def write_json(path, document):
    """Writes `document` as strict JSON, whole or not at all."""
    text = json.dumps(finite(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
