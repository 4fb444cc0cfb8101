"""Wires tasks to plan with: the real ones, on shapes of weights and batches in place of files and data."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from eqvae_jax.data.latents import LatentSpace
from eqvae_jax.training.sharding import AXES

LATENTS = {"masking": "16x16:1024"}  # process -> what it is planned with where --latents says nothing
POSTERIORS = "32x32x4"
FACTOR = 8  # pixels a side of a latent, of the images that REPA looks at


class Planned(NamedTuple):
    """batch: ShapeDtypeStructs of a whole batch. per_device: examples in one forward pass on one device. notes: what
    was assumed, in words.
    """

    task: Any
    batch: dict
    per_device: int
    notes: tuple


class PlannedLatents(NamedTuple):
    """As data.latents.Latents, where nothing is stored."""

    shape: tuple
    is_tokens: bool
    manifest: dict
    space: LatentSpace
    image_shape: tuple


def build(config, mesh, hold, per_device=None, latents="", classes=1000) -> Planned:
    """The task of any config on a mesh of devices that need not be there.

    hold: tree of ShapeDtypeStructs with shardings -> the same as `rehearsal.Value`s, for frozen networks. per_device:
    the batch on a device; None for the config's, spread over the mesh. latents, classes: as `parse_latents` reads them.
    Raises ValueError as `main` does.
    """
    kinds = {"autoencoder": autoencoder, "generator": generator, "classifier": classifier}
    if config.task not in kinds:
        raise ValueError(f"task is {config.task!r}; it must be one of {', '.join(kinds)}.")
    notes = spread_batch(config, mesh, per_device)
    options = dict(latents=latents, classes=classes) if config.task == "generator" else {}
    task, batch, more = kinds[config.task](config, mesh, hold, **options)
    split = NamedSharding(mesh, PartitionSpec(AXES))
    rows = config.data.batch_size
    batch = {name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)
             for name, (shape, dtype) in batch.items()}
    accumulate = config.training.get("accumulate", 1)
    return Planned(task, batch, rows // (mesh.size * accumulate), (*notes, *more))


def spread_batch(config, mesh, per_device=None):
    """Sets config.data.batch_size, over all devices, to what divides over them; returns notes on how.

    Raises ValueError for a per_device below 1.
    """
    data, accumulate = config.data, config.training.get("accumulate", 1)
    parts = mesh.size * accumulate
    if per_device is not None and per_device < 1:
        raise ValueError(f"per_device_batch is {per_device}; it must be at least 1.")
    if per_device is None and not data.batch_size:
        per_device = data.batch_per_device
    data.evaluation_batch_size = mesh.size
    if per_device is None and data.batch_size % parts == 0:
        return [f"batch {data.batch_size} of the config, {data.batch_size // parts} a device"]
    wanted, data.batch_size = data.batch_size, (per_device or 1) * parts
    if per_device is None:
        return [f"the config's batch of {wanted} does not divide over {mesh.size} devices x accumulation {accumulate}: "
                f"planned with 1 a device, a batch of {data.batch_size}"]
    return [f"batch {data.batch_size}: {per_device} a device x {mesh.size} devices x accumulation {accumulate}"]


def replicated(mesh, shapes):
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)


def autoencoder(config, mesh, hold):
    from eqvae_jax.autoencoders.presets import PRESETS, configured
    from eqvae_jax.autoencoders.task import autoencoder_task, check
    from eqvae_jax.features.lpips import LPIPS, SMALLEST
    from eqvae_jax.weights.tables import parameter_shapes

    name = config.init.removeprefix("init:") if config.init.startswith("init:") else config.preset
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}.")
    model = configured(PRESETS[name].model, config.model)
    check(config, model, mesh)
    config.loss.logvar = config.loss.logvar or 0.0
    lpips = None
    if config.loss.perceptual_weight:
        image = jax.ShapeDtypeStruct((1, SMALLEST, SMALLEST, 3), jnp.float32)
        lpips = hold(replicated(mesh, jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]))
    task = autoencoder_task(config, model, parameter_shapes(model), mesh, lpips)
    side = config.data.image_size
    return task, {"image": ((side, side, 3), jnp.uint8), "index": ((), jnp.int32)}, [
        f"the autoencoder is the preset {name}, whatever weights it would start from"]


def classifier(config, mesh, hold):
    from eqvae_jax.evaluation.classifier_task import check, classifier_task

    check(config, mesh)
    side = config.data.image_size
    return classifier_task(config, mesh), {"image": ((side, side, 3), jnp.uint8), "label": ((), jnp.int32)}, []


def generator(config, mesh, hold, latents, classes):
    from eqvae_jax.generators.task import check, generator_task
    from eqvae_jax.run.generator import check_kind, network

    stored = parse_latents(latents or LATENTS.get(config.process.kind, POSTERIORS), classes)
    check_kind(stored, config.process.kind)
    if config.alignment:
        planned_encoder = lambda *args: dinov2(*args, mesh=mesh, hold=hold)
    else:
        planned_encoder = None
    wired = network(config, stored, planned_encoder)
    check(config, wired.model, wired.process, stored.shape, classes, mesh)
    task = generator_task(config, wired.model, wired.process, wired.space, mesh, alignment=wired.alignment)
    example = {"label": ((), jnp.int32), "index": ((), jnp.int32)}
    if stored.is_tokens:
        example["tokens"] = (stored.shape, jnp.int32)
        kind = f"{stored.manifest['autoencoder']['codes']} codes"
    else:
        example |= {"mean": (stored.shape, jnp.float32), "std": (stored.shape, jnp.float32)}
        kind = "posteriors"
    notes = [f"latents of {' x '.join(map(str, stored.shape))}, {kind}, {classes} classes"]
    if config.alignment:
        example["image"] = (stored.image_shape, jnp.uint8)
        notes.append(f"aligned with DINOv2 ViT-{dinov2_size(config.alignment.encoder)}/14 on images of "
                     f"{stored.image_shape[0]} pixels")
    return task, example, notes


def parse_latents(text, classes) -> PlannedLatents:
    """Of "32x32x4", posteriors of h x w x C, or "16x16:1024", tokens of 1024 codes. Raises ValueError for others."""
    found = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+)|:(\d+))", text)
    if not found or classes < 1:
        raise ValueError(f"latents is {text!r}, with {classes} classes; it must be as 32x32x4, height, width and "
                         "channels of posteriors, or as 16x16:1024, height, width and codes of tokens, and 1 class or "
                         "more.")
    height, width, channels, codes = (int(number) if number else None for number in found.groups())
    manifest = {"classes": classes, "autoencoder": {"codes": codes},
                "statistics": {"overall_std": 1.0, "overall_mean": 0.0}}
    shape = (height, width) if codes else (height, width, channels)
    return PlannedLatents(shape, bool(codes), manifest, LatentSpace(1.0, 0.0, "", "planned"),
                          (FACTOR * height, FACTOR * width, 3))


def dinov2_size(reference):
    """Of dinov2:S, B, L or g; B, which REPA takes, of any file."""
    from eqvae_jax.features.dinov2 import SIZES

    size = reference.removeprefix("dinov2:")
    return size if size in SIZES else "B"


def dinov2(reference, grid, image_shape, dtype, mesh, hold):
    """As run.alignment.open_encoder, of shapes."""
    from eqvae_jax.features.dinov2 import parameter_shapes, preset
    from eqvae_jax.run.alignment import dinov2_encoder

    model = preset(dinov2_size(reference))
    return dinov2_encoder(model, hold(replicated(mesh, parameter_shapes(model))), grid, dtype)
