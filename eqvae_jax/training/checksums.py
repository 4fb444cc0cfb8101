"""What the files of a checkpoint were when it was written: workdir/checksums/STEP.json, {file: [bytes, SHA-256]}.

Orbax's rename says that a checkpoint was complete once; this says whether it still is.
"""

import concurrent.futures
import hashlib
import json

from eqvae_jax.atomic import whole


def record(checkpoint):
    """Writes the sums of a complete checkpoint's files, and forgets those of checkpoints that are gone."""
    files = _files(checkpoint)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = pool.map(_sum, files.values())
    with whole(_beside(checkpoint)) as partial:
        partial.write_text(json.dumps(dict(zip(files, sums, strict=True)), indent=0, sort_keys=True))
    for path in _beside(checkpoint).parent.glob("*.json"):
        if not (checkpoint.parent / path.stem).exists():
            path.unlink(missing_ok=True)


def forget(checkpoint):
    """Removes the sums of a checkpoint, which is about to be written anew."""
    _beside(checkpoint).unlink(missing_ok=True)


def problem(checkpoint):
    """A sentence about the first file that is not as it was written, or None.

    None too where there are no sums: of a run that was killed before they were taken.
    """
    beside = _beside(checkpoint)
    if not beside.exists():
        return None
    try:
        written = json.loads(beside.read_text())
    except ValueError:  # a machine that lost power can leave an empty file
        return None
    try:
        return _compare(written, _files(checkpoint))
    except OSError as error:
        return f"its files cannot be read ({error.strerror or error})"


def _compare(written, files):
    for name, (size, _) in written.items():
        if name not in files:
            return f"{name} is missing"
        if (found := files[name].stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for (name, wanted), found in zip(written.items(), pool.map(lambda n: _sum(files[n]), written), strict=True):
            if found != wanted:
                return f"{name} is not what was written, its SHA-256 is another"
    return None


def _beside(checkpoint):
    return checkpoint.parent.parent / "checksums" / f"{checkpoint.name}.json"


def _files(checkpoint):
    # But for Orbax's own note beside the items, which changes when the checkpoint gets its name.
    return {str(path.relative_to(checkpoint)): path for path in sorted(checkpoint.rglob("*"))
            if path.is_file() and path.parent != checkpoint}


def _sum(path):
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
