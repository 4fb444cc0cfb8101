"""The images of a config's `data` section, for the tasks that train on images."""

import jax

from eqvae_jax.data.images import evaluation_batches, train_batches
from eqvae_jax.data.sources import fingerprint, open_source
from eqvae_jax.training import loop


def open_images(config):
    """(the source of training images, loop.Data) of a config; reads `seed` and `data`.

    Raises ValueError where a reference names nothing or a number in `data` makes no sense.
    """
    data, devices = config.data, jax.device_count()
    source, held_out = open_source(data.train), open_source(data.evaluation)
    crops = dict(image_size=data.image_size, min_crop=data.min_crop, max_crop=data.max_crop,
                 broken_limit=data.broken_limit)
    return source, loop.Data(
        train=lambda start: train_batches(
            source, batch_size=data.batch_size, seed=config.seed, crop=data.crop, flip=data.flip, start_step=start,
            workers=data.workers, **crops),
        evaluation=lambda: evaluation_batches(
            held_out, batch_size=-(-data.evaluation_batch_size // devices) * devices,
            limit=data.evaluation_limit or None, crops=data.evaluation_crops, **crops),
        identity=lambda: {"data.train": fingerprint(source), "data.evaluation": fingerprint(held_out)})
