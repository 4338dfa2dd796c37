"""Export at the end of a fit, validation or test."""

import json

import lightning as L
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lq
from lq.callbacks import Export, QuantizationAwareTraining
from lq.export import engine
from tests.lit import LitWithEvaluation, autoencoder, loader, trainer


def test_submodule_of_a_plain_module(tmp_path):
    module = autoencoder()
    export = Export(tmp_path / "out" / "encoder.onnx", module="encoder")
    callbacks = [QuantizationAwareTraining(calibration_batches=2), export]
    trainer(tmp_path, callbacks).fit(module, loader())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "encoder.engine",
        "encoder.engine.json",
        "encoder.onnx",
    ]
    assert export.report.top1_agreement == 1.0
    session = ort.InferenceSession(tmp_path / "out" / "encoder.onnx")
    x = torch.rand(3, 784)
    exported = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        expected = module.eval().encoder(x)
    torch.testing.assert_close(torch.from_numpy(exported), expected, atol=2e-2, rtol=0)
    info = json.loads((tmp_path / "out" / "encoder.engine.json").read_text())
    assert info["formats"] == {"0": "int8", "2": "int8"}


@pytest.mark.parametrize("run", ["validate", "test"])
def test_after_an_evaluation(tmp_path, run):
    class WithValidation(LitWithEvaluation):
        pass

    module = autoencoder(WithValidation)
    lq.calibrate(lq.quantize(module.encoder, "tensorrt_int8"), [torch.rand(4, 784)])
    export = Export(tmp_path / "m.onnx", module="encoder", engine=False)
    runner = trainer(tmp_path, [export])
    getattr(runner, run)(module, loader(), verbose=False)
    assert (tmp_path / "m.onnx").is_file()
    assert not (tmp_path / "m.engine").exists()


def test_without_a_builder_the_onnx_is_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(engine, "BUILDERS", ("no_such_builder",))
    export = Export(tmp_path / "m.onnx", module="encoder")
    trainer(tmp_path, [export]).fit(autoencoder(), loader())
    assert (tmp_path / "m.onnx").is_file()
    assert "pip install tensorrt-rtx" in caplog.text
    assert export.engine_path is None


class Unused(LitWithEvaluation):
    def __init__(self):
        super().__init__(nn.Linear(784, 4), nn.Linear(4, 784))
        self.unused = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("module", "match"), [("unused", "never was"), (None, "never was|name a part")]
)
def test_what_cannot_be_exported(tmp_path, module, match):
    export = Export(tmp_path / "m.onnx", module=module)
    with pytest.raises((RuntimeError, ValueError), match=match):
        trainer(tmp_path, [export]).fit(Unused(), loader())
    assert not (tmp_path / "m.onnx").exists()


def test_hook_is_gone_after_an_exception(tmp_path):
    class Fails(L.Callback):
        def on_train_batch_start(self, *args):
            raise ZeroDivisionError

    module = autoencoder()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, [Export(tmp_path / "m.onnx", "encoder"), Fails()]).fit(module, loader())
    assert not module.encoder._forward_pre_hooks


def test_what_the_target_cannot_run_is_refused_before_training(tmp_path):
    steps = []

    class Count(L.Callback):
        def on_train_batch_start(self, *args):
            steps.append(1)

    callbacks = [
        QuantizationAwareTraining({"inputs": "int4"}),
        Export(tmp_path / "m.onnx", "encoder"),
        Count(),
    ]
    with pytest.raises(ValueError, match=r"cannot run layer '0'.*int4"):
        trainer(tmp_path, callbacks).fit(autoencoder(), loader())
    assert not steps
    with pytest.raises(ValueError, match="tensorflow"):
        Export("m.onnx", target="tensorflow")


def test_keyword_inputs(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(784, 4)

        def forward(self, x, mask):
            return self.fc(x * mask)

    class Lit(LitWithEvaluation):
        def training_step(self, batch, batch_idx):
            x = batch[0].flatten(1)
            return self.decoder(self.encoder(x, mask=torch.ones_like(x))).square().mean()

    export = Export(tmp_path / "m.onnx", "encoder", engine=False)
    trainer(tmp_path, [export]).fit(Lit(Masked(), nn.Linear(4, 784)), loader())
    session = ort.InferenceSession(tmp_path / "m.onnx")
    assert {i.name for i in session.get_inputs()} == {"x", "mask"}
