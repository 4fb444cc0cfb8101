"""How a command of the pages is parsed as it stands, and how it is run small, in a directory that has what it names.

Parsing is the door's own, with the config of the page: a flag, a field or a variant that is not there fails. Running is
the same command, in this process, with `:smoke` for the config's variant, the substitutions of SMALL and the flags of
MORE: names of directories, references and the other flags are those of the page.
"""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys

import numpy as np
from pages import ROOT
from PIL import Image

from eqvae_jax import convert, encode, evaluate, main, plan, report, sample, weights
from eqvae_jax.autoencoders.kl import AutoencoderKL
from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.autoencoders.vq import AutoencoderVQ
from eqvae_jax.data.cropping import resize
from eqvae_jax.data.sources import open_source
from eqvae_jax.planning import topology
from eqvae_jax.weights.initial import calm, random_parameters
from eqvae_jax.weights.tables import parameter_shapes

PARSERS = {"encode": encode._parser, "sample": sample._parser, "evaluate": evaluate._parser, "report": report._parser}
IMAGES = ["--image_size=32", "--limit=4", "--batch_size=2"]
PLAIN = ["--config.training.preview_every=0"]


def generation(words):
    """What evaluate generation takes beside its own words; folders of images have no size."""
    cut = ["--image_size=8"] if any("folder:" in word for word in words) else []
    return ["--features=workdir:runs/fashion/cnn", "--cache=features", "--batch_size=4", *cut]


# Door -> (pattern of a word, what stands in its place or "" for nothing), with the reason where it is not size.
SMALL = {
    "main": [
        (r"--config=configs/(\w+)\.py(:\w+)?", rf"--config={ROOT}/configs/\1.py:smoke"),
        (r"--config\.loss\.lpips_weights=download", "--config.loss.perceptual_weight=0"),  # a download
        (r"--config\.alignment\.encoder=dinov2:.*", "--config.alignment.encoder=workdir:runs/fashion/cnn"),  # likewise
        (r"--config\.init=taming:.*", "--config.init=init:vqgan-smoke"),  # taming: files have 32 groups, small models 4
        (r"--config\.mesh\.fsdp=\d+", ""),  # devices that are not here
    ],
    "encode": [],
    "sample": [(r"--count=\d+", "--count=4"), (r"--guidance=.*", "--guidance=2"), (r"--classes=\d+", "--classes=1")],
    "evaluate": [
        (r"--features=inception", "--features=workdir:runs/fashion/cnn"),  # downloads
        (r"--inception=download", ""), (r"--protocol=pytorch-fid", ""), (r"--lpips=download", ""),
        (r"--image_size=\d+", ""),
    ],
    "report": [],
    "convert": [],
    "plan": [
        (r"--config=configs/(\w+)\.py(:\w+)?", rf"--config={ROOT}/configs/\1.py:smoke"),
        (r"--topology=.*", "--topology=here"),  # the TPU's compiler
        (r"--per_device_batch=\d+", ""), (r"--config\.mesh\.fsdp=\d+", ""),
    ],
    "data.preparation": [(r"--size=\d+", "--size=32")],
}
MORE = {
    "main": lambda words: {
        "repa": [*PLAIN, "--config.model.patch_size=2"],  # 2 x 2 places, as the classifier sees
        "sit": [*PLAIN, "--config.model.width=64", "--config.model.heads=1"],  # as its public files take for granted
        "dit": PLAIN, "maskgit": PLAIN}.get(re.search(r"(\w+)\.py", words[0])[1], []),
    "encode": lambda words: ["--image_size=8", "--batch_size=3", "--limit=6"],
    "sample": lambda words: ["--batch_size=4"],
    "evaluate": lambda words: generation(words) if words[0] == "generation" else IMAGES,
    "report": lambda words: IMAGES if any(word.startswith("--images") for word in words) else [],
    "convert": lambda words: IMAGES if any("latent-stats" in word for word in words) else [],
    "plan": lambda words: ["--sizes=1", "--latents=4x4x4", "--classes=10"],
    "data.preparation": lambda words: ["--workers=0"],
}
# What the pages' commands take for granted, in their own words: run first, whatever page asks for it.
BEFORE = """
main --config=configs/eq_sdvae.py --workdir=runs/eq --config.init=diffusers:stabilityai/sd-vae-ft-ema \
    --config.data.train=folder:PHOTOS --config.loss.lpips_weights=download
main --config=configs/eq_sdvae.py --workdir=runs/control --config.init=diffusers:stabilityai/sd-vae-ft-ema \
    --config.data.train=folder:PHOTOS --config.loss.lpips_weights=download \
    --config.equivariance.p_equivariance=0 --config.equivariance.p_low_resolution=0
main --config=configs/eq_vqgan.py --workdir=runs/eq-vqgan \
    --config.init=taming:last.ckpt --config.data.train=folder:PHOTOS
main --config=configs/fashion_classifier.py --workdir=runs/fashion/cnn --config.data.train=idx:FASHION:train \
    --config.data.evaluation=idx:FASHION:test
encode --autoencoder=workdir:runs/eq --images=folder:TRAIN --output=runs/latents
encode --autoencoder=workdir:runs/eq --images=folder:TRAIN --output=runs/latents-images --keep_images
encode --autoencoder=workdir:runs/eq-vqgan --images=folder:TRAIN --output=runs/codes
main --config=configs/sit.py:XL_2 --config.data.latents=runs/latents --workdir=runs/sit
main --config=configs/dit.py:XL_2 --config.data.latents=runs/latents --workdir=runs/dit --config.mesh.fsdp=16 \
    --config.model.remat=True
sample --generator=workdir:runs/sit --count=50000 --output=samples.npz
data.preparation --images=folder:PHOTOS --output=shards --size=512
""".replace("\\\n", "").strip().splitlines()
COPIES = {"runs/sit": ("runs/sit-control", "runs/fashion/sit-eq")}


