"""Plans a training run on a machine that is not here: does it fit, how fast can it be, what would bound it.

    python -m eqvae_jax.plan --config=configs/dit.py:XL_2 --topology=v5e:16x16
    python -m eqvae_jax.plan --config=configs/eq_sdvae.py --topology=v4:4x4x4 --per_device_batch=4 --json=plan.json
    python -m eqvae_jax.plan --config=configs/sit.py:B_2 --topology=here

The config's own training step is compiled for the slice by the TPU's compiler, which needs no TPU (pip install libtpu).
No data, latents or weights are needed: everything is planned from shapes. Any value of the config is a flag, as of
eqvae_jax.main: --config.mesh.fsdp=16 --config.model.remat=True.

Printed: memory of a chip by part; FLOPs; bytes moved; collectives; a roofline, which is the least time a step could
take were everything but one resource free, at the vendor's peak numbers: a bound, not a forecast.
"""

import functools
import json
import sys
import time
from pathlib import Path

from absl import app, flags, logging

from eqvae_jax import main as training
from eqvae_jax.planning import topology

# JAX and all that imports it is imported where it is first needed: what cannot work is refused in a second.

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", None, f"Chip and sides of the slice: {topology.EXAMPLES}.")
flags.DEFINE_integer("per_device_batch", None, "Examples in one forward pass on one device; by default the config's "
                     "batch spread over the slice, or 1 where it does not divide.")
flags.DEFINE_string("latents", "", "Of generators, the latents to plan with: 32x32x4 (the default), or 16x16:1024, "
                    "tokens and codes (MaskGIT's default).")
flags.DEFINE_integer("classes", 1000, "Of generators, how many classes the latents have.")
flags.DEFINE_string("sizes", "3", "Of autoencoders, how many sizes of tau are compiled for each of its branches, "
                    "evenly spread from the smallest to the largest; the others are interpolated. all: every one.")
flags.DEFINE_bool("quick", False, "Compile with XLA's least effort, autoencoders several times sooner: the same FLOPs, "
                  "and what a TPU would keep in its small memory counts as temporaries.")
flags.DEFINE_string("json", "", "File to write the numbers to.")


SMALLER = """What makes a step smaller: --config.mesh.fsdp=N splits parameters and optimizer over N chips,
--config.model.remat=True keeps less for the backward pass, and other chips have more memory."""


QUICKLY = "compiled with XLA's least effort (--quick), which keeps nothing in the chips' small memory"


def plan(config, topology_name, per_device=None, latents="", classes=1000, sizes=3, quick=False,
         say=lambda line: None):
    """The plan of a config as a dict of plain numbers, words and lists; it changes config.data.

    quick: as the flag. say: is told what is compiled. Where XLA refuses a batch for want of memory, half of it is
    planned, until one fits; "refused" then says which did not. Raises ValueError for what cannot be, as `main` does,
    and rehearsal.DoesNotFit where not even one example a device fits.
    """
    from eqvae_jax.planning.document import document
    from eqvae_jax.planning.rehearsal import DoesNotFit, Rehearsal
    from eqvae_jax.run.planning import build
    from eqvae_jax.training.sharding import make_mesh

    begun, refused = time.monotonic(), []
    devices, chip = topology.open_devices(topology_name)
    mesh = make_mesh(config.mesh, devices)
    while True:
        rehearsal = Rehearsal(say, quick)
        planned = build(config, mesh, rehearsal.values, per_device, latents, classes)
        try:
            found = document(config, mesh, chip, planned, rehearsal, sizes, say)
            break
        except DoesNotFit as error:
            if planned.per_device == 1:
                raise DoesNotFit(f"{error}, at one example a device.\n{SMALLER}") from error
            say(f"{error}, at {planned.per_device} a device; half of it is tried")
            refused.append({"per_device_batch": planned.per_device, "reason": str(error)})
            per_device = planned.per_device // 2
    if refused:
        found["largest_per_device_batch"] = min(found["largest_per_device_batch"], refused[-1]["per_device_batch"] - 1)
    if quick:
        found["notes"].append(QUICKLY)
    return {"topology": topology_name, "device": devices[0].device_kind} | found | {
        "refused": refused, "seconds": time.monotonic() - begun}


def main(argv):
    if len(argv) > 1:
        return f"unexpected arguments: {' '.join(argv[1:])}; every option is a --flag=value, and --help lists them."
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        topology.check(FLAGS.topology)
        sizes = parse_sizes(FLAGS.sizes)
        output = Path(FLAGS.json).expanduser() if FLAGS.json else None
        if output and not output.absolute().parent.is_dir():
            raise ValueError(f"--json={FLAGS.json}: there is no directory {output.absolute().parent}.")
        topology.prepare(FLAGS.topology)
        from eqvae_jax.planning.document import as_text

        numbers = plan(FLAGS.config, FLAGS.topology, FLAGS.per_device_batch, FLAGS.latents, FLAGS.classes, sizes,
                       FLAGS.quick, say=lambda line: print(line, file=sys.stderr, flush=True))
        print(as_text(numbers))
        if output:
            output.write_text(json.dumps(numbers, indent=1) + "\n")
    except (ValueError, OSError, RuntimeError) as error:
        if FLAGS.verbosity > 0:
            raise
        return f"\n{type(error).__name__}: {error}\n(--verbosity=1 shows the traceback)"


def parse_sizes(text):
    """How many sizes, 0 for all. Raises ValueError for what is neither a number from 1 nor "all"."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise ValueError(f"--sizes={text}; it must be a number from 1, or all.")
    return 0 if text == "all" else int(text)


def run():
    """The command line's entry: errors a user can act on are one message, not a traceback."""
    required = ["config", "topology"]
    flags.mark_flags_as_required(required)
    optional = ["per_device_batch", "latents", "classes", "sizes", "quick", "json"]
    app.run(main, flags_parser=functools.partial(training.parse_flags, name="plan", about=__doc__, required=required,
                                                 optional=optional))


if __name__ == "__main__":
    run()
