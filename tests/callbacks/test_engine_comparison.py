"""One table of every stage."""

import json

import pytest
import torch

import lq
from lq.callbacks import EngineComparison, Export, QuantizationAwareTraining
from lq.data import DigitsDataModule
from tests.lit import autoencoder, loader, trainer


def digits_module():
    torch.manual_seed(0)
    return lq.QuantModule("lq.models.digits_cnn")


def fit(folder, callbacks):
    torch.manual_seed(1)
    module = digits_module()
    run = trainer(folder, callbacks, max_epochs=1, limit_train_batches=6)
    run.fit(module, datamodule=DigitsDataModule())
    return module


def test_every_stage_is_measured_on_the_test_set(tmp_path, capsys):
    qat = QuantizationAwareTraining(calibration_batches=3)
    export, comparison = Export(tmp_path / "m.onnx", engine=False), EngineComparison()
    module = fit(tmp_path, [qat, export, comparison])
    assert set(comparison.rows) == {"float", "float file", "PTQ", "QAT", "INT8 file"}
    measured = lq.evaluate(module.model, DigitsDataModule().test_dataloader())
    assert comparison.rows["QAT"].top1 == measured.top1
    assert comparison.rows["QAT"].n == 400
    printed = capsys.readouterr().out
    assert "On digits, 400 images" in printed
    assert json.loads((tmp_path / "m.json").read_text())["data"] == "digits"
    again = EngineComparison()
    again.load_state_dict(json.loads(json.dumps(comparison.state_dict())))
    assert again.rows == comparison.rows


def test_measuring_does_not_change_the_training(tmp_path):
    plain = fit(tmp_path, [QuantizationAwareTraining(calibration_batches=3)])
    compared = fit(tmp_path, [QuantizationAwareTraining(calibration_batches=3), EngineComparison()])
    expected, found = plain.state_dict(), compared.state_dict()
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_refused_before_training(tmp_path):
    with pytest.raises(RuntimeError, match="data module"):
        trainer(tmp_path, [EngineComparison("encoder")]).fit(autoencoder(), loader())
    with pytest.raises(RuntimeError, match="list it first"):
        fit(tmp_path, [EngineComparison(), Export(tmp_path / "m.onnx")])
