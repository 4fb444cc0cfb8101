"""What differs between public SiT's weights and ours.

It counts time from noise to data and predicts the velocity that way, so its network is given 1 - t, and its last layer
changes sign when a file is read or written; and of its 8 channels only the first half is used.
"""

import numpy as np

from eqvae_jax.generators.dit import time_rates
from eqvae_jax.weights.errors import WeightsError


def from_sit(model, params, prediction, where):
    """Ours from the public SiT's: unused channels dropped, the velocity's sign turned, and time reversed."""
    channels, out = model.in_channels, model.out_channels
    if out not in (channels, 2 * channels):
        raise WeightsError(f"{where}: a SiT of {channels} channels predicts {channels} or {2 * channels}; this one "
                           f"predicts {out}")
    sign = np.float32(-1 if prediction == "velocity" else 1)
    final = {name: sign * value.reshape(*value.shape[:-1], -1, out)[..., :channels].reshape(*value.shape[:-1], -1)
             for name, value in params["final"].items()}
    return model.clone(out_channels=channels, reversed_time=True), params | {"final": final}


def to_sit(model, params, prediction, where):
    """What `from_sit` undoes, with as many channels of zeros; and time turned round where it runs from data."""
    channels = model.in_channels
    if model.out_channels != channels:
        raise WeightsError(f"{where}: SiT predicts as many channels as it is given, {channels}; this model predicts "
                           f"{model.out_channels}")
    if not model.reversed_time:
        params = params | {"time_in": params["time_in"] | {"kernel": turned(params["time_in"]["kernel"])}}
    sign = np.float32(-1 if prediction == "velocity" else 1)
    final = {}
    for name, value in params["final"].items():
        value = np.asarray(value, np.float32).reshape(*value.shape[:-1], -1, channels)
        final[name] = np.concatenate([sign * value, np.zeros_like(value)], -1).reshape(*value.shape[:-2], -1)
    return model.clone(out_channels=2 * channels, reversed_time=True), params | {"final": final}


def turned(kernel):
    """The kernel (256, D) that makes of the cosines and sines of 1 - t what `kernel` makes of those of t.

    cos(f (1 - s)) = cos f cos fs + sin f sin fs; sin(f (1 - s)) = sin f cos fs - cos f sin fs. It is its own inverse.
    """
    rates = time_rates().astype(np.float64)[:, None]
    cosines, sines = np.split(np.asarray(kernel, np.float64), 2)
    return np.concatenate([np.cos(rates) * cosines + np.sin(rates) * sines,
                           np.sin(rates) * cosines - np.cos(rates) * sines]).astype(np.float32)
