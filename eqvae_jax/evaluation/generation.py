"""Generated images against reference images in the features of one network: FID and its kin, and how they were made.

The result is one JSON-ready dict as comparison.compare's: "results" (name -> {metric: float}), "images" (the
reference), "generated", "features", "protocol", "left_out", "warnings", "software" and "command".
"""

import sys

import jax

from eqvae_jax.evaluation import distances, provenance, tables
from eqvae_jax.evaluation.choices import METRICS
from eqvae_jax.evaluation.feature_sets import INCEPTION, collect, label, too_few
from eqvae_jax.evaluation.gaussians import frechet_distance, load_statistics
from eqvae_jax.evaluation.samples import statistics_suffix, write_npz
from eqvae_jax.features.inception import PROTOCOLS

NEIGHBOURS = 3  # of precision and recall, ADM's
SCORE_RULES = {"adm": "in the set's order, 5,000 to a part", "torch-fidelity": "shuffled, 10 parts"}
REFERENCE_IMAGES = 10_000  # as many as ADM's references hold beside the statistics of all


def stored_statistics(reference, extractor):
    """Whether the reference's file holds statistics of these features; they come before those of its images.

    Raises:
      ValueError: by what the file says, they were made with other weights or another protocol.
    """
    file = reference.samples
    if file is None or f"mu{statistics_suffix(extractor.name)}" not in file.members:
        return False
    made = file.made_with
    if made is None and "mu_s" in file.members:  # only ADM's evaluator writes these
        made = {"protocol": "adm"}
    if made is None:  # pytorch-fid's, or from elsewhere
        return True
    if made.get("hash", extractor.hash) != extractor.hash:
        raise ValueError(f"{file.path}: its statistics were made with weights {made['hash']} of {extractor.name}, and "
                         f"these are {extractor.hash}: take the same weights, or make the reference anew.")
    then, now = (PROTOCOLS.get(name, name) for name in (made["protocol"], extractor.protocol))
    if then != now:
        raise ValueError(f"{file.path}: its statistics follow the protocol {made['protocol']}, and features are now "
                         f"taken with {extractor.protocol}, which moves FID by about 0.1: choose the file's protocol.")
    return True


def obstacle(metric, reference, generated, extractor, subset_size):
    """Why a metric cannot be measured, as a sentence; None if it can."""
    stored = stored_statistics(reference, extractor)
    least = {"kid": subset_size, "precision_recall": NEIGHBOURS + 1}.get(metric, 2)
    smallest, name = min((images.count, name) for name, images in generated.items())
    if smallest < least:
        return f"{metric} needs at least {least} images, and {name} has {smallest}."
    if metric == "sfid" and extractor.name != INCEPTION:
        return f"sfid needs Inception's spatial features; {extractor.name} has none."
    if metric == "sfid" and stored and "mu_s" not in reference.samples.members:
        return f"sfid needs mu_s and sigma_s, and {reference.reference} has mu and sigma only."
    if metric == "inception_score" or (stored and metric in ("fid", "sfid")):
        return None
    if not reference.count:
        return f"{metric} needs images of the reference, and {reference.reference} holds statistics only."
    if reference.count < least:
        return f"{metric} needs at least {least} images, and the reference has {reference.count}."
    return None


def plan(reference, generated, extractor, metrics=None, subset_size=1000):
    """(metrics to measure, {metric: why it is left out}); metrics=None: all that the sets allow.

    Raises ValueError for a metric that is not known, that was asked for and cannot be measured, or if none can be.
    """
    if unknown := set(metrics or ()) - set(METRICS):
        raise ValueError(f"there is no metric {', '.join(sorted(unknown))}; there are {', '.join(METRICS)}.")
    reasons = {name: obstacle(name, reference, generated, extractor, subset_size) for name in metrics or METRICS}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if left_out and (metrics or len(left_out) == len(reasons)):
        raise ValueError("\n".join(dict.fromkeys(left_out.values())))
    return [name for name in reasons if name not in left_out], left_out


