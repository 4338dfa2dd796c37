"""PTQ as a callback."""

import json

import pytest
import torch
from torch import nn

import lq
from lq.callbacks import Calibration
from lq.data import DigitsDataModule
from lq.surgery import quantizers
from tests.lit import LitWithEvaluation, autoencoder, loader, trainer


def digits_module(**kwargs):
    torch.manual_seed(0)
    return lq.QuantModule("lq.models.digits_cnn", **kwargs)


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_calibrates_on_calibration_data(tmp_path, run):
    module, data = digits_module(), DigitsDataModule(batch_size=64)
    runner = trainer(tmp_path, [Calibration(batches=2)])
    getattr(runner, run)(module, datamodule=data)
    expected = digits_module()
    expected.configure_model()
    loader = data.calibration_dataloader()
    lq.calibrate(expected.model, [b for b, _ in zip(loader, range(2), strict=False)])
    for name, quantizer in quantizers(module.model).items():
        assert torch.equal(quantizer.scale, expected.model.get_submodule(name).scale), name


def test_fit_starts_in_float_and_trains_quantized(tmp_path):
    module = digits_module()
    runner = trainer(tmp_path, [Calibration(batches=1)], max_epochs=1, limit_train_batches=2)
    runner.fit(module, datamodule=DigitsDataModule())
    assert all(q.mode is lq.Mode.QUANTIZE for q in quantizers(module).values())
    assert all(q.is_calibrated for q in quantizers(module).values())


def test_a_calibrated_checkpoint_is_left_alone(tmp_path):
    module, data = digits_module(), DigitsDataModule()
    runner = trainer(tmp_path, [Calibration(batches=1)])
    runner.test(module, datamodule=data, verbose=False)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    before = {n: q.scale.clone() for n, q in quantizers(module).items()}
    other = digits_module()
    again = trainer(tmp_path, [Calibration(batches=8, calibrator="percentile(50)")])
    again.test(
        other, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False
    )
    assert all(torch.equal(before[n], q.scale) for n, q in quantizers(other).items())


def test_ranges_are_kept_in_a_file_and_taken_from_it(tmp_path):
    data, path = DigitsDataModule(), tmp_path / "ranges.json"

    def calibrated(**arguments):
        module = digits_module()
        callback = Calibration(calibrator="auto", cache=str(path), **arguments)
        trainer(tmp_path, [callback]).validate(module, datamodule=data, verbose=False)
        return {n: q.scale for n, q in quantizers(module).items()}

    first, written = calibrated(batches=2), path.read_text()
    again = calibrated(batches=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert path.read_text() == written
    assert set(json.loads(written)["outputs"]) > {"each", "max", "mse"}
    with pytest.raises(ValueError, match="same data"):
        calibrated(batches=1)


def test_somebody_elses_module(tmp_path):
    class WithForward(LitWithEvaluation):
        def forward(self, x):
            return self.decoder(self.encoder(x.flatten(1)))

    module = autoencoder(WithForward)
    runner = trainer(tmp_path, [Calibration(batches=1)], max_epochs=1)
    runner.fit(module, loader(), loader())
    assert all(q.is_calibrated for q in quantizers(module).values())


@pytest.mark.parametrize(
    ("make", "arguments", "error", "match"),
    [
        pytest.param(LitWithEvaluation, {}, ValueError, "forward", id="no forward"),
        pytest.param(LitWithEvaluation, {"module": "x"}, ValueError, "submodule", id="no module"),
    ],
)
def test_refusals(tmp_path, make, arguments, error, match):
    module = make(nn.Linear(784, 4), nn.Linear(4, 784))
    with pytest.raises(error, match=match):
        trainer(tmp_path, [Calibration(**arguments)]).fit(module, loader())


@pytest.mark.parametrize(
    "arguments", [{"batches": 0}, {"calibrator": "maximum"}], ids=["batches", "calibrator"]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Calibration(**arguments)


def test_no_calibration_data(tmp_path):
    with pytest.raises(RuntimeError, match="Calibration needs training data"):
        trainer(tmp_path, [Calibration(module="encoder")]).test(
            autoencoder(LitWithEvaluation), loader()
        )
