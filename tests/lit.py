"""The plain LightningModule of Lightning's own quick start, unmodified, and data for it."""

import lightning as L
import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from lq.callbacks import QuantizationAwareTraining
from lq.tensor_spec import RANGES


class LitAutoEncoder(L.LightningModule):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def training_step(self, batch, batch_idx):
        # training_step defines the train loop.
        # it is independent of forward
        x, _ = batch
        x = x.view(x.size(0), -1)
        z = self.encoder(x)
        x_hat = self.decoder(z)
        loss = nn.functional.mse_loss(x_hat, x)
        # Logging to TensorBoard (if installed) by default
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = optim.Adam(self.parameters(), lr=1e-3)
        return optimizer


class LitWithEvaluation(LitAutoEncoder):
    """The same with a validation and a test step."""

    def validation_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        self.log("val_loss", nn.functional.mse_loss(self.decoder(self.encoder(x)), x))

    def test_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        self.log("test_loss", nn.functional.mse_loss(self.decoder(self.encoder(x)), x))


def autoencoder(cls=LitAutoEncoder):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 3))
    decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 28 * 28))
    return cls(encoder, decoder)


def loader(scale=1.0, samples=64, batch_size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(samples, 1, 28, 28, generator=generator) * scale
    return DataLoader(TensorDataset(images, torch.zeros(samples)), batch_size)


def trainer(folder, callbacks=(), **kwargs):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            **kwargs,
        }
    )


class LitSmall(LitWithEvaluation):
    """Three layers, and what a test chooses between the first and the second."""

    def __init__(self, between=nn.ReLU):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(784, 32), between(), nn.Linear(32, 16))
        super().__init__(encoder, nn.Linear(16, 784))
        self.lr = 0.01

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return optim.SGD(trained, self.lr, momentum=0.9)


def norm():
    return nn.BatchNorm1d(32)


def with_ranges(kind):
    """Return a recipe whose ranges are ``frozen``, follow a ``moving_average``, or train."""
    spec = {"format": "int8", "range": kind}
    return {"weights": spec, "inputs": spec}


def every_range():
    """Return a recipe with ranges of every kind for ``LitSmall``, an offset among them."""
    frozen, following, lsq, pact = (with_ranges(kind)["inputs"] for kind in RANGES)
    rules = [
        {"name": "encoder.0", "weights": frozen, "inputs": following},
        {"name": "encoder.2", "weights": following, "inputs": {**lsq, "symmetric": False}},
        {"name": "decoder", "weights": lsq, "inputs": pact},
    ]
    return {"rules": rules}


def qat(recipe=None, **kwargs):
    """Return the callback with ranges of every kind, if not said otherwise."""
    return QuantizationAwareTraining(
        recipe or every_range(), **{"calibration_batches": 2, **kwargs}
    )


class Losses(L.Callback):
    """Notes the loss of every training batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.seen.append(outputs["loss"].item())


class Crash(L.Callback):
    """Ends a fit as Ctrl-C does, at the start of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)
