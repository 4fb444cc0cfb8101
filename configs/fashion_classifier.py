"""A small classifier of Fashion-MNIST (or of images like it), for Fréchet distances where Inception makes no sense.

    --config=configs/fashion_classifier.py --config.data.train=idx:DIR:train --config.data.evaluation=idx:DIR:test
    --config=configs/fashion_classifier.py:tiny      at 32 pixels, for python -m eqvae_jax.reproduce
    --config=configs/fashion_classifier.py:smoke     seconds, on photographs that are all of one class; for tests

DIR holds the four files of Fashion-MNIST, as the authors publish them and as Debian's package dataset-fashion-mnist
installs them. The numbers are ours: the least that reliably passes 91 % on the test set.
"""

from ml_collections import ConfigDict


def get_config(variant="fashion"):
    variants = {"fashion": fashion, "tiny": tiny, "smoke": smoke}
    if variant not in variants:
        raise ValueError(f"configs/fashion_classifier.py has no variant {variant!r}; it has: {', '.join(variants)}")
    return variants[variant]()


def fashion():
    config = ConfigDict()
    config.task = "classifier"
    config.seed = 0
    config.name = "fashion-cnn"  # how metrics name the features: FID(fashion-cnn)
    config.model = dict(classes=10, channels=32, feature_size=128)
    config.data = dict(
        train="", evaluation="",  # idx:DIR:train and idx:DIR:test, or tfds:fashion_mnist:train and :test
        image_size=28, batch_size=128,
        crop="center", min_crop=1.0, max_crop=1.0, flip=True,
        workers=0, broken_limit=0.01,
        evaluation_batch_size=500, evaluation_limit=0, evaluation_crops=1,
    )
    config.loss = dict(label_smoothing=0.1)
    config.optimizer = dict(learning_rate=2e-3, schedule="cosine", warmup_steps=50, b1=0.9, b2=0.999, eps=1e-8,
                            weight_decay=0.01, clip_norm=1.0)
    config.ema_decay = 0.0
    config.training = dict(steps=2000, log_every=100, eval_every=1000, preview_every=0, max_skipped=20, warm_up=False)
    config.checkpoint = dict(every=1000, keep=1, keep_best=0, best_metric="", best_mode="max")
    config.mesh = dict(data=-1, fsdp=1, min_shard_size=2**18, rules=())
    config.stages = dict()
    return config


def tiny():
    """At reproduce.py's 32 pixels, in a third of the steps."""
    config = fashion()
    config.data.update(image_size=32, flip=False)  # shoes all point one way
    config.training.update(steps=600, eval_every=600)
    return config


def smoke():
    config = fashion()
    config.model.update(channels=8, feature_size=8)
    config.data.update(train="photos:train", evaluation="photos:test", batch_size=4, evaluation_batch_size=3)
    config.optimizer.update(schedule="constant", warmup_steps=0)
    config.training.update(steps=2, log_every=1, eval_every=2)
    return config
