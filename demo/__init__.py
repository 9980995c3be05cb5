"""Two small real Mllamas, the data sets they are trained on, and the script that trains them."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Answers easy-VQA and scenes on plain paper; 65 visual tokens a tile."""
PHOTO_MODEL = Path(__file__).parent / "photo-model"
"""Answers scenes over photographs; 257 visual tokens a tile."""
MODELS = {"scenes": MODEL, "photo-scenes": PHOTO_MODEL}
"""By the name of the scenes' style."""
