"""Curves of training are those of the log."""

import csv

import lightning as L
import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

import lq
from lq.data import DigitsDataModule
from lq.plots import plot_history, read_history
from tests.plots.looking import overlapping

HISTORY = [
    {"epoch": i, "train_loss": 2.0 / (i + 1), "val_loss": 2.2 / (i + 1), "val_top1": 0.5 + i / 20}
    for i in range(8)
]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_are_the_history(theme: str) -> None:
    figure = plot_history([*HISTORY, {"epoch": 8, "train_loss": 0.1, "seconds": 3.0}], theme)
    loss, accuracy = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.get_lines()}
    assert lines["train_loss"] == [*([r["epoch"], r["train_loss"]] for r in HISTORY), [8, 0.1]]
    assert lines["val_loss"] == [[r["epoch"], r["val_loss"]] for r in HISTORY]
    (top1,) = accuracy.get_lines()
    assert top1.get_ydata().tolist() == [r["val_top1"] for r in HISTORY]
    assert not overlapping(figure)


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match=r"but got \['epoch', 'seconds'\]"):
        plot_history([{"epoch": 0, "seconds": 1.0}])


def test_what_lightning_logged(tmp_path) -> None:
    L.seed_everything(0)
    logger = CSVLogger(tmp_path)
    trainer = L.Trainer(
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=2,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[LearningRateMonitor()],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(lq.QuantModule("lq.models.digits_cnn", recipe=None), datamodule=DigitsDataModule())
    history = read_history(logger.log_dir)
    assert [row["epoch"] for row in history] == [0, 1]
    assert history[-1]["val/top1"] == pytest.approx(trainer.callback_metrics["val/top1"].item())
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        losses = [float(r["train/loss"]) for r in csv.DictReader(file) if r["train/loss"]]
    assert len(losses) == 8
    assert history[0]["train/loss"] == pytest.approx(sum(losses[:4]) / 4)
    assert len(plot_history(history).axes) == 3


def test_no_such_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv"):
        read_history(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="no line has one"):
        read_history(tmp_path)
