"""Classifier-free guidance around any network, everywhere or within an interval of time.

Source: classifier-free guidance (arXiv 2207.12598) as DiT, SiT and REPA run it; intervals (arXiv 2404.07724).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Guided:
    """A network(x, t) with guidance in it; `guided` makes it.

    Called as `network(x, t, decided_at)`, with another t (B,), it decides by that one whether to guide: Heun's second
    evaluation keeps the decision of the first, as in REPA and in the interval's own code.
    """

    both: Callable
    conditional: Callable
    active: Callable | None

    def __call__(self, x, t, decided_at=None):
        if self.active is None:
            return self.both(x, t)
        decided_at = t if decided_at is None else decided_at
        return jax.lax.cond(self.active(decided_at[0]), self.both, self.conditional, x, t)


def guided(network_of_labels, labels, null, scale, *, channels=None, interval=None):
    """Returns network(x (B,h,w,C), t (B,)) -> output with uncond + scale (cond - uncond) in the guided channels.

    It calls `network_of_labels(x, t, labels)` once, on 2B examples where it guides and on the B conditional ones where
    it does not; scale 1 never doubles. The channels that are not guided, a predicted variance among them, are the
    conditional ones.

    labels: int32 (B,). null: the label of no class. scale: a float, or a traced scalar (always doubled).
    channels: how many leading channels are guided. None: those of the latents. 3: what DiT and SiT released, whose
      fourth channel stays conditional; their scale 1 + s acts like about 1 + 0.75 s on all four.
    interval: where to guide, decided by the first example's t, so for samplers, in which t is common. None: everywhere.
      (low, high): low <= t <= high in the network's own t, as REPA has it. A function of a scalar t: `noise_levels`.
      An adaptive solver does not see the jump at an interval's ends; take Euler or Heun.
    Raises ValueError for channels or an interval that cannot be.
    """
    conditional = lambda x, t: network_of_labels(x, t, labels).astype(jnp.float32)
    if channels is not None and channels < 1:
        raise ValueError(f"guided: channels is {channels}; it must be at least 1, or None for all of the latents'.")
    if isinstance(interval, (tuple, list)):
        interval = _times(*interval)
    if isinstance(scale, (int, float)) and scale == 1:
        return conditional

    def both(x, t):
        count = x.shape[-1] if channels is None else channels
        if count > x.shape[-1]:
            raise ValueError(f"guided: channels is {count}, but the latents have {x.shape[-1]}.")
        output = network_of_labels(paired(x, x), paired(t, t), paired(labels, jnp.full_like(labels, null)))
        output = output.astype(jnp.float32)
        cond, uncond = output[0::2], output[1::2]                                        # (B,h,w,C_out) each
        mixed = uncond[..., :count] + scale * (cond[..., :count] - uncond[..., :count])
        return jnp.concatenate([mixed, cond[..., count:]], -1)

    return Guided(both, conditional, interval)


def paired(a, b):
    """(B, ...) twice -> (2B, ...), rows of a and b in turn.

    Each example's two copies lie side by side: where the batch is divided over devices, neither has to move.
    """
    return jnp.stack([a, b], 1).reshape(2 * len(a), *a.shape[1:])


def noise_levels(low, high, level):
    """An interval as the paper defines it: low < level(t) <= high, where level(t) is EDM's sigma of the scaled data.

    level: `Interpolant.noise_level`, or `gaussian_diffusion.noise_level(diffusion)`. The numbers belong to the standard
    deviation of the latents they were tuned on.
    """
    if not 0 <= low < high:
        raise ValueError(f"noise_levels({low}, {high}): the interval is (low, high] with 0 <= low < high.")
    return lambda t: (level(t) > low) & (level(t) <= high)


def _times(low, high):
    if not low <= high:
        raise ValueError(f"guided: interval is ({low}, {high}); the lower time comes first.")
    return lambda t: (t >= low) & (t <= high)
