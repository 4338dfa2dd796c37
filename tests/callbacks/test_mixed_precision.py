"""The ladder as a callback: what it leaves behind, and how the module goes on."""

import lightning as L
import pytest
import torch
from torch import nn

import lq
from lq.callbacks import Export, MixedPrecision
from lq.checkpoint import load_from_checkpoint
from lq.data import DigitsDataModule
from lq.mixed_precision import Drop, PrecisionConstraints, UnreachableError
from lq.mixed_precision.measured import rightness
from lq.models import digits_cnn
from lq.paired import paired_drop
from lq.plan import PrecisionPlan
from lq.sensitivity.journal import Journal
from tests.lit import trainer


class LitClassifier(L.LightningModule):
    """A module that knows nothing of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_cnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        accuracy = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_top1", accuracy)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, torch.Tensor]:
    L.seed_everything(0)
    module = LitClassifier()
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder, max_epochs=3, limit_val_batches=0).fit(module, datamodule=data())
    return module.state_dict()


def data() -> DigitsDataModule:
    return DigitsDataModule(batch_size=64, calibration_size=128)


def module_of(weights: dict[str, torch.Tensor]) -> LitClassifier:
    module = LitClassifier()
    module.load_state_dict(weights)
    return module


def drop_of(module: LitClassifier, weights: dict[str, torch.Tensor]) -> Drop:
    batches = list(data().val_dataloader())
    return paired_drop(rightness(module_of(weights).eval(), batches), rightness(module, batches))


def test_a_plan_and_a_module_that_follows_it(trained, tmp_path) -> None:
    module = module_of(trained)
    limits = PrecisionConstraints(max_accuracy_drop=0.03, min_compression=4)
    callback = MixedPrecision(
        limits,
        str(tmp_path / "plan.yaml"),
        formats=("int8", "int4"),
        module="net",
        calibrator="max",
        checkpoint=str(tmp_path / "mixed.ckpt"),
    )
    export = Export(tmp_path / "m.onnx", module="net", engine=False)
    trainer(tmp_path, [callback, export]).validate(module, datamodule=data(), verbose=False)
    report = callback.report
    assert report.kept
    assert [rung.name for rung in report.rungs] == ["ptq", "repair", "mixed precision"]
    plan = PrecisionPlan.from_yaml(tmp_path / "plan.yaml")
    assert (
        plan == report.plan == PrecisionPlan.of(module.net) == PrecisionPlan.of(tmp_path / "m.onnx")
    )
    assert "int4" in plan.values()
    assert drop_of(module, trained) == report.rungs[-1].drop
    restored = load_from_checkpoint(LitClassifier, tmp_path / "mixed.ckpt")
    assert PrecisionPlan.of(restored.net) == plan
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(restored.eval()(x), module.eval()(x), atol=0, rtol=0)


def test_the_last_rung_is_a_fit_of_a_copy(trained, tmp_path, monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise UnreachableError("no plan is enough")

    monkeypatch.setattr("lq.mixed_precision.guard.verified_search", refuse)
    module = module_of(trained)
    layers = PrecisionPlan.of(module.net)
    costs = lq.count_costs(module.net, torch.zeros(1, 1, 8, 8))
    size = 1.001 * costs.total("size_mb", dict.fromkeys(layers, "int4"))
    callback = MixedPrecision(
        PrecisionConstraints(max_accuracy_drop=0.1, max_size_mb=size),
        str(tmp_path / "plan.yaml"),
        formats=("int8", "int4"),
        module="net",
        calibrator="max",
        finetune_epochs=1,
    )
    runner = trainer(tmp_path, [callback])
    runner.validate(module, datamodule=data(), verbose=False)
    assert module.trainer is runner
    assert runner.datamodule.trainer is runner
    names = [rung.name for rung in callback.report.rungs]
    assert names == ["ptq", "repair", "mixed precision", "qat"]
    assert callback.report.rungs[2].note == "no plan is enough"
    trained_weights = callback.report.model.state_dict()["0.weight"]
    assert not torch.equal(trained_weights, trained["net.0.weight"])
    assert callback.report.kept
    assert drop_of(module, trained) == callback.report.rungs[-1].drop


def test_a_sweep_that_was_killed_goes_on(trained, tmp_path, monkeypatch) -> None:
    limits = PrecisionConstraints(max_accuracy_drop=0.03, min_compression=4)
    arguments = {"formats": ("int8", "int4"), "module": "net", "calibrator": "max", "batches": 2}
    plan, whole = tmp_path / "plan.yaml", tmp_path / "whole.yaml"
    add, added = Journal.add, []

    def counted(journal, *found):
        add(journal, *found)
        added.append(found[:2])
        if len(added) == 7:
            raise RuntimeError("killed")

    monkeypatch.setattr(Journal, "add", counted)
    callback = MixedPrecision(limits, str(plan), **arguments)
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, [callback]).validate(module_of(trained), datamodule=data())
    assert plan.with_suffix(".jsonl").is_file()
    trainer(tmp_path, [callback]).validate(module_of(trained), datamodule=data(), verbose=False)
    assert len(added) == len(set(added))
    assert not plan.with_suffix(".jsonl").exists()
    again = MixedPrecision(limits, str(whole), **arguments)
    trainer(tmp_path, [again]).validate(module_of(trained), datamodule=data(), verbose=False)
    assert PrecisionPlan.from_yaml(plan) == PrecisionPlan.from_yaml(whole)


def test_without_a_name_a_quant_modules_model(trained, tmp_path) -> None:
    net = digits_cnn()
    net.load_state_dict({k.removeprefix("net."): v for k, v in trained.items()})
    module = lq.QuantModule(net, recipe="tensorrt_int8")
    limits = PrecisionConstraints(max_accuracy_drop=0.05)
    callback = MixedPrecision(limits, str(tmp_path / "plan.yaml"), calibrator="max")
    trainer(tmp_path, [callback]).validate(module, datamodule=data(), verbose=False)
    assert set(PrecisionPlan.of(module.model).values()) == {"int8"}
    assert lq.surgery.is_calibrated(module.model)
    before, callback.report = callback.report, None
    trainer(tmp_path, [callback]).validate(module, datamodule=data(), verbose=False)
    assert before.kept
    assert callback.report is None  # it is quantized and calibrated already


def test_limits_that_nothing_keeps_are_told(trained, tmp_path, caplog) -> None:
    limits = PrecisionConstraints(max_size_mb=0.001)
    callback = MixedPrecision(limits, str(tmp_path / "p.yaml"), module="net", calibrator="max")
    runner = trainer(tmp_path, [callback])
    runner.validate(module_of(trained), datamodule=data(), verbose=False)
    assert not callback.report.kept
    assert "No rung keeps to the limits" in caplog.text
    assert "the nearest is" in callback.report.rungs[-1].note


def test_a_fit_is_left_alone(trained, tmp_path) -> None:
    module = module_of(trained)
    limits = PrecisionConstraints(max_accuracy_drop=0.05)
    callback = MixedPrecision(limits, str(tmp_path / "plan.yaml"), module="net")
    trainer(tmp_path, [callback], fast_dev_run=True).fit(module, datamodule=data())
    assert not lq.surgery.quantizers(module)
    assert not (tmp_path / "plan.yaml").exists()


def test_what_is_refused(tmp_path) -> None:
    limits = PrecisionConstraints(max_accuracy_drop=0.05)
    with pytest.raises(ValueError, match="`batches` to be at least 1"):
        MixedPrecision(limits, batches=0)
    with pytest.raises(ValueError, match="is a directory"):
        MixedPrecision(limits, plan=str(tmp_path))
