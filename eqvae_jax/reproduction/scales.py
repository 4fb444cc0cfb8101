"""At which size an experiment is made. What of it is in the configs stands there, as the variant of its name."""

from typing import NamedTuple

KINDS = ("sdvae", "sdxlvae", "sd3vae", "sdvae16", "vqgan")  # of autoencoders, as configs/eq_KIND.py


class Scale(NamedTuple):
    """How much of everything; None is all of a set.

    variant: of the autoencoders' configs, "" for the paper's. generators: name -> config; "dit on sdvae16" goes before
    "dit", and "dit long" is one that is trained for `steps["dit long"]`. images: where train, test and tuning images
    come from unless told; tuning is what autoencoders are fine-tuned on. image_size. sides: kind -> side of its
    latents, at which turning is all that tau does. shift: in pixels, of tau with shifts. start: kind -> published
    weights, or {}: then `base` steps of plain training from random weights are the start. tune: steps of each arm, 0
    for the config's. devices: that batch sizes are given for. baseline: the arm that EQ is compared with; "before" is
    the start itself. classifier: config of the network of Fréchet distances, "" for Inception, None for no such
    distances. reference: real images of gFID, "" for the test images. latents, samples: how many are encoded and drawn.
    reconstructed, moved, encoded: images for rFID, for R and S, and for the intrinsic dimension. crops: of each of
    these images, random but always the same, with sides from `min_crop` of the short side on; 1 is the centre's. batch,
    sample_batch: images at a time. guidance: of the table with guidance, by generator.
    """

    variant: str
    generators: dict[str, str]
    images: dict[str, str]
    image_size: int
    sides: dict[str, int]
    batch: int
    samples: int = 0
    sample_batch: int = 0
    shift: int = 4
    steps: dict[str, int] = {}
    base: int = 0
    tune: int = 0
    devices: int = 1
    start: dict[str, str] = {}
    baseline: str = "control"
    classifier: str | None = ""
    reference: str = ""
    latents: int | None = None
    reconstructed: int | None = None
    moved: int | None = None
    encoded: int | None = None
    crops: int = 1
    min_crop: float = 0.5
    guidance: dict[str, tuple[str, ...]] = {}

    @property
    def distances(self):
        """Whether there are Fréchet distances."""
        return self.classifier is not None

    @property
    def kinds(self):
        """The kinds of autoencoders: all with published weights, else one of each sort of latent."""
        return KINDS if self.start else ("sdvae", "vqgan")


def split(reference):
    """Images of a reference without its split: idx:DIR, tfds:NAME or photos."""
    return {"train": f"{reference}:train", "test": f"{reference}:test", "tuning": f"{reference}:train"}


def _generators(variant):
    return {name: f"configs/{name}.py:{variant}" for name in ("dit", "sit", "repa", "maskgit")}


GUIDED = {"dit": ("--guidance=1.5",), "repa": ("--guidance=1.8", "--guidance_times", "0", "0.7")}
FASHION = dict(images=split("tfds:fashion_mnist"), image_size=32, sides={"sdvae": 8, "vqgan": 8}, guidance=GUIDED)
SCALES = {
    # Seconds a stage, to no purpose but to show that everything fits together.
    "smoke": Scale(
        "trial", _generators("smoke"), split("photos"), image_size=32, sides={"sdvae": 16, "vqgan": 16}, base=2, tune=2,
        latents=12, samples=12, batch=2, sample_batch=6, reconstructed=6, moved=2, encoded=8,
        classifier="configs/fashion_classifier.py:smoke", guidance=GUIDED),
    # For two CPU cores.
    "tiny": Scale(
        "tiny", _generators("tiny"), **FASHION, base=1200, tune=800, latents=10_000, samples=5000, batch=50,
        sample_batch=250, reconstructed=5000, moved=500, encoded=2000,
        classifier="configs/fashion_classifier.py:tiny"),
    # For a GPU, of the same images; not yet run.
    "small": Scale(
        "small", _generators("small"), **FASHION, base=8000, tune=3000, samples=10_000, batch=200, sample_batch=1000,
        moved=2000, encoded=5000, classifier="configs/fashion_classifier.py:tiny"),
    # Autoencoders only, on crops of a dozen photographs: too few for generators and for Fréchet distances.
    "photos": Scale(
        "photos", {}, split("photos"), image_size=48, sides={"sdvae": 12, "vqgan": 12}, base=1000, tune=600, batch=50,
        classifier=None, crops=100, min_crop=0.3),
    # The paper's. Names in capitals are for the reader to fill in.
    "paper": Scale(
        "",
        {"dit": "configs/dit.py:B_2", "sit": "configs/sit.py:B_2", "repa": "configs/repa.py:XL_2",
         "maskgit": "configs/maskgit.py:base", "dit on sdvae16": "configs/dit.py:B_1", "dit xl": "configs/dit.py:XL_2",
         "sit xl": "configs/sit.py:XL_2", "dit long": "configs/dit.py:XL_2", "repa long": "configs/repa.py:XL_2"},
        {"train": "folder:IMAGENET/train", "test": "folder:IMAGENET/val", "tuning": "folder:OPENIMAGES"},
        image_size=256, sides={"sdvae": 32, "sdxlvae": 32, "sd3vae": 32, "sdvae16": 16, "vqgan": 16}, shift=32,
        samples=50_000, batch=32, sample_batch=256,
        steps={"dit long": 7_000_000, "repa long": 4_000_000}, devices=8,
        start={"sdvae": "ldm:kl-f8/model.ckpt", "sdvae16": "ldm:kl-f16/model.ckpt",
               "sdxlvae": "diffusers:stabilityai/sdxl-vae",
               "sd3vae": "diffusers:stabilityai/stable-diffusion-3-medium-diffusers/vae",
               "vqgan": "taming:vqgan_imagenet_f16_1024/last.ckpt"},
        baseline="before", reference="VIRTUAL_imagenet256_labeled.npz", encoded=10_000, guidance=GUIDED),
}
