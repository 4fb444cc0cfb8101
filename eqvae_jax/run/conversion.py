"""What conversions of autoencoders and of generators share: refusals before anything is read, and tables."""

import os
import pathlib

FEW_NAMES = 3  # shown without --verbose
SUFFIXES = {kind: (".safetensors", ".pt") for kind in ("dit", "sit", "repa")}  # of files; .ckpt of others
SUFFIXES["maskgit"] = (".safetensors", ".pt", ".pth", ".msgpack")


def check_target(source, target, overwrite):
    """Refuses, before anything is read, a target that cannot or should not be written.

    Raises ValueError: a suffix that is not written, the source itself, something that exists without `overwrite`, a
    directory where a file should go or the reverse, no permission.
    """
    path, origin = pathlib.Path(target.rest).resolve(), pathlib.Path(source.rest).resolve()
    folder = target.kind == "diffusers"
    suffixes = SUFFIXES.get(target.kind, (".safetensors", ".ckpt"))
    if not folder and path.suffix not in suffixes:
        raise ValueError(f"{target}: a file's name ends in {' or '.join(suffixes)}, which says how it is written.")
    inside = origin == path.parent if source.kind == "diffusers" else origin.is_file() and origin.parent == path
    if source.kind != "init" and (path == origin or inside):
        raise ValueError(f"{target} is where {source} is read from: write elsewhere.")
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{target}: {path} is a {'directory' if path.is_dir() else 'file'}: write elsewhere.")
    if folder and (index := path / "diffusion_pytorch_model.safetensors.index.json").exists():
        raise ValueError(f"{target}: diffusers would go on loading the shards of its {index.name}: write elsewhere.")
    if path.exists() and not overwrite and not (folder and not any(path.iterdir())):
        raise ValueError(f"{target} {'is not empty' if folder else 'exists'}: --overwrite writes over it.")
    place = path if folder else path.parent
    place = next(parent for parent in (place, *place.parents) if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise ValueError(f"{target}: {place} is no directory that this user may write to.")


def parameter_table(params, parts, verbose=False):
    """Lines of a table with a row for each part of a model, or, verbose, for each of its tensors."""
    import flax
    import numpy as np

    flat = {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(params).items()}
    leaves = {part: [leaf for path, leaf in flat.items() if path[0] == part] for part in parts if part in params}
    leaves["total"] = list(flat.values())
    header = ["part", "tensors", "parameters", "dtype", "MiB"]
    lines = aligned([header, *([part, *_totals(own)] for part, own in leaves.items())])
    if verbose:
        tensors = [
            ["/".join(path), " x ".join(map(str, leaf.shape)), f"{leaf.mean():.3g}", f"{leaf.std():.3g}"]
            for path, leaf in flat.items()
        ]
        lines += ["", *aligned([["tensor", "shape", "mean", "std"], *tensors])]
    return lines


def _totals(leaves):
    size = sum(leaf.size for leaf in leaves)
    dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
    return [f"{len(leaves):,}", f"{size:,}", dtypes, f"{sum(leaf.nbytes for leaf in leaves) / 2**20:.1f}"]


def left_out(reasons, verbose=False):
    """Lines that say what of the source was not read: reasons is a dict reason -> names of what it holds."""
    lines = []
    for reason, names in reasons.items():
        few = names if verbose else names[:FEW_NAMES]
        more = f" and {len(names) - len(few):,} more" if len(names) > len(few) else ""
        lines += [f"left out    {reason} ({len(names):,}):", f"            {', '.join(few)}{more}"]
    return lines or ["left out    nothing"]


def aligned(rows):
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]


def show(*blocks):
    for lines in blocks:
        print("\n".join(lines), end="\n\n", flush=True)
