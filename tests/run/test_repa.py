"""Training a SiT aligned with another network's features, as a user does."""

import jax
import numpy as np
import pytest
from generator_configs import aligned, rows_of

from eqvae_jax import main, sample
from eqvae_jax.training.checkpoint import load_params


def test_repa_trains_resumes_and_samples(with_images, classifier, tmp_path):
    longer = aligned(with_images, classifier, **{"training.steps": 4, "optimizer.learning_rate": 0.05})
    assert main.train(longer, tmp_path / "run") == 0
    rows = [row for row in rows_of(tmp_path / "run") if row["split"] == "train"]
    assert all(row["loss"] == pytest.approx(row["denoising"] + 0.5 * row["alignment"], rel=1e-5) for row in rows)
    longer.training.steps = 2
    assert main.train(longer, tmp_path / "again") == 0
    longer.training.steps = 4
    assert main.train(longer, tmp_path / "again") == 0
    jax.tree.map(np.testing.assert_array_equal, *(load_params(tmp_path / run, "ema")[0] for run in ("run", "again")))
    from eqvae_jax import weights

    model, params, spec = weights.load_generator(f"workdir:{tmp_path / 'run'}")
    assert spec.kind == "repa" and not model.reversed_time and "projector_out" in params
    assert sample.main([f"--generator=workdir:{tmp_path / 'run'}", "--count=2", f"--output={tmp_path / 's.npz'}"]) == 0
    started = aligned(with_images, classifier, **{"init": f"workdir:{tmp_path / 'run'}", "training.steps": 1,
                                                  "optimizer.learning_rate": 0.0})
    assert main.train(started, tmp_path / "started") == 0
    start = load_params(tmp_path / "started", "params")[0]["generator"]
    jax.tree.map(np.testing.assert_array_equal, start, load_params(tmp_path / "run", "ema")[0]["generator"])
    (tmp_path / "run").rename(tmp_path / "moved")             # what it began with is not needed to go on
    started.training.steps = 2
    assert main.train(started, tmp_path / "started") == 0


@pytest.mark.parametrize("changes, message", [
    ({"alignment.encoder": ""}, "dinov2:FILE"), ({"alignment.encoder": "clip:x"}, "must be one of"),
    ({"data.latents": "{caches}/one"}, "encode again with --keep_images"), ({"alignment.depth": 2}, "blocks 1 to 1"),
    ({"model.patch_size": 1}, "sees 4 places in images of 8 x 8, and the generator has 4 x 4 tokens"),
    ({"init": "init"}, "does not say what it is"),
    ({"data.evaluation": "{caches}/one"}, "alignment looks at those of both"),
])
def test_alignments_that_cannot_be_are_refused(caches, with_images, classifier, tmp_path, changes, message):
    changes = {name: value.format(caches=caches) if isinstance(value, str) else value
               for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main.train(aligned(with_images, classifier, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
