"""A plan as one dict of plain numbers, and as text to read."""

import jax

from eqvae_jax.planning.estimate import TERMS, Cost, collectives_of, cost_of, largest_batch, smallest_slice
from eqvae_jax.planning.rehearsal import device_bytes
from eqvae_jax.training.programs import Variant, expected, placed, spread
from eqvae_jax.training.state import state_shapes

GIB, MIB = 2**30, 2**20
USABLE = 0.98  # of a chip's memory; the TPU's runtime keeps 0.25 of a v5e's 16 GiB
ASSUMPTIONS = (
    "vendors' peak numbers; products at the bfloat16 rate, float32 ones too, which TPUs do by default",
    "collectives around rings, over all links of a chip at once; slices without wrap-around have less",
    "a program takes as long as its longest term, and programs follow one another; input keeps up",
    "memory traffic as the compiler's instructions have it, loops as often as they run",
)


def document(config, mesh, chip, planned, rehearsal, sizes, say):
    """Rehearses a planned task's steps; the dict says what `as_text` prints. sizes: as programs.spread's `most`."""
    task = planned.task
    every = list(task.variants()) if task.variants else [Variant("step", "step", 1.0, 0.0, task.train_step)]
    chosen = spread(every, sizes)
    shapes = placed(state_shapes(task.init, jax.random.key(config.seed)), task.shardings)
    state_bytes = sum(map(device_bytes, jax.tree.leaves(shapes)))
    frozen, batch = rehearsal.held(), rehearsal.values(planned.batch)
    steps = {}
    for number, variant in enumerate(chosen, start=1):
        say(f"[{number}/{len(chosen)}] {variant.name}, {variant.share:.1%} of the steps")
        rehearsal.calls, state = [], rehearsal.values(shapes)
        variant.train_step(state, batch, 0, rehearsal)
        steps[variant.name] = rehearsal.calls
    costs = {name: cost_of(calls, chip, mesh.size) for name, calls in steps.items()}
    mean = Cost(*map(float, expected(every, costs)))
    worst, call = max(((name, call) for name, calls in steps.items() for call in calls), key=lambda pair: pair[1].peak)
    gradients = sum(map(device_bytes, jax.tree.leaves(shapes.params)))
    memory = {
        "peak": call.peak, "capacity": chip and chip.hbm, "fits": chip and fits(steps, chip),
        "state": state_bytes, "frozen": frozen, "step": worst, "program": call.program.name,
        "arguments": call.program.arguments, "temporaries": call.program.temporaries,
        "results": call.program.outputs - call.program.aliased, "beside": call.beside,
    }
    rows, model_flops = config.data.batch_size, task.model_flops and task.model_flops()
    found = {
        "devices": mesh.size, "mesh": dict(mesh.shape), "batch": rows, "per_device_batch": planned.per_device,
        "notes": list(planned.notes), "memory": memory,
        "flops": {"model_per_example": model_flops, "computed_per_example": mean.flops * mesh.size / rows},
        "moved": mean.moved, "sent": mean.sent, "collectives": _collectives(every, steps),
        "unknown_loops": sum(c.program.traffic.unknown_loops for calls in steps.values() for c in calls),
        "variants": [{"name": v.name, "share": v.share, "compiled": v.name in steps} for v in every],
        "steps": {name: costs[name]._asdict() | {"peak": max(call.peak for call in calls)}
                  for name, calls in steps.items()},
        "programs": [_program(program) for program in rehearsal.programs.values()],
    }
    if chip:
        found["roofline"] = {term: getattr(mean, term) for term in (*TERMS, "step")} | {
            "dominating": mean.dominating, "examples_per_second": rows / mean.step,
            "by_cycles": mean.cycles / chip.clock if chip.clock and mean.cycles else None,
            "mfu": model_flops and model_flops * rows / mesh.size / mean.step / chip.flops}
        fixed = state_bytes + frozen + gradients
        largest = largest_batch(planned.per_device, call.peak, fixed, USABLE * chip.hbm)
        largest = found["largest_per_device_batch"] = max(largest, planned.per_device if memory["fits"] else 0)
        found["smallest_slice"] = largest and smallest_slice(
            chip.slices, rows // config.training.get("accumulate", 1), largest)
    return found


def fits(steps, chip):
    """Whether every call of every step fits a chip: what XLA compiles does by itself, and not beside much else."""
    return all(call.beside < MIB or call.peak <= USABLE * chip.hbm for calls in steps.values() for call in calls)


def _collectives(every, steps):
    """{kind: {times, bytes, sent}} of the mean step."""
    by_step = {name: collectives_of(calls) for name, calls in steps.items()}
    found = {}
    for kind in sorted({kind for one in by_step.values() for kind in one}):
        numbers = expected(every, {name: one.get(kind, (0, 0, 0.0)) for name, one in by_step.items()})
        found[kind] = dict(zip(("times", "bytes", "sent"), map(float, numbers), strict=True))
    return found


def _program(program):
    return {"name": program.name, "seconds": program.seconds, "arguments": program.arguments,
            "temporaries": program.temporaries, "outputs": program.outputs, "aliased": program.aliased,
            "flops": program.flops, "memory": program.traffic.memory, "cycles": program.traffic.cycles,
            "xla_flops": program.xla_flops, "xla_bytes": program.xla_bytes}


def as_text(plan):
    """The plan in words, a screen of them."""
    memory, flops = plan["memory"], plan["flops"]
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    lines = [f"{plan['topology']}: {plan['devices']} x {plan['device']}, mesh {mesh}"]
    lines += [f"  {note}" for note in plan["notes"]]
    lines += [f"  {one['per_device_batch']} a device does not fit: {one['reason']}" for one in plan["refused"]]
    verdict = "" if memory["fits"] is None else (
        f" of {_size(memory['capacity'])}: {'fits' if memory['fits'] else 'DOES NOT FIT'}")
    lines += [
        f"memory of a chip          {_size(memory['peak'])}{verdict}",
        f"  always there: {_parts(memory, {'state': 'state', 'frozen': 'frozen networks'})}",
        f"  at the fullest, in {memory['program']} ({memory['step']}): "
        + _parts(memory, {"arguments": "arguments", "temporaries": "temporaries", "results": "results not in place",
                          "beside": "held between programs"}),
        f"FLOPs of an image         {_giga(flops['model_per_example'])} of the model, "
        f"{_giga(flops['computed_per_example'])} computed",
        f"moved by a chip in a step {plan['moved'] / 1e9:.3g} GB of its memory, {plan['sent'] / 1e9:.3g} GB to others",
    ]
    lines += [f"  {kind}: {one['times']:.4g} times, {one['bytes'] / 1e6:.4g} MB in all, {one['sent'] / 1e6:.4g} MB sent"
              for kind, one in plan["collectives"].items()]
    compiled = sum(variant["compiled"] for variant in plan["variants"])
    if len(plan["variants"]) > 1:
        lines.append(f"tau                       {len(plan['variants'])} kinds of steps, {compiled} compiled; the "
                     "others between them by their pixels")
    if roof := plan.get("roofline"):
        terms = ", ".join(f"{term} {1e3 * roof[term]:.3g}" for term in TERMS)
        lines += [f"a step takes at least, ms {terms}",
                  f"  together {1e3 * roof['step']:.3g} ms, {roof['examples_per_second']:,.0f} images a second"
                  + (f", at most {roof['mfu']:.0%} of the peak FLOP/s" if roof["mfu"] else "")
                  + f"; {roof['dominating']} dominates"]
        if roof["by_cycles"]:
            lines.append(f"  the compiler's own estimate of its instructions: {1e3 * roof['by_cycles']:.3g} ms, "
                         "without waiting for other chips")
        lines += _advice(plan)
        lines += ["assumed", *(f"  {line}" for line in ASSUMPTIONS)]
    else:
        lines.append("no roofline: the speed of this kind of device is not in eqvae_jax/hardware.py")
    if plan["unknown_loops"]:
        lines.append(f"{plan['unknown_loops']} loops of unknown length are counted as running once.")
    lines.append(f"{len(plan['programs'])} programs compiled in {plan['seconds']:.0f} s")
    return "\n".join(lines)


def _advice(plan):
    largest, batch = plan["largest_per_device_batch"], plan["batch"]
    if not largest:
        return ["fits with                 no batch at all: --config.mesh.fsdp=N splits the state over N chips, "
                "--config.model.remat=True keeps less for the backward pass"]
    smallest = f"; a batch of {batch} from {plan['smallest_slice']} on" if plan["smallest_slice"] else ""
    return [f"fits with                 about {largest} a device{smallest}"]


def _parts(memory, names):
    return ", ".join(f"{name} {_size(memory[key])}" for key, name in names.items() if memory[key] > MIB / 100)


def _size(count):
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / MIB:.2f} MiB"


def _giga(number):
    return "an unknown number" if number is None else f"{number / 1e9:,.4g} G"
