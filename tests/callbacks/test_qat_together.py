"""QAT together with what else a fit may have, compared with the same written in plain torch."""

import copy
import warnings

import lightning as L
import onnx
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import lq
from lq.callbacks import QuantizationAwareTraining
from lq.collector import RangeCollector
from lq.surgery import quantized_layers, quantizers
from tests.lit import LitAutoEncoder, LitWithEvaluation, Losses, autoencoder, loader, trainer
from tests.lit import with_ranges as ranges

KINDS = ["frozen", "moving_average", "lsq", "pact"]


def qat(kind="frozen", **kwargs):
    return QuantizationAwareTraining(ranges(kind), **{"calibration_batches": 2, **kwargs})


class Parts(LitAutoEncoder):
    """Small, with optimizer and layers to choose; what it logs would be compiled with it."""

    def __init__(self, encoder=None, decoder=None):
        torch.manual_seed(0)
        super().__init__(encoder or nn.Linear(784, 16), decoder or nn.Linear(16, 784))
        self.lr = 0.05

    def training_step(self, batch, batch_idx):
        return reconstruction(self, batch[0])

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), self.lr, momentum=0.9)


class UsedTwice(Parts):
    def __init__(self):
        torch.manual_seed(0)
        twice = nn.Linear(784, 784)
        super().__init__(nn.Sequential(twice, nn.ReLU(), twice), nn.Linear(784, 784))


class Frozen(Parts):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16)))
        self.encoder[0].requires_grad_(False)


def reconstruction(module, images):
    x = images.flatten(1)
    return F.mse_loss(module.decoder(module.encoder(x)), x)


def by_hand(module, kind, calibration_batches=2, accumulate=1, clip=None, autocast=None):
    """Train as a fit of two epochs should, without Lightning."""
    scaler = torch.amp.GradScaler("cpu", enabled=autocast is torch.float16)
    collector = RangeCollector(lq.quantize(module, ranges(kind)))
    collector.start()
    optimizer = module.configure_optimizers()
    for number, (images, _) in enumerate([*loader(), *loader()], 1):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = reconstruction(module, images)
        scaler.scale(loss / accumulate).backward()
        if number % accumulate == 0:
            scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if number == calibration_batches:
            collector.finish()
    return module.state_dict()


def float16_on_cpu():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(state[k], expected[k])] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "lightning", "hand"),
    [
        pytest.param(autoencoder, {}, {}, id="plain"),
        pytest.param(
            autoencoder, {"accumulate_grad_batches": 4}, {"accumulate": 4}, id="accumulated"
        ),
        pytest.param(autoencoder, {"gradient_clip_val": 0.01}, {"clip": 0.01}, id="clipped"),
        pytest.param(
            Parts,
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01},
            {"accumulate": 2, "clip": 0.01, "calibration_batches": 3},
            id="calibrated-while-accumulating",
        ),
        pytest.param(
            autoencoder, {"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}, id="bf16-mixed"
        ),
        pytest.param(
            autoencoder,
            {"plugins": float16_on_cpu, "gradient_clip_val": 0.01},
            {"autocast": torch.float16, "clip": 0.01},
            id="16-mixed-with-scaler",
        ),
        pytest.param(UsedTwice, {}, {}, id="used-twice"),
        pytest.param(Frozen, {}, {}, id="frozen-layer"),
    ],
)
def test_a_fit_is_the_plain_loop(tmp_path, kind, make, lightning, hand):
    lightning = {k: v() if callable(v) else v for k, v in lightning.items()}
    module = make()
    callback = qat(kind, calibration_batches=hand.get("calibration_batches", 2))
    trainer(tmp_path, [callback], **lightning).fit(module, loader())
    state = module.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert_equal(state, by_hand(make(), kind, **hand))
