"""Several processes as one program: how they find each other, what they must agree on, and how they end together.

A program on several hosts is the same command on each of them. `start` joins the processes, `agree` compares what they
were started with, `meet` lets none go on without the others, and `run` ends them together: where one fails, is killed
or falls silent, the others say which it was and stop, with exit code RESTART, instead of waiting in a collective for
ever. With one process all of it does nothing.

Where they find each other, first of these:

    --coordinator=HOST:PORT --processes=N --process=I      or EQVAE_COORDINATOR, EQVAE_PROCESSES, EQVAE_PROCESS
    Slurm, Open MPI                                        what srun and mpirun set, if there are several tasks
    Cloud TPU                                              the metadata of the slice

EQVAE_LIMIT is after how many seconds without a sign of life a process is lost (60), EQVAE_START_LIMIT how long to wait
for all of them in the beginning (300).

The only user of jax._src.distributed: its key-value store and barriers have time limits, where JAX's public collectives
wait for ever.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import secrets
import sys
import traceback

from eqvae_jax.distributed import group
from eqvae_jax.distributed.group import LAST, RESTART, seconds
from eqvae_jax.distributed.joining import add_flags, start, start_from

__all__ = ["LAST", "RESTART", "Disagreement", "add_flags", "agree", "alone", "because", "command", "gather",
           "interrupted", "meet", "refuse", "run", "shared", "software", "start", "start_from"]


class Disagreement(ValueError):
    """The processes of one program were not started alike."""


def run(main):
    """Calls main() and returns its exit code, for sys.exit; the processes of a program end together."""
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            because(end.code)
    except BaseException as failure:
        if not group.joined:
            raise
        traceback.print_exc()
        because(failure)
        code = 1
    return group.joined.leave(code or 0) if group.joined else code


def refuse(error):
    """Prints an error that the user can put right, keeps it for the other processes to be told; returns exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    because(error)
    return 2


def interrupted(advice):
    """The same of Ctrl-C, or of SIGTERM to one of several processes; returns exit code 130."""
    print(f"stopped; {advice}", file=sys.stderr)
    because("it was interrupted")
    return 130


def because(error):
    """Keeps why this process is about to end, for the others to be told."""
    if group.joined:
        group.joined.reason = " ".join(str(error).split())[:500] or type(error).__name__


def command(options):
    """Facts to agree on before a command line's work: its flags, and the code and the versions that run it.

    options: argparse's.
    """
    flags = dict(vars(options))
    for own in ("coordinator", "processes", "process", "run"):
        flags.pop(own, None)
    return {f"--{name}": str(value) for name, value in flags.items()} | software()


def software():
    """{"code": the hash of this package's files, "python", "jax" ...: versions} that run this process."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(set(root.rglob("*.py")) - set(root.glob("configs/*"))):  # in wheels only; values are compared
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"code of eqvae_jax": digest.hexdigest()[:12], "python": platform.python_version()} | versions


def agree(name, facts):
    """Compares what all processes know under `name`, and waits for each at most EQVAE_START_LIMIT seconds.

    Args:
      facts: () -> dict, name -> a value that JSON can write, compared as such; not called where there is one process.
    Raises:
      Disagreement: naming each fact that differs, its values, and which processes have them. All processes raise it.
      RuntimeError: a process did not come.
    """
    if not group.joined:
        return
    limit = seconds("EQVAE_START_LIMIT", 300)
    group.joined.barrier(f"{name}: all are here", limit)
    group.joined.put(f"facts/{name}", facts())
    group.joined.barrier(name, limit)
    told = group.joined.all(f"facts/{name}")
    lines = []
    for fact in dict.fromkeys(fact for one in told.values() for fact in one):
        values = {}
        for k in sorted(told):
            values.setdefault(json.dumps(told[k].get(fact, "absent")), []).append(group.joined.name(k))
        if len(values) > 1:
            lines.append(f"  {fact}: " + ", but ".join(f"{value} on {_some(names)}" for value, names in values.items()))
    if lines:
        raise Disagreement(f"the {len(told)} processes were not started alike ({name}):\n" + "\n".join(lines[:20])
                           + "\ngive every host the same command, code, data and shared workdir.")


def meet(event, limit=600.0):
    """Waits for all processes; raises RuntimeError, naming those that did not come within `limit` seconds."""
    if group.joined:
        group.joined.barrier(event, limit)


def gather(name, value):
    """[value of each process], in order; values are such as JSON can write. To be called by all of them."""
    if not group.joined:
        return [value]
    group.joined.put(f"gathered/{name}", value)
    group.joined.barrier(f"{name}: written", LAST)
    found = group.joined.all(f"gathered/{name}")
    group.joined.barrier(f"{name}: read", group.joined.limit)
    return [found[k] for k in sorted(found)]


def alone():
    """Whether this program is one process, as far as `start` knows."""
    return group.joined is None


def shared(directory):
    """Tells whether all processes see the same `directory`, as a value to `agree` on."""
    if alone():
        return "one process"
    path = pathlib.Path(directory) / ".seen_by_all_processes"
    if group.joined.index == 0:
        path.write_text(secrets.token_hex(8))
    meet("the directory is marked", LAST)  # others may still be downloading, or reading a long list of files
    seen = path.read_text() if path.exists() else "not the one of process 0"
    meet("the directory is looked at")
    if group.joined.index == 0:
        path.unlink()
    return seen


def _some(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
