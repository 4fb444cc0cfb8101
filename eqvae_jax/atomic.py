"""Files that appear under their name only once they are complete."""

import contextlib
import pathlib
import secrets


@contextlib.contextmanager
def whole(path):
    """Gives a path to write to; the file is at `path` once the block is done, and nowhere if it was interrupted."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # hosts that share a folder may share a pid
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong above is what must be reported
            partial.unlink(missing_ok=True)
