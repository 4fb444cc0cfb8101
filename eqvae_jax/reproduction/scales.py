"""At which size an experiment is made. What of it is in the configs stands there, as the variant of its name."""

from typing import NamedTuple


class Scale(NamedTuple):
    """How much of everything; None is all of a set.

    variant: of the autoencoders' configs, "" for the paper's. generators: name -> config. images: where train, test and
    tuning images come from unless told; tuning is what autoencoders are fine-tuned on. image_size; side: of the
    latents, whose full size leaves turning alone. start: kind of autoencoder -> published weights, or {}: then `base`
    steps of plain training from random weights are the start. tune: steps of each arm, 0 for the config's. baseline:
    the arm that EQ is compared with; "before" is the start itself. classifier: config of the network of Fréchet
    distances, or "" for Inception. reference: real images of gFID, "" for the test images. latents, samples: how many
    are encoded and drawn. reconstructed, moved, encoded: images for rFID, for R and S, and for the intrinsic dimension.
    batch, sample_batch: images at a time. guidance: of the table with guidance, by generator.
    """

    variant: str
    generators: dict[str, str]
    images: dict[str, str]
    image_size: int
    side: int
    samples: int
    batch: int
    sample_batch: int
    base: int = 0
    tune: int = 0
    start: dict[str, str] = {}
    baseline: str = "control"
    classifier: str = ""
    reference: str = ""
    latents: int | None = None
    reconstructed: int | None = None
    moved: int | None = None
    encoded: int | None = None
    guidance: dict[str, tuple[str, ...]] = {}


def split(reference):
    """Images of a reference without its split: idx:DIR, tfds:NAME or photos."""
    return {"train": f"{reference}:train", "test": f"{reference}:test", "tuning": f"{reference}:train"}


def _generators(variant):
    return {name: f"configs/{name}.py:{variant}" for name in ("dit", "sit", "repa", "maskgit")}


FASHION = "tfds:fashion_mnist"
_GUIDED = {"dit": ("--guidance=1.5",), "repa": ("--guidance=1.8", "--guidance_times", "0", "0.7")}
SCALES = {
    # Seconds a stage, to no purpose but to show that everything fits together.
    "smoke": Scale(
        "smoke",
        _generators("smoke"),
        split("photos"),
        image_size=32,
        side=16,
        base=2,
        tune=2,
        latents=12,
        samples=12,
        batch=2,
        sample_batch=6,
        reconstructed=6,
        moved=2,
        encoded=8,
        classifier="configs/fashion_classifier.py:smoke",
        guidance=_GUIDED,
    ),
    # Two CPU cores and an hour.
    "tiny": Scale(
        "tiny",
        _generators("tiny"),
        split(FASHION),
        image_size=32,
        side=8,
        base=1200,
        tune=800,
        latents=10_000,
        samples=5000,
        batch=50,
        sample_batch=250,
        reconstructed=5000,
        moved=500,
        encoded=2000,
        classifier="configs/fashion_classifier.py:tiny",
        guidance=_GUIDED,
    ),
    # A GPU and some hours, of the same images.
    "small": Scale(
        "small",
        _generators("small"),
        split(FASHION),
        image_size=32,
        side=8,
        base=8000,
        tune=3000,
        samples=10_000,
        batch=200,
        sample_batch=1000,
        moved=2000,
        encoded=5000,
        classifier="configs/fashion_classifier.py:tiny",
        guidance=_GUIDED,
    ),
    # The paper's. Names in capitals are for the reader to fill in.
    "paper": Scale(
        "",
        {
            "dit": "configs/dit.py:B_2",
            "sit": "configs/sit.py:B_2",
            "repa": "configs/repa.py:XL_2",
            "maskgit": "configs/maskgit.py:base",
            "dit on sdvae16": "configs/dit.py:B_1",
        },
        {"train": "folder:IMAGENET/train", "test": "folder:IMAGENET/val", "tuning": "folder:OPENIMAGES"},
        image_size=256,
        side=32,
        samples=50_000,
        batch=32,
        sample_batch=256,
        start={
            "sdvae": "ldm:kl-f8/model.ckpt",
            "sdvae16": "ldm:kl-f16/model.ckpt",
            "sdxlvae": "diffusers:stabilityai/sdxl-vae",
            "sd3vae": "diffusers:stabilityai/stable-diffusion-3-medium-diffusers/vae",
            "vqgan": "taming:vqgan_imagenet_f16_1024/last.ckpt",
        },
        baseline="before",
        reference="VIRTUAL_imagenet256_labeled.npz",
        encoded=10_000,
        guidance=_GUIDED,
    ),
}
