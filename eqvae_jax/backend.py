"""What must be set before JAX starts: XLA's CPU flags, the compilation cache. Importing this imports no JAX."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

# jaxlib versions on which the flag was tried. XLA aborts the process on a flag it does not know.
_FLAG_KNOWN_TO = ("0.10.",)
# Keeps convolutions off YNNPACK, which runs them on one thread: kernel gradients are up to 7 times faster without.
_CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


def _accelerator_installed() -> bool:
    return any(importlib.util.find_spec(name) for name in
               ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin"))


def set_cpu_flags():
    """Adds the flag that makes XLA's CPU convolutions fast to XLA_FLAGS, where the installed jaxlib knows it.

    Left alone where an accelerator's plugin is installed and JAX_PLATFORMS does not say "cpu" (libtpu parses
    XLA_FLAGS too), where the flag is already given, and with EQVAE_JAX_NO_CPU_FLAGS=1.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not _accelerator_installed()
    known = importlib.metadata.version("jaxlib").startswith(_FLAG_KNOWN_TO)
    flags = os.environ.get("XLA_FLAGS", "")
    if on_cpu and known and "ynn_fusion_type" not in flags and not os.environ.get("EQVAE_JAX_NO_CPU_FLAGS"):
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_FLAG}".strip()


def machine() -> str:
    """Names the kind of processor: code compiled for one can crash on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        traits = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        traits = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(traits.encode()).hexdigest()[:8]}"


def use_compilation_cache():
    """Keeps compiled programs on disk between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache directory.

    Set it to an empty string for no cache. Returns the directory, or None.
    """
    import jax

    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if directory is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = str(Path(home) / "eqvae_jax" / f"xla-{machine()}")
    if not directory:
        return None
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return directory
