"""QuantModule: training, measuring, checkpoints."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

import lq
from lq.callbacks import QuantizationAwareTraining
from lq.data import DigitsDataModule
from lq.models import digits_cnn
from lq.surgery import quantized_layers, quantizers
from tests.lit import trainer


def fitted(folder, **kwargs):
    torch.manual_seed(0)
    module = lq.QuantModule("lq.models.digits_cnn", **kwargs)
    callbacks = [
        QuantizationAwareTraining(calibration_batches=2),
        ModelCheckpoint(folder, save_last=True, save_top_k=0),
    ]
    run = trainer(folder, callbacks, max_epochs=1, limit_train_batches=8)
    run.fit(module, datamodule=DigitsDataModule())
    return module, run


def test_load_from_checkpoint_alone(tmp_path):
    module, _ = fitted(tmp_path)
    loaded = lq.QuantModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_checkpoint_needs_no_recipe_file(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    lq.Recipe.from_dict({"rules": [{"name": "9", "format": "fp16"}]}).to_yaml(recipe)
    fitted(tmp_path, recipe=str(recipe))
    recipe.unlink()
    loaded = lq.QuantModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.model[9].layer_spec.weights.format == "fp16"


def test_test_metrics_equal_evaluate(tmp_path):
    module, run = fitted(tmp_path)
    data = DigitsDataModule()
    (logged,) = run.test(module, datamodule=data, verbose=False)
    measured = lq.evaluate(module.model, data.test_dataloader())
    assert logged["test/top1"] == pytest.approx(measured.top1)
    assert logged["test/top5"] == pytest.approx(measured.top5)
    logits = torch.cat([module.model.eval()(x) for x, _ in data.test_dataloader()])
    target = torch.cat([y for _, y in data.test_dataloader()])
    assert measured.top1 == pytest.approx(float((logits.argmax(1) == target).float().mean()))


def test_top5_of_three_classes_is_all(tmp_path):
    class ThreeClasses(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 3)

        def forward(self, x):
            return self.fc(x.flatten(1))

    module = lq.QuantModule(ThreeClasses(), recipe=None)
    batches = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))]
    (logged,) = trainer(tmp_path).test(module, torch.utils.data.DataLoader(batches, None))
    assert logged["test/top5"] == 1.0


@pytest.mark.parametrize("kind", ["safetensors", "pth", "ckpt"])
def test_starting_weights(tmp_path, kind):
    torch.manual_seed(1)
    source = digits_cnn()
    path = tmp_path / f"w.{kind}"
    if kind == "safetensors":
        save_file(source.state_dict(), path)
    elif kind == "pth":
        torch.save(source.state_dict(), path)
    else:
        weights = {f"model.{k}": v for k, v in source.state_dict().items()}
        torch.save({"state_dict": weights}, path)
    module = lq.QuantModule("lq.models.digits_cnn", weights=path)
    module.configure_model()
    module.configure_model()
    assert torch.equal(module.model[0].weight, source[0].weight)
    assert not any(q.is_calibrated for q in quantizers(module).values())


def test_weights_that_do_not_fit(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    module = lq.QuantModule("lq.models.digits_cnn", weights=tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth.*to fit Sequential.*[Mm]issing"):
        module.configure_model()


def test_module_given_as_an_object(tmp_path):
    torch.manual_seed(0)
    module = lq.QuantModule(digits_cnn(), recipe="tensorrt_int8")
    module.configure_model()
    lq.calibrate(module.model, [torch.randn(4, 1, 8, 8)])
    run = trainer(tmp_path)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "m.ckpt")
    loaded = lq.QuantModule.load_from_checkpoint(
        tmp_path / "m.ckpt", model=digits_cnn(), weights_only=True
    )
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_float_training_has_no_quantizers():
    module = lq.QuantModule("lq.models.digits_cnn", recipe=None)
    module.configure_model()
    assert not quantized_layers(module)


def test_images_of_nan(tmp_path):
    batches = [(torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2, dtype=torch.long))]
    module = lq.QuantModule("lq.models.digits_cnn", recipe=None)
    with pytest.raises(ValueError, match="finite loss, but the test images give nan"):
        trainer(tmp_path).test(module, torch.utils.data.DataLoader(batches, None))


def test_empty_batch(tmp_path):
    batches = [(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))]
    module = lq.QuantModule("lq.models.digits_cnn", recipe=None)
    with pytest.raises(ValueError, match="got an empty one"):
        trainer(tmp_path).test(module, torch.utils.data.DataLoader(batches, None))
