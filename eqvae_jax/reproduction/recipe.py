"""The paper's own scale, written down: every command as a script, the configs they resolve to, the cost."""

import ast
import json
import re
import shlex
from pathlib import Path

from eqvae_jax import hardware, recipes
from eqvae_jax.atomic import whole
from eqvae_jax.reproduction.stages import DOORS, Output

UTILISATION = 0.4  # share of the peak FLOP/s that the hours assume; nobody has measured it
CHIPS = ("v5e", "v6e", "H100")
OBJECTIVE = re.compile(r"(equivariance|model|loss)\.(?!lpips)")  # fields that decide what a step computes
HEADER = """#!/usr/bin/env bash
# {title}, at the paper's scale.
#
# The commands run in order; given again, what is done is left out, and training, encoding and sampling go on where they
# were stopped.
#
#   RUNS=DIR IMAGENET=DIR OPENIMAGES=DIR LAUNCH="launch/slurm.sh --nodes=4 --sbatch=--wait ... --" bash commands.sh
#
# Each needs the results of those before it: what LAUNCH starts must end before LAUNCH does, as sbatch's --wait has it.
# IMAGENET holds train/ and val/ as they are unpacked. Weights (kl-f8/model.ckpt and the like) and ADM's reference are
# looked for where this is started. LAUNCH is put before each command, and is empty on one host.
set -euo pipefail
: "${{RUNS:?a directory for all results}}" "${{IMAGENET:?}}" "${{OPENIMAGES:?}}"
"""


def write(experiment, stages, folder, say=print):
    """Writes commands.sh, configs/ and README.md into `folder`."""
    folder = Path(folder)
    configs = folder / "configs"
    trainings = [stage for stage in stages if stage.door == "main"]
    costs = cost_rows(trainings, say)
    script = [HEADER.format(title=experiment.title)]
    for stage in stages:
        script.append(f"\n# {stage.name}\n{line(stage)}\n")
    files = {folder / "commands.sh": "".join(script), folder / "README.md": readme(experiment, stages, costs)}
    for stage in trainings:
        files[configs / f"{stage.folder('').name}.json"] = json.dumps(resolved(stage), indent=1) + "\n"
    for path, text in files.items():
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    say(f"wrote {folder}: commands.sh ({len(stages)} commands), configs/ ({len(trainings)}), README.md with the cost")


def line(stage):
    """A stage's command for a shell, with ${RUNS} for the workdir.

    One whose product is there is left out. A training has none that says that it is done: it ends at once then.
    """
    words = ["${LAUNCH:-}", "python", *(_quoted(word) for word in stage.command("RUNS")[1:])]
    product = DOORS[stage.door][2]
    if product:
        words = ["[", "-e", _quoted(str(stage.folder("RUNS") / product)), "]", "||", *words]
    return " ".join(words)


def _quoted(word):
    """A word for a shell, in which RUNS, IMAGENET and OPENIMAGES are variables."""
    safe = shlex.quote(word)
    with_variables = re.sub(r"\b(RUNS|IMAGENET|OPENIMAGES)(?=/|$)", r"${\1}", word)
    return safe if with_variables == word else f'"{with_variables}"'


def resolved(stage):
    """The config that a training's command resolves to, as nested dicts; other stages stand by their folders."""
    reference, flags = flags_of(stage)
    config = recipes.load(reference)
    for name, value in flags.items():
        override(config, name, value)
    return json.loads(json.dumps(config.to_dict()))


def flags_of(stage):
    """(what --config names, {field: text} of the --config.FIELD flags) of a training."""
    flags = {}
    for argument in stage.arguments:
        if isinstance(argument, Output):
            argument = argument.form.format(f"RUNS/stages/{argument.stage.folder('').name}")
        flag, _, value = argument.partition("=")
        flags[flag] = value
    reference = flags.pop("--config")
    return reference, {flag.removeprefix("--config."): value for flag, value in flags.items()}


