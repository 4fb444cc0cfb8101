"""A cache of latents, written by python -m eqvae_jax.encode, and reading it; batches of it: data/latent_batches.py.

It holds posteriors of a KL autoencoder, or tokens, the codes of a VQ autoencoder; and the images too, where they were
kept. What it holds is unscaled; LatentSpace is the one place where an autoencoder's scale and shift are applied.
"""

import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
from typing import NamedTuple

import numpy as np

from eqvae_jax.data import latent_cache, latent_records

_REPAIR = "delete it and give the command of python -m eqvae_jax.encode again, which writes what is missing"


class LatentSpace(NamedTuple):
    """What latents mean: diffusion models see (z - shift) * scale of the autoencoder with this hash.

    reference: where its weights came from, for messages and for decoding.
    """

    scale: float
    shift: float
    hash: str
    reference: str

    @classmethod
    def of(cls, spec):
        """That of an autoencoder: spec has these four as attributes, as weights.AutoencoderSpec."""
        return cls(float(spec.scale), float(spec.shift), spec.hash, spec.reference)

    def to_model(self, z):
        """The autoencoder's latents (..., C) as diffusion models see them."""
        return (z - self.shift) * self.scale

    def to_autoencoder(self, z):
        """The inverse of `to_model`."""
        return z / self.scale + self.shift

    def require(self, other: "LatentSpace"):
        """Raises ValueError, which names both, unless `other` is of the same weights, scale and shift."""
        if self.hash != other.hash:
            raise ValueError(f"these latents are of {self.reference} (hash {self.hash}), and {other.reference} is "
                             f"another autoencoder (hash {other.hash}): name the one with the first hash.")
        if (self.scale, self.shift) != (other.scale, other.shift):
            raise ValueError(f"the latents of {self.reference} are scaled by {self.scale:g} after - {self.shift:g}, "
                             f"those of {other.reference} by {other.scale:g} after - {other.shift:g}: both must agree.")


class Latents:
    """An open cache; `manifest` is the dict of manifest.json, `shape` (h, w, C), `space` its LatentSpace.

    is_tokens: it holds tokens; shape is then (h, w). image_shape: (H, W, 3) of the kept images, or None.
    """

    def __init__(self, directory: pathlib.Path, manifest: dict):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.directory, self.manifest = directory, manifest
        self.shape, self.dtype = tuple(manifest["shape"]), manifest["dtype"]
        self.is_tokens = self.dtype == latent_records.TOKENS
        side = manifest["preprocessing"]["image_size"]
        self.image_shape = (side, side, 3) if manifest["preprocessing"].get("images") else None
        self.space = LatentSpace(*(manifest["autoencoder"][name] for name in LatentSpace._fields))
        counts = [entry["count"] for entry in manifest["shards"]]
        self._ends = np.cumsum(counts)
        self._decoders = concurrent.futures.ThreadPoolExecutor()  # decoding PNG lets other threads run
        self._records = ArrayRecordDataSource([
            _Whole(str(directory / entry["file"]), 0, n, n)
            for entry, n in zip(manifest["shards"], counts, strict=True)])

    def __len__(self):
        return self.manifest["count"]

    @property
    def nbytes(self) -> int:
        """Bytes of all latents as they are stored."""
        numbers = math.prod(latent_records.stored_shape(self.shape, self.dtype))
        return len(self) * numbers * np.dtype(self.dtype).itemsize

    @property
    def image_bytes(self) -> int:
        """Bytes of all kept images, decoded."""
        return len(self) * math.prod(self.image_shape or (0,))

    def __getitem__(self, i: int) -> dict:
        """{"mean", "std", "mirror_mean", "mirror_std"}: float32 (h,w,C), or {"tokens", "mirror_tokens"}: uint16 (h,w);
        "label"; "index", the image's in the source; "image", uint8 (H,W,3), where images were kept.

        Raises:
          ValueError: the record is damaged, which names its shard.
        """
        record = self.read(i)
        whole, mirror = record.latent
        if self.is_tokens:
            latent = {"tokens": whole, "mirror_tokens": mirror}
        else:
            (mean, std), (mirror_mean, mirror_std) = whole.astype(np.float32), mirror.astype(np.float32)
            latent = {"mean": mean, "std": std, "mirror_mean": mirror_mean, "mirror_std": mirror_std}
        image = {"image": record.pixels()} if self.image_shape else {}
        return latent | image | {"label": record.label, "index": record.index}

    def read(self, i: int) -> latent_records.Record:
        """One latent as it is stored, its checksum compared; errors as of [i]."""
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f"latent {i} of {len(self)} in {self.directory}")
        try:
            return self._unpack(self._records[i])
        except Exception as error:  # the native reader has one exception type for everything
            shard = int(np.searchsorted(self._ends, i, side="right"))
            path = self.directory / self.manifest["shards"][shard]["file"]
            raise ValueError(f"{path}: latent {i} cannot be read ({error}): {_REPAIR}") from error

    def read_many(self, rows) -> list[latent_records.Record]:
        """What `read` gives, of many latents at once: two to four times faster each."""
        rows = [int(row) for row in rows]
        try:
            found = self._records.__getitems__(rows)
            return [self._unpack(record) for record in found]
        except Exception:  # one by one, the error says which
            return [self.read(row) for row in rows]

    def _unpack(self, record):
        found = latent_records.unpack(record, self.shape, self.dtype)
        if self.image_shape and found.image is None:
            raise ValueError("it has no image, and the cache was to keep them")
        return found

    def take(self, rows: np.ndarray, mirrored: np.ndarray, images: bool = False) -> dict:
        """{"mean", "std": float32 (B,h,w,C), "label": int32 (B,)} of latents; mirrored: bool (B,), which of the two.

        Of tokens {"tokens": int32 (B,h,w), "label"}. images: with "image", uint8 (B,H,W,3).
        """
        shape = latent_records.stored_shape(self.shape, self.dtype)[1:]
        latent = np.empty((len(rows), *shape), np.int32 if self.is_tokens else np.float32)
        label = np.empty(len(rows), np.int32)
        records = self.read_many(rows)
        for b, record in enumerate(records):
            label[b], latent[b] = record.label, record.latent[int(mirrored[b])]
        image = np.stack(list(self._decoders.map(latent_records.Record.pixels, records))) if images else None
        return as_batch(latent, label, image, mirrored)

    def fingerprint(self) -> str:
        """ "20,000 latents, 0f3a52c1": how many there are, and a hash of the manifest, which knows the shards' sums."""
        manifest = json.dumps(self.manifest, sort_keys=True).encode()
        return f"{len(self):,} latents, {hashlib.sha256(manifest).hexdigest()[:8]}"

    def __repr__(self):
        return f"latents:{self.directory} ({len(self)} latents)"


