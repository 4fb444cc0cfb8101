"""Plans every recipe on four slices, and how the bytes a chip sends grow with the slice: docs/plans.md and a figure.

    python benchmarks/plans.py                                    # what is not in docs/plans.json yet
    python benchmarks/plans.py --configs dit.py:XL_2 --slices v5e:4x4

Each plan runs in a process of its own, python -m eqvae_jax.plan, and is kept in docs/plans.json as soon as it is there,
so that an interrupted run goes on. Autoencoders are planned with --quick: each has some twenty large programs, and with
its usual effort a TPU's compiler takes seconds for every convolution. Needs libtpu, and no TPU.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Recipe -> flags. Where the recipe's batch does not divide over a slice, the plan takes one example a chip and says so.
CONFIGS = ("dit.py:XL_2", "sit.py:XL_2", "repa.py:XL_2", "maskgit.py:base", "eq_sdvae.py", "eq_sdvae16.py",
           "eq_sdxlvae.py", "eq_sd3vae.py", "eq_vqgan.py")
SLICES = ("v5e:4x4", "v5e:16x16", "v4:4x4x4", "v6e:8x8")
WEAK, WEAK_BATCH = ("v5e:4x4", "v5e:8x8", "v5e:16x16"), 4  # images a chip
MOST_SPLIT = 128  # chips that XL/2's width of 1152 divides over; more would leave half of its kernels whole
HEADER = """# Plans

What `python -m eqvae_jax.plan` says of the recipes, on slices that nobody had: compiled by the TPU's own compiler
({version}), run on no TPU. Written by `python benchmarks/plans.py`.