def override(config, name, text):
    """Sets config.SECTION.FIELD from a flag's text, as the type that is there."""
    *sections, field = name.split(".")
    for section in sections:
        config = config[section]
    config[field] = text if isinstance(config[field], str) else ast.literal_eval(text)


def cost_rows(trainings, say=print):
    """A row for each training: name, steps, batch, FLOPs of an image, of all, and chip-hours at UTILISATION.

    FLOPs are those of the model, traced from shapes as `plan` counts them; networks that only measure are not in them.
    """
    rows, known = [], {}
    for stage in trainings:
        config, latents = resolved(stage), latents_of(stage)
        reference, flags = flags_of(stage)
        objective = tuple((name, value) for name, value in flags.items() if OBJECTIVE.match(name))
        what = reference, latents, objective
        if what not in known:
            say(f"counting the FLOPs of {stage.name} ...")
            known[what] = flops_of(*what)
        flops, steps, batch = known[what], config["training"]["steps"], config["data"]["batch_size"]
        total = flops * batch * steps
        hours = {chip: total / (hardware.CHIPS[chip].flops * UTILISATION) / 3600 for chip in CHIPS}
        rows.append((stage.name, steps, batch, flops, total, hours))
    return rows


def latents_of(stage):
    """What the latents that a generator trains on look like, as plan's --latents says it; "" of an autoencoder."""
    from eqvae_jax.autoencoders.presets import PRESETS

    encoded = next((needed for needed in stage.inputs if needed.door == "encode"), None)
    if encoded is None:
        return ""
    config = recipes.load(f"eq_{encoded.name.split()[0]}")
    model = PRESETS[config.preset].model
    side = config.data.image_size // model.downsampling
    codes = f":{model.codebook_size}" if model.kind == "vq" else f"x{model.latent_channels}"
    return f"{side}x{side}{codes}"


def flops_of(reference, latents="", flags=()):
    """FLOPs of the model for one image of a training step of a config with (field, text) of some flags."""
    import jax

    from eqvae_jax.planning.rehearsal import Rehearsal
    from eqvae_jax.run.planning import build
    from eqvae_jax.training.sharding import make_mesh

    config = recipes.load(reference)
    for name, value in flags:
        override(config, name, value)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    hold = Rehearsal(lambda text: None).values
    return build(config, mesh, hold, per_device=1, latents=latents).task.model_flops()


def readme(experiment, stages, costs):
    """What is in the folder, and what it would cost."""
    doors = {}
    for stage in stages:
        doors[stage.door] = doors.get(stage.door, 0) + 1
    cost = (
        f"Cost of the trainings, from FLOPs counted in the models, at {UTILISATION:.0%} of the vendors' peak, which is "
        "an assumption: `python -m eqvae_jax.plan --config=... --topology=...` says what bounds a step on a slice, and "
        "whether it fits. Encoding, sampling and evaluation are not in it; 50,000 samples of 250 evaluations cost "
        "about as much as training on 4 million images."
    )
    lines = [
        f"# {experiment.title}, at the paper's scale",
        "",
        experiment.about,
        "",
        f"`commands.sh` has {', '.join(f'{count} x {door}' for door, count in doors.items())}, in order; `configs/` "
        "has what each training resolves to. None of it has been run by us.",
        "",
        cost,
        "",
        f"| training | steps | batch | GFLOP an image | EFLOP | {' | '.join(f'{chip} hours' for chip in CHIPS)} |",
        f"|{'---|' * (5 + len(CHIPS))}",
    ]
    sums = dict.fromkeys(CHIPS, 0.0)
    for name, steps, batch, flops, total, hours in costs:
        for chip in CHIPS:
            sums[chip] += hours[chip]
        lines.append(
            f"| {name} | {steps:,} | {batch} | {flops / 1e9:,.1f} | {total / 1e18:,.1f} | "
            + " | ".join(f"{hours[chip]:,.0f}" for chip in CHIPS)
            + " |"
        )
    lines.append(f"| all | | | | | {' | '.join(f'{sums[chip]:,.0f}' for chip in CHIPS)} |")
    return "\n".join(lines) + "\n"
