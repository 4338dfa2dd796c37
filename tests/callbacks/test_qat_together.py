"""QAT together with what else a fit may have, compared with the same written in plain torch."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader, Subset, TensorDataset

import lq
from lq.collector import RangeCollector
from lq.models import digits_cnn
from lq.surgery import quantized_layers, quantizers
from lq.tensor_spec import RANGES
from tests.lit import (
    LitAutoEncoder,
    LitSmall,
    Losses,
    every_range,
    loader,
    needs_gloo,
    norm,
    qat,
    trainer,
    with_ranges,
)


class UsedTwice(LitAutoEncoder):
    def __init__(self):
        torch.manual_seed(0)
        twice = nn.Linear(32, 32)
        encoder = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), twice, nn.ReLU(), twice)
        super().__init__(encoder, nn.Linear(32, 784))


class Frozen(LitSmall):
    def __init__(self):
        super().__init__()
        self.encoder[0].requires_grad_(False)


def reconstruction(module, images):
    x = images.flatten(1)
    return F.mse_loss(module.decoder(module.encoder(x)), x)


def by_hand(module, recipe, calibration_batches=2, accumulate=1, clip=None, autocast=None):
    """Train as a fit of two epochs should, without Lightning."""
    scaler = torch.amp.GradScaler("cpu", enabled=autocast is torch.float16)
    collector = RangeCollector(lq.quantize(module, recipe))
    collector.start()
    optimizer = module.configure_optimizers()
    for number, (images, _) in enumerate([*loader(), *loader()], 1):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = reconstruction(module, images)
        scaler.scale(loss / accumulate).backward()
        if number % accumulate == 0:
            scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if number == calibration_batches:
            collector.finish()
    return module.state_dict()


def float16_on_cpu():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(state[k], expected[k])] == []


@pytest.mark.parametrize(
    ("make", "lightning", "hand"),
    [
        pytest.param(LitSmall, {}, {}, id="plain"),
        pytest.param(lambda: LitSmall(norm), {}, {}, id="batchnorm"),
        pytest.param(LitSmall, {"accumulate_grad_batches": 4}, {"accumulate": 4}, id="accumulated"),
        pytest.param(LitSmall, {"gradient_clip_val": 0.01}, {"clip": 0.01}, id="clipped"),
        pytest.param(
            LitSmall,
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01},
            {"accumulate": 2, "clip": 0.01, "calibration_batches": 3},
            id="calibrated-while-accumulating",
        ),
        pytest.param(
            LitSmall, {"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}, id="bf16-mixed"
        ),
        pytest.param(
            LitSmall,
            {"plugins": float16_on_cpu, "gradient_clip_val": 0.01},
            {"autocast": torch.float16, "clip": 0.01},
            id="16-mixed-with-scaler",
        ),
        pytest.param(Frozen, {}, {}, id="frozen-layer"),
        *(pytest.param(UsedTwice, {}, {"recipe": k}, id=f"used-twice-{k}") for k in RANGES),
    ],
)
def test_a_fit_is_the_plain_loop(tmp_path, make, lightning, hand):
    recipe = with_ranges(hand["recipe"]) if "recipe" in hand else every_range()
    hand, module = {**hand, "recipe": recipe}, make()
    options = {key: value() if callable(value) else value for key, value in lightning.items()}
    callback = qat(recipe, calibration_batches=hand.get("calibration_batches", 2))
    trainer(tmp_path, [callback], **options).fit(module, loader())
    state = module.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert_equal(state, by_hand(make(), **hand))


def test_16_mixed_on_a_cpu_is_bf16_mixed(tmp_path):
    """Lightning has no float16 for a CPU: it says so and takes bfloat16."""
    states = []
    for precision in ("16-mixed", "bf16-mixed"):
        run, module = trainer(tmp_path, [qat()], precision=precision), LitSmall()
        assert run.precision == "bf16-mixed"
        run.fit(module, loader())
        states.append(module.state_dict())
    assert_equal(*states)


class ByTurns(LitSmall):
    """Two optimizers, stepped by hand; each sees the parameters of the other as constants."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(reconstruction(self, batch[0]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        first = optim.SGD(self.encoder.parameters(), 0.05, momentum=0.9)
        return first, optim.Adam(self.decoder.parameters(), 1e-3)


def test_several_optimizers_by_hand(tmp_path):
    module, other = ByTurns(), ByTurns()
    trainer(tmp_path, [qat()], max_epochs=1).fit(module, loader())

    collector = RangeCollector(lq.quantize(other, every_range()))
    collector.start()
    optimizers = other.configure_optimizers()
    for number, (images, _) in enumerate(loader(), 1):
        for optimizer in optimizers:
            parameters = optimizer.param_groups[0]["params"]
            gradients = torch.autograd.grad(
                reconstruction(other, images), parameters, allow_unused=True
            )
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        if number == 2:
            collector.finish()
    assert_equal(module.state_dict(), other.state_dict())


