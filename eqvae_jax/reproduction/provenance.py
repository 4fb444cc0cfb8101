"""What a reader needs to judge a result and to get it again: the command, the data, the control, how much of what."""

import importlib.metadata
import platform
import shlex
import time
from pathlib import Path

from eqvae_jax.reproduction.running import as_time
from eqvae_jax.reproduction.stages import Output

BASELINES = {
    "control": "what is not named EQ is the control: the same start, trained on plainly for as many steps as EQ gets",
    "before": "what is not named EQ is the published weights as they are",
}


def how(options, scale, seeds, stages, records):
    """{name: text}, in order.

    options: the command line's. seeds: a list. stages: all that was made; records: of those that have one.
    """
    source, _, place = (options.images or scale.images["train"].rpartition(":")[0]).partition(":")
    images = f"{source}:DIR" if Path(place).is_absolute() else f"{source}:{place}".removesuffix(":")
    which = f"--table={options.table}" if options.table else f"--figure={options.figure}"
    command = ["python", "-m", "eqvae_jax.reproduce", which, f"--scale={options.scale}", f"--seeds={len(seeds)}",
               f"--jobs={options.jobs}", "--workdir=DIR", *([f"--images={images}"] if options.images else [])]
    crops = (f"; {scale.crops} random crops of each of {scale.tested} test images, so that intervals say nothing of "
             "other images" if scale.crops > 1 else "")
    commits = list(dict.fromkeys(name for record in records for name in str(record["commit"]).split(", ")))
    silent = len(stages) - len(records)
    whole = not silent and all(record.get("attempts", 1) == 1 for record in records)
    return {
        "command": shlex.join(command),
        "images": f"{images} at {scale.image_size} pixels{crops}",
        "baseline": BASELINES[scale.baseline],
        "steps": "; ".join(steps(stages)),
        "measured": ", ".join(measured(stages, scale)),
        "seeds": ", ".join(map(str, seeds)),
        "commit": ", ".join(commit if commit != "None" else f"version {version()}" for commit in commits)
        + (" (the stages are of several)" if len(commits) > 1 else "")
        + (f"; of {silent} stages it is not known" if silent else ""),
        "machine": f"{processor()}, {options.jobs} stages at a time",
        "time": f"{'' if whole else 'at least '}{as_time(sum(record['seconds'] for record in records))} for all stages "
        "one after another, those that other tables share included",
        "written": time.strftime("%Y-%m-%d"),
    }


def steps(stages):
    """How long each kind of network was trained: ["sdvae 1,200 or 800", "sdvae EQ 800", "dit 1,000"]."""
    found = {}
    for stage in stages:
        kind, amount = stage.work
        if kind.endswith(" step"):
            found.setdefault(kind.removesuffix(" step"), {})[f"{amount:,}"] = None
    return [f"{kind} {' or '.join(amounts)} steps" for kind, amounts in found.items()]


def measured(stages, scale):
    """How many images each kind of evaluation is of, and in whose features distances are."""
    found = {}
    for stage in stages:
        if stage.door == "evaluate":
            if stage.arguments[0] == "generation":
                samples = next(needed for needed in stage.inputs if needed.door == "sample")
                found[f"generation of {number(samples, '--count', scale)} samples against the test set"] = None
            else:
                found[f"{stage.arguments[0]} of {number(stage, '--limit', scale)} test images"] = None
    if any(isinstance(word, Output) and "features" in word.form for stage in stages for word in stage.arguments):
        found[f"Fréchet distances in the features of {scale.classifier}"] = None
    return list(found)


def number(stage, flag, scale):
    """A flag's number in a stage's command, as text; all test images where there is none."""
    texts = [word.partition("=")[2] for word in stage.arguments if str(word).startswith(f"{flag}=")]
    return f"{int(texts[0]) if texts else scale.tested:,}"


def version():
    """Of this package where it is installed, else "unknown"."""
    try:
        return importlib.metadata.version("eqvae_jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def processor():
    """The processors of this machine and how many."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{len(names)} x {names[0]}"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
