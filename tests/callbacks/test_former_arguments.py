"""The arguments of Lightning 1.9's callback, and what its published tests say that users relied on.

Told anew from tests/tests_pytorch/callbacks/test_quantization.py of Lightning 1.9.
"""

from __future__ import annotations

import copy
import sys

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq import cli
from lq.callbacks import QuantizationAwareTraining
from lq.surgery import quantizers

DEPRECATED = (DeprecationWarning, UserWarning)


class Regression(L.LightningModule):
    """Three layers with activations by name, as in the published tests."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (16, 64, 64)
        for i, (inputs, outputs) in enumerate(zip(sizes, (*sizes[1:], 64), strict=True)):
            setattr(self, f"layer_{i}", nn.Linear(inputs, outputs))
            setattr(self, f"layer_{i}a", nn.ReLU())
        self.layer_end = nn.Linear(64, 1)

    def forward(self, x):
        for i in range(3):
            x = getattr(self, f"layer_{i}a")(getattr(self, f"layer_{i}")(x))
        return self.layer_end(x)

    def _loss(self, batch):
        return nn.functional.mse_loss(self(batch[0]).squeeze(1), batch[1])

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data(samples: int = 256) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 16, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].sum(1) + 5), 32)


def trainer(tmp_path, *callbacks, **kwargs) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        default_root_dir=tmp_path, callbacks=list(callbacks), **{"max_epochs": 7, **quiet, **kwargs}
    )


def error(model: nn.Module) -> float:
    """The mean absolute percentage error of the published tests."""
    with torch.no_grad():
        found = [(model.eval()(x).squeeze(1) - y).abs() / y.abs() for x, y in data()]
    return torch.cat(found).mean().item()


def old(**former) -> QuantizationAwareTraining:
    batches = {} if former.get("collect_quantization") else {"calibration_batches": 2}
    with pytest.warns(DEPRECATED, match="of Lightning 1.9's QuantizationAwareTraining is now") as w:
        callback = QuantizationAwareTraining(**batches, **former)
    assert len([x for x in w if "Lightning 1.9" in str(x.message)]) == len(former)
    return callback


@pytest.mark.parametrize("observe", ["average", "histogram"])
@pytest.mark.parametrize("fuse", [True, False])
def test_parity_with_float_training_and_through_checkpoints(tmp_path, observe, fuse) -> None:
    torch.manual_seed(42)
    model = Regression()
    trainer(tmp_path, enable_checkpointing=False).fit(model, data())
    quantized = copy.deepcopy(model)
    fused = [(f"layer_{i}", f"layer_{i}a") for i in range(3)] if fuse else None
    callback = old(
        observer_type=observe,
        modules_to_fuse=fused,
        quantize_on_fit_end=False,
        observer_enabled_stages=("train",),
    )
    fit = trainer(tmp_path / "quantized", callback)
    fit.fit(quantized, data())
    assert error(quantized) < error(model) + 0.05
    path = fit.checkpoint_callback.best_model_path
    # What needed strict=False there, or failed: loading, and going on.
    loaded = lq.load_from_checkpoint(Regression, path)
    assert error(loaded) == error(quantized)
    resumed = Regression()
    again = trainer(tmp_path, copy.deepcopy(callback), max_epochs=8, enable_checkpointing=False)
    again.fit(resumed, data(), ckpt_path=path, weights_only=True)
    assert error(resumed) < error(model) + 0.05


@pytest.mark.parametrize(
    ("former", "message"),
    [
        ({"qconfig": ["abc"]}, "`qconfig` to be one of fbgemm"),
        ({"qconfig": "abc"}, "`qconfig` to be one of fbgemm"),
        ({"observer_type": "abc"}, "`observer_type` to be average or histogram"),
        ({"collect_quantization": "abc"}, "`collect_quantization` to be a number"),
        ({"collect_quantization": 1.2}, "`collect_quantization` to be a number"),
        ({"collect_quantization": lambda trainer: True}, "got a function"),
        ({"collect_quantization": 0}, "`collect_quantization` to be at least 1, but got 0"),
        ({"observer_enabled_stages": ("abc",)}, "to be among train, validate"),
        ({"observer_enabled_stages": ("train", "validate")}, "from training data alone"),
        ({"observer_enabled_stages": ()}, "from training data alone"),
        ({"input_compatible": False}, "takes float inputs"),
        ({"quantize_on_fit_end": True}, "list Export"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Lightning 1.9")
def test_refusals(former, message) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**former)


def test_never_was_one() -> None:
    with pytest.raises(TypeError, match="no argument 'obsever_type'; did you mean 'observer_type'"):
        QuantizationAwareTraining(obsever_type="average")
    with pytest.raises(ValueError, match="but got both"):
        QuantizationAwareTraining("w4a4", qconfig="fbgemm")


def test_modules_to_fuse_that_are_not_there(tmp_path) -> None:
    callback = old(modules_to_fuse=[("layer_0", "layer_NONE")])
    with pytest.raises(ValueError, match="but got 'layer_NONE'; did you mean 'layer_2'"):
        trainer(tmp_path, callback).fit(Regression(), data())


@pytest.mark.parametrize(
    ("former", "settings"),
    [
        ({"qconfig": "fbgemm"}, {"recipe": "onnxruntime_int8"}),
        ({"observer_type": "histogram"}, {"calibrator": "mse"}),
        ({"collect_quantization": 3}, {"calibration_batches": 3}),
        ({"collect_quantization": None}, {"calibration_batches": 2}),
        ({"input_compatible": True}, {"recipe": "tensorrt_int8"}),
    ],
)
def test_what_each_means_today(former, settings) -> None:
    callback = old(**former)
    for name, value in settings.items():
        assert getattr(callback, name) == value


def test_observers_that_average_follow_while_training(tmp_path) -> None:
    module = Regression()
    fit = trainer(tmp_path, old(observer_type="average"), enable_checkpointing=False, max_epochs=1)
    fit.fit(module, data())
    assert module.layer_1.input_quantizer.spec.range == "moving_average"
    assert module.layer_1.weight_quantizer.spec.range == "moving_average"


def test_kernels_with_one_scale_for_all_of_a_weight(tmp_path) -> None:
    module = Regression()
    fit = trainer(tmp_path, old(qconfig="qnnpack"), enable_checkpointing=False, max_epochs=1)
    fit.fit(module, data())
    assert module.layer_1.weight_quantizer.scale.dim() == 0
    assert module.layer_1.input_quantizer.spec.qmax == 255


@pytest.mark.parametrize("count", [1, 3])
def test_how_often_ranges_are_collected(tmp_path, count) -> None:
    """There a counter of forward calls; here the largest inputs of the first batches."""
    module, seen = Regression(), []
    module.layer_0.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    callback = old(collect_quantization=count)
    fit = trainer(tmp_path, callback, enable_checkpointing=False, max_epochs=1)
    fit.fit(module, data())
    amax = module.layer_0.input_quantizer.amax
    torch.testing.assert_close(amax, torch.stack(seen[:count]).max(), rtol=1e-6, atol=0)


def test_validation_test_and_prediction_move_no_range(tmp_path) -> None:
    torch.manual_seed(0)
    module = Regression()
    alone = copy.deepcopy(module)
    former = {"observer_type": "average", "quantize_on_fit_end": False}
    options = {"enable_checkpointing": False, "max_epochs": 4, "limit_train_batches": 3}
    fit = trainer(tmp_path, old(**former), num_sanity_val_steps=1, val_check_interval=1, **options)
    fit.fit(module, data(), data(64))
    fit.validate(module, data(64), verbose=False)
    fit.test(module, data(64), verbose=False)
    fit.predict(module, data(64))
    trainer(tmp_path, old(**former), limit_val_batches=0, **options).fit(alone, data())
    assert quantizers(alone)
    expected = alone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore")  # what else is warned of, is not ours
def test_from_a_config(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = """
    seed_everything: 1
    trainer:
      fast_dev_run: true
      callbacks:
        - class_path: lq.callbacks.QuantizationAwareTraining
          init_args: {calibration_batches: 1, observer_type: histogram}
    model: {model: lq.models.digits_cnn}
    data: {class_path: lq.data.DigitsDataModule}
    """
    (tmp_path / "old.yaml").write_text(config)
    monkeypatch.setattr(sys, "argv", ["lq", "fit", "--config", "old.yaml"])
    with pytest.warns(DEPRECATED, match="is now `calibrator='mse'`"):
        cli.main()


def test_the_order_of_arguments_does_not_matter() -> None:
    former = {"observer_type": "average", "qconfig": "qnnpack"}
    with pytest.warns(DEPRECATED):
        one = QuantizationAwareTraining(**former)
    with pytest.warns(DEPRECATED):
        other = QuantizationAwareTraining(**dict(reversed(former.items())))
    assert one.recipe == other.recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibrator": "entropy", "observer_type": "histogram"}, "leave out `observer_type`"),
        ({"calibration_batches": 7, "collect_quantization": 3}, "leave out `collect_quantization`"),
        ({"observer_enabled_stages": None}, "`observer_enabled_stages` to be names"),
        ({"modules_to_fuse": 5}, "`modules_to_fuse` to be lists of names, but got 5"),
    ],
)
def test_what_is_said_twice_or_wrongly_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**arguments)
