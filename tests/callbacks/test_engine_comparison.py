"""One table of every stage."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lq
from lq.callbacks import EngineComparison, Export, QuantizationAwareTraining
from lq.data import DigitsDataModule
from lq.modes import quantizer_mode
from lq.quantizer import Mode
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
    assert comparison.rows["float"].versus is None
    drops = {name: row.versus.drop.mean for name, row in comparison.rows.items() if row.versus}
    assert set(drops) == {"float file", "PTQ", "QAT", "INT8 file"}
    top1 = {name: row.top1 for name, row in comparison.rows.items()}
    expected = {name: top1["float"] - top1[name] for name in drops}
    assert drops == pytest.approx(expected, abs=1e-6)
    assert comparison.rows["float file"].versus.agreement == 1
    printed = capsys.readouterr().out
    assert "On digits, 400 images" in printed
    assert json.loads((tmp_path / "m.json").read_text())["data"] == "digits"
    again = EngineComparison()
    again.load_state_dict(json.loads(json.dumps(comparison.state_dict())))
    assert again.rows == comparison.rows
    assert again._float.agreement(comparison._float) == 1


def test_measuring_does_not_change_the_training(tmp_path):
    plain = fit(tmp_path, [QuantizationAwareTraining(calibration_batches=3)])
    compared = fit(tmp_path, [QuantizationAwareTraining(calibration_batches=3), EngineComparison()])
    expected, found = plain.state_dict(), compared.state_dict()
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def calibrated_digits():
    data, module = DigitsDataModule(), digits_module()
    module.configure_model()
    data.setup("fit")
    lq.calibrate(module.model, data.calibration_dataloader(), progress=False)
    return module, data


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_a_test_compares_float_fake_quant_and_the_file(tmp_path, stage, capsys):
    module, data = calibrated_digits()
    export, comparison = Export(tmp_path / "m.onnx", engine=False), EngineComparison()
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, [export, comparison], logger=logger)
    getattr(run, stage)(module, datamodule=data, verbose=False)
    rows = comparison.rows
    assert list(rows) == ["float", "fake-quant", "INT8 file"]
    with quantizer_mode(module.model, Mode.BYPASS):
        plain = lq.evaluate(module.model, data.test_dataloader())
    assert rows["float"].top1 == plain.top1
    beside = lq.evaluate(tmp_path / "m.onnx", data.test_dataloader(), progress=False)
    assert rows["INT8 file"].top1 == beside.top1
    logged = list(csv.DictReader(io.StringIO((Path(logger.log_dir) / "metrics.csv").read_text())))
    values = {k: float(v) for row in logged for k, v in row.items() if v}
    assert values["comparison/INT8 file/drop"] == rows["INT8 file"].versus.drop.mean
    assert values["final/drop"] == rows["INT8 file"].versus.drop.mean
    assert values["final/size_mb"] == rows["INT8 file"].size_mb
    assert values["final/latency_ms"] == rows["INT8 file"].latency_ms
    assert "agreement" in capsys.readouterr().out


def test_the_trainers_own_loaders_will_do(tmp_path):
    module, data = calibrated_digits()
    comparison = EngineComparison()
    run = trainer(tmp_path, [comparison], max_epochs=1, limit_train_batches=2,
                  num_sanity_val_steps=0)  # fmt: skip
    run.fit(module, data.train_dataloader(), data.val_dataloader())
    assert set(comparison.rows) == {"float", "PTQ", "QAT"}
    expected = lq.evaluate(module.model, data.val_dataloader(), progress=False)
    assert comparison.rows["QAT"].top1 == expected.top1
    run.test(module, data.test_dataloader(), verbose=False)
    assert comparison.rows["fake-quant"].n == 400


def test_a_resumed_fit_compares_with_the_same_float(tmp_path):
    def callbacks():
        return [QuantizationAwareTraining(calibration_batches=3), EngineComparison()]

    torch.manual_seed(1)
    first = callbacks()
    run = trainer(tmp_path, first, max_epochs=1, limit_train_batches=6)
    run.fit(digits_module(), datamodule=DigitsDataModule())
    run.save_checkpoint(tmp_path / "one.ckpt")
    second = callbacks()
    run = trainer(tmp_path, second, max_epochs=2, limit_train_batches=6)
    run.fit(digits_module(), datamodule=DigitsDataModule(), ckpt_path=tmp_path / "one.ckpt",
            weights_only=True)  # fmt: skip
    rows = second[1].rows
    assert rows["float"] == first[1].rows["float"]
    assert rows["QAT"].versus.drop.mean == pytest.approx(rows["float"].top1 - rows["QAT"].top1)
    assert rows["QAT"] != first[1].rows["QAT"]


def test_refused_before_training(tmp_path):
    with pytest.raises(RuntimeError, match="data module"):
        trainer(tmp_path, [EngineComparison("encoder")]).fit(autoencoder(), loader())
    with pytest.raises(RuntimeError, match="list it first"):
        fit(tmp_path, [EngineComparison(), Export(tmp_path / "m.onnx")])


def test_it_comes_after_training(tmp_path):
    """Before it, float and PTQ would be measured a step after the quantizers begin."""
    callbacks = [EngineComparison(), QuantizationAwareTraining(calibration_batches=3)]
    with pytest.raises(RuntimeError, match="QuantizationAwareTraining before EngineComparison"):
        fit(tmp_path, callbacks)


def test_of_several_loaders_the_first_is_measured(tmp_path):
    class Lists(DigitsDataModule):
        def test_dataloader(self):
            return [super().test_dataloader()]

    comparison = EngineComparison()
    callbacks = [QuantizationAwareTraining(calibration_batches=3), comparison]
    run = trainer(tmp_path, callbacks, max_epochs=1, limit_train_batches=6)
    run.fit(digits_module(), datamodule=Lists())
    assert comparison.rows["QAT"].n == 400
