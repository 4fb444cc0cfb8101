"""The folder of a latent cache while it is written: what was asked for, finished shards, and the manifest at the end.

    encoding.json                              the plan: what every shard is made of
    latents-00000-of-00042.array_record        a shard (format: data/latent_records.py)
    latents-00000-of-00042.json                what is known of it: it is there once the shard is complete
    manifest.json                              the plan and all shards: when it is there, the cache is complete

With the manifest, encoding.json and the shards' own .json go. Nothing written depends on when or how often a process
was killed.
"""

import collections
import hashlib
import json
import os
import pathlib

import numpy as np

from eqvae_jax.atomic import whole

FORMAT, VERSION = "eqvae_jax latents", 1
MANIFEST, PLAN = "manifest.json", "encoding.json"
_FREE = ("autoencoder.reference",)  # weights may have moved: their hash says whether they are the same


def shard_name(k: int, shards: int) -> str:
    return f"latents-{k:05d}-of-{shards:05d}.array_record"


class Cache:
    """One folder, written by one or several processes; `begin` it, write missing shards, `publish`."""

    def __init__(self, directory: str | os.PathLike, plan: dict, shards: int):
        self.directory, self.plan = pathlib.Path(directory), plan
        self.names = [shard_name(k, shards) for k in range(shards)]

    def begin(self) -> bool:
        """Records the plan, or compares it with the one found; tells whether the cache is already complete.

        A complete cache that lacks a shard, or has one of another size, is opened again.

        Raises:
          ValueError: the folder holds latents made otherwise, which names every difference.
          OSError: the folder cannot be written.
        """
        if manifest := read_json(self.directory / MANIFEST):
            self._compare(manifest)
            if not any(self._wrong_size(entry) for entry in manifest["shards"]):
                self._tidy()
                return True
            for entry in manifest["shards"]:
                write_json(self._beside(entry["file"]), entry)
            write_json(self.directory / PLAN, {key: manifest[key] for key in self.plan})
            (self.directory / MANIFEST).unlink()
        elif plan := read_json(self.directory / PLAN):
            self._compare(plan)
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            if others := sorted(path.name for path in self.directory.glob("latents-*")):
                raise ValueError(f"{self.directory} holds {others[0]}, but neither {MANIFEST} nor {PLAN}: name another "
                                 "--output, or delete that folder")
            write_json(self.directory / PLAN, self.plan)
        return False

    def check(self):
        """Refuses a folder that this process does not see, or finds with another plan; after one process has begun."""
        plan = read_json(self.directory / PLAN) or read_json(self.directory / MANIFEST)
        if plan is None:
            raise ValueError(f"{self.directory} has no {PLAN}, which process 0 has written there: --output must be "
                             "a folder that all hosts share")
        self._compare(plan)

    def finished(self, k: int) -> dict | None:
        """What is known of a complete shard, whose bytes are compared with it; None for one that is to be written."""
        path = self._beside(self.names[k])
        try:
            entry = read_json(path)
        except ValueError:  # a machine that lost power can leave an empty file
            entry = None
        if entry and not self._wrong_size(entry) and sha256(self.directory / entry["file"]) == entry["sha256"]:
            return entry
        path.unlink(missing_ok=True)
        return None

    def finish(self, k: int, facts: dict) -> dict:
        """Declares a written shard complete; facts: what the manifest says of it beside its name, size and hash."""
        shard = self.directory / self.names[k]
        entry = {"file": shard.name, "bytes": shard.stat().st_size, "sha256": sha256(shard), **facts}
        write_json(self._beside(shard.name), entry)
        return entry

    def entries(self) -> list[dict]:
        """What is known of all shards, in order, once all processes have written theirs."""
        return [read_json(self._beside(name)) for name in self.names]

    def publish(self, facts: dict) -> dict:
        """Writes the manifest: the plan, facts and the shards; returns it."""
        manifest = read_json(self.directory / PLAN) | facts | {"shards": self.entries()}
        write_json(self.directory / MANIFEST, manifest)
        self._tidy()
        return manifest

    def published(self) -> dict | None:
        """The manifest, or None while there is none."""
        return read_json(self.directory / MANIFEST)

    def _tidy(self):
        """Removes what the manifest replaces, and what killed writers of small files have left."""
        beside = [self._beside(name) for name in self.names]
        for path in (*beside, self.directory / PLAN, *self.directory.glob(".*.json.*")):
            path.unlink(missing_ok=True)

    def _beside(self, name):
        return (self.directory / name).with_suffix(".json")

    def _wrong_size(self, entry):
        path = self.directory / entry["file"]
        return not path.is_file() or path.stat().st_size != entry["bytes"]

    def _compare(self, found):
        there, now = _flat({key: found.get(key) for key in self.plan}), _flat(self.plan)
        different = [f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in dict.fromkeys([*now, *there])
                     if key not in _FREE and there.get(key) != now.get(key)]
        if different:
            raise ValueError(f"{self.directory} holds latents made otherwise ({'; '.join(different)}); "
                             "name another --output, or delete that folder")


