"""A source of noise images in memory, and what comparing batches takes."""

import jax
import numpy as np

from eqvae_jax.data.decoding import BrokenExample


class Memory:
    """n noise images whose label is their number; those in `broken` cannot be read."""

    def __init__(self, n, broken=()):
        self.n, self.broken = n, frozenset(broken)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.broken:
            raise BrokenExample(self.name(i), "spoilt")
        rng = np.random.default_rng(i)
        return {"image": rng.integers(0, 256, (12 + i % 5, 17, 3), np.uint8), "label": i}

    def name(self, i):
        return f"{i}.png"

    def __repr__(self):
        return f"Memory({self.n})"


def joined(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key], key)


def pretend(monkeypatch, index, count):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)
