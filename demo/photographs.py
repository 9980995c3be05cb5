"""Real photographs, to lie behind the demo's second set of scenes. None is in this repository.

Test scenes use those that ride in the wheels of scikit-image, scikit-learn and matplotlib, which the environment holds anyway.
Training scenes use others, from Debian's packages (``python -m demo.photographs --output build/photographs`` fetches and
unpacks them, on a Debian or Ubuntu with their package lists; nothing is installed).
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

FOLDER = Path(os.environ.get("DEMO_PHOTOGRAPHS", "build/photographs"))
"""Where training's photographs are."""

# Python package of the wheel: paths in it.
_WHEELS = {
    "skimage": (
        *("data/astronaut.png", "data/brick.png", "data/camera.png", "data/chelsea.png", "data/coffee.png", "data/coins.png"),
        *("data/grass.png", "data/gravel.png", "data/hubble_deep_field.jpg", "data/motorcycle_left.png", "data/rocket.jpg"),
    ),
    "sklearn.datasets": ("images/china.jpg", "images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}
_MATE = [
    "Garden",
    "Dune",
    "Wood",
    "Aqua",
    "TwoWings",
    "Storm",
    "GreenMeadow",
    "RainDrops",
    "Blinds",
    "FreshFlower",
    "LadyBird",
    "YellowFlower",
]
_PLASMA = [
    "BytheWater",
    "ColdRipple",
    "DarkestHour",
    "EveningGlow",
    "FallenLeaf",
    "Grey",
    "Kite",
    "OneStandsOut",
    "Path",
    "summer_1am",
]
_OPENCV = (
    *("alphamat/input_images/plant.jpg", "data/aero1.jpg", "data/aero3.jpg", "data/aloeL.jpg", "data/apple.jpg"),
    *("data/baboon.jpg", "data/board.jpg", "data/box_in_scene.png", "data/building.jpg", "data/butterfly.jpg"),
    *("data/chicky_512.png", "data/fruits.jpg", "data/graf1.png", "data/leuvenA.jpg", "data/licenseplate_motion.jpg"),
    *("data/messi5.jpg", "data/orange.jpg", "data/rubberwhale1.png", "data/squirrel_cls.jpg", "data/sudoku.png"),
    *("hfs/data/000.jpg", "reg/home.png", *(f"text/scenetext0{i}.jpg" for i in range(1, 7))),
)
# Debian package: paths in it.
_DEBIAN = {
    "mate-backgrounds": tuple(f"usr/share/backgrounds/mate/nature/{name}.jpg" for name in _MATE),
    "lomiri-wallpapers-20.04": ("usr/share/backgrounds/Kleiber_by_Lukas_Baubkus.jpg",),
    "plasma-workspace-wallpapers": tuple(f"usr/share/wallpapers/{name}/contents/images/1920x1080.jpg" for name in _PLASMA),
    "opencv-doc": tuple(f"usr/share/doc/opencv-doc/examples/{name}" for name in _OPENCV),
}
NAMES = {
    "test": tuple(f"{package}/{path}" for package, paths in _WHEELS.items() for path in paths),
    "train": tuple(f"{package}/{path}" for package, paths in _DEBIAN.items() for path in paths),
}
# Larger ones are made smaller once: a scene has 336 pixels a side at most.
_LONGEST = 640


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of the photograph ``name``: ``share`` of the largest one of the wanted proportions, ``right`` and ``down`` of the
    room that leaves, from 0 to 1."""

    name: str
    share: float
    right: float
    down: float
    mirrored: bool

    def image(self, size: tuple[int, int]) -> Image.Image:
        """The part as an RGB image of ``size`` pixels. FileNotFoundError where the photograph is missing."""
        whole = photograph(self.name)
        scale = self.share * min(whole.width / size[0], whole.height / size[1])
        width, height = scale * size[0], scale * size[1]
        left, top = self.right * (whole.width - width), self.down * (whole.height - height)
        part = whole.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else part


def crop(rng: random.Random, names: Sequence[str]) -> Crop:
    """A random part of one of the photographs."""
    return Crop(rng.choice(names), rng.uniform(0.4, 1.0), rng.random(), rng.random(), rng.random() < 0.5)


@functools.cache
def photograph(name: str) -> Image.Image:
    """A photograph of ``NAMES``, RGB, 640 pixels at its longer side at most. FileNotFoundError where it is missing."""
    package, _, inside = name.partition("/")
    if package in _WHEELS:
        with resources.as_file(resources.files(package) / inside) as path:
            image = Image.open(path).convert("RGB")
    else:
        path = FOLDER / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: python -m demo.photographs --output {FOLDER} fetches it from Debian")
        image = Image.open(path).convert("RGB")
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    return image


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: %(default)s")
    output = parser.parse_args(arguments).output
    for package, paths in _DEBIAN.items():
        if all((output / package / path).exists() for path in paths):
            continue
        print(f"{package}: fetching {len(paths)} photographs", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
                archive = next(Path(folder).glob("*.deb"))
                subprocess.run(["dpkg-deb", "--extract", archive, folder], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"demo.photographs: {package} could not be fetched: {error}", file=sys.stderr)
                return 1
            for path in paths:
                (output / package / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / path, output / package / path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
