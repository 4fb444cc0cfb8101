"""Wires the training of a small classifier: configs/fashion_classifier.py."""

NEEDS = """This config needs labelled images:
  --config.data.train=idx:DIR:train --config.data.evaluation=idx:DIR:test, with the four files of Fashion-MNIST in DIR
    (Debian's package dataset-fashion-mnist installs them; https://github.com/zalandoresearch/fashion-mnist),
  or tfds:fashion_mnist:train and tfds:fashion_mnist:test."""


def preflight(config):
    """Checks what can be checked without JAX; raises ValueError that says what to set."""
    if not config.data.train or not config.data.evaluation:
        raise ValueError(NEEDS)


def train(config, workdir):
    """Trains one config in `workdir`, going on where a former one stopped; returns 0 or an interruption's exit code."""
    from eqvae_jax.evaluation.classifier_task import check, classifier_task
    from eqvae_jax.run.images import open_images
    from eqvae_jax.training import loop
    from eqvae_jax.training.sharding import make_mesh

    mesh, data = make_mesh(config.mesh), config.data
    check(config, mesh)
    source, batches = open_images(config)
    print(f"{data.train}: {len(source):,} images at {data.image_size} pixels, {config.model.classes} classes. "
          f"Batch {data.batch_size} on {mesh.size} devices. Its features will be called {config.name}.")
    return loop.train(classifier_task(config, mesh), batches, config, workdir, mesh)[1]
