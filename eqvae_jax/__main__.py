"""python -m eqvae_jax: the command `eqvae` where it is not on the path."""

from eqvae_jax import commands

if __name__ == "__main__":
    commands.run("python -m eqvae_jax")
