"""Features of whole sets of images: which network makes them, and one pass over a set, cached by content.

A cached shard is found by the bytes of its images and the network, so a set that was measured once is not computed
again under any name, and an evaluation that was interrupted goes on where it stopped.
"""

import hashlib
import logging
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from eqvae_jax import distributed, weights
from eqvae_jax.atomic import whole
from eqvae_jax.autoencoders.objective import to_float
from eqvae_jax.evaluation import gaussians
from eqvae_jax.evaluation.samples import checked_images
from eqvae_jax.features.classifier import Classifier
from eqvae_jax.features.inception import PROTOCOLS, inception_features
from eqvae_jax.training.metrics import fetch
from eqvae_jax.training.sharding import devices_for, replicate, scatter
from eqvae_jax.weights.autoencoders import parameter_hash
from eqvae_jax.weights.errors import WeightsError
from eqvae_jax.weights.tables import check_parameters

logger = logging.getLogger(__name__)
INCEPTION = "inception"
SHARD, SHARD_BYTES = 1000, 2**28  # images, and bytes of them, that are computed and cached together
ENOUGH = 50_000  # samples of an FID that can be compared with published ones
_FORMAT = "1"  # of a cached shard; part of its name


class Extractor(NamedTuple):
    """A frozen network that turns images into features.

    name: "inception", or a classifier's own. hash: of its parameters. protocol: how images reach it.
    extract: uint8 (B, H, W, 3), NumPy or JAX -> {"pool": (B, D), ["spatial": (B, 2023),] "logits": (B, K)}, float32;
      spread over all devices where they divide B; several processes all call it, with the same images.
    """

    name: str
    hash: str
    protocol: str
    extract: Callable


def inception_extractor(reference, protocol="adm"):
    """Extractor of FID's Inception; reference: as `weights.load_inception`; protocol: as `inception_features`.

    Raises ValueError for another protocol, WeightsError as `load_inception`.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"no protocol of Inception's input is called {protocol!r}; there are {', '.join(PROTOCOLS)}.")
    params, spec = weights.load_inception(reference)
    compute = lambda params, images: inception_features(params, images, protocol)._asdict()
    return Extractor(INCEPTION, spec.hash, protocol, _spread(compute, params))


def load_classifier(workdir):
    """(model, params, name) of a run of configs/fashion_classifier.py; what enters is uint8 / 127.5 - 1.

    Raises WeightsError where the directory holds no such run.
    """
    from eqvae_jax.training.checkpoint import load_averaged  # needs Orbax, which is slow to import

    try:
        saved, config, _ = load_averaged(workdir)
        if config.get("task") != "classifier" or "classifier" not in saved:
            raise WeightsError("its run trained no classifier (configs/fashion_classifier.py does)")
        if config["name"] == INCEPTION or not config["name"]:
            raise WeightsError(f"a classifier cannot be called {config['name']!r}: its metrics would pass for others'")
        model, params = Classifier(**config["model"]), saved["classifier"]
        image = jax.ShapeDtypeStruct((1, 28, 28, 3), np.float32)
        check_parameters("its parameters", params, jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    except (ValueError, FileNotFoundError) as error:
        raise WeightsError(f"workdir:{workdir}: {error}") from error
    return model, params, config["name"]


def classifier_extractor(workdir):
    """Extractor of a run of configs/fashion_classifier.py, at the images' own size; errors as of `load_classifier`."""
    model, params, name = load_classifier(workdir)

    @jax.jit
    def compute(params, images):
        found = model.apply({"params": params}, to_float(images))
        return {"pool": found.features, "logits": found.logits}

    return Extractor(name, parameter_hash(params), "x / 127.5 - 1", _spread(compute, params))


def _spread(compute, params):
    """`compute(params, images)` as a function of images, which are spread over all devices."""
    placed = {}

    def extract(images):
        devices = devices_for(len(images))
        mesh = Mesh(np.array(devices), ("data",))
        if len(devices) not in placed:
            placed[len(devices)] = replicate(mesh, params)
        with jax.default_matmul_precision("highest"):  # the accelerators' default is TF32 or bf16
            rows = NamedSharding(mesh, PartitionSpec("data"))
            images = jax.device_put(images, rows) if isinstance(images, jax.Array) else scatter(images, rows)
            return compute(placed[len(devices)], images)

    return extract


def open_extractor(features, inception="", protocol="adm"):
    """The Extractor that a command line names: features "inception", with its weights' reference, or "workdir:DIR"."""
    if features == INCEPTION:
        return inception_extractor(inception, protocol)
    kind, _, rest = features.partition(":")
    if kind != "workdir" or not rest:
        raise ValueError(f"features={features!r} is neither inception nor workdir:DIR of a trained classifier.")
    return classifier_extractor(rest)


def label(metric, extractor):
    """A metric's name with the network it was taken with: "FID" of Inception, else "FID(fashion-cnn)"."""
    return metric if extractor.name == INCEPTION else f"{metric}({extractor.name})"


def too_few(metric, count):
    """The sentence that warns of a Fréchet distance of `count` samples; None if they are enough."""
    if count >= ENOUGH:
        return None
    return (f"{metric} of {count:,} images is higher than that of the usual {ENOUGH:,} would be: compare it only with "
            "values of as many.")


