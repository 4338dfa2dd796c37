"""A sweep as a callback of validate."""

import csv

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lq
from lq.callbacks import Calibration, SensitivitySweep
from lq.data import DigitsDataModule
from lq.sensitivity import Sensitivity
from lq.sensitivity.run import FirstBatches
from lq.sensitivity.validation import shuffled
from tests.lit import LitWithEvaluation, autoencoder, loader, trainer


def digits_module(**kwargs):
    torch.manual_seed(0)
    return lq.QuantModule("lq.models.digits_cnn", recipe=None, **kwargs)


def swept(module, data, **arguments):
    """What the function finds on the batches that the callback takes."""
    data.setup("validate")
    batches = shuffled(data.val_dataloader(), 2)
    data.setup("fit")
    calibration = FirstBatches(data.calibration_dataloader())
    return lq.sweep(module.model, batches, calibration=calibration, progress=False, **arguments)


@pytest.mark.parametrize("method", ["exact", "gradient"])
def test_finds_what_the_function_finds(tmp_path, method):
    module, data = digits_module(), DigitsDataModule(batch_size=32)
    callback = SensitivitySweep(tmp_path / "s.json", method=method, batches=2)
    trainer(tmp_path, [callback]).validate(module, datamodule=data, verbose=False)
    assert str(callback.result) == str(swept(module, data, method=method))
    assert str(Sensitivity.from_json(tmp_path / "s.json")) == str(callback.result)
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [row["layer"] for row in rows] == list(callback.result.layers)
    assert {row["data_hash"] for row in rows} == {callback.result.data_hash}


def test_weights_and_inputs_apart(tmp_path):
    data = DigitsDataModule(batch_size=32)
    callback = SensitivitySweep(tmp_path / "s.json", parts=["weights", "inputs"], batches=1)
    trainer(tmp_path, [callback]).validate(digits_module(), datamodule=data, verbose=False)
    assert {row.part for row in callback.result} == {"weights", "inputs"}


class Crash(L.Callback):
    """Ends a validation after its sweep has begun."""

    def __init__(self, lines):
        self.lines = lines

    def on_validation_end(self, trainer, pl_module):
        journal = lq.sensitivity.journal.Journal
        add = journal.add

        def crashing(this, *args):
            add(this, *args)
            if sum(map(len, this._values.values())) == self.lines:
                journal.add = add
                raise RuntimeError("crashed")

        journal.add = crashing


def test_goes_on_after_a_crash(tmp_path):
    data = DigitsDataModule(batch_size=32)
    callback = SensitivitySweep(tmp_path / "s.json", batches=2)
    with pytest.raises(RuntimeError, match="crashed"):
        trainer(tmp_path, [Crash(8), callback]).validate(digits_module(), datamodule=data)
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert not (tmp_path / "s.json").exists()
    trainer(tmp_path, [callback]).validate(digits_module(), datamodule=data, verbose=False)
    assert (tmp_path / "s.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert callback.result == swept(digits_module(), data)


def test_a_part_of_any_module_without_class_numbers(tmp_path):
    callback = SensitivitySweep(tmp_path / "s.json", metric="sqnr", module="encoder", batches=2)
    images = [x.flatten(1) for x, _ in loader()]
    data = DataLoader(torch.cat(images), batch_size=8)

    class Lit(LitWithEvaluation):
        def validation_step(self, batch, batch_idx):
            self.decoder(self.encoder(batch))

        def train_dataloader(self):
            return data

    runner = trainer(tmp_path, [callback])
    with pytest.raises(RuntimeError, match="needs training data"):
        runner.validate(autoencoder(Lit), dataloaders=data, verbose=False)


def test_does_nothing_within_a_fit(tmp_path):
    callback = SensitivitySweep(tmp_path / "s.json")
    module = digits_module()
    runner = trainer(tmp_path, [callback], max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    runner.fit(module, datamodule=DigitsDataModule())
    assert callback.result is None


def test_a_quantized_module_is_refused(tmp_path):
    module = lq.QuantModule("lq.models.digits_cnn", recipe="tensorrt_int8")
    runner = trainer(tmp_path, [Calibration(batches=1), SensitivitySweep(tmp_path / "s.json")])
    with pytest.raises(ValueError, match="recipe: null"):
        runner.validate(module, datamodule=DigitsDataModule(), verbose=False)


def test_scores_are_logged(tmp_path):
    class Logger(L.pytorch.loggers.CSVLogger):
        logged = {}  # noqa: RUF012

        def log_metrics(self, metrics, step=None):
            self.logged |= metrics

    callback = SensitivitySweep(tmp_path / "s.json", metric="kl", batches=1)
    runner = trainer(tmp_path, [callback], logger=Logger(tmp_path))
    runner.validate(digits_module(), datamodule=DigitsDataModule(), verbose=False)
    assert Logger.logged["sensitivity/9/int8/kl"] == callback.result.row("9", "int8").kl


def test_wrong_data():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield torch.zeros(1)

    for wrong in ([1, 2], DataLoader(Stream()), [DataLoader([1])] * 2):
        with pytest.raises(ValueError, match="one DataLoader"):
            shuffled(wrong, 1)
    with pytest.raises(ValueError, match="`batches` to be at least 1, but got -1"):
        shuffled(DataLoader([1]), -1)
    assert len(shuffled([DataLoader([1])], 1)) == 1
