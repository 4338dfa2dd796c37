"""Curves of what the quantizers do."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lq
from lq.callbacks import QuantizationAwareTraining, QuantizerMonitor
from lq.callbacks.quantizer_monitor import quantizer_figures
from tests.lit import autoencoder, loader, trainer


def test_logs_every_quantizer_at_the_interval(tmp_path):
    module, logger = autoencoder(), TensorBoardLogger(tmp_path)
    callbacks = [QuantizationAwareTraining(calibration_batches=2), QuantizerMonitor(4)]
    trainer(tmp_path, callbacks, logger=logger).fit(module, loader())
    events = EventAccumulator(logger.log_dir).Reload()
    tags = [t for t in events.Tags()["scalars"] if t.startswith("quantizer/")]
    assert len(tags) == 8 * 3  # two quantizers on each of four layers
    tag = "quantizer/encoder.0.input_quantizer/scale"
    assert [e.step for e in events.Scalars(tag)] == [5, 9, 13]
    assert events.Scalars(tag)[-1].value == pytest.approx(
        float(module.encoder[0].input_quantizer.scale)
    )
    assert not any(m._forward_hooks for m in module.modules())


def test_figures_equal_numpy():
    quantizer = lq.Quantizer(lq.QuantSpec("int8"))
    quantizer.amax = torch.tensor(1.27)
    x = torch.tensor([0.005, 0.5, 2.0, -3.0])
    figures = quantizer_figures(quantizer, x, quantizer(x))
    assert figures["clip_rate"] == 0.5
    assert figures["scale"] == pytest.approx(0.01)
    noise = ((x - quantizer(x)).numpy() ** 2).sum()
    assert 10 ** (figures["sqnr_db"] / 10) == pytest.approx((x.numpy() ** 2).sum() / noise, 1e-5)


def test_other_loggers_and_none(tmp_path):
    for logger in (CSVLogger(tmp_path), False):
        callbacks = [QuantizationAwareTraining(calibration_batches=2), QuantizerMonitor(1)]
        trainer(tmp_path, callbacks, logger=logger).fit(autoencoder(), loader())


def test_bad_interval():
    with pytest.raises(ValueError, match="every_n_steps"):
        QuantizerMonitor(0)
