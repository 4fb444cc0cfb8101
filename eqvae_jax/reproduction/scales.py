"""At which size an experiment is made. What of it is in the configs stands there, as the variant of its name."""

from typing import NamedTuple

KINDS = ("sdvae", "sdxlvae", "sd3vae", "sdvae16", "vqgan")  # of autoencoders, as configs/eq_KIND.py


class Scale(NamedTuple):
    """How much of everything; None is all of a set."""

    # Of the autoencoders' configs, "" for the paper's.
    variant: str
    # Name -> config; "dit on sdvae16" goes before "dit", and "dit long" is one that is trained for steps["dit long"].
    generators: dict[str, str]
    # Where train, test and tuning images come from unless told; tuning is what autoencoders are fine-tuned on.
    images: dict[str, str]
    image_size: int
    # Kind -> side of its latents, at which turning is all that tau does.
    sides: dict[str, int]
    # Images at a time.
    batch: int
    # How many a generator draws, and at a time.
    samples: int = 0
    sample_batch: int = 0
    # Of options beyond the paper: pixels of tau's shifts, and the latent noise, three times the latents' width.
    shift: int = 4
    noise: float = 7.0
    # Of variants of generators, where it is not the config's.
    steps: dict[str, int] = {}
    # Kind -> published weights, or {}: then `base` steps of plain training from random weights are the start.
    start: dict[str, str] = {}
    base: int = 0
    # Steps of each arm, 0 for the config's.
    tune: int = 0
    # That batch sizes are given for.
    devices: int = 1
    # The arm that EQ is compared with; "before" is the start itself.
    baseline: str = "control"
    # Config of the network of Fréchet distances, "" for Inception, None for no such distances.
    classifier: str | None = ""
    # Real images of gFID, "" for the test images.
    reference: str = ""
    # How many are encoded for generators.
    latents: int | None = None
    # Test images for rFID, for R and S, and for the intrinsic dimension.
    reconstructed: int | None = None
    moved: int | None = None
    encoded: int | None = None
    # Of each of them, random but always the same, with sides from `min_crop` of the short side on; 1 is the centre's.
    crops: int = 1
    min_crop: float = 0.5
    # Images in the test set, for estimates of time.
    tested: int = 10_000
    # Flags of the table with guidance, by generator.
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
        shift=6, classifier=None, tested=3, crops=100, min_crop=0.3),
    # The paper's. Names in capitals are for the reader to fill in.
    "paper": Scale(
        "",
        {"dit": "configs/dit.py:B_2", "sit": "configs/sit.py:B_2", "repa": "configs/repa.py:XL_2",
         "maskgit": "configs/maskgit.py:base", "dit on sdvae16": "configs/dit.py:B_1", "dit xl": "configs/dit.py:XL_2",
         "sit xl": "configs/sit.py:XL_2", "dit long": "configs/dit.py:XL_2", "repa long": "configs/repa.py:XL_2"},
        {"train": "folder:IMAGENET/train", "test": "folder:IMAGENET/val", "tuning": "folder:OPENIMAGES"},
        image_size=256, sides={"sdvae": 32, "sdxlvae": 32, "sd3vae": 32, "sdvae16": 16, "vqgan": 16},
        samples=50_000, batch=32, sample_batch=256, shift=32, noise=16.0,
        steps={"dit long": 7_000_000, "repa long": 4_000_000}, devices=8,
        start={"sdvae": "ldm:kl-f8/model.ckpt", "sdvae16": "ldm:kl-f16/model.ckpt",
               "sdxlvae": "diffusers:stabilityai/sdxl-vae",
               "sd3vae": "diffusers:stabilityai/stable-diffusion-3-medium-diffusers/vae",
               "vqgan": "taming:vqgan_imagenet_f16_1024/last.ckpt"},
        baseline="before", reference="VIRTUAL_imagenet256_labeled.npz", encoded=10_000, guidance=GUIDED),
}
