"""The command `eqvae`: one name for all commands of this package, and how each of them names itself.

    eqvae train --config=configs/eq_sdvae.py:quickstart --workdir=RUNS/quickstart

is python -m eqvae_jax.main with the same arguments, and python -m eqvae_jax train. Nothing is imported here but what
one command needs: eqvae --help is there at once.
"""

import difflib
import importlib
import importlib.metadata
import platform
import re
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """One command: its module, whose run() reads sys.argv and exits, and what it does, in a line."""

    module: str
    does: str


COMMANDS = {
    "train": Command("eqvae_jax.main", "trains an autoencoder, a generator or a classifier by a config"),
    "encode": Command("eqvae_jax.encode", "images into a cache of latents, on which generators train"),
    "sample": Command("eqvae_jax.sample", "images from a generator, as .npz and as a picture"),
    "evaluate": Command("eqvae_jax.evaluate", "measures reconstruction, equivariance, latents and generation"),
    "report": Command("eqvae_jax.report", "compares runs: one page with figures, curves and numbers"),
    "convert": Command("eqvae_jax.convert", "weights in and out: diffusers, LDM, taming, DiT, SiT, REPA, MaskGIT"),
    "plan": Command("eqvae_jax.plan", "says whether and how fast a config would train on a TPU slice, without one"),
    "reproduce": Command("eqvae_jax.reproduce", "tables and figures of the paper, our numbers beside the paper's"),
    "prepare": Command("eqvae_jax.data.preparation", "any source of images into ArrayRecord shards"),
}
_SELF = "python -m eqvae_jax"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu", "jax-cuda12-plugin",
             "jax-cuda13-plugin", "diffrax")


def program(name):
    """How the command `name` was called: "eqvae NAME", or "python -m eqvae_jax.MODULE"."""
    return sys.argv[0] if sys.argv[0] in (f"eqvae {name}", f"{_SELF} {name}") else f"python -m {COMMANDS[name].module}"


def as_called(text):
    """A module's docstring with its commands written the way in which this process was called."""
    called = next((own for own in ("eqvae", _SELF) if sys.argv[0].startswith(f"{own} ")), None)
    if called is None:
        return text
    for name, command in COMMANDS.items():
        text = re.sub(rf"(python -m )?\b{re.escape(command.module)}\b", f"{called} {name}", text)
    return text


def usage(own):
    """What --help prints."""
    lines = [f"  {name:<10}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join([
        f"usage: {own} COMMAND [arguments]", "",
        "EQ-VAE in JAX: autoencoders whose latents scale and turn with the image, and generators trained on them.", "",
        "commands:", *lines, "",
        f"{own} COMMAND --help explains one; {own} --version names the versions at work, for reports of bugs.",
    ])


def versions():
    """What --version prints: ours on the first line, then Python's and those of the packages that do the work."""
    import eqvae_jax

    lines = [f"eqvae_jax {eqvae_jax.__version__}", f"python {platform.python_version()}, {platform.platform()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # most of the accelerators' are not there
    return "\n".join(lines)


def run(own="eqvae"):
    """The entry of `eqvae`: hands its arguments to a command's run(), which sees its own name as sys.argv[0].

    own: how this command was called. Exits as the command does; with 2 where there is none.
    """
    name, *arguments = sys.argv[1:] or [""]
    if name in ("--help", "-h", "help"):
        print(usage(own))
        sys.exit(0)
    if name in ("--version", "version"):
        print(versions())
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"error: {name!r} is no command of {own}." + (f" Did you mean {near[0]}?" if near else "") if name
              else f"error: {own} needs a command.", f"There are {', '.join(COMMANDS)}; see {own} --help.",
              file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"{own} {name}", *arguments]
    importlib.import_module(COMMANDS[name].module).run()
