"""What every test needs: a CPU backend, a compilation cache, and PyTorch's packages where a test compares with them."""

import gc
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import tempfile

from eqvae_jax.backend import machine

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling dominates these tests: without LLVM's optimiser and XLA's new code generators it takes a third of the time,
# and tiny programs run as fast.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    least = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA aborts the process on a flag it does not know
        least += ["--xla_cpu_use_fusion_emitters=false"]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *least]).strip()
# Compiled programs are kept between runs; they are made for one kind of processor, so machines must not share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(
    pathlib.Path(tempfile.gettempdir()) / f"eqvae_jax_tests-{os.getuid()}-{machine()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Tracing makes objects by the hundred thousand, and keeps them: looking through them all for cycles finds few.
gc.set_threshold(100_000, 20, 20)

import numpy as np  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="session")
def torch():
    """PyTorch, imported by the tests that ask for it only: it costs seconds. The package itself never imports it."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    return torch


@pytest.fixture(scope="session")
def lpips_package(torch):
    """The reference implementation of LPIPS, whose wheel carries the weights of its linear heads."""
    declare_nms(torch)
    return pytest.importorskip("lpips")


@pytest.fixture(scope="session")
def diffusers(torch):
    declare_nms(torch)
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def transformers(torch):
    declare_nms(torch)
    return pytest.importorskip("transformers")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def declare_nms(torch):
    """Let torchvision be imported beside a CPU build of torch, whose missing operators it decorates at import time."""
    if importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    declare_nms.library = library               # the schemas live as long as this object
    importlib.import_module("torchvision")
