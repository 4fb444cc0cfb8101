"""A small classifier, trained in minutes, whose last hidden layer measures images where Inception makes no sense.

Fréchet distances in its features are named for it, as FID(fashion-cnn): they compare with nothing but each other.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Classified(NamedTuple):
    """features: (B, D), the last hidden layer, never negative. logits: (B, classes). map: (B, H/4, W/4, 4 channels),
    what the last convolution sees at each place, before it is averaged.
    """

    features: jax.Array
    logits: jax.Array
    map: jax.Array


class Classifier(nn.Module):
    """Convolutions and pooling, then one hidden layer: images (B, H, W, 3) in [-1, 1] -> Classified.

    classes: how many labels. channels: width of the first level, doubled at each of three. feature_size: D. The last
    level is averaged over positions, so images of any size of 4 pixels a side or more will do.
    """

    classes: int = 10
    channels: int = 32
    feature_size: int = 128

    @nn.compact
    def __call__(self, x) -> Classified:
        he = nn.initializers.he_normal()
        for level in range(3):
            for j in range(1 + (level > 0)):  # one at full resolution, where convolutions cost most
                name, width = f"conv{level}_{j}", self.channels * 2**level
                x = nn.relu(nn.Conv(width, (3, 3), kernel_init=he, name=name)(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if level < 2 else x                                     # (B,H/4,W/4,C)
        features = nn.relu(nn.Dense(self.feature_size, kernel_init=he, name="hidden")(jnp.mean(x, axis=(1, 2))))
        return Classified(features, nn.Dense(self.classes, name="out")(features), x)
