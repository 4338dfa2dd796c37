"""Two processes train and calibrate as one."""

import lightning as L
import pytest
import torch

from lq.callbacks import QuantizationAwareTraining
from tests.lit import autoencoder, loader, needs_gloo


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
