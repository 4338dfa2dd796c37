"""Control of oscillating weights in a fit, against the same training by hand."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks import OscillationControl, QuantizationAwareTraining
from lq.oscillation import annealed, dampening_loss
from tests.lit import Crash, trainer
from tests.test_oscillation import ByHand

LEARNED = {"format": "int3", "range": "lsq"}


def slow_scales(module):
    """Parameter groups in which scales learn slowly enough to stay positive."""
    named = dict(module.named_parameters())
    scales = [p for name, p in named.items() if name.endswith("scale")]
    others = [p for name, p in named.items() if not name.endswith("scale")]
    return [{"params": others}, *([{"params": scales, "lr": 1e-4}] if scales else [])]


class Toy(L.LightningModule):
    """The regression of section 2.2, whose weights oscillate."""

    def __init__(self, weights="int3"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 6, bias=False)
        lq.quantize(self.net, {"weights": weights, "inputs": "fp32"})
        lq.calibrate(self.net, [torch.rand(1, 8)], progress=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(slow_scales(self), lr=0.05, momentum=0.9)


class ToyManual(Toy):
    """Two optimizers, one of which has nothing to do with the weights."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.ones(()))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, other = self.optimizers()
        for loss, by in ((self.other.square(), other), (None, optimizer)):
            by.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx) if loss is None else loss)
            by.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9),
            torch.optim.SGD([self.other], lr=0.1),
        ]


def toy_data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 8, generator=generator)
    return DataLoader(TensorDataset(x, x @ torch.randn(8, 6, generator=generator) * 0.15), 4)


FREEZE = {"method": "freeze", "threshold": 0.3, "final_threshold": 0.1, "momentum": 0.05}


def trained_by_hand(epochs):
    """The same with numpy's algorithm between the steps."""
    module = Toy()
    weight, quantizer = module.net.weight, module.net.weight_quantizer
    spec, optimizer = quantizer.spec, module.configure_optimizers()
    scale = quantizer.scale[:, None].expand_as(weight).numpy()
    by_hand, batches = None, list(toy_data())
    for step in range(epochs * len(batches)):
        optimizer.zero_grad()
        module.training_step(batches[step % len(batches)], step).backward()
        if by_hand is not None:
            weight.grad[torch.from_numpy(by_hand.frozen)] = 0
        optimizer.step()
        if by_hand is None:
            by_hand = ByHand((quantizer(weight) / quantizer.scale[:, None]).detach().numpy(), 0.05)
        threshold = annealed(0.3, 0.1, step / (epochs * len(batches)))
        held = by_hand.step(weight.detach().numpy(), scale, spec.qmin, spec.qmax, threshold)
        weight.data.copy_(torch.from_numpy(held))
    return weight.detach(), by_hand


@pytest.mark.parametrize("cls", [Toy, ToyManual], ids=["automatic", "manual"])
def test_freezing_equals_the_training_by_hand(tmp_path, cls):
    module, callback = cls(), OscillationControl(**FREEZE, module="net")
    run = trainer(tmp_path, [callback], max_epochs=6)
    run.fit(module, toy_data())
    expected, by_hand = trained_by_hand(6)
    assert torch.equal(module.net.weight.detach(), expected)
    assert 0.1 < by_hand.frozen.mean() < 0.9
    assert float(run.callback_metrics["oscillation/frozen"]) == pytest.approx(by_hand.frozen.mean())
    share = (by_hand.frequency > 0.005).mean()
    for name in ("oscillation/share", "oscillation//share"):
        assert float(run.callback_metrics[name]) == pytest.approx(share)


def test_frozen_weights_stay_at_their_code_with_a_learned_scale(tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            tracker = callback._stabilizer._trackers[""]
            weight, quantizer = pl_module.net.weight.detach(), pl_module.net.weight_quantizer
            frozen, scale = tracker.frozen.clone(), quantizer.scale.detach()
            assert torch.equal(weight[frozen], (tracker.codes * scale[:, None])[frozen])
            assert torch.equal(quantizer(weight)[frozen], weight[frozen])
            seen.append((frozen, tracker.codes.clone(), scale.clone()))

    callback = OscillationControl(**FREEZE, module="net")
    trainer(tmp_path, [callback, Watch()], max_epochs=6).fit(Toy(LEARNED), toy_data())
    (frozen, codes, scale), (still, last, moved) = seen[50], seen[-1]
    assert frozen.any()
    assert still[frozen].all()
    assert torch.equal(codes[frozen], last[frozen])
    assert not torch.equal(scale, moved)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaled"])
def test_dampening_equals_the_summed_loss(tmp_path, accumulate, scaled):
    module = Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
    callback = OscillationControl("dampen", dampening=0.5, module="net")
    run = trainer(tmp_path, [callback], plugins=plugins, accumulate_grad_batches=accumulate)
    run.fit(module, toy_data())

    other, batches = Toy(), list(toy_data())
    optimizer, quantizer = other.configure_optimizers(), other.net.weight_quantizer
    spec = quantizer.spec
    for step in range(2 * len(batches)):
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = other.training_step(batches[step % len(batches)], step) / accumulate
        if (step + 1) % accumulate == 0:
            weight = annealed(0.0, 0.5, step / (2 * len(batches)))
            range_ = (quantizer.scale, spec.qmin, spec.qmax, spec.axis)
            loss = loss + weight * dampening_loss(other.net.weight, *range_)
        loss.backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if scaled else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(module.net.weight, other.net.weight, **tolerance)


def test_methods_do_what_they_are_for(tmp_path):
    def share(**arguments):
        run = trainer(tmp_path, [OscillationControl(**arguments, module="net")], max_epochs=30)
        module = Toy()
        run.fit(module, toy_data())
        return float(run.callback_metrics["oscillation/share"])

    tracked = share(method="track", momentum=0.05)
    assert tracked > 0.3
    assert share(method="dampen", dampening=0.5, momentum=0.05) < tracked / 2
    assert share(**FREEZE) < tracked / 2


def test_tracking_changes_nothing(tmp_path):
    modules = Toy(), Toy()
    trainer(tmp_path).fit(modules[0], toy_data())
    trainer(tmp_path, [OscillationControl("track")]).fit(modules[1], toy_data())
    assert torch.equal(modules[0].net.weight, modules[1].net.weight)
    assert not any(o._optimizer_step_post_hooks for o in [modules[1].trainer.optimizers[0]])


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))

    training_step = Toy.training_step

    def configure_optimizers(self):
        return torch.optim.Adam(slow_scales(self), lr=0.1)