def combine(parts: list[dict]) -> dict:
    """Statistics of parts as those of the whole.

    Of posteriors {"values", "mean", "variance", "noise"}. values: how many vectors (C,). mean, variance: (C,), of the
    posteriors' means, the population's. noise: (C,), the mean of std^2. The variance of posterior samples is variance +
    noise, by the law of total variance. Of tokens {"codes"}: how often each code, as text, is there.
    """
    if "codes" in parts[0]:
        found = collections.Counter()
        for part in parts:
            found.update(part["codes"])
        return {"codes": dict(sorted(found.items(), key=lambda item: int(item[0])))}
    counts = np.array([part["values"] for part in parts], np.float64)
    means, variances, noises = (np.array([part[key] for part in parts], np.float64)              # (P,C)
                                for key in ("mean", "variance", "noise"))
    shares = counts / counts.sum()
    mean = shares @ means
    return {"values": int(counts.sum()), "mean": mean.tolist(),
            "variance": (shares @ (variances + np.square(means - mean))).tolist(), "noise": (shares @ noises).tolist()}


def statistics_of(stored: np.ndarray) -> dict:
    """Statistics, as of `combine`, of latents as they are stored: (B,2,2,h,w,C) of posteriors, (B,2,h,w) of tokens."""
    if stored.ndim == 4:
        codes, counts = np.unique(stored, return_counts=True)
        return {"codes": {str(code): int(count) for code, count in zip(codes, counts, strict=True)}}
    mean, std = (part.astype(np.float64).reshape(-1, stored.shape[-1]) for part in (stored[:, :, 0], stored[:, :, 1]))
    return {"values": len(mean), "mean": mean.mean(0).tolist(), "variance": mean.var(0).tolist(),
            "noise": np.square(std).mean(0).tolist()}


def summary(statistics: dict) -> dict:
    """What the manifest says of a set.

    Of posterior samples {"mean", "std"} per channel and {"overall_mean", "overall_std"}; of tokens {"codes_used",
    "perplexity"}, exp of the entropy of their frequencies.
    """
    if "codes" in statistics:
        share = np.array(list(statistics["codes"].values())) / sum(statistics["codes"].values())
        return {"codes_used": len(share), "perplexity": float(np.exp(-np.sum(share * np.log(share))))}
    mean, variance = np.array(statistics["mean"]), np.array(statistics["variance"]) + np.array(statistics["noise"])
    # Every channel has as many values as any other, so the whole is their equal mixture.
    return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist(), "overall_mean": float(mean.mean()),
            "overall_std": float(np.sqrt(variance.mean() + mean.var()))}


def read_json(path: pathlib.Path) -> dict | None:
    """The content of a file, None where there is none; ValueError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error})") from error


def write_json(path: pathlib.Path, value: dict):
    """Writes a file whole or not at all."""
    with whole(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a name without its content would be taken for a finished shard's


def sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flat(tree, prefix=""):
    result = {}
    for key, value in tree.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
