"""Read torch's checkpoint files (.ckpt, .pth, .pt, .bin) without torch and without running anything in them.

Both containers: the zip archives of torch >= 1.6, and the stream of pickles before. Tensors come back as read-only
NumPy arrays that map the file, so a checkpoint of any size costs memory only where it is used. bfloat16: `ml_dtypes`.
"""

import dataclasses
import io
import math
import mmap
import pathlib
import struct
import zipfile

import ml_dtypes
import numpy as np

from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.pickles import Name, hashable, read_pickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
LFS_POINTER = b"version https://git-lfs"
LARGEST_PICKLE = 256 * 2**20             # the part that describes the tensors; LDM's largest take 1 MB
STORAGES = {
    "torch.DoubleStorage": np.float64, "torch.FloatStorage": np.float32, "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16, "torch.LongStorage": np.int64, "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16, "torch.CharStorage": np.int8, "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """One flat block of numbers, which tensors are views of."""

    dtype: np.dtype
    size: int
    values: np.ndarray | None            # None while a legacy file is read for the first time


class PickledDtype:
    """A NumPy dtype as pickles describe it: a name first, the byte order as state."""

    def __init__(self, name="", *_):
        self.name, self.order = name, "="

    def set_pickled_state(self, state):
        self.order = state[1] if state[1] in ("<", ">") else "="

    def scalar(self, data=b""):
        dtype = np.dtype(self.name).newbyteorder(self.order)
        if dtype.kind not in "biufc" or len(data) != dtype.itemsize:
            raise WeightsError(f"a NumPy scalar of dtype {self.name!r} with {len(data)} bytes")
        return np.frombuffer(data, dtype)[0]


def read_torch_file(path):
    """The object in a torch file: containers as they are, tensors as NumPy arrays, all else as `Placeholder`.

    Raises WeightsError where the file is missing, truncated, of another format, or asks for what a file of weights has
    no use for. Nothing in the file is executed and nothing is written.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if not path.stat().st_size:
        raise WeightsError(f"{path}: the file is empty")
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise WeightsError("a Git LFS pointer, not the file it stands for: run `git lfs pull` where it is from")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return read_zip(path, data) if data[:4] == b"PK\3\4" else read_legacy(data)
    except (WeightsError, OSError) as error:
        raise WeightsError(f"{path}: {error}") from error


def read_zip(path, data):
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except Exception as error:           # zipfile lets IndexError, struct.error and others through
        raise WeightsError(f"a broken zip archive, perhaps a partial download ({error})") from error
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError("a zip archive, but not one that torch.save wrote (no single */data.pkl in it)")
    root = pickles[0].removesuffix("data.pkl")

    def locate(name):
        """Position and length of an entry's bytes."""
        if name not in entries:
            raise WeightsError(f"the archive has no entry {name!r}")
        entry = entries[name]
        # torch stores, so that files can be mapped. Refusing the rest also refuses archives that inflate without end.
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise WeightsError(f"the archive's entry {name!r} is compressed or encrypted; unpack and store it again")
        header = data[entry.header_offset:entry.header_offset + 30]
        if len(header) != 30 or header[:4] != b"PK\3\4":
            raise WeightsError(f"the archive's entry {name!r} is not where its directory says")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.file_size > len(data):
            raise WeightsError(f"the archive's entry {name!r} is cut off; download the file again")
        return start, entry.file_size

    def content(name, limit):
        start, size = locate(name)
        if size > limit:
            raise WeightsError(f"the archive's entry {name!r} has {size} bytes; more than {limit} are not plausible")
        return data[start:start + size]

    if root + "byteorder" in entries and content(root + "byteorder", 16) != b"little":
        raise WeightsError("written on a big-endian machine; save it again on another")

    storages = {}

    def load_persistent(identifier):
        dtype, key, size = storage_header(identifier)
        start, length = locate(f"{root}data/{key}")
        if size * dtype.itemsize > length:
            raise WeightsError(f"storage {key} claims {size} x {dtype} and has {length} bytes")
        if (key, dtype) not in storages:
            storages[key, dtype] = Storage(dtype, size, np.ndarray(size, dtype, data, start))
        return storages[key, dtype]

    return read_pickle(io.BytesIO(content(pickles[0], LARGEST_PICKLE)), BUILDERS, load_persistent)


def read_legacy(data):
    """Four pickles (magic, protocol, machine, object), the storages' keys, then each storage's size and bytes."""

    def plain():
        return read_pickle(data, {}, lambda identifier: None)

    try:
        magic = plain()
    except WeightsError:
        magic = None
    if magic != LEGACY_MAGIC:
        raise WeightsError("not a file that torch.save wrote: neither its zip archive nor its legacy stream")
    protocol, machine = plain(), plain()
    if protocol != LEGACY_PROTOCOL:
        raise WeightsError(f"another legacy protocol than {LEGACY_PROTOCOL}, the only one known")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise WeightsError("written on a big-endian machine; save it again on another")

    # The bytes follow the object that uses them: read it to learn what there is, and again with the storages found.
    start, storages = data.tell(), {}

    def note(identifier):
        dtype, key, size = storage_header(identifier)
        return storages.setdefault(key, Storage(dtype, size, None))

    read_pickle(data, BUILDERS, note)
    keys = plain()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise WeightsError("the list of storages is not that of the object; the file is damaged")
    position = data.tell()
    for key in keys:
        storage = storages[key]
        end = position + 8 + storage.size * storage.dtype.itemsize
        if end > len(data):
            raise WeightsError(f"storage {key} is cut off; download the file again")
        if struct.unpack("<q", data[position:position + 8])[0] != storage.size:
            raise WeightsError(f"storage {key} has another size than the object says; the file is damaged")
        values = np.ndarray(storage.size, storage.dtype, data, position + 8)
        storages[key] = dataclasses.replace(storage, values=values)
        position = end
    data.seek(start)
    return read_pickle(data, BUILDERS, note)


def storage_header(identifier):
    """dtype, key and number of elements from ("storage", type, key, device, number of elements, [view])."""
    kind, *rest = identifier if isinstance(identifier, tuple) else (None,)
    if kind != "storage" or len(rest) not in (4, 5):
        raise WeightsError("a persistent identifier that is not torch's")
    storage_type, key, _, size = rest[:4]
    known = f"none of {', '.join(STORAGES)}"
    if not isinstance(storage_type, Name):  # whose text may be endless
        raise WeightsError(f"a storage of a kind that is no name, {known}")
    if str(storage_type) not in STORAGES:
        raise WeightsError(f"a storage of kind {storage_type}, which is {known}")
    if not isinstance(key, str) or type(size) is not int or size < 0:
        raise WeightsError("a storage whose key is not text or whose size is not a number")
    if rest[4:] not in ([], [None]):
        raise WeightsError("a storage that is a view of another, as torch wrote before version 0.4; save it again")
    return np.dtype(STORAGES[str(storage_type)]), key, size


def build_tensor(storage, offset, size, stride, *_):
    """A view of a storage. It may skip and share elements, but never reach outside or have more than there are."""
    if not isinstance(storage, Storage):
        raise WeightsError("a tensor without a storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 32 or any(type(n) is not int or n < 0 for n in numbers):
        raise WeightsError("a tensor whose offset, shape or strides are not sizes")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= storage.size or count > storage.size):
        raise WeightsError(f"a tensor of shape {tuple(size)} that does not fit in its {storage.size} elements")
    if storage.values is None:
        return None
    if not count:
        return np.zeros(size, storage.dtype)
    bytes_per_step = [step * storage.dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage.values[offset:], size, bytes_per_step, writeable=False)


def build_dict(items=()):
    return {hashable(key): value for key, value in items}


def build_bytes(text="", encoding="latin1"):
    if not isinstance(text, str) or encoding != "latin1":
        raise WeightsError("bytes in an encoding other than latin1")
    return text.encode("latin1")


def build_scalar(dtype, *data):
    return dtype.scalar(*data) if isinstance(dtype, PickledDtype) else None


BUILDERS = {
    "collections.OrderedDict": build_dict,
    "torch._utils._rebuild_tensor": build_tensor,
    "torch._utils._rebuild_tensor_v2": build_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda size=(): tuple(size),
    "_codecs.encode": build_bytes,
    "numpy.dtype": PickledDtype,
    "numpy.core.multiarray.scalar": build_scalar,
    "numpy._core.multiarray.scalar": build_scalar,
}