class World:
    """A directory in which the pages' commands are run, each once."""

    def __init__(self, root):
        self.root, self.done = root, set()
        with contextlib.chdir(root):
            _write_images()
            _write_weights()
            for line in BEFORE:
                door, *words = line.split()
                self.run(door, words)
            for original, copies in COPIES.items():
                for copy in copies:
                    shutil.copytree(original, copy)
            shutil.copy("samples.npz", "VIRTUAL_imagenet256_labeled.npz")
            generator = weights.load_generator("workdir:runs/sit")
            weights.save_generator("sit:SiT-XL-2-256x256.pt", *generator)

    def run(self, door, words):
        """Runs `python -m eqvae_jax.DOOR WORDS` in smoke form, unless it was; raises AssertionError if it fails."""
        words = small(door, words)
        if (key := (door, *words)) in self.done:
            return
        with contextlib.chdir(self.root):
            status = perform(door, words)
        assert not status, f"{door} {' '.join(words)}: {status}"
        self.done.add(key)


def small(door, words):
    """The words of a command in smoke form."""
    changed = []
    if door == "convert" and any(word.startswith("--to=ldm:") for word in words):
        # Small runs have 4 groups, and ldm: files 32.
        words = ["--from=ldm:sdxl_vae.safetensors", *(word for word in words if not word.startswith("--from="))]
    for word in words:
        for pattern, instead in SMALL[door]:
            if re.fullmatch(pattern, word):
                word = re.sub(pattern, instead, word)
        changed += [word] if word else []
    return changed + MORE[door](changed)


def parse(door, words):
    """Parses the words as the door does, as they stand, and checks what can be checked without running."""
    if door in ("main", "plan"):
        words = [re.sub(r"^--config=configs/", f"--config={ROOT}/configs/", word) for word in words]
        with flags_of(door, words) as values:
            stages = main.stages_of(values.config, ROOT)
            for _, config, _ in stages if door == "main" else []:
                main.preflight(config)
            if door == "plan" and importlib.util.find_spec("libtpu"):
                topology.check(values.topology)
    elif door == "convert":
        convert._options(words)
    elif door in PARSERS:
        PARSERS[door]().parse_args(words)
    else:
        assert door == "data.preparation"  # a script of its own, which is run


@contextlib.contextmanager
def flags_of(door, words):
    """absl's flags, set by a command line; afterwards as they were before."""
    values, before = main.FLAGS, sys.argv
    sys.argv = [door, *words]  # config_flags looks there for the config's fields
    try:
        values.unparse_flags()
        values(sys.argv)
        yield values
    finally:
        sys.argv = before
        for name in [name for name in values if name.startswith("config.")]:
            delattr(values, name)
        for name in ("config", "workdir", "topology"):
            values[name].unparse()
        values.unparse_flags()


def perform(door, words):
    """Runs a door in this process; returns what its exit code would be, or the message that it ends with."""
    if door in ("main", "plan"):
        with flags_of(door, words) as values:
            with values.config.unlocked():
                values.config.stages = {}  # one training shows what three do
            return {"main": main.main, "plan": plan.main}[door]([door])
    if door == "data.preparation":  # its flags are defined only where it is run
        command = [sys.executable, "-m", "eqvae_jax.data.preparation", *words]
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        return ended.returncode and ended.stderr
    return {"encode": encode, "sample": sample, "evaluate": evaluate, "report": report, "convert": convert}[door].main(
        words)


def _write_images():
    """Photographs in folders of two classes, and a data set in MNIST's format."""
    source, rng = open_source("photos:all"), np.random.default_rng(0)
    pictures = [resize(source[i]["image"], 40, 40) for i in range(min(8, len(source)))]
    for folder in ("PHOTOS", "TRAIN", "VAL"):
        for i, picture in enumerate(pictures):
            os.makedirs(f"{folder}/{'ab'[i % 2]}", exist_ok=True)
            Image.fromarray(picture).save(f"{folder}/{'ab'[i % 2]}/{i}.png")
    os.makedirs("FASHION")
    for split in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (8, 28, 28), np.uint8), np.arange(8, dtype=np.uint8)
        for what, x in (("images", images), ("labels", labels)):
            header = np.array([0x800 + x.ndim, *x.shape], ">u4").tobytes()
            with open(f"FASHION/{split}-{what}-idx{x.ndim}-ubyte", "wb") as file:
                file.write(header + x.tobytes())


def _write_weights():
    """Random autoencoders under the names of published ones: the small presets', whose programs other tests compile.

    Files of latent-diffusion and taming-transformers do not say how many groups there are: they hold models with 32.
    """
    size = dict(channels=32, multipliers=(1, 2), blocks_per_level=1)
    for model, reference in (
            (PRESETS["smoke"].model, "diffusers:stabilityai/sd-vae-ft-ema"),
            (PRESETS["sd3-smoke"].model, "diffusers:stabilityai/stable-diffusion-3-medium-diffusers/vae"),
            (AutoencoderKL(**size), "ldm:sdxl_vae.safetensors"),
            (AutoencoderVQ(**size, attention_levels=(1,), codebook_size=16), "taming:last.ckpt")):
        params = calm(model, random_parameters(parameter_shapes(model), seed=0))
        os.makedirs(os.path.dirname(reference.partition(":")[2]) or ".", exist_ok=True)
        weights.save_autoencoder(reference, model, params, weights.AutoencoderSpec(model.kind, 1.0, 0.0, reference, ""))
