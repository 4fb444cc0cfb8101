"""Real photographs that are already on the machine: those inside scikit-image, scikit-learn and matplotlib.

They ship in the packages' wheels, so a first run needs no download. Of the pictures there, these are the
photographs of everyday scenes; drawings, scans of text, microscopy, medical and astronomical images are left
out, as are lawn (`grass`, noise to a small network) and the second of a stereo pair (`motorcycle_right`).
"""

import importlib.metadata
import importlib.util
from pathlib import Path

from eqvae_jax.data.decoding import decode

_PIP = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}

# Split by photograph: no crop of a test photograph is ever trained on. The test set has an animal (fur,
# shallow focus), a building with sky and trees, and a still life of saturated colour and wood grain.
PHOTOS = {
    "train": {
        "astronaut": ("skimage", "data/astronaut.png"),
        "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
        "camera": ("skimage", "data/camera.png"),
        "motorcycle": ("skimage", "data/motorcycle_left.png"),
        "flower": ("sklearn", "datasets/images/flower.jpg"),
        "rocket": ("skimage", "data/rocket.jpg"),
        "coins": ("skimage", "data/coins.png"),
        "brick": ("skimage", "data/brick.png"),
        "gravel": ("skimage", "data/gravel.png"),
    },
    "test": {
        "chelsea": ("skimage", "data/chelsea.png"),
        "china": ("sklearn", "datasets/images/china.jpg"),
        "coffee": ("skimage", "data/coffee.png"),
    },
}
PHOTOS["all"] = PHOTOS["train"] | PHOTOS["test"]


class PhotoSource:
    """The photographs of one split, decoded on first use and kept in memory (9 MB in all); labels are 0."""

    def __init__(self, split: str = "train"):
        if split not in PHOTOS:
            raise ValueError(f"photos:{split}: the splits are {', '.join(PHOTOS)}")
        self._split, self._names = split, list(PHOTOS[split])
        self._paths = [_locate(*PHOTOS[split][name]) for name in self._names]
        self._images = {}

    def __len__(self):
        return len(self._names)

    def __getitem__(self, i):
        if i not in self._images:  # two threads may both decode one: they store equal arrays
            self._images[i] = decode(self._paths[i], self.name(i))
        return {"image": self._images[i], "label": 0}

    def name(self, i):
        return f"photo {self._names[i]}"

    def __repr__(self):
        return f"photos:{self._split} ({len(self)} images)"

    def __getstate__(self):
        return self.__dict__ | {"_images": {}}


def _locate(package: str, file: str) -> str:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        raise ValueError(f"photos: {file} ships with {_PIP[package]}, which is not installed; "
                         f"pip install {' '.join(_PIP.values())}")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        version = importlib.metadata.version(_PIP[package])
        raise ValueError(f"photos: {_PIP[package]} {version} has no {file}; pip install --upgrade "
                         f"{_PIP[package]}, or name other images (folder:DIR)")
    return str(path)
