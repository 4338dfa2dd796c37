"""Every shipped config runs, by the command at its head."""

import json
import re
import shlex
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

import lq
from lq import cli
from lq.models import create_model
from tests.test_data import batch, published

CONFIGS = Path(__file__).parent.parent / "configs"
FACTORIES = {
    "resnet18": ("torchvision.models.resnet18", {"num_classes": 1000}),
    "mobilenet_v2": ("torchvision.models.mobilenet_v2", {}),
    "resnet20_cifar10": ("lq.models.resnet20", {}),
    "digits": ("lq.models.digits_cnn", {}),
}
SHORT = {
    "fit": ["--trainer.limit_train_batches=2"],
    "validate": [],
    "sensitivity": ["--batches=1"],
    "compare": ["--batch_sizes=[1]"],
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


def cifar10(root: Path, images: int) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        (folder / name).write_bytes(published(batch(images, 10, seed=i)))
    return root


class Crash(L.Callback):
    """Ends a fit in its third epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("crashed")


def configs(*kinds: str) -> list[Path]:
    return sorted(p for p in CONFIGS.glob("*.yaml") if p.stem.rsplit("_")[-1] in kinds)


def prepared(path: Path, folder: Path) -> list[str]:
    """The command of a config, cut short, with weights and images for it in `folder`."""
    arguments = command(path)
    quick = [*SHORT[arguments[0]], "--trainer.accelerator=cpu", "--data.batch_size=4"]
    arguments += [*quick, "--trainer.enable_progress_bar=false"]
    if path.stem == "quickstart":
        return arguments
    if path.stem == "compare":
        start_from("digits", folder)
        return [*arguments, "--data.batch_size=64"]
    name, kind = path.stem.rsplit("_", 1)
    if kind != "float":
        start_from(name, folder)
    if name == "digits":
        return arguments
    if "cifar" in name:
        images, held_out = (300, 300) if kind == "mixed" else (20, 10)  # a fifth validates
        root = cifar10(folder / "data", images)
        return [*arguments, f"--data.root={root}", f"--data.val_size={held_out}"]
    root = image_folder(folder / "data")
    return [*arguments, f"--data.root={root}", "--data.image_size=32", "--data.num_workers=0"]


def start_from(name: str, folder: Path) -> None:
    """Write the checkpoint that the float config of a model would leave behind."""
    factory, arguments = FACTORIES[name]
    torch.manual_seed(0)
    weights = create_model(factory, **arguments).state_dict()
    start = folder / f"runs/{name}_float/last.ckpt"
    start.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"model.{k}": v for k, v in weights.items()}}, start)


@pytest.mark.parametrize(
    "path",
    configs("float", "ptq", "qat", "lowbit", "sensitivity", "mixed", "compare"),
    ids=lambda p: p.stem,
)
def test_config(path: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = prepared(path, tmp_path)
    cli.main([*arguments, *["--trainer.max_epochs=1"] * (arguments[0] == "fit")])
    produced = {p.name for p in Path(f"runs/{path.stem}").iterdir()}
    exported = {"model.onnx", "model.engine", "model.engine.json"}
    expected = {
        "float": {"last.ckpt", "best.ckpt"},
        "ptq": {"last.ckpt", *exported},
        "mixed": {"last.ckpt", "plan.yaml", *exported},
        "qat": {"last.ckpt", "best.ckpt", *exported},
        "lowbit": {"last.ckpt", "best.ckpt"},
        "sensitivity": {"sensitivity.json", "sensitivity.csv", "sensitivity.jsonl"},
        "compare": {"comparison.json", "report.html", "report.md", "plots", "methods"},
    }
    assert expected[path.stem.rsplit("_", 1)[-1]] <= produced
    if path.stem == "compare":
        assert [row.failed for row in lq.Comparison.load("runs/compare")] == [""] * 9


@pytest.mark.parametrize(
    "path", configs("float", "qat", "lowbit", "quickstart"), ids=lambda p: p.stem
)
def test_crashed_fit_resumes_from_its_last_epoch(path: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = prepared(path, tmp_path)
    epochs = 15 if path.stem == "quickstart" else 3
    arguments.append(f"--trainer.max_epochs={epochs}")
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--trainer.callbacks+=tests.test_configs.Crash"])
    assert "lq: error: crashed" in capsys.readouterr().err
    last = Path(f"runs/{path.stem}/last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 1
    cli.main([*arguments, f"--ckpt_path={last}"])
    assert torch.load(last, weights_only=True)["epoch"] == epochs - 1
    assert len(list(last.parent.glob("last*.ckpt"))) == 1


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