def measure(*, reference, generated, extractor, metrics=None, subsets=100, subset_size=1000, seed=2020,
            batch_size=50, cache=None, progress=True):
    """Measures sets of generated images against one reference; returns the dict described at the top of this file.

    Args:
      reference: ImageSet. generated: name -> ImageSet, in the order of the table's columns.
      extractor: feature_sets.Extractor; its protocol also rules the Inception Score and precision and recall.
      metrics: which of METRICS; None for all that the sets allow.
      subsets, subset_size, seed: of KID; the defaults are torch-fidelity's.
      batch_size, cache, progress: as feature_sets.collect.

    Raises ValueError as `plan`, before anything is compiled, and as `collect`.
    """
    chosen, left_out = plan(reference, generated, extractor, metrics, subset_size)
    stored = stored_statistics(reference, extractor)
    moments = [metric for metric in ("fid", "sfid") if metric in chosen]
    without_images = {"inception_score", *(moments if stored else ())}
    options = {"batch_size": batch_size, "cache": cache, "progress": progress}
    theirs, targets = None, {}
    if set(chosen) - without_images:
        theirs = collect(extractor, reference.batches(batch_size), reference.count, name="reference", **options)
    for metric in moments:
        if stored:
            suffix = statistics_suffix(extractor.name)
            targets[metric] = load_statistics(reference.samples.path, metric == "sfid", suffix)
        else:
            targets[metric] = theirs.spatial if metric == "sfid" else theirs.gaussian
    rules = {
        "inception_score": "torch-fidelity" if extractor.protocol == "torch-fidelity" else "adm",
        "precision_recall": "adm" if (extractor.name, extractor.protocol) == (INCEPTION, "adm") else "float32",
        "kid": {"subsets": subsets, "subset_size": subset_size, "seed": seed},
    }
    results, columns, warnings = {}, {}, []
    for name, images in generated.items():
        ours = collect(extractor, images.batches(batch_size), images.count, name=name, **options)
        values = _values(chosen, theirs, ours, targets, rules)
        results[name] = {label(metric, extractor): value for metric, value in values.items()}
        columns[name] = _described(images, ours)
        warnings += _doubts(name, images, ours, theirs)
    counts = [column["count"] for column in columns.values()] + ([theirs.count] if theirs and not stored else [])
    if moments and (sentence := too_few(label("FID", extractor), min(counts))):
        warnings.append(sentence)
    return provenance.finite({
        "results": results,
        "baseline": tables.baseline(results),
        "images": _described(reference, theirs) | {"image_size": next(iter(generated.values())).image_size[0]},
        "generated": columns,
        "features": {"name": extractor.name, "hash": extractor.hash, "protocol": extractor.protocol},
        "protocol": {
            "images": "8-bit",
            "features": "float32, matmul precision highest; moments float64",
            "reference_statistics": "stored in its file" if stored else "of its images",
            "inception_score": f"{rules['inception_score']}: {SCORE_RULES[rules['inception_score']]}",
            "precision_recall": f"{rules['precision_recall']}, k={NEIGHBOURS}",
            "kid": rules["kid"],
        },
        "left_out": {label(metric, extractor): reason for metric, reason in left_out.items()},
        "warnings": warnings,
        "note": f"{extractor.name} {extractor.hash}, {extractor.protocol}; reference: {reference.reference}, "
        + ("statistics stored in the file" if stored else f"{theirs.count:,} images" if theirs else "not used")
        + "; " + ", ".join(f"{name}: {column['count']:,} images" for name, column in columns.items()),
        "software": provenance.software(),
        "command": sys.argv,
    })


def _values(chosen, theirs, ours, targets, rules):
    """{metric: float} of one generated set; targets: the reference's Gaussian for fid and for sfid."""
    values = {}
    for metric, target in targets.items():
        source = ours.spatial if metric == "sfid" else ours.gaussian
        values[metric] = frechet_distance(target.mu, target.sigma, source.mu, source.sigma)
    if "inception_score" in chosen:
        score = distances.inception_score(ours.logits, protocol=rules["inception_score"])
        values |= {"inception_score": score.mean, "inception_score_std": score.std}
    if "precision_recall" in chosen:
        options = {"k": NEIGHBOURS, "protocol": rules["precision_recall"]}
        values |= distances.precision_recall(reference=theirs.pool, generated=ours.pool, **options)._asdict()
    if "kid" in chosen:
        kid = distances.kernel_distance(reference=theirs.pool, generated=ours.pool, **rules["kid"])
        values |= {"kid": kid.mean, "kid_std": kid.std}
    return values


def _described(images, features):
    """A set for metrics.json; features: its FeatureSet, None where only stored statistics of it were used."""
    described = {"reference": images.reference, "count": images.count, "image_size": images.image_size,
                 "crop": images.preparation, "broken": dict(images.broken)}
    if features:
        described |= {"count": features.count, "hash": features.hash, "features_from_cache": features.cached}
    if images.samples and images.samples.made_with:
        described["made_with"] = images.samples.made_with
    return described


def _doubts(name, images, ours, theirs):
    """Sentences about what looks like a mistake of the command line."""
    doubts = []
    if theirs and ours.hash == theirs.hash:
        doubts.append(f"{name} holds the same images as the reference.")
    if images.samples and {"mu", "mu_s"} <= images.samples.members:
        doubts.append(f"{name} holds statistics, as references do, which are not used: are the two exchanged?")
    if images.preparation != "none":
        doubts.append(f"{name} was not measured as it is, but after: {images.preparation}.")
    return doubts


def reference_gaussian(reference, extractor, *, batch_size=50, cache=None, progress=True):
    """Gaussian of a reference ImageSet's features, from its file where that holds them.

    Raises ValueError as `measure`.
    """
    if stored_statistics(reference, extractor):
        return load_statistics(reference.samples.path, suffix=statistics_suffix(extractor.name))
    batches = reference.batches(batch_size)
    options = {"batch_size": batch_size, "cache": cache, "progress": progress, "name": "reference"}
    return collect(extractor, batches, reference.count, **options).gaussian


def write_reference(path, reference, extractor, *, batch_size=50, cache=None, progress=True):
    """Writes an .npz with the statistics of all of a reference's images and at most 10,000 of them, evenly spread.

    With Inception it is ADM's format, which ADM's evaluator takes as its reference batch; sFID's statistics are left
    out under the protocol "pytorch-fid", so that it refuses a file which would move its FID.

    Returns the FeatureSet. Raises ValueError as `collect`, or if there are no images.
    """
    if not reference.count:
        raise ValueError(f"{reference.reference} holds statistics only, and a reference is made from images.")
    options = {"batch_size": batch_size, "cache": cache, "progress": progress, "name": "reference"}
    features = collect(extractor, reference.batches(batch_size), reference.count, **options)
    every = -(-features.count // REFERENCE_IMAGES)
    made_with = {"features": extractor.name, "hash": extractor.hash, "protocol": extractor.protocol,
                 "count": features.count, "images": reference.reference, "content": features.hash}
    if jax.process_index() == 0:
        write_npz(path, reference.batches(batch_size, every), -(-features.count // every), made_with=made_with,
                  statistics=features.gaussian,
                  spatial=None if extractor.protocol == "pytorch-fid" else features.spatial)
    return features