def open_latents(reference: str | os.PathLike, verify: bool = False) -> Latents:
    """Opens a cache: DIR or latents:DIR.

    Every record's checksum is compared when it is read. verify: compares those of whole shards now, at the speed of
    reading all of them.

    Raises:
      ValueError: there is no complete cache of this version, or a shard is missing, truncated or damaged; names it.
    """
    directory = pathlib.Path(str(reference).removeprefix("latents:")).expanduser()
    manifest = latent_cache.read_json(directory / latent_cache.MANIFEST)
    if manifest is None:
        begun = (directory / latent_cache.PLAN).exists()
        raise ValueError(f"{directory} {'is an unfinished cache' if begun else 'holds no cache of latents'}: it has no "
                         f"{latent_cache.MANIFEST}, which python -m eqvae_jax.encode writes last"
                         f"{'; give its command again' if begun else ''}")
    found = manifest.get("format"), manifest.get("version")
    if found != (latent_cache.FORMAT, latent_cache.VERSION):
        raise ValueError(f"{directory / latent_cache.MANIFEST} is of format {found[0]!r}, version {found[1]!r}; this "
                         f"program reads {latent_cache.FORMAT!r}, version {latent_cache.VERSION}: encode again")
    for entry in manifest["shards"]:
        path = directory / entry["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing; give the command of python -m eqvae_jax.encode again")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{path} has {size} bytes instead of {entry['bytes']}: {_REPAIR}")
    if verify:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            sums = pool.map(latent_cache.sha256, [directory / entry["file"] for entry in manifest["shards"]])
            for entry, found in zip(manifest["shards"], sums, strict=True):
                if found != entry["sha256"]:
                    raise ValueError(f"{directory / entry['file']} is damaged, its SHA-256 is {found} instead of "
                                     f"{entry['sha256']}: {_REPAIR}")
    return Latents(directory, manifest)


class _Whole(NamedTuple):
    """A shard of which all records are read: spares Array Record opening each file to count them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def as_batch(latent, label, image, mirrored):
    """latent: (B,2,h,w,C), means and standard deviations, or (B,h,w) tokens. image: as it was kept, or None."""
    batch = {"tokens": latent} if latent.dtype == np.int32 else {"mean": latent[:, 0], "std": latent[:, 1]}
    if image is not None:
        batch["image"] = np.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
    return batch | {"label": label}
