import pytest
import toy_autoencoder as toys

from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.evaluation import comparison


def test_names_may_stand_before_a_reference_that_has_an_equals_sign():
    assert comparison.named(["EQ=workdir:/a=b", "ldm:/c=d.ckpt", "runs/lr=1", "new=runs/lr=2"]) == {
        "EQ": "workdir:/a=b",
        "ldm:/c=d.ckpt": "ldm:/c=d.ckpt",
        "runs/lr=1": "runs/lr=1",
        "new": "runs/lr=2",
    }


@pytest.mark.parametrize("texts, says", [
    (["a=runs/1", "b=runs/1", "a=runs/2"], "'a', runs/1 and runs/2: give each its own name, as NAME=runs/2"),
    (["init:sd", "init:sd"], "'init:sd', init:sd and init:sd: give each"),
])  # fmt: skip
def test_a_name_is_given_once(texts, says):
    with pytest.raises(ValueError, match=f"two columns are called {says}"):
        comparison.named(texts)


def test_what_has_a_codebook_says_how_large_it_is():
    describe = lambda model, kind: comparison._describe(model, {}, toys.Spec("init:x", kind=kind))
    vq, kl = describe(PRESETS["vqgan"].model, "vq"), describe(PRESETS["sd"].model, "kl")
    assert vq["kind"] == "vq" and vq["codebook_size"] == 1024 and vq["downsampling"] == 16
    assert kl["kind"] == "kl" and "codebook_size" not in kl
