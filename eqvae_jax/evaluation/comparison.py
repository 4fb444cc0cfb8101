"""Several autoencoders on the same images under one protocol: the numbers, and how they were made.

The result is one JSON-ready dict, written as metrics.json by the doors and read by the table and the report:

    results        name -> {metric: float or None}     as reconstruction.reconstruct, equivariance_errors and
                   latents.latent_measures
    latents        name -> what is no single number: channels' moments, spectrum (with the measure "latents")
    warnings       sentences that belong beside the numbers
    baseline       the name that changes are relative to
    autoencoders   name -> reference, hash, kind, scale, shift, downsampling factor, parameters[, codebook_size]
    images         reference, count, image_size, crop, broken images left out
    protocol       posterior, uint8 convention, interpolation, seed, the features of rFID ... and each transform's
                   true sizes
    software       versions, devices, commit, time;  command
"""

import dataclasses
import re
import sys

import jax

from eqvae_jax import distributed
from eqvae_jax.data.images import evaluation_batches
from eqvae_jax.data.sources import fingerprint, open_source
from eqvae_jax.evaluation import feature_sets, latents, metrics, provenance, reconstruction, rfid, tables, transforms
from eqvae_jax.features.lpips import SMALLEST as LPIPS_SMALLEST

MEASURES = ("reconstruction", "equivariance", "latents")
_NAMED = re.compile(r"([^=:/\\]+)=(.+)")  # NAME=REFERENCE; a reference's own "=" comes after its colon or slash


