"""Two processes train and calibrate as one."""

import json

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks import (
    EngineComparison,
    QuantizationAwareTraining,
    QuantizerMonitor,
    SensitivitySweep,
)
from lq.data import DigitsDataModule
from lq.models import digits_cnn
from lq.sensitivity import Sensitivity
from tests.lit import autoencoder, loader, needs_gloo, trainer


class SaveRanges(L.Callback):
    """Writes what every rank ended with."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        state = {k: v.clone() for k, v in pl_module.state_dict().items()}
        torch.save(state, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


@needs_gloo
@pytest.mark.parametrize("calibrator", ["max", "auto"])
def test_two_ranks_share_ranges_and_weights(tmp_path, calibrator):
    images = torch.cat([x for x, _ in loader()])
    batches_of_a_rank = len(images) // 8 // 2
    L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            QuantizationAwareTraining(calibrator=calibrator, calibration_batches=batches_of_a_rank),
            SaveRanges(tmp_path),
        ],
    ).fit(autoencoder(), loader())
    ranks = [torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert all(torch.equal(ranks[0][k], ranks[1][k]) for k in ranks[0])
    if calibrator == "max":
        # Each rank saw half of the images; the range is that of all, to the last bit.
        assert torch.equal(ranks[0]["encoder.0.input_quantizer.scale"], images.max() / 127)


@needs_gloo
@pytest.mark.parametrize("method", ["exact", "adaptive", "gradient"])
def test_two_ranks_share_the_layers_of_a_sweep(tmp_path, method):
    found = {}
    for ranks, strategy in ((1, "auto"), (2, "ddp_spawn")):
        torch.manual_seed(0)
        module = lq.QuantModule("lq.models.digits_cnn", recipe=None)
        path = tmp_path / f"{ranks}/s.json"
        callback = SensitivitySweep(path, method=method, metric="kl", batches=4)
        runner = trainer(tmp_path, [callback], devices=ranks, strategy=strategy)
        runner.validate(module, datamodule=DigitsDataModule(batch_size=32), verbose=False)
        found[ranks] = Sensitivity.from_json(path)
    assert str(found[2]) == str(found[1])
    journals = [tmp_path / "2" / name for name in ("s.jsonl", "s.jsonl.1")]
    measured = [[json.loads(x) for x in j.read_text().splitlines()] for j in journals]
    keys = [
        {(x["variant"], x["batch"]) for x in lines if x.get("variant", "float") != "float"}
        for lines in measured
    ]
    assert keys[0]
    assert keys[1]
    assert not keys[0] & keys[1]


class Classifier(L.LightningModule):
    """Somebody's own, whose training step calls a part of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = digits_cnn()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@needs_gloo
def test_two_ranks_are_watched_and_compared(tmp_path):
    """What only the first rank measures does not wait for the other."""
    images = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    data = DataLoader(TensorDataset(*images), 8)
    L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=2,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            QuantizationAwareTraining(calibration_batches=1),
            QuantizerMonitor(every_n_steps=1),
            EngineComparison(),
        ],
    ).fit(Classifier(), data, data)
    (file,) = tmp_path.rglob("metrics.csv")
    columns = file.read_text().splitlines()[0]
    assert "comparison/QAT/drop" in columns
    assert "quantizer/net.0.input_quantizer/sqnr_db" in columns