def test_learning_rate_finder(tmp_path):
    """Lightning puts it before all callbacks; it runs in float, and calibration starts after it."""
    found, given = LitSmall(), LitSmall()
    finder = LearningRateFinder(min_lr=1e-4, max_lr=0.5, num_training_steps=16)
    trainer(tmp_path, [qat(), finder]).fit(found, loader())
    assert found.lr != given.lr
    given.lr = found.lr
    trainer(tmp_path, [qat()]).fit(given, loader())
    assert_equal(found.state_dict(), given.state_dict())


class Finetune(BaseFinetuning):
    """Trains the encoder from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.encoder)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.encoder, optimizer, lr=0.01)


class States(L.Callback):
    """Copies the module after every step, before what is listed later sees it."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append({k: v.clone() for k, v in pl_module.state_dict().items()})


@pytest.mark.parametrize("ours_first", [True, False], ids=["qat-finetuning", "finetuning-qat"])
def test_layers_frozen_for_a_while(tmp_path, ours_first):
    states, module, callbacks = States(), LitSmall(), [qat(), Finetune()]
    callbacks = callbacks if ours_first else callbacks[::-1]
    trainer(tmp_path, [*callbacks, states]).fit(module, loader())
    calibrated, before, after = (states.seen[i] for i in (1, 7, 15))
    changed = {k for k in before if not torch.equal(before[k], calibrated[k])}
    weights = {f"encoder.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    learned = {f"encoder.2.input_quantizer.{name}" for name in ("scale", "offset")}
    assert not changed & weights
    # What is in the encoder when it is frozen is frozen with it.
    assert changed & learned == (set() if ours_first else learned)
    assert {k for k in before if not torch.equal(before[k], after[k])} > weights | learned


@pytest.mark.parametrize("start_epoch", [0, 1], ids=["calibrated-first", "calibrated-late"])
@pytest.mark.parametrize("decay", [0.5, None], ids=["ema", "mean"])
def test_averages(tmp_path, decay, start_epoch):
    """Weights and ranges end as the averages over all steps, ranges from calibration on."""
    states, module = States(), LitSmall()
    averaging = EMAWeightAveraging(decay=decay) if decay else WeightAveraging()
    run = trainer(tmp_path, [qat(start_epoch=start_epoch), states, averaging])
    run.fit(module, loader())
    average, calibrated = dict(states.seen[0]), 8 * start_epoch + 1
    for number, state in enumerate(states.seen[1:], 1):
        for key in state.keys() - {"lq_recipe"}:
            begins = key.endswith(("scale", "offset")) and number <= calibrated
            share = 1.0 if begins else 1 - decay if decay else 1 / (number + 1)
            average[key] = average[key].lerp(state[key], share) if share < 1 else state[key]
    torch.testing.assert_close(module.state_dict(), average, rtol=1e-5, atol=1e-6)
    assert all(q.is_calibrated for q in quantizers(module).values())


def test_the_average_is_validated_with_its_ranges(tmp_path):
    module = LitSmall(norm)
    run = trainer(tmp_path, [qat(), EMAWeightAveraging(decay=0.9)])
    run.fit(module, loader(), loader())
    while_training = run.callback_metrics["val_loss"]
    (afterwards,) = run.validate(module, loader(), verbose=False)
    assert afterwards["val_loss"] == while_training


def test_the_average_has_the_ranges_of_weights_that_begin_before_inputs(tmp_path):
    """Meanwhile the average is validated with its weights quantized, its inputs not yet."""
    losses = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(trainer.callback_metrics["val_loss"].item())

    callbacks = [qat(start_epoch=1, inputs_start_epoch=2), EMAWeightAveraging(decay=0.9), Watch()]
    trainer(tmp_path, callbacks, max_epochs=3).fit(LitSmall(), loader(), loader())
    assert len(losses) == 4
    assert all(0 < loss < 1 for loss in losses)


@pytest.mark.parametrize("start_epoch", [0, 2], ids=["calibrated-first", "calibrated-late"])
def test_stochastic_weight_averaging(tmp_path, start_epoch):
    """Weights are means over starts of epochs; a pass with them finds BatchNorm's statistics.

    Lightning steps the optimizer once more after that pass, with the gradients of the last epoch.
    """
    states, module = States(), LitSmall(norm)
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    callbacks = [qat(start_epoch=start_epoch), states, averaging]
    trainer(tmp_path, callbacks, max_epochs=4).fit(module, loader())
    starts, averaged = [states.seen[i] for i in (7, 15, 23)], states.seen[-2]
    for name in dict(module.named_parameters()):
        assert averaged[name].isfinite().all()
        if "quantizer" not in name:
            mean = torch.stack([state[name] for state in starts]).mean(0)
            torch.testing.assert_close(averaged[name], mean)
    found = module.encoder[1].running_mean.clone()
    module.load_state_dict(averaged)
    outputs = [module.eval().encoder[0](x.flatten(1)).detach() for x, _ in loader()]
    expected = torch.stack([y.mean(0) for y in outputs]).mean(0)
    # The range of the first layer's input follows the batches of that pass.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-3)


def test_frozen_statistics_and_stochastic_weight_averaging_exclude_each_other(tmp_path):
    callbacks = [qat(freeze_batchnorm_epoch=1), StochasticWeightAveraging(swa_lrs=0.05)]
    with pytest.raises(ValueError, match=r"freeze_batchnorm_epoch.*StochasticWeightAveraging"):
        trainer(tmp_path, callbacks).fit(LitSmall(norm), loader())


class Digits(L.LightningModule):
    """Convolutions, BatchNorm and a residual addition, on noise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = digits_cnn()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), 0.01, momentum=0.9)


def digits():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(32, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(32) % 10), 8)


def exported_codes(net, path):
    """Return the integers of all weights in the graph of a network, by layer."""
    import onnx  # here, as spawned ranks import this file

    lq.export_onnx(net.eval(), next(iter(digits()))[0], path)
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    return {name: torch.tensor(stored[f"{name}.weight.int8"]) for name in quantized_layers(net)}


@pytest.mark.parametrize(
    ("kind", "ours_first", "permanent"),
    [
        pytest.param("lsq", True, False, id="qat-pruning-masked"),
        pytest.param("moving_average", False, True, id="pruning-qat-removed"),
    ],
)
def test_pruned_weights_are_zero_in_the_engine(tmp_path, kind, ours_first, permanent):
    pruning = ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=permanent)
    callbacks = [qat(with_ranges(kind)), pruning]
    callbacks = callbacks if ours_first else callbacks[::-1]
    module = Digits()
    trainer(tmp_path, callbacks).fit(module, digits())
    codes = exported_codes(module.net, tmp_path / "pruned.onnx")
    layers = quantized_layers(module.net)
    zeros = torch.cat([(layer.weight == 0).flatten() for layer in layers.values()])
    assert zeros.float().mean() > 0.7  # half of the weights, and after an epoch half of the rest
    for name, layer in layers.items():
        zero = layer.weight == 0
        assert (layer.weight_quantizer(layer.weight)[zero] == 0).all()
        assert (codes[name][zero] == 0).all()
        assert codes[name][~zero].any()


@pytest.mark.parametrize("ours_first", [True, False], ids=["qat-pruning", "pruning-qat"])
def test_a_pruned_checkpoint_is_tested_and_goes_on(tmp_path, ours_first):
    def run(epochs):
        callbacks = [qat("tensorrt_int8"), ModelPruning("l1_unstructured", amount=0.5)]
        return trainer(tmp_path, callbacks if ours_first else callbacks[::-1], max_epochs=epochs)

    module, path = Digits(), tmp_path / "pruned.ckpt"
    fit = run(2)
    fit.fit(module, digits())
    fit.save_checkpoint(path)
    expected = run(2).test(module, digits(), verbose=False)
    assert run(2).test(Digits(), digits(), path, verbose=False, weights_only=True) == expected
    run(3).fit(Digits(), digits(), ckpt_path=path, weights_only=True)


class TwoOfFour(nn.Module):
    """Keeps the two largest of each four weights in a row."""

    def __init__(self, weight):
        super().__init__()
        groups = weight.detach().flatten(1).unflatten(1, (-1, 4))
        mask = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2).indices, 1.0)
        self.register_buffer("mask", mask.reshape(weight.shape))

    def forward(self, weight):
        return weight * self.mask


def mask_layers(net):
    """Mask all layers with rows of fours."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    masked = [layer for layer in layers if layer.weight[0].numel() % 4 == 0]
    for layer in masked:
        parametrize.register_parametrization(layer, "weight", TwoOfFour(layer.weight))
    return masked


@pytest.mark.parametrize(
    ("first", "kind"), [("mask", "frozen"), ("quantize", "lsq")], ids=["mask-first", "mask-last"]
)
def test_two_of_four_stay(tmp_path, kind, first):
    module = Digits()
    if first == "quantize":
        lq.quantize(module, with_ranges(kind))
    masked = mask_layers(module.net)
    start = [layer.weight.detach().clone() for layer in masked]
    trainer(tmp_path, [qat(with_ranges(kind))]).fit(module, digits())
    codes = exported_codes(module.net, tmp_path / "sparse.onnx")
    names = {layer: name for name, layer in quantized_layers(module.net).items()}
    assert len(masked) == 4
    for layer, weight in zip(masked, start, strict=True):
        stored = codes[names[layer]]
        assert (stored[weight == 0] == 0).all()
        assert ((stored.flatten(1).unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all()
        assert not torch.equal(layer.weight, weight)


def without_channels(net):
    """Return a copy of a Conv-BatchNorm-ReLU-Conv network without the channels that are zero."""
    conv, norm, relu, following = copy.deepcopy(net)
    keep = conv.weight.flatten(1).any(1)
    slim = nn.Conv2d(conv.in_channels, int(keep.sum()), 3, bias=False)
    slim.weight.data = conv.weight.data[keep]
    slim_norm = nn.BatchNorm2d(slim.out_channels)
    slim_norm.load_state_dict({k: v[keep] if v.dim() else v for k, v in norm.state_dict().items()})
    slim_following = nn.Conv2d(slim.out_channels, following.out_channels, 3)
    slim_following.weight.data = following.weight.data[:, keep]
    slim_following.bias.data = following.bias.data
    return nn.Sequential(slim, slim_norm, relu, slim_following), keep


def test_channels_pruned_before_quantization(tmp_path):
    """Channels that are zero change nothing: the net quantized without them gives the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    net.append(nn.Conv2d(16, 8, 3))
    prune.ln_structured(net[0], "weight", amount=0.5, n=2, dim=0)
    prune.remove(net[0], "weight")
    net[3].weight.data[:, ~net[0].weight.flatten(1).any(1)] = 0
    slim, keep = without_channels(net)
    assert keep.sum() == 8
    images = next(iter(digits()))[0]
    for model in (net, slim):
        lq.calibrate(lq.quantize(model, "tensorrt_int8"), [images], progress=False)
    assert torch.equal(slim[0].weight_quantizer.scale, net[0].weight_quantizer.scale[keep])
    assert (net[0].weight_quantizer.scale > 0).all()
    torch.testing.assert_close(slim.eval()(images), net.eval()(images))

    module = Digits()
    module.net = slim.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(8, 10))
    lq.dequantize(module.net)
    trainer(tmp_path, [qat(with_ranges("lsq"))]).fit(module, digits())
    codes = exported_codes(module.net, tmp_path / "slim.onnx")
    assert [tuple(c.shape[:2]) for c in codes.values()] == [(8, 1), (8, 8), (10, 8)]


class Shared(LitSmall):
    """Every rank gets its share of each batch of 16; Lightning's own sampler would shuffle."""

    def training_step(self, batch, batch_idx):
        return reconstruction(self, batch[0])  # what is logged would be compiled too

    def train_dataloader(self):
        world, images = self.trainer.world_size, loader().dataset
        mine = Subset(images, range(self.trainer.global_rank, len(images), world))
        return DataLoader(mine, 16 // world)


def calibrated():
    """Return a module with ranges of the first batch."""
    collector = RangeCollector(lq.quantize(Shared(), every_range()))
    collector.start()
    reconstruction(collector.model, next(iter(loader()))[0])
    collector.finish()
    return collector.model


def compiled_layers(module):
    module.encoder.compile(backend="aot_eager")
    return module


@pytest.mark.parametrize(
    ("make", "compiled"),
    [
        pytest.param(calibrated, torch.compile, id="module"),
        pytest.param(Shared, compiled_layers, id="layers-that-calibrate"),
    ],
)
def test_compiled(tmp_path, make, compiled):
    losses, modules = [Losses(), Losses()], [make(), make()]
    for module, note, change in zip(modules, losses, (lambda m: m, compiled), strict=True):
        trainer(tmp_path, [qat(), note]).fit(change(module), loader())
    assert losses[1].seen == pytest.approx(losses[0].seen, rel=1e-4)
    assert modules[0].state_dict().keys() == modules[1].state_dict().keys()


class SaveRank(Losses):
    """Writes what every rank saw and ended with."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        state = {k: v.clone() for k, v in pl_module.state_dict().items()}
        path = self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt"
        torch.save({"losses": torch.tensor(self.seen), "state": state}, path)


@needs_gloo
def test_two_ranks_are_one_with_the_joint_batch(tmp_path):
    two = DDPStrategy(start_method="spawn", find_unused_parameters=True)
    for options in ({"strategy": two, "devices": 2}, {"devices": 1}):
        options |= {"max_epochs": 4, "use_distributed_sampler": False}
        trainer(tmp_path, [qat(), SaveRank(tmp_path)], **options).fit(Shared())
    files = ("2-0", "2-1", "1-0")
    first, second, one = (torch.load(tmp_path / f"{f}.pt", weights_only=True) for f in files)
    assert_equal(first["state"], second["state"])
    assert len(one["losses"]) == 16
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, one["losses"])
    torch.testing.assert_close(first["state"], one["state"], rtol=1e-3, atol=1e-5)
