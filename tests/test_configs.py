"""Every shipped config runs, by the command at its head."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lq import cli
from lq.models import create_model
from tests.test_data import batch, published

CONFIGS = Path(__file__).parent.parent / "configs"
FACTORIES = {
    "resnet18": ("torchvision.models.resnet18", {"num_classes": 1000}),
    "mobilenet_v2": ("torchvision.models.mobilenet_v2", {}),
    "resnet20_cifar10": ("lq.models.resnet20", {}),
}
SHORT = {
    "fit": ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"],
    "validate": [],
}


def command(path: Path) -> list[str]:
    """The arguments of the command that a config's head names."""
    (line,) = re.findall(r"^#   lq (.*)$", path.read_text(), re.MULTILINE)
    arguments = shlex.split(line)
    assert arguments[1:] == ["--config", f"configs/{path.name}"]
    return [arguments[0], "--config", str(path)]


def image_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def cifar10(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        (folder / name).write_bytes(published(batch(20, 10, seed=i)))
    return root


def others() -> list[Path]:
    return sorted(p for p in CONFIGS.glob("*.yaml") if p.stem != "quickstart")


@pytest.mark.parametrize("path", others(), ids=lambda p: p.stem)
def test_config(path: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, kind = path.stem.rsplit("_", 1)
    factory, arguments = FACTORIES[name]
    start = Path(f"runs/{name}_float/last.ckpt")
    if kind != "float":
        torch.manual_seed(0)
        weights = create_model(factory, **arguments).state_dict()
        start.parent.mkdir(parents=True)
        torch.save({"state_dict": {f"model.{k}": v for k, v in weights.items()}}, start)
    if "cifar" in name:
        data = [f"--data.root={cifar10(tmp_path / 'data')}", "--data.val_size=10"]
    else:
        root = image_folder(tmp_path / "data")
        data = [f"--data.root={root}", "--data.image_size=32", "--data.num_workers=0"]
    arguments = command(path)
    quick = [*SHORT[arguments[0]], "--trainer.accelerator=cpu", "--data.batch_size=4"]
    cli.main([*arguments, *quick, "--trainer.enable_progress_bar=false", *data])
    produced = {p.name for p in Path(f"runs/{path.stem}").iterdir()}
    expected = {
        "float": {"last.ckpt", "best.ckpt"},
        "ptq": {"model.onnx", "model.engine", "model.engine.json"},
        "qat": {"last.ckpt", "best.ckpt", "model.onnx", "model.engine", "model.engine.json"},
    }
    assert expected[kind] <= produced


def test_quickstart_reaches_what_it_promises(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main([*command(CONFIGS / "quickstart.yaml"), "--trainer.enable_progress_bar=false"])
    printed = capsys.readouterr().out
    for line in ("float", "PTQ", "QAT", "INT8 file", "ONNX:", "Engine:", "tensorboard --logdir"):
        assert line in printed
    rows = json.loads(Path("runs/quickstart/digits.json").read_text())["rows"]
    assert rows["float"]["n"] == 400
    assert rows["float"]["top1"] >= 0.97
    assert rows["PTQ"]["top1"] >= rows["float"]["top1"] - 0.01
    assert rows["QAT"]["top1"] >= rows["float"]["top1"] - 0.005
    assert rows["INT8 file"]["top1"] == pytest.approx(rows["QAT"]["top1"], abs=0.0025)
    assert rows["INT8 file"]["size_mb"] < 0.6 * rows["float file"]["size_mb"]
    assert Path("runs/quickstart/digits.engine").is_file()
