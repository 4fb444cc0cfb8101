"""The run's directory: writable, and of one config only."""

import errno
import json
import tempfile
from pathlib import Path

import jax

from eqvae_jax.atomic import whole

# What may differ on resume, because no result depends on it: how long (under a constant learning rate), how often,
# how many, on what devices.
CHANGEABLE = ("training.steps", "training.warm_up", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best",
              "data.workers", "data.evaluation_batch_size")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file-size limit reached


def may_change(name, config):
    """Tells whether a run of a resolved config may be resumed with another value of this leaf ("section.field")."""
    if name == "training.accumulate":  # an autoencoder draws a tau for each micro-batch
        return config.get("task") == "generator"
    return name in CHANGEABLE or name.startswith("mesh.") or name.endswith("_every")


def resolved(config):
    """Returns an ml_collections ConfigDict as plain JSON data (tuples become lists)."""
    try:
        return json.loads(json.dumps(config.to_dict()))
    except TypeError as error:
        message = f"the config holds something JSON cannot write, so a run could not record it: {error}"
        raise TypeError(message) from None


def differences(old, new):
    """Returns [(name, old, new)] of the leaves in which two resolved configs differ; a missing leaf is
    "absent".
    """
    old, new = leaves(old), leaves(new)
    return [(name, old.get(name, "absent"), new.get(name, "absent")) for name in sorted(old | new)
            if name not in old or name not in new or old[name] != new[name]]


def leaves(tree, prefix=""):
    """{"section.field": value} of nested dicts."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: value for key, branch in tree.items()
            for name, value in leaves(branch, f"{prefix}.{key}" if prefix else key).items()}


def prepare(workdir, config, started):
    """Returns `workdir` as an absolute Path that exists, can be written, and holds config.json of this
    config.

    started: the workdir already holds a checkpoint; then its config must be the same but for `may_change`.
    Raises ValueError listing the differing leaves, or an address instead of a directory; OSError where
    nothing can be written.
    """
    path = local_path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
    except OSError as error:
        raise type(error)(error.errno, f"cannot write into the workdir {path} ({error.strerror}); "
                                       "name a directory you may write with --workdir") from None
    config, file = resolved(config), path / "config.json"
    if started and file.exists():
        decays = config["optimizer"]["schedule"] != "constant"  # then every step's learning rate depends on how long
        changed = [line for line in differences(json.loads(file.read_text()), config)
                   if not may_change(line[0], config) or decays and line[0] == "training.steps"]
        if changed:
            lines = "\n".join(f"  {name}: was {old!r} -> now {new!r}" for name, old, new in changed)
            newer = (f"; what was absent came with a newer version of this project: where its value means that it is "
                     f"off, write it into {file}, else go back to the version that began the run"
                     if any(old == "absent" for _, old, _ in changed) else "")
            raise ValueError(f"the workdir {path} belongs to a run with another config:\n{lines}\n"
                             f"resume with the same values, or start afresh in another --workdir{newer}")
    if jax.process_index() == 0:
        with whole(file) as partial:
            partial.write_text(json.dumps(config, indent=2) + "\n")
    return path


def saved_value(workdir, name):
    """Returns the leaf `name` ("section.field") of the config.json in `workdir`, or None where there is none."""
    file = local_path(workdir) / "config.json"
    return leaves(json.loads(file.read_text())).get(name) if file.exists() else None


def local_path(workdir):
    """Returns an absolute Path; raises ValueError for an address such as gs://..., which files cannot be
    appended to.
    """
    if "://" in str(workdir):
        raise ValueError(f"the workdir {workdir} is an address; mount the bucket as a directory (gcsfuse) "
                         "and name that")
    return Path(workdir).expanduser().resolve()