FLOPs, memory and bytes are counted in the compiled programs; times are a roofline, the least that the hardware could
take at its vendor's peak numbers, and no forecast. `sent` is what a chip sends to others in a step. `memory` adds up
arguments and temporaries, an upper bound, as some share their place: the compiler itself refuses what does not fit, and
then half the batch is planned. So on v5e:4x4 the XL recipes do not fit with their 16 images a chip as they are; with
`--config.mesh.fsdp=16 --config.model.remat=True` 4 images a chip take 2.9 GiB (the figure's first orange point).
Autoencoders (`eq_`) are compiled with `--quick`, XLA's least effort, which keeps nothing in the chips' small memory.

| config | slice | batch a chip | memory, GiB | GFLOP an image | sent, MB | step, ms | images/s | dominates |
|---|---|---|---|---|---|---|---|---|
"""


def plan(config, topology, extra=()):
    """The plan's JSON, or {"error": its last lines}."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "plan.json"
        command = [sys.executable, "-m", "eqvae_jax.plan", f"--config=configs/{config}", f"--topology={topology}",
                   f"--json={output}", *extra]
        print(" ".join(command[1:]), file=sys.stderr)
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if output.exists():
            return json.loads(output.read_text())
        return {"error": ended.stderr.strip()[-600:]}


def row(config, topology, found):
    if "error" in found:
        reason = next((line for line in found["error"].splitlines() if "does not fit" in line), "no plan")
        return f"| `{config}` | {topology} | | {reason.rpartition('DoesNotFit: ')[2]} | | | | | |\n"
    memory, roof, flops = found["memory"], found["roofline"], found["flops"]
    fits = "" if memory["fits"] else " **does not fit**"
    return (f"| `{config}` | {topology} | {found['per_device_batch']} | {memory['peak'] / 2**30:.1f} of "
            f"{memory['capacity'] / 2**30:.0f}{fits} | {flops['computed_per_example'] / 1e9:,.0f} | "
            f"{found['sent'] / 1e6:,.0f} | {1e3 * roof['step']:.3g} | {roof['examples_per_second']:,.0f} | "
            f"{roof['dominating']} |\n")


def weak_scaling(plans, output):
    """Bytes that a chip sends in a step, DiT-XL/2 at the same batch a chip: data parallel, and parameters split."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for fsdp, color in ((False, "C0"), (True, "C1")):
        points = [(plans[key]["devices"], plans[key]["sent"] / 1e9) for key in map(weak_key, WEAK, (fsdp,) * len(WEAK))
                  if key in plans and "error" not in plans[key]]
        if not points:
            continue
        chips, sent = zip(*points, strict=True)
        name = f"parameters split over up to {MOST_SPLIT} chips" if fsdp else "data parallel"
        axes.plot(chips, sent, "o", color=color, label=f"{name}: counted in the compiled step")
        formula, law = (3, "3 P (n - 1) / n") if fsdp else (2, "2 P (n - 1) / n")
        size = gradients(plans[weak_key(WEAK[0], False)])
        axes.plot(chips, [formula * size * (n - 1) / n / 1e9 for n in chips], "--", color=color,
                  label=f"{law}, with P = {size / 1e9:.2f} GB")
    axes.set(xscale="log", xlabel="chips (v5e), 4 images each", ylabel="GB sent by a chip in a step",
             ylim=(0, 1.1 * axes.get_ylim()[1]),
             title="DiT-XL/2: what a chip sends does not grow with the slice")
    axes.set_xticks([16, 64, 256], ["16", "64", "256"])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(output, dpi=150)


def weak_key(topology, fsdp):
    return f"weak {topology} {'fsdp' if fsdp else 'data'}"


def gradients(found):
    """Bytes of all gradients as they are computed, most of them in bfloat16: what data parallelism adds up."""
    return found["collectives"]["all-reduce"]["bytes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="*", default=CONFIGS)
    parser.add_argument("--slices", nargs="*", default=SLICES)
    parser.add_argument("--sizes", default="3", help="of tau, as plan's --sizes")
    parser.add_argument("--no_weak", action="store_true", help="leave out the figure's plans")
    arguments = parser.parse_args()
    docs = ROOT / "docs"
    cache = docs / "plans.json"
    plans = json.loads(cache.read_text()) if cache.exists() else {}

    def keep(key, config, topology, extra=()):
        if key not in plans:
            found = plan(config, topology, extra)
            if "does not fit" not in found.get("error", "does not fit"):  # of nothing that is worth keeping
                raise SystemExit(f"{key}: {found['error']}")
            plans[key] = found
            cache.write_text(json.dumps(plans, indent=1) + "\n")
            write(plans, docs)

    if not arguments.no_weak:
        for topology in WEAK:
            keep(weak_key(topology, False), "dit.py:XL_2", topology, [f"--per_device_batch={WEAK_BATCH}",
                                                                      "--config.model.remat=True"])
            chips = min(math.prod(map(int, topology.partition(":")[2].split("x"))), MOST_SPLIT)
            keep(weak_key(topology, True), "dit.py:XL_2", topology, [
                f"--per_device_batch={WEAK_BATCH}", "--config.model.remat=True", f"--config.mesh.fsdp={chips}"])
    for config in arguments.configs:
        for topology in arguments.slices:
            options = [f"--sizes={arguments.sizes}", "--quick"] if config.startswith("eq_") else []
            keep(f"{config} {topology}", config, topology, options)
    write(plans, docs)


def write(plans, docs):
    """docs/plans.md and docs/weak_scaling.png of what there is."""
    import importlib.metadata

    version = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    rows = [row(*key.split(" "), found) for key, found in plans.items() if not key.startswith("weak")]
    notes = sorted({note for found in plans.values() for note in found.get("notes", ()) if "does not divide" in note})
    text = HEADER.format(version=version) + "".join(rows)
    if notes:
        text += "\n" + "".join(f"- {note}\n" for note in notes)
    if any(key.startswith("weak") for key in plans):
        weak_scaling(plans, docs / "weak_scaling.png")
        text += "\n![Bytes that a chip sends in a step, by the number of chips](weak_scaling.png)\n"
    (docs / "plans.md").write_text(text)


if __name__ == "__main__":
    main()