class FeatureSet(NamedTuple):
    """gaussian of pool, spatial's or None; pool (N, D) and logits (N, K), mapped from disk; N; (H, W); content's hash.

    hash does not depend on the network; cached: how many of the images were not computed anew.
    """

    gaussian: gaussians.Gaussian
    spatial: gaussians.Gaussian | None
    pool: np.ndarray
    logits: np.ndarray
    count: int
    image_size: tuple[int, int]
    hash: str
    cached: int


def collect(extractor, batches, count=None, *, batch_size=50, cache=None, progress=True, name="images"):
    """FeatureSet of a set of images, in one pass and in flat memory.

    Args:
      batches: iterable of uint8 (B, H, W, 3), B as it comes.
      count: how many are expected, for the progress bar.
      batch_size: images that go through the network at once; the last are padded, so one program is compiled.
      cache: directory for shards of features, about 20 kB an image of Inception; None for none.

    Raises:
      ValueError: images of another type, shape or size than the first, in [0, 1] though 8-bit, fewer than two; features
        that are not finite.
    """
    devices = len(jax.devices())
    batch_size = -(-batch_size // devices) * devices
    pool, spatial, content = gaussians.Statistics(), gaussians.Statistics(), hashlib.sha256()
    directory = pathlib.Path(cache).expanduser() if cache else None
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    spools, total, cached, size = {"pool": _Spool(directory), "logits": _Spool(directory)}, 0, 0, None
    with tqdm(total=count, desc=name, unit="image", leave=False, disable=None if progress else True) as bar:
        for images in _shards(batches):
            if total == 0 and images.max() <= 1:
                raise ValueError("no pixel is above 1 of 255: images in [0, 1] were made uint8 without multiplying.")
            digest, size = _digest(images), images.shape[1:3]
            content.update(digest.digest())
            features, found = _cached(directory, extractor, digest, images, batch_size)
            pool.update(features["pool"])
            if "spatial" in features:
                spatial.update(features["spatial"])
            for kind, spool in spools.items():
                spool.add(features[kind])
            total, cached = total + len(images), cached + found * len(images)
            bar.update(len(images))
    if total < 2:
        raise ValueError(f"{name}: {total} images; a distribution needs at least 2.")
    arrays = {kind: spool.map() for kind, spool in spools.items()}
    return FeatureSet(pool.finalize(), spatial.finalize() if spatial.n else None, **arrays, count=total,
                      image_size=size, hash=content.hexdigest()[:16], cached=cached)


def _shards(batches):
    """Yields uint8 (<= SHARD, H, W, 3) in one reused array; how many to a shard depends on the images' size alone."""
    shard, filled = None, 0
    for batch in batches:
        batch = checked_images(batch, None if shard is None else shard.shape[1:3])
        if shard is None:
            rows = max(1, min(SHARD, SHARD_BYTES // batch[:1].nbytes)) if len(batch) else 0
            shard = np.empty((rows, *batch.shape[1:]), np.uint8) if rows else None
        while len(batch):
            part = batch[: len(shard) - filled]
            shard[filled : filled + len(part)] = part
            filled, batch = filled + len(part), batch[len(part) :]
            if filled == len(shard):
                yield shard
                filled = 0
    if filled:
        yield shard[:filled]


def _digest(images):
    digest = hashlib.sha256(f"{images.shape}".encode())
    digest.update(images.data)
    return digest


def _cached(directory, extractor, digest, images, batch_size):
    """(features of one shard, whether they come from the cache)."""
    if directory is None:
        return _compute(extractor, images, batch_size), False
    made = [_FORMAT, extractor.name, extractor.hash, extractor.protocol, digest.hexdigest()]
    key = hashlib.sha256("\n".join(made).encode()).hexdigest()
    path = directory / key[:2] / f"{key}.npz"
    features = _stored(path, len(images))
    if not all(distributed.gather("features are kept", features is not None)):  # each may have a disk of its own
        features = _compute(extractor, images, batch_size)
        with whole(path) as partial, partial.open("wb") as file:
            np.savez(file, **features)
        return features, False
    return features, True


def _stored(path, count):
    """Features of a cached shard of so many images, None where there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:  # whose checksums are verified
            features = {kind: file[kind] for kind in file}
        _check(features, count)
        return features
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, OSError) as error:
        logger.warning("cached features %s are damaged (%s) and are computed anew", path, error)
        return None


def _compute(extractor, images, batch_size):
    """Features of (N, H, W, 3) images as NumPy float32, in batches of one size."""
    pending = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        if len(batch) < batch_size:
            batch = np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
        pending.append(extractor.extract(batch))
    pending = fetch(pending)  # not one by one, so that the device never waits for the host
    features = {kind: np.concatenate([part[kind] for part in pending])[: len(images)] for kind in pending[0]}
    _check(features, len(images))
    return features


def _check(features, count):
    for kind in {"pool", "logits", *features}:
        gaussians.checked(features[kind], kind, 0, "")
        if len(features[kind]) != count:
            raise ValueError(f"{kind} has {len(features[kind])} rows for {count} images")


class _Spool:
    """Rows of features on their way to a file without a name, which is gone with the last array that maps it."""

    def __init__(self, directory):
        # Beside the cache where there is one: a system's directory for temporary files is often memory.
        self._file, self._rows, self._columns = tempfile.TemporaryFile(dir=directory), 0, 0

    def add(self, rows):
        rows = np.ascontiguousarray(rows, np.float32)
        self._file.write(rows.data)
        self._rows, self._columns = self._rows + len(rows), rows.shape[1]

    def map(self):
        self._file.flush()
        return np.memmap(self._file, np.float32, "r", shape=(self._rows, self._columns))
