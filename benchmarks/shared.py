"""Real images and weights, where they are: LQ_DATA, or ../shared/data from the repository."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

FOLDER = Path(os.environ.get("LQ_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def require_data() -> Path:
    """Return the folder of real data, or end, saying that there is none."""
    if not (FOLDER / "cifar10").is_dir():
        print(f"Skipped: there is no data in {FOLDER}; set LQ_DATA.")
        sys.exit(0)
    return FOLDER


def cifar10(split: str) -> TensorDataset:
    """Return the normalized images of ``train`` (50,000) or ``test`` (5,000)."""
    folder = require_data() / "cifar10"
    files = [f"train_{i}" for i in range(1, 6)] if split == "train" else ["test_first5000"]
    images = torch.cat([_tiles(folder / f"{name}.webp") for name in files])
    labels = np.load(folder / "labels.npz")
    key = next(k for k in labels.files if k.startswith(split))
    target = torch.from_numpy(labels[key][: len(images)].astype(np.int64))
    return TensorDataset((images / 255 - MEAN) / STD, target)


def _tiles(path: Path) -> torch.Tensor:
    sheet = np.asarray(Image.open(path).convert("RGB"))
    rows = sheet.shape[0] // 32
    tiles = sheet.reshape(rows, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    return torch.from_numpy(tiles.copy()).float()


def batches(data: TensorDataset, size: int = 128, shuffle: bool = False) -> DataLoader:
    """Return a loader; the order of a shuffled one is fixed by torch's seed."""
    return DataLoader(data, batch_size=size, shuffle=shuffle)
