"""convert for generators: a run into a public file and back, and what is refused."""

import jax
import numpy as np
import pytest

from eqvae_jax import convert, weights
from eqvae_jax.generators.dit import DiT
from eqvae_jax.weights.generators import GeneratorSpec, save_generator


@pytest.fixture
def published(tmp_path, rng):
    """(path of a SiT's .pt, its model, its parameters), every tensor random."""
    model = DiT(input_size=4, in_channels=4, out_channels=4, patch_size=2, width=64, depth=2, heads=1, classes=5,
                reversed_time=True)
    one = np.zeros(1, np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4, 4, 4), np.float32), one.astype(np.float32),
                            one)["params"]
    params = jax.tree.map(lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    path = tmp_path / "sit.pt"
    save_generator(f"sit:{path}", model, params, GeneratorSpec("sit", 5, "here", "aa"))
    return path, model, params


def test_a_file_is_described_and_written_in_another_form(published, tmp_path, capsys):
    path, model, params = published
    target = tmp_path / "out" / "sit.safetensors"
    assert convert.main([f"--from=sit:{path}", f"--to=sit:{target}"]) == 0
    printed = capsys.readouterr().out
    for line in ("2 blocks of 64, 1 heads, patches of 2", "latent      4 x 4 x 4", "block_1", "verified    read back"):
        assert line in printed, printed
    back, read, _ = weights.load_generator(f"sit:{target}")
    assert back == model
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize("arguments, message", [
    (["--to=diffusers:OUT"], "is a generator; write dit:FILE, sit:FILE, repa:FILE"), (["--to=sit:OUT.ckpt"], "or .pt"),
    (["--scale=2"], "--scale: autoencoders have it"), (["--to=dit:OUT.pt"], "these weights are a sit's"),
])
def test_what_generators_do_not_have_is_refused(published, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert convert.main([f"--from=sit:{published[0]}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sit.pt"]


def test_a_file_that_reads_back_otherwise_is_reported(published, tmp_path, monkeypatch, capsys):
    real = weights.save_generator

    def damaged(reference, model, params, spec):
        real(reference, model, params | {"time_in": jax.tree.map(lambda a: 1.5 * a, params["time_in"])}, spec)

    monkeypatch.setattr(weights, "save_generator", damaged)
    assert convert.main([f"--from=sit:{published[0]}", f"--to=sit:{tmp_path / 'b.pt'}"]) == 2
    assert "its network says otherwise" in capsys.readouterr().err
