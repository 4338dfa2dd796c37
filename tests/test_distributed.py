"""Two processes train and calibrate as one."""

import json

import lightning as L
import pytest
import torch

import lq
from lq.callbacks import QuantizationAwareTraining, SensitivitySweep
from lq.data import DigitsDataModule
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
