"""Write torch's checkpoint files (.ckpt, .pth) without torch: the zip archive that `torch.save` makes since 1.6.

An archive of stored entries, so that readers can map it: `data.pkl` describes the tensors, `data/0`, `data/1`, ... hold
their bytes. Source: torch/csrc/jit/serialization.md and inline_container.cc.
"""

import struct
import zipfile

import numpy as np

from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.files import whole_or_nothing
from eqvae_jax.weights.torch_files import STORAGES

ROOT = "archive/"
ALIGNMENT = 64                           # torch's: where a storage may begin
STORAGE_NAMES = {np.dtype(dtype): name.removeprefix("torch.") for name, dtype in STORAGES.items()}


def write_torch_file(path, tensors, under="state_dict", beside=None):
    """Writes {"state_dict": tensors}, the layout of Lightning's checkpoints, for torch.load with its safest options.

    under: another name in its place, or None for the tensors alone. tensors: name -> NumPy array, in any memory layout;
    one at a time is brought into torch's. beside: name -> int, what else the dict holds, such as a trainer's counters.
    The file appears under its name only when it is complete.
    Raises WeightsError where it cannot be written.
    """
    with whole_or_nothing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        add(archive, "data.pkl", pickled(tensors, under, beside or {}))
        add(archive, "byteorder", b"little")
        for i, value in enumerate(tensors.values()):
            value = np.asarray(value, order="C")
            little = value.astype(value.dtype.newbyteorder("<"), copy=False)
            add(archive, f"data/{i}", little.reshape(-1).view(np.uint8).data)
        add(archive, "version", b"3\n")


def add(archive, name, content):
    """An entry whose bytes begin at a multiple of ALIGNMENT; the gap is an extra field named FB, as torch makes it."""
    entry = zipfile.ZipInfo(ROOT + name)                     # dated 1980: the same weights give the same file
    entry.file_size = len(content)
    begin = archive.fp.tell() + 30 + len(entry.filename) + 4
    if len(content) > zipfile.ZIP64_LIMIT // 2:
        raise WeightsError(f"a tensor of {len(content)} bytes is more than this writer takes")
    gap = -begin % ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
    with archive.open(entry, "w") as file:
        file.write(content)


def pickled(tensors, under, beside):
    """The pickle of {under: OrderedDict of tensors, **beside}, in the operations that torch's safest reader knows."""
    items = b"".join(text(name) + tensor(value, i) for i, (name, value) in enumerate(tensors.items()))
    filled = ORDERED_DICT + b"(" + items + b"u"
    numbers = b"".join(text(name) + integer(value) + b"s" for name, value in beside.items())
    return b"\x80\x02" + (filled if under is None else b"}" + text(under) + filled + b"s" + numbers) + b"."


# An empty OrderedDict: name, empty tuple, call.
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def tensor(value, i):
    """torch._utils._rebuild_tensor_v2(storage i, offset 0, shape, strides, requires_grad, backward hooks)."""
    storage = STORAGE_NAMES.get(value.dtype.newbyteorder("="))
    if not storage:
        raise WeightsError(f"torch has no tensors of type {value.dtype}")
    identifier = (b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(str(i)) + text("cpu")
                  + integer(value.size) + b"t")
    strides = [int(np.prod(value.shape[axis + 1:])) for axis in range(value.ndim)]
    arguments = (identifier + b"Q" + integer(0) + integers(value.shape) + integers(strides) + b"\x89" + ORDERED_DICT)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def integers(values):
    return b"(" + b"".join(integer(value) for value in values) + b"t"
