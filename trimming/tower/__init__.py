"""The vision tower, and which of an image's rows go on through it: one small file a policy."""

from trimming.tower.alike import Alike
from trimming.tower.evit import EViT
from trimming.tower.grid import GridRows
from trimming.tower.padding import padding_of
from trimming.tower.policy import TowerPolicy, TowerRows
from trimming.tower.random import RandomRows
from trimming.tower.tome import ToMe
from trimming.tower.tower import Encoding, Tower, TowerTiles, tower_plan
from trimming.tower.windows import Windows

__all__ = [
    "Alike",
    "EViT",
    "Encoding",
    "GridRows",
    "RandomRows",
    "ToMe",
    "Tower",
    "TowerPolicy",
    "TowerRows",
    "TowerTiles",
    "Windows",
    "padding_of",
    "tower_plan",
]