def named(texts):
    """["before=workdir:A", "workdir:B"] -> {"before": "workdir:A", "workdir:B": "workdir:B"}, in order.

    The columns of a command line: references or workdirs, each with a name of its own before it or not.

    Raises:
      ValueError: two would share a name.
    """
    result = {}
    for text in texts:
        match = _NAMED.fullmatch(text)
        name, reference = match.groups() if match else (text, text)
        if name in result:
            raise ValueError(
                f"two columns are called {name!r}, {result[name]} and {reference}: give each its own name, as "
                f"NAME={reference}."
            )
        result[name] = reference
    return result


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Every choice that changes a number. Defaults are ours; the released evaluation decodes a sample instead.

    images: a reference for data.sources.open_source; limit: how many records, None for all; crops: 1 for
    ADM's centre crop, more for that many fixed random crops of each record, of min_crop..max_crop of its short
    side.
    posterior: which latent is decoded, "mode" or "sample"; uint8: one of metrics.UINT8_CONVENTIONS.
    ssim_range, ssim_border: as metrics.ssim; the released evaluation's are None, which is also of unclipped decodes,
    and "reflect" ("valid" with torchmetrics up to 1.4.1).
    interpolation, antialias: of tau, as equivariance.apply_tau; turns, scales: the transforms of R and S.
    """

    images: str
    image_size: int = 256
    batch_size: int = 8
    limit: int | None = None
    crops: int = 1
    min_crop: float = 0.5
    max_crop: float = 1.0
    posterior: str = "mode"
    uint8: str = "round"
    ssim_range: float | None = 2.0
    ssim_border: str = "valid"
    interpolation: str = "bilinear"
    antialias: bool = False
    turns: tuple[int, ...] = transforms.PAPER_TURNS
    scales: tuple[float, ...] = transforms.PAPER_SCALES
    seed: int = 0

    def __post_init__(self):
        for name, allowed in {
            "posterior": ("mode", "sample"),
            "uint8": tuple(metrics.UINT8_CONVENTIONS),
            "ssim_border": ("valid", "reflect"),
            "interpolation": ("bilinear", "bicubic"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}.")
        if self.ssim_range is not None and not self.ssim_range > 0:
            raise ValueError(f"ssim_range={self.ssim_range!r} is no range of values: 2 is that of [-1, 1].")


def open_batches(protocol):
    """(batches, broken): a protocol's images, and a dict name -> reason that fills up as they are read.

    Raises ValueError for a reference that names nothing, an empty set, or sizes that cannot work.
    """
    broken, source = {}, open_source(protocol.images)
    distributed.agree("the images", lambda: {protocol.images: fingerprint(source)})
    batches = evaluation_batches(
        source,
        image_size=protocol.image_size,
        batch_size=protocol.batch_size,
        limit=protocol.limit,
        crops=protocol.crops,
        min_crop=protocol.min_crop,
        max_crop=protocol.max_crop,
        on_broken=broken.__setitem__,
        whole=True,
    )
    return batches, broken


def check(models, protocol, measures=MEASURES, lpips=None, extractor=None):
    """Refuses what cannot be measured, before anything is compiled; returns name -> list of transforms.

    models: dict name -> (model, params, spec), as weights.load_autoencoder returns them.

    Raises:
      ValueError: the image size does not suit an autoencoder, SSIM, LPIPS or a scale; or rFID is asked for without
        an 8-bit convention.
    """
    side = protocol.image_size
    if extractor is not None:
        rfid.check(protocol.uint8)
    for measure, smallest in {
        "SSIM": metrics.SSIM_WINDOW,
        "LPIPS": 0 if lpips is None else LPIPS_SMALLEST,
    }.items():
        if "reconstruction" in measures and side < smallest:
            raise ValueError(
                f"{measure} needs images of at least {smallest} pixels a side, image_size is {side}."
            )
    chosen = {}
    for name, (model, params, _) in models.items():
        factor = model.downsampling
        if side % factor or side < factor:
            below, above = side // factor * factor, (side // factor + 1) * factor
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"{name} downsamples by {factor} and image_size={side} is no multiple of it: take {nearest}."
            )
        encode, decode = reconstruction.functions(model)
        latent = reconstruction.latent_size(encode, decode, params, (side, side))
        if "equivariance" in measures:
            chosen[name] = transforms.choose(latent, factor, protocol.turns, protocol.scales)
            if not chosen[name]:
                raise ValueError("There is no transform to measure: give at least one turn or scale.")
    return chosen


def compare(
    models, protocol, measures=MEASURES, *, lpips=None, extractor=None, batches=None, broken=None, progress=True
):
    """Measures every model on the protocol's images; returns the dict described at the top of this file.

    Args:
      models: dict name -> (model, params, spec), in the order of the table's columns.
      measures: which of MEASURES.
      lpips: parameters of features.lpips, or None.
      extractor: evaluation.feature_sets.Extractor for rFID, plain and under each transform, or None.
      batches, broken: from `open_batches`, where the caller has opened them already.

    Raises ValueError as `check` and `open_batches`, before anything is compiled.
    """
    if batches is None:
        batches, broken = open_batches(protocol)
    chosen = check(models, protocol, measures, lpips, extractor)
    options = {
        "posterior": protocol.posterior,
        "uint8": protocol.uint8,
        "seed": protocol.seed,
        "progress": progress,
        "extractor": extractor,
        "references": {},  # statistics of tau x are the same for every model of one downsampling factor
    }
    tau = {"method": protocol.interpolation, "antialias": protocol.antialias}
    ssim = {"ssim_range": protocol.ssim_range, "ssim_border": protocol.ssim_border}
    results, details, warnings = {}, {}, []
    for name, (model, params, spec) in models.items():
        encode, decode = reconstruction.functions(model)
        results[name] = {}
        if "reconstruction" in measures:
            results[name] |= reconstruction.reconstruct(
                encode, decode, params, batches, assign=reconstruction.assignment(model), lpips=lpips, **ssim,
                **options,
            )
        if "equivariance" in measures:
            results[name] |= reconstruction.equivariance_errors(
                encode, decode, params, batches, chosen[name], **options, **tau
            )
        if "latents" in measures:
            try:
                structure = latents.latent_structure(encode, params, batches, progress=progress)
            except latents.NotFinite as error:
                if not results[name]:
                    raise
                warnings.append(f"{name}: {error}")  # its other numbers say so too
            else:
                values, details[name], problems = latents.latent_measures(structure, spec.scale, spec.shift)
                results[name] |= {"count": structure.statistics.count} | values
                warnings += [f"{name}: {problem}" for problem in problems]
    counts = {column.pop("count") for column in results.values()}  # one number: everyone saw the same images
    count = counts.pop()
    if extractor is not None and set(measures) & {"reconstruction", "equivariance"}:
        too_few = feature_sets.too_few(feature_sets.label("rFID", extractor), count)
        warnings = ([too_few] if too_few else []) + warnings
    return provenance.finite(
        {
            "results": results,
            "latents": details,
            "warnings": warnings,
            "baseline": tables.baseline(models),
            "autoencoders": {name: _describe(*loaded) for name, loaded in models.items()},
            "images": {
                "reference": protocol.images,
                "count": count,
                "image_size": protocol.image_size,
                "crop": _crop(protocol),
                "broken": dict(broken),
            },
            "protocol": dataclasses.asdict(protocol)
            | {
                "lpips": lpips is not None,
                "pixel_errors": "mean |difference| of clipped images in [-1, 1] under the uint8 convention",
                "ssim": _ssim(protocol),
                "latents": "raw (unscaled), squared per-image ratios, mean over images",
                "intrinsic_dimension": "TwoNN of flattened modes, by DADApy's defaults, duplicates left out",
                "rfid": rfid.describe(extractor) if extractor else None,
                "matmul_precision": "highest",
                "transforms": {
                    name: {tau.label: _sizes(tau) for tau in taus} for name, taus in chosen.items()
                },
            },
            "software": provenance.software(),
            "command": sys.argv,
        }
    )


def _crop(protocol):
    if protocol.crops == 1:
        return "ADM centre crop"
    share = f"{protocol.min_crop:g} to {protocol.max_crop:g} of its short side"
    return f"{protocol.crops} fixed random crops of each image, {share}"


def _ssim(protocol):
    border = {"valid": "inside windows only", "reflect": "images continued by reflection"}[protocol.ssim_border]
    values = f"data range {protocol.ssim_range:g}" if protocol.ssim_range else "unclipped, range of each pair"
    return f"Gaussian 11 x 11 window, sigma 1.5, {values}, {border}"


def _describe(model, params, spec):
    description = {
        "reference": spec.reference,
        "hash": spec.hash,
        "kind": spec.kind,
        "scale": float(spec.scale),
        "shift": float(spec.shift),
        "downsampling": model.downsampling,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    assign = reconstruction.assignment(model)
    return description | ({"codebook_size": assign[1]} if assign else {})


def _sizes(transform):
    if transform.size is None:
        return {"degrees_clockwise": 90 * transform.turns}
    return {"latent": list(transform.size), "image": list(transform.image_size), "scale": transform.scale}
