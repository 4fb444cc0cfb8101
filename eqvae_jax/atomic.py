"""Files that appear under their name only once they are complete."""

import contextlib
import os
import pathlib


@contextlib.contextmanager
def whole(path):
    """Gives a path to write to; the file is at `path` once the block is done, and nowhere if it was interrupted."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong above is what must be reported
            partial.unlink(missing_ok=True)