def qat_fit(
    folder, ckpt_path=None, crash=None, method="freeze", first=False, extra=(), extra_first=False
):
    qat = QuantizationAwareTraining({"weights": LEARNED}, calibration_batches=3)
    momentum, limits = 0.03, {"threshold": 0.07, "final_threshold": 0.06}
    control = OscillationControl(method, momentum=momentum, dampening=0.1, **limits)
    callbacks = [control, qat] if first else [qat, control]
    callbacks = [*extra, *callbacks] if extra_first else [*callbacks, *extra]
    callbacks += [ModelCheckpoint(folder, save_last=True)]
    callbacks += [] if crash is None else [Crash(crash)]
    run, module = trainer(folder, callbacks, max_epochs=4), Net()
    try:
        run.fit(module, toy_data(), ckpt_path=ckpt_path, weights_only=True)
    except SystemExit:  # Lightning's answer to the keyboard
        assert crash is not None
    return run, module, control


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["freeze", "dampen"])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resume_equals_the_uninterrupted_fit(tmp_path, epoch, method):
    run, whole, control = qat_fit(tmp_path / "whole", method=method)
    _, stopped, _ = qat_fit(tmp_path / "crash", crash=epoch, method=method)
    assert not same(whole, stopped)
    again, resumed, other = qat_fit(
        tmp_path / "again", tmp_path / "crash" / "last.ckpt", method=method
    )
    assert same(whole, resumed)
    assert again.callback_metrics == run.callback_metrics
    assert run.callback_metrics["oscillation/share"] > 0.1
    if method == "freeze":
        assert run.callback_metrics["oscillation/frozen"] > 0.05
    for name, tracker in control._stabilizer._trackers.items():
        mine = other._stabilizer._trackers[name].state()
        assert all(torch.equal(value, mine[key]) for key, value in tracker.state().items())


def test_order_of_the_callbacks_does_not_matter(tmp_path):
    assert same(qat_fit(tmp_path / "a")[1], qat_fit(tmp_path / "b", first=True)[1])


def test_resume_with_another_method_is_refused(tmp_path):
    qat_fit(tmp_path, crash=2)
    with pytest.raises(RuntimeError, match="freezes none"):
        qat_fit(tmp_path, tmp_path / "last.ckpt", method="track")


@pytest.mark.parametrize("pruning_first", [False, True])
def test_pruned_weights_stay_zero(tmp_path, pruning_first):
    pruning = ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False)
    _, module, control = qat_fit(tmp_path, extra=[pruning], extra_first=pruning_first)
    frozen_and_there = 0
    for name in ("net.0", "net.2"):
        layer = module.get_submodule(name)
        assert (layer.weight == 0).float().mean() > 0.3
        frozen = control._stabilizer._trackers[name].frozen
        rest = frozen & (layer.weight != 0)
        frozen_and_there += int(rest.sum())
        quantized = layer.weight_quantizer(layer.weight).detach()
        assert (quantized[layer.weight == 0] == 0).all()
        assert torch.equal(quantized[rest], layer.weight.detach()[rest])
    assert frozen_and_there > 0


def test_nothing_to_control_is_refused(tmp_path):
    callbacks = [QuantizationAwareTraining(), OscillationControl()]
    with pytest.raises(ValueError, match="at most `max_bits`, 4, bits"):
        trainer(tmp_path, callbacks, max_epochs=1).fit(Net(), toy_data())


def test_progressive_bits_are_controlled_once_they_are_few(tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append((control._stabilizer._formats.get("net.0"), control._stabilizer.shares()))
            for name, tracker in control._stabilizer._trackers.items():
                layer = pl_module.get_submodule(name)
                weight, frozen = layer.weight.detach(), tracker.frozen
                assert torch.equal(layer.weight_quantizer(weight)[frozen], weight[frozen])

    qat = QuantizationAwareTraining(
        {"weights": LEARNED}, calibration_batches=3, progressive_bits={0: 8, 2: 4, 6: 3}
    )
    limits = {"momentum": 0.03, "threshold": 0.07, "final_threshold": 0.06}
    control = OscillationControl("freeze", **limits)
    trainer(tmp_path, [qat, control, Watch()], max_epochs=12).fit(Net(), toy_data())
    formats = [name for name, _ in seen]
    assert formats == [None] * 2 + ["int4"] * 4 + ["int3"] * 6
    assert seen[-1][1]["frozen"] > 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"method": "freez"}, "did you mean 'freeze'", id="method"),
        pytest.param({"momentum": 0}, "`momentum`", id="momentum"),
        pytest.param({"momentum": 0.01}, "single oscillation", id="threshold"),
        pytest.param({"threshold": 0.001}, "`threshold`", id="order"),
        pytest.param({"dampening": -1}, "`dampening`", id="dampening"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        OscillationControl(**arguments)
