"""QAT through crashes, checkpoints, copies and whatever broke Lightning's own callback."""

import ast
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks import Export, QuantizationAwareTraining
from lq.models import digits_cnn
from lq.restore import load_model
from lq.surgery import is_calibrated, quantized_layers, quantizers
from lq.tensor_spec import RANGES
from tests.lit import LitSmall, Losses, loader, norm, qat, trainer, with_ranges

ROOT = Path(__file__).parents[2]
OURS = "callbacks/test_quantization_aware_training.py"
HERE = "callbacks/test_qat_life_cycle.py"
TOGETHER = "callbacks/test_qat_together.py"
ROWS = {
    "6457, 8485, 11346: quantizers exist before weights load": [
        f"{HERE}::test_crash_and_resume",
        f"{OURS}::test_restored_outputs_are_bit_equal",
    ],
    "12896: test(ckpt_path) after the end of a fit": [f"{HERE}::test_exporting_converts_nothing"],
    "12900: results before and after restoring, before and after converting": [
        f"{HERE}::test_restored_metrics_are_equal",
        f"{HERE}::test_exporting_converts_nothing",
    ],
    "10968: test after fit, on any device": [
        f"{OURS}::test_fit_twice",
        f"{HERE}::test_tested_on_another_device",
    ],
    "7926, 8677, 15862: keywords, several inputs, integers": [f"{HERE}::test_any_inputs"],
    "11047, 8542: pruning": [
        f"{OURS}::test_pruning_in_both_orders",
        f"{TOGETHER}::test_pruned_weights_are_zero_in_the_engine",
    ],
    "8507: validation data move no range": [
        f"{OURS}::test_ranges_are_those_of_the_training_batches",
        f"{HERE}::test_validation_moves_no_range",
    ],
    "12890, 7551: nested and shared modules": [f"{HERE}::test_nested_and_shared"],
    "7552: traced programs quantize their inputs": [f"{HERE}::test_traced_programs_quantize"],
    "16609, 9808, 9878: no torch.ao": [f"{HERE}::test_nothing_of_torch_ao"],
    "8570: every snippet of the docs runs": ["test_docs.py::test_snippet_runs"],
    "pytorch 35182, 37270: two processes": [
        "test_distributed.py::test_two_ranks_share_ranges_and_weights",
        f"{TOGETHER}::test_two_ranks_are_one_with_the_joint_batch",
    ],
}
"""Reports against Lightning's removed quantization callback -> the tests that hold them."""


@pytest.mark.parametrize("tests", ROWS.values(), ids=ROWS.keys())
def test_every_report_has_its_tests(tests):
    for test in tests:
        file, name = test.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


