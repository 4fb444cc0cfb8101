"""Where the configs are: beside the package in a checkout, inside it where it was installed from a wheel."""

import difflib
import runpy
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def directory():
    """The folder of the configs that belong to this package; setup.py puts them into the wheel."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names():
    """["dit", "eq_sd3vae", ...], the configs of this package."""
    return sorted(path.stem for path in directory().glob("*.py"))


def resolve(reference):
    """What --config says -> "FILE.py" or "FILE.py:VARIANT" of a file that exists.

    Args:
      reference: a file that exists, or, in any directory, one of `names`: configs/eq_sdvae.py, eq_sdvae.py or eq_sdvae;
        each with :VARIANT or without.
    Raises:
      ValueError: it is neither; the nearest name and all others are in the message.
    """
    file, colon, variant = reference.partition(":")
    path = Path(file).expanduser()
    if path.is_file():
        return f"{path}{colon}{variant}"
    stem = path.name.removesuffix(".py")
    if path.parent in (Path("."), Path("configs")) and stem in names():
        return f"{directory() / stem}.py{colon}{variant}"
    near = difflib.get_close_matches(stem, names(), n=1)
    raise ValueError(f"{file or 'nothing'}: there is no such file, and no such config here."
                     + (f" Did you mean {near[0]}?" if near else "")
                     + f" There are {', '.join(names())}.")


def load(reference):
    """The ConfigDict of what --config says, as its get_config(variant) returns it: not locked.

    Raises ValueError as `resolve` does, for a variant that there is not, and with the traceback of a file that fails.
    """
    path, *variant = resolve(reference).split(":", 1)
    try:
        return runpy.run_path(path)["get_config"](*variant)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be used as a config:\n{traceback.format_exc()}") from error
