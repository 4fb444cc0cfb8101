"""EQ-VAE in JAX: autoencoders whose latents scale and turn with the image, and generators trained on them.

Reference: Kouzelis et al., "EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image
Modeling", ICML 2025, arXiv 2502.09509.
"""

from eqvae_jax.backend import set_cpu_flags

__version__ = "0.1.0"  # setup.py reads this line; CHANGELOG.md says what is in it

set_cpu_flags()  # XLA reads its flags once, when the first array is made
