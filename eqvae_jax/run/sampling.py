"""Images from a generator: the sampler and the decoder as one program, spread over the devices."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from eqvae_jax.evaluation.reconstruction import functions
from eqvae_jax.generators.draws import example_keys
from eqvae_jax.generators.networks import sees_tokens
from eqvae_jax.generators.process import make_images
from eqvae_jax.training.metrics import to_host
from eqvae_jax.training.sharding import AXES, replicate, scatter


class NotFinite(ValueError):
    """A generator's latents hold NaN or infinity."""


class Sampler:
    """Makes image number n of a set, for any n, from (seed, n) alone: neither batch nor devices matter.

    But for dopri5, which takes steps that suit a whole batch.
    """

    def __init__(self, model, process, settings, space, autoencoder, mesh, batch, seed=0):
        """autoencoder: (model, params, spec) that decodes; batch: images at a time, rounded up to the devices.

        Raises ValueError, naming both, if the autoencoder is not the one whose latents were learnt.
        """
        decoder, params, spec = autoencoder
        if spec.hash != space.hash:
            raise ValueError(f"the generator learnt latents of {space.reference} (hash {space.hash}), and "
                             f"{spec.reference} is another autoencoder (hash {spec.hash}): its pictures would be "
                             "wrong.")
        if batch < 1:
            raise ValueError(f"a batch of {batch} images must be at least 1.")
        if sees_tokens(model) and getattr(decoder, "codebook_size", None) != model.codes:
            raise ValueError(f"the generator makes tokens of {model.codes:,} codes, and {spec.reference} has "
                             f"{getattr(decoder, 'codebook_size', 'no')}.")
        self.model, self.mesh, self.batch = model, mesh, -(-batch // mesh.size) * mesh.size
        self._key = jax.random.key(seed)
        self._decoder = replicate(mesh, params)
        if sees_tokens(model):
            decode = lambda params, ids: decoder.apply({"params": params}, ids, method="decode_indices")
        else:
            decode = lambda params, z: functions(decoder)[1](params, space.to_autoencoder(z))
        make = make_images(model, process, settings, decode)

        @jax.jit
        def images(params, decoder, key, number, label):
            return make(params, decoder, example_keys(jax.random.fold_in(key, 0), number), label)

        @jax.jit
        def uniform(key, number):
            draw = lambda k: jax.random.randint(k, (), 0, model.classes)
            return jax.vmap(draw)(example_keys(jax.random.fold_in(key, 1), number))

        self._images, self._uniform = images, uniform

    def place(self, params):
        """The generator's parameters on every device."""
        return replicate(self.mesh, params)

    def labels(self, policy, numbers):
        """int32 (N,): "uniform", drawn as DiT's released command does; "balanced", 0, 1, .. in turn; or one class."""
        numbers = np.asarray(numbers, np.int32)
        if policy == "uniform":
            return np.asarray(self._uniform(self._key, numbers), np.int32)
        if policy == "balanced":
            return numbers % self.model.classes
        return np.full(len(numbers), int(policy), np.int32)

    def images(self, params, numbers, labels):
        """uint8 (N,H,W,3) of the images with these numbers (N,) and labels (N,); params: the generator's.

        Raises NotFinite, which names them, where images would be of NaN: as pixels they look like any other.
        """
        numbers, labels = np.asarray(numbers, np.int32), np.asarray(labels, np.int32)
        parts = []
        for start in range(0, len(numbers), self.batch):
            rows = slice(start, start + self.batch)
            parts.append(self._batch(params, numbers[rows], labels[rows]))
        return np.concatenate(parts)

    def _batch(self, params, numbers, labels):
        made = self._images(params, self._decoder, self._key, self._spread(numbers), self._spread(labels))
        images, finite = (to_host(part)[: len(numbers)] for part in made)
        if not finite.all():
            raise NotFinite(f"images {', '.join(map(str, numbers[~finite][:5]))} (in all {(~finite).sum()}) came out "
                            "as NaN or infinity: the generator's weights are broken, or its sampler failed (dopri5: "
                            "larger tolerances; bfloat16: float32).")
        return images

    def _spread(self, values):
        """A batch over the devices, which on a pod are not in the order of their hosts: each takes its rows of it."""
        padded = np.pad(values, (0, self.batch - len(values)))  # so that one program is compiled
        return scatter(padded, NamedSharding(self.mesh, PartitionSpec(AXES)))

    def check(self, params):
        """Traces all that a set needs, so that what does not fit raises ValueError now; params may be shapes."""
        number = jax.ShapeDtypeStruct((self.batch,), np.int32)
        jax.eval_shape(self._images, params, self._decoder, self._key, number, number)
