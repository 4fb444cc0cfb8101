"""Masked tokens: how MaskGIT learns from an image's tokens, and how it makes them, the most confident first.

Two published recipes for each, of which the first is the reproduction's, that the EQ-VAE paper trains:

                reproduction (PyTorch, v1)                           original (JAX)
    training    Masking()                                            Masking(schedule="cosine", masked_only=True)
    decoding    Decoding(): 256 pixels, 8 steps                      Decoding(steps=8, schedule="cosine", guidance=0.0)
                Decoding(15, guidance=2.8, choice_temperature=7.0):
                512 pixels

The original's training loop was never released; its masks here are drawn as the reproduction draws them.
Source: Chang et al., "MaskGIT" (arXiv 2202.04200), google-research/maskgit, libml/parallel_decode.py; Besnier & Chen
(arXiv 2310.14400), v1.0 of valeoai/Halton-MaskGIT.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqvae_jax.generators.guidance import paired

# Share of the tokens to mask for a uniform r, in training.
RATIOS = {
    "arccos": lambda r: jnp.arccos(r) / (jnp.pi / 2), "cosine": lambda r: jnp.cos(r * jnp.pi / 2),
    "linear": lambda r: r, "square": lambda r: r**2,
}
# How many tokens a step fixes, in proportion, for r from 1 to 0.
INCREMENTS = {
    "arccos": lambda r: np.arccos(r) / (np.pi / 2), "linear": lambda r: 1 - r, "square": lambda r: 1 - r**2,
    "root": lambda r: 1 - np.sqrt(r),
}
SCHEDULES = (*INCREMENTS, "cosine")


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are masked in training, and the loss.

    codes: how many there are; `codes` itself is the mask. schedule: of RATIOS, from a uniform draw to the probability
    with which each token is masked. label_smoothing: the share of a target that is spread evenly over all logits.
    masked_only: the loss is that of masked tokens; otherwise of all.
    Raises ValueError, naming the field, for what cannot be.
    """

    codes: int = 1024
    schedule: str = "arccos"
    label_smoothing: float = 0.1
    masked_only: bool = False

    def __post_init__(self):
        _whole("Masking", "codes", self.codes, 1)
        _choose("Masking", "schedule", self.schedule, tuple(RATIOS))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"Masking: label_smoothing is {self.label_smoothing}; it is a share, 0 or more and below "
                             "1.")

    def corrupt(self, keys, ids):
        """(ids with masks, which are masked), both shaped as ids: int (B, N) or (B, h, w), 0..codes - 1.

        keys: (B,); an example's masks depend on its own alone.
        """
        def masks(key):
            ratio_key, token_key = jax.random.split(key)
            ratio = RATIOS[self.schedule](jax.random.uniform(ratio_key))
            return jax.random.uniform(token_key, ids.shape[1:]) < ratio

        masked = jax.vmap(masks)(keys)
        return jnp.where(masked, self.codes, ids), masked

    def measure(self, logits, ids, masked):
        """{"loss", "accuracy_masked", "masked"}, (B,) float32 each, of logits (B, N, K).

        loss: cross-entropy with label smoothing, in nats a token. accuracy_masked: share of the masked tokens whose
        code has the largest logit. masked: share of the tokens that are.
        """
        ids, masked = ids.reshape(logits.shape[:2]), masked.reshape(logits.shape[:2]).astype(jnp.float32)
        logits = logits.astype(jnp.float32)
        target = jnp.take_along_axis(logits, ids[..., None], -1)[..., 0]                         # (B, N)
        smooth = (1 - self.label_smoothing) * target + self.label_smoothing * logits.mean(-1)
        loss = jax.nn.logsumexp(logits, -1) - smooth                                             # (B, N)
        # Of few tokens, none may be masked: such an example counts nothing, where 0 / 0 would spoil the batch.
        over_masked = lambda values: (values * masked).sum(-1) / jnp.maximum(masked.sum(-1), 1)
        return {"loss": over_masked(loss) if self.masked_only else loss.mean(-1),
                "accuracy_masked": over_masked((logits.argmax(-1) == ids).astype(jnp.float32)),
                "masked": masked.mean(-1)}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are made; the numbers are the reproduction's for images of 256 pixels.

    steps: of decoding; each calls the network once, on two copies where it guides. schedule: "arccos", "linear",
    "square" or "root", by which the tokens that a step fixes grow (the reproduction's), or "cosine", by which the
    tokens that remain shrink (the original's). guidance: w of logits (1 + w) cond - w uncond at the last step, 0 at the
    first and linear between; 0 for none. choice_temperature: of the Gumbel noise on confidences, which shrinks to none.
    inverse_temperature: what logits are multiplied by before tokens are drawn.
    Raises ValueError, naming the field, for what cannot be.
    """

    steps: int = 8
    schedule: str = "arccos"
    guidance: float = 3.0
    choice_temperature: float = 4.5
    inverse_temperature: float = 1.0

    def __post_init__(self):
        _whole("Decoding", "steps", self.steps, 1)
        _choose("Decoding", "schedule", self.schedule, SCHEDULES)
        for name in ("guidance", "choice_temperature"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"Decoding: {name} is {getattr(self, name)}; it must be at least 0, which is none.")
        if not 0 < self.inverse_temperature < np.inf:
            raise ValueError(f"Decoding: inverse_temperature is {self.inverse_temperature}; it must be above 0.")
        if self.guidance and self.steps == 1:
            raise ValueError("Decoding: guidance grows from 0 at the first step, so that one step has none; take more "
                             "steps, or guidance=0.0.")


class Plan(NamedTuple):
    """At each step, (S,): how many tokens it fixes, and the temperature of the noise on their confidences."""

    counts: np.ndarray
    temperatures: np.ndarray


def plan(settings, tokens) -> Plan:
    """The steps of decoding N tokens; raises ValueError where there are too many for them."""
    steps, over = settings.steps, settings.choice_temperature
    problem = ValueError(f"Decoding: steps is {steps}, of which schedule {settings.schedule!r} cannot give each at "
                         f"least one of {tokens} tokens; take fewer.")
    if steps > tokens:
        raise problem
    if settings.schedule == "cosine":
        after = np.floor(tokens * np.cos(np.pi / 2 * np.arange(1, steps + 1) / steps)).astype(int)
        counts, left = [], tokens
        for remaining in np.clip(after, 1, None)[:-1]:
            remaining = min(remaining, left - 1)
            counts.append(left - remaining)
            left = remaining
        return Plan(np.array([*counts, left]), over * (1 - np.arange(1, steps + 1) / steps))
    weights = INCREMENTS[settings.schedule](np.linspace(1, 0, steps)) if steps > 1 else np.ones(1)
    counts = np.round(tokens * weights / weights.sum()).astype(int)          # halves to the even, as torch rounds
    counts = np.maximum(counts, 1)
    counts[-1] += tokens - counts.sum()
    if counts[-1] < 1:
        raise problem
    return Plan(counts, over * (1 - np.arange(steps) / max(steps - 1, 1)))


def generate(network, labels, null, keys, tokens, codes, settings):
    """Tokens (B, N) int32, 0..codes - 1, that a network makes for labels; an example's depend on its own key alone.

    network: (ids (B, N), labels) -> logits (B, N, K). null: the label of no class, or None where there is none.
    keys: (B,). tokens: N. Raises ValueError for settings that do not fit.
    """
    tokens_to_logits = guided_logits(network, labels, null, settings)
    return decode(tokens_to_logits, gumbel_noise(keys), len(labels), tokens, codes, settings)


def guided_logits(network, labels, null, settings):
    """tokens_to_logits (ids, step) of `decode`, with guidance that grows over the steps.

    It calls the network once, on 2B examples; without guidance on B. Raises ValueError where the network has no label
    to guide away from.
    """
    if not settings.guidance:
        return lambda ids, step: network(ids, labels)
    if null is None:
        raise ValueError(f"Decoding: guidance is {settings.guidance}, but this network has no label of no class; take "
                         "guidance=0.0.")

    def both(ids, step):
        logits = network(paired(ids, ids), paired(labels, jnp.full_like(labels, null))).astype(jnp.float32)
        scale = settings.guidance * step / (settings.steps - 1)
        return (1 + scale) * logits[0::2] - scale * logits[1::2]                                 # (B, N, K)

    return both


def gumbel_noise(keys):
    """noise (step, (N, K)) of `decode`: standard Gumbel, each example's from its own of the keys (B,)."""
    def noise(step, shape):
        def draw(key):
            sample, choice = jax.random.split(jax.random.fold_in(key, step))
            return jax.random.gumbel(sample, shape), jax.random.gumbel(choice, shape[:1])

        return jax.vmap(draw)(keys)

    return noise


def decode(tokens_to_logits, noise, batch, tokens, codes, settings):
    """Tokens (B, N) int32, 0..codes - 1, all masks at first: each step draws those that are masked and fixes the most
    confident, by the logarithm of their probability with noise.

    tokens_to_logits: (ids (B, N), step) -> logits (B, N, K), K at least codes; the step is traced. noise: (step,
    (N, K)) -> Gumbel noise (B, N, K), which draws the tokens, and (B, N), on their confidences. A network with logits
    of the mask may draw it: that token is fixed as a mask, and the last code in the end, as in the reproduction.
    """
    counts, temperatures = (jnp.asarray(column) for column in plan(settings, tokens))

    def step(i, carry):
        ids, known = carry
        logits = settings.inverse_temperature * tokens_to_logits(ids, i).astype(jnp.float32)     # (B, N, K)
        if logits.shape[:2] != (batch, tokens) or logits.shape[2] < codes:
            raise ValueError(f"decode: logits {logits.shape} for {batch} images of {tokens} tokens and {codes} codes.")
        to_draw, on_confidence = noise(i, logits.shape[1:])
        drawn = jnp.argmax(logits + to_draw, -1).astype(ids.dtype)                               # (B, N)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1)[..., 0]
        confidence = jnp.where(known, -jnp.inf, log_p + temperatures[i] * on_confidence)
        rank = jnp.argsort(jnp.argsort(confidence, descending=True))                             # 0: the most confident
        new = rank < counts[i]                                                                   # none that is known
        return jnp.where(new, drawn, ids), known | new

    ids = jnp.full((batch, tokens), codes, jnp.int32)
    ids, _ = jax.lax.fori_loop(0, settings.steps, step, (ids, jnp.zeros(ids.shape, bool)))
    return jnp.minimum(ids, codes - 1)


def _choose(where, name, value, known):
    if value not in known:
        raise ValueError(f"{where}: {name} is {value!r}; it must be one of {', '.join(known)}.")


def _whole(where, name, value, least):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{where}: {name} is {value!r}; it must be a whole number, at least {least}.")
