import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # toy_regression, under any import mode of pytest


def _start(mode, workdir, **environment):
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, str(HERE / "toy_regression.py"), mode, str(workdir)]
    return subprocess.Popen(command, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="session")
def children(tmp_path_factory):
    """Three processes side by side: {"killed" | "signalled" | "eight_devices": (workdir, exit code, out,
    err)}.
    """
    root = tmp_path_factory.mktemp("children")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    running = {"killed": _start("killed", root / "killed"),
               "signalled": _start("signalled", root / "signalled"),
               "eight_devices": _start("eight_devices", root / "eight_devices", XLA_FLAGS=flags)}
    waiting = root / "signalled" / "waiting"
    deadline = time.monotonic() + 120
    while not waiting.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running["signalled"].terminate()
    results = {}
    for name, process in running.items():
        out, err = process.communicate(timeout=120)
        results[name] = root / name, process.returncode, out, err
    return results


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """(workdir, final state) of six steps without a break, on one device."""
    import toy_regression as toy

    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, toy.run(workdir, toy.get_config(**{"checkpoint.every": 4}))
