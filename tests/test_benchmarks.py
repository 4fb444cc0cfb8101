"""The benchmark of the input pipeline, in a tiny setting: it runs, and its table is what its measurements say."""

import json
import os
import pathlib
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="processor seconds are read from /proc")
def test_input_says_how_many_cores_are_needed(torch, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(ROOT / "benchmarks" / "input.py"), "--sizes", "96x64", "--files=6", "--images=8",
               "--batch=4", "--image_size=16", "--latents=16", "--rounds=2", "--eq_gflop=2000", "--dit_gflop=500",
               "--machine", "mine=2 chips,100 TFLOP/s,50 %,8 vCPUs", f"--json={tmp_path / 'input.json'}"]
    run = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "input.json").read_text())

    programs, machines = found["programs"], found["machines"]
    jpegs = {f"96x64 {name}" for name in ("torch", "folder, threads", "folder, workers", "arrayrecord, threads")}
    assert set(programs) == jpegs | {"28x28 idx, threads", "latents, files", "latents, memory"}
    for name, numbers in programs.items():
        assert len(numbers["rounds"]) == 2 and min(numbers["rounds"]) > 0 and numbers["per_second"] > 0
        assert numbers["per_core_second"] == statistics.median(numbers["rounds"])
        assert ("ratio" in numbers) == (name in jpegs - {"96x64 torch"})
    pairs = zip(programs["96x64 folder, threads"]["rounds"], programs["96x64 torch"]["rounds"], strict=True)
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    assert list(programs["96x64 folder, threads"]["ratio"].values()) == [statistics.mean(ratios), *ratios]

    assert set(machines) == {"v5e-8", "v5e-16", "v6e-8", "H100", "8 x H100", "mine"}
    assert machines["mine"]["cpus"] == 8
    rates = {"latents, files": 200, "96x64 folder, threads": 50}  # 2 chips of half of 100 TFLOP/s
    for program, rate in rates.items():
        needed = machines["mine"]["programs"][program]
        assert needed["rate"] == pytest.approx(rate)
        assert needed["cores"] == pytest.approx(rate / programs[program]["per_core_second"])
    eight = machines["v5e-8"]["programs"]["96x64 torch"]["rate"]
    assert eight == pytest.approx(8 * 197e12 * 0.45 / 2000e9)
    assert f"{eight:12.0f}" in run.stdout and "vCPUs of the hosts" in run.stdout
