"""Training MaskGIT on tokens, as a user does."""

import jax
import numpy as np
import pytest
from generator_configs import get_config, masked, rows_of, small

from eqvae_jax import convert, main, sample
from eqvae_jax.run.generator import build
from eqvae_jax.training.checkpoint import load_params


def test_maskgit_trains_resumes_samples_and_is_converted(tokens, tmp_path, capsys):
    changes = {"optimizer.learning_rate": 0.01, "training.accumulate": 2, "training.preview_every": 2, "ema_decay": 0.5}
    for steps, name in ((4, "run"), (2, "again"), (4, "again")):
        assert main.train(masked(tokens, **changes | {"training.steps": steps}), tmp_path / name) == 0
    jax.tree.map(np.testing.assert_array_equal, *(load_params(tmp_path / run, "ema")[0] for run in ("run", "again")))
    row = next(row for row in rows_of(tmp_path / "run") if row["split"] == "eval")
    assert 0 <= row["accuracy_masked"] <= 1 and 0 < row["masked"] < 1 and np.isfinite(row["loss"])
    assert [path.name for path in (tmp_path / "run" / "previews").iterdir()][0].startswith("samples_")

    run, made = f"--generator=workdir:{tmp_path / 'run'}", {}
    for batch in (2, 5):
        output = tmp_path / f"{batch}.npz"
        assert sample.main([run, "--count=5", f"--batch_size={batch}", "--evaluations=3", f"--output={output}"]) == 0
        made[batch] = np.load(output)["arr_0"]
    np.testing.assert_array_equal(made[2], made[5])
    assert made[5].shape == (5, 8, 8, 3) and len({image.tobytes() for image in made[5]}) > 1

    file = f"maskgit:{tmp_path / 'm.pth'}"
    assert convert.main([f"--from=workdir:{tmp_path / 'run'}", f"--to={file}"]) == 0
    assert "verified" in capsys.readouterr().out
    assert sample.main([f"--generator={file}", "--autoencoder=init:vqgan-smoke", "--count=5", "--batch_size=5",
                        "--evaluations=3", "--guidance=2", f"--output={tmp_path / 'file.npz'}"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "file.npz")["arr_0"], made[5])  # the public file has 4 as guidance


@pytest.mark.parametrize("changes, message", [
    ({"data.latents": "{caches}/one"}, r"holds posteriors of init:smoke, and this config learns tokens"),
    ({"sampling.guidance": 0.5}, "must be at least 1"), ({"sampling.sampler": "ddpm"}, "has arccos, linear"),
    ({"sampling.evaluations": 17, "training.preview_every": 2}, "of 16 tokens; take fewer"),
    ({"process.path": "linear"}, "path is for an interpolant"),
    ({"process.schedule": "cubic"}, "schedule is 'cubic'"), ({"model.heads": 3}, "3 heads"),
    ({"model.preset": "small"}, "no MaskGIT named 'small'"),
])
def test_masked_tokens_that_cannot_be_learnt_are_refused(caches, tokens, tmp_path, changes, message):
    changes = {name: value.format(caches=caches) if isinstance(value, str) else value
               for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main.train(masked(tokens, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sit_of_tokens_is_refused(tokens, caches, tmp_path):
    with pytest.raises(ValueError, match="holds tokens of init:vqgan-smoke, and this config learns posteriors"):
        main.train(small(caches, **{"data.latents": str(tokens)}), tmp_path / "run")


def test_maskgits_sizes_and_recipe_are_the_reproductions():
    class Cache:
        shape, manifest = (16, 16), {"classes": 1000, "autoencoder": {"codes": 1024}}

    config = get_config("maskgit", "base")
    from eqvae_jax.generators.process import make_process
    from eqvae_jax.run.generator import parameter_shapes

    model = build(config.model, Cache, make_process(**config.process, codes=1024))
    assert sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(model))) == 174_160_874
    assert (config.data.batch_size, config.ema_decay, config.training.steps) == (512, 0.0, 755_200)
    assert (config.optimizer.b2, config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.96, 1e-5, 1.0)
    with pytest.raises(ValueError, match="no variant 'B_2'; it has: base"):
        get_config("maskgit", "B_2")