class Normed(LitSmall):
    """With BatchNorm, Adam and a schedule: whatever else has a state."""

    def __init__(self):
        super().__init__(norm)

    def configure_optimizers(self):
        optimizer = optim.Adam(self.parameters(), 1e-4)
        return [optimizer], [optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Crash(L.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 3:
            raise RuntimeError("the power is gone")


class Metrics(Losses):
    """Notes the validation's metrics besides."""

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(trainer.callback_metrics["val_loss"].item())


AVERAGES = {
    "alone": lambda: [],
    "ema": lambda: [EMAWeightAveraging(decay=0.9)],
    "swa": lambda: [StochasticWeightAveraging(swa_lrs=1e-4, swa_epoch_start=2)],
}


def run(folder, averaging, extra=(), **kwargs):
    """Calibrate in the second of five epochs, over the batch that the crash in it comes after."""
    schedule = {"start_epoch": 1, "calibration_batches": 5, "freeze_scales_epoch": 4}
    if averaging != "swa":
        schedule["freeze_batchnorm_epoch"] = 3
    metrics, module = Metrics(), Normed()
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    callbacks = [qat(**schedule), metrics, *AVERAGES[averaging](), *extra, last]
    fit = trainer(folder, callbacks, max_epochs=5)
    fit.fit(module, loader(), loader(scale=2.0), weights_only=True, **kwargs)
    return {
        "state": module.state_dict(),
        "optimizer": fit.optimizers[0].state_dict()["state"],
        "schedule": fit.optimizers[0].param_groups[0]["lr"],
        "metrics": metrics.seen,
    }


@pytest.mark.parametrize("averaging", AVERAGES)
def test_crash_and_resume(tmp_path, averaging):
    """As if nothing had happened: weights, ranges, states of the optimizer, metrics."""
    whole = run(tmp_path / "whole", averaging)
    assert len(whole["optimizer"]) == 8 + 4  # weights, biases and BatchNorm; scales and an offset
    for epoch in (1, 2, 3):
        folder = tmp_path / str(epoch)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run(folder, averaging, [Crash(epoch)])
        resumed = run(folder, averaging, ckpt_path=folder / "last.ckpt")
        # SWA has one epoch more; an epoch has 8 losses and then a metric of the validation.
        epochs = (6 if averaging == "swa" else 5) - epoch
        assert resumed["metrics"] == whole["metrics"][-9 * epochs :]
        expected = {**whole, "metrics": resumed["metrics"]}
        torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


@pytest.fixture
def float_checkpoint(tmp_path):
    module, fit = Normed(), trainer(tmp_path)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "float.ckpt")
    return tmp_path / "float.ckpt"


def test_a_float_checkpoint_starts_as_weights(tmp_path, float_checkpoint):
    module, other = Normed(), Normed()
    module.load_state_dict(torch.load(float_checkpoint, weights_only=True)["state_dict"])
    trainer(tmp_path, [qat()]).fit(module, loader())

    trainer(tmp_path).fit(other, loader())
    trainer(tmp_path, [qat()]).fit(other, loader())
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", RANGES)
def test_a_float_fit_goes_on_quantized_unless_scales_are_learned(tmp_path, kind, float_checkpoint):
    module, losses = Normed(), Losses()
    fit = trainer(tmp_path, [qat(with_ranges(kind)), losses], max_epochs=3)
    arguments = {"ckpt_path": float_checkpoint, "weights_only": True}
    if kind in ("lsq", "pact"):
        with pytest.raises(ValueError, match=r"optimizer has no learned.*module\.load_state_dict"):
            fit.fit(module, loader(), **arguments)
    else:
        fit.fit(module, loader(), **arguments)
        assert len(losses.seen) == 8
        assert is_calibrated(module)


@pytest.mark.parametrize(
    ("older", "newer", "named"),
    [
        pytest.param({}, {"name": "decoder", "format": "skip"}, "not in the model", id="missing"),
        pytest.param({"name": "decoder", "format": "skip"}, {}, "missing", id="added"),
        pytest.param({"name": "decoder", "format": "fp16"}, {}, "missing", id="changed"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_another_recipe_names_the_layer(tmp_path, stage, older, newer, named):
    fit = trainer(tmp_path, [QuantizationAwareTraining({"rules": [older] if older else []})])
    fit.fit(Normed(), loader())
    fit.save_checkpoint(tmp_path / "older.ckpt")
    callback = QuantizationAwareTraining({"rules": [newer] if newer else []})
    start = getattr(trainer(tmp_path, [callback], max_epochs=3), stage)
    with pytest.raises(RuntimeError, match=rf"another recipe: .*2 {named} \(decoder\.input_quant"):
        start(Normed(), loader(), ckpt_path=tmp_path / "older.ckpt", weights_only=True)


WITHOUT_LIGHTNING = """
import sys

class Blocked:
    def find_spec(self, name, *args):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")

blocked = {"lightning", "pytorch_lightning", "torchmetrics", "torchvision", "jsonargparse", "onnx"}
sys.meta_path.insert(0, Blocked())

import torch
from torch import nn

import lq
from lq.restore import load_model

class Twin(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 32), nn.BatchNorm1d(32), nn.Linear(32, 16))
        self.decoder = nn.Linear(16, 784)

folder = sys.argv[1]
x = torch.load(f"{folder}/x.pt", weights_only=True)
twin = lq.load_from_checkpoint(Twin, f"{folder}/plain.ckpt").eval()
digits = load_model(f"{folder}/digits.ckpt").eval()
outputs = {"plain": twin.decoder(twin.encoder(x["plain"])), "digits": digits(x["digits"])}
torch.save({k: v.detach() for k, v in outputs.items()}, f"{folder}/y.pt")
"""


def test_checkpoints_load_without_lightning(tmp_path):
    """One of somebody else's module, and one of QuantModule, which says how it is made."""
    plain = Normed()
    digits = lq.QuantModule("lq.models.digits_cnn", {"num_classes": 10}, with_ranges("lsq"))
    for module, data, name in ((plain, loader(), "plain"), (digits, noise(), "digits")):
        fit = trainer(tmp_path, [qat()], max_epochs=1)
        fit.fit(module, data)
        fit.save_checkpoint(tmp_path / f"{name}.ckpt")
        module.eval()
    x = {"plain": torch.rand(3, 784), "digits": torch.randn(3, 1, 8, 8)}
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_LIGHTNING, tmp_path], check=True, cwd=ROOT)
    y = torch.load(tmp_path / "y.pt", weights_only=True)
    assert torch.equal(y["plain"], plain.decoder(plain.encoder(x["plain"])))
    assert torch.equal(y["digits"], digits(x["digits"]))


def noise():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(32, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(32) % 10), 8)


def test_what_load_model_cannot_rebuild(tmp_path):
    module = lq.QuantModule(digits_cnn())
    fit = trainer(tmp_path, [qat()], max_epochs=1)
    fit.fit(module, noise())
    fit.save_checkpoint(tmp_path / "object.ckpt")
    with pytest.raises(ValueError, match=r"object\.ckpt.*pass the float network as `model`"):
        load_model(tmp_path / "object.ckpt")
    x = torch.randn(3, 1, 8, 8)
    loaded = load_model(tmp_path / "object.ckpt", digits_cnn())
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        load_model(tmp_path / "none.ckpt")
    torch.save({"state_dict": digits_cnn().state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt.*lq\.load_from_checkpoint"):
        load_model(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_trained_module(tmp_path, clone):
    """Equal outputs and gradients, and an equal training from there on."""
    module, images = Normed(), next(iter(loader()))[0].flatten(1)
    trainer(tmp_path, [qat()], max_epochs=1).fit(module, loader())
    other, gradients, outputs = clone(module), [], []
    for each in (module, other):
        outputs.append(each.eval().decoder(each.encoder(images)))
        each.train().zero_grad()
        F.mse_loss(each.decoder(each.encoder(images)), images).backward()
        gradients.append([p.grad.clone() for p in each.parameters()])
        trainer(tmp_path, [qat()], max_epochs=1).fit(each, loader())
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_copies_share_what_the_module_shares():
    """Layers and the addition that see one tensor have one quantizer, in a copy its own."""
    model, (images, _) = lq.quantize(digits_cnn(), "tensorrt_int8"), next(iter(noise()))
    lq.calibrate(model, [images], progress=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(images), model.eval()(images))
        assert list(quantizers(other)) == list(quantizers(model))
        assert not set(quantizers(other).values()) & set(quantizers(model).values())


def test_restored_metrics_are_equal(tmp_path):
    module, fit = Normed(), trainer(tmp_path, [qat()])
    fit.fit(module, loader(), loader())
    while_training = fit.callback_metrics["val_loss"].item()
    fit.save_checkpoint(tmp_path / "a.ckpt")
    (restored,) = trainer(tmp_path, [qat()]).validate(
        Normed(), loader(), tmp_path / "a.ckpt", verbose=False, weights_only=True
    )
    assert restored["val_loss"] == while_training


def test_exporting_converts_nothing(tmp_path):
    """The file is made from what the module is, which stays so, is tested and trains on."""
    last = ModelCheckpoint(tmp_path, save_last=True)
    export = Export(tmp_path / "m.onnx", module="encoder", engine=False)
    module, fit = Normed(), trainer(tmp_path, [qat("tensorrt_int8"), export, last])
    fit.fit(module, loader())
    assert (tmp_path / "m.onnx").is_file()
    assert len(quantized_layers(module)) == 3
    arguments = {"weights_only": True, "verbose": False}
    again = trainer(tmp_path, [qat("tensorrt_int8")], max_epochs=3)
    expected = again.test(module, loader(), **arguments)
    for path in (last.best_model_path, last.last_model_path):
        assert again.test(module, loader(), path, **arguments) == expected
        assert again.test(Normed(), loader(), path, **arguments) == expected
    again.fit(module, loader(), ckpt_path=last.last_model_path, weights_only=True)
    assert again.current_epoch == 3


@pytest.mark.gpu
def test_tested_on_another_device(tmp_path):
    module = Normed()
    trainer(tmp_path, [qat()], accelerator="gpu", devices=1).fit(module, loader())
    before = {k: v.cpu() for k, v in module.state_dict().items()}
    results = []
    for device in ("gpu", "cpu"):
        test = trainer(tmp_path, [qat()], accelerator=device, devices=1).test
        results += test(module, loader(), verbose=False)
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-3)
    after = {k: v.cpu() for k, v in module.state_dict().items()}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


class Backbone(nn.Module):
    """Takes integers, two tensors and keywords; holds one block under two names."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.blocks = nn.ModuleDict({"first": nn.Sequential(nn.Linear(16, 16), nn.ReLU())})
        self.again = self.blocks["first"]
        self.head = nn.Linear(16, 10)

    def forward(self, tokens, image, *, gain=1.0, mask=None):
        x = self.blocks["first"](self.embedding(tokens) + image)
        x = self.again(x) * gain
        return self.head(x if mask is None else x * mask)


class Nested(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"backbone": Backbone(), "unused": nn.Identity()})

    def training_step(self, batch, batch_idx):
        image, target = batch
        mask = (target > 0).float()[:, None]
        output = self.net["backbone"](target, image=image, gain=0.5, mask=mask)
        return F.cross_entropy(output, target)

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), 0.01)


def rows():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(32, 16, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(32) % 10), 8)


def test_any_inputs(tmp_path):
    """Integers pass as they are; what was given by name, by position and by default arrives."""
    module = Nested()
    trainer(tmp_path, [qat(with_ranges("lsq"))]).fit(module, rows())
    backbone = module.net["backbone"].eval()
    image, tokens = next(iter(rows()))
    output = backbone(tokens, image)
    assert torch.equal(output, backbone(image=image, tokens=tokens))
    # By hand, from the integers on.
    first, head = backbone.blocks["first"][0], backbone.head
    x = backbone.embedding.weight[tokens] + image
    for layer in (first, first, head):
        scale = layer.input_quantizer.scale
        x = (x / scale).round().clamp(-128, 127) * scale
        scale = layer.weight_quantizer.scale[:, None]
        weight = (layer.weight / scale).round().clamp(-127, 127) * scale
        x = F.linear(x, weight, layer.bias)
        x = x if layer is head else x.relu()
    torch.testing.assert_close(output, x)


@pytest.mark.parametrize("module_name", [None, "net.backbone"], ids=["whole", "backbone"])
def test_nested_and_shared(tmp_path, module_name):
    """A block under two names is quantized once, trained, saved and restored as one."""
    module = Nested()
    fit = trainer(tmp_path, [qat(with_ranges("lsq"), module=module_name)])
    fit.fit(module, rows())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    backbone = module.net["backbone"]
    assert backbone.again is backbone.blocks["first"]
    assert set(quantized_layers(backbone)) == {"blocks.first.0", "head"}
    loaded = lq.load_from_checkpoint(Nested, tmp_path / "a.ckpt").net["backbone"]
    assert loaded.again is loaded.blocks["first"]
    image, tokens = next(iter(rows()))
    assert torch.equal(loaded(tokens, image), backbone(tokens, image))


def test_validation_moves_no_range(tmp_path):
    """Validated on data ten times as large, before, between and after: trained all the same."""
    states = []
    for validated in (True, False):
        module, fit = Normed(), trainer(tmp_path, [qat()], val_check_interval=2)
        fit.fit(module, loader(), loader(scale=10.0) if validated else None)
        states.append(module.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes become constants
@pytest.mark.parametrize("kind", RANGES)
def test_traced_programs_quantize(kind):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 6)
    lq.calibrate(lq.quantize(model, with_ranges(kind)), [x], progress=False)
    beyond = 3 * x
    expected = model.eval()(beyond)
    assert not torch.equal(expected, lq.dequantize(copy.deepcopy(model))(beyond))
    traced = torch.jit.trace(model, x, check_trace=False)
    exported = torch.export.export(model, (x,)).module()
    for program in (traced, exported):
        assert torch.equal(program(beyond), expected)


def test_nothing_of_torch_ao():
    files = [*(ROOT / "lq").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr != "ao", file
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                assert not any(n == "ao" or n.startswith("torch.ao") for n in names), file
