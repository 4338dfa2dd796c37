"""A quantized copy of a network is trained as its module says, and the module stays as it is."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks.fine_tuning import History, fine_tune, training_of
from lq.models import digits_cnn


class Data(L.LightningDataModule):
    name = "noise"

    def loader(self, seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(32, 1, 8, 8, generator=generator)
        return DataLoader(TensorDataset(x, torch.arange(32) % 10), 16)

    def train_dataloader(self) -> DataLoader:
        return self.loader(0)

    def val_dataloader(self) -> DataLoader:
        return self.loader(1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.fixture
def parts() -> tuple[lq.QuantModule, nn.Module]:
    torch.manual_seed(0)
    module = lq.QuantModule(digits_cnn(), recipe=None, optimizer=sgd)
    net = lq.quantize(copy.deepcopy(module.model), "tensorrt_int8")
    return module, lq.calibrate(net, [x for x, _ in Data().train_dataloader()], progress=False)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_trains_the_copy_alone(parts) -> None:
    module, net = parts
    before, start = copy.deepcopy(module.state_dict()), copy.deepcopy(net.state_dict())
    data = Data()
    rows = fine_tune(module, net, 2, data, "cpu", validate=True)
    assert equal(module.state_dict(), before)
    assert not equal(net.state_dict(), start)
    assert [row["epoch"] for row in rows] == [0.0, 1.0]
    assert {"train/loss", "val/top1"} <= rows[0].keys()
    assert data.trainer is None


def test_does_what_the_same_loop_in_torch_does(parts) -> None:
    module, net = parts
    wanted = copy.deepcopy(net).train()
    optimizer = sgd(wanted.parameters())
    for _ in range(2):
        for x, target in Data().train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(wanted(x), target).backward()
            optimizer.step()
    fine_tune(module, net, 2, Data(), "cpu")
    assert equal(net.state_dict(), wanted.state_dict())


def test_the_copys_recipe_counts(parts) -> None:
    module, net = parts
    other = lq.QuantModule(copy.deepcopy(module.model), recipe="onnxruntime_int8", optimizer=sgd)
    before = copy.deepcopy(other.state_dict())
    first, second = net, copy.deepcopy(net)
    fine_tune(module, first, 1, Data(), "cpu")
    fine_tune(other, second, 1, Data(), "cpu")
    assert equal(first.state_dict(), second.state_dict())
    assert equal(other.state_dict(), before)


def test_goes_on_after_a_kill(parts, tmp_path, monkeypatch) -> None:
    module, net = parts
    whole, killed = copy.deepcopy(net), copy.deepcopy(net)
    rows = fine_tune(module, whole, 3, Data(), "cpu", folder=tmp_path / "whole")
    epoch_end = History.on_train_epoch_end

    def kill(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt
        epoch_end(self, trainer, pl_module)

    monkeypatch.setattr(History, "on_train_epoch_end", kill)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fine_tune(module, killed, 3, Data(), "cpu", folder=tmp_path / "killed")
    monkeypatch.undo()
    again = copy.deepcopy(net)
    assert fine_tune(module, again, 3, Data(), "cpu", folder=tmp_path / "killed") == rows
    assert equal(again.state_dict(), whole.state_dict())
    done = copy.deepcopy(net)
    assert fine_tune(module, done, 3, Data(), "cpu", folder=tmp_path / "killed") == rows
    assert equal(done.state_dict(), whole.state_dict())


def test_trains_in_training_mode(parts) -> None:
    """Whoever measured the module before has set it to eval."""
    module, net = parts
    before = net[1].running_mean.clone()
    module.eval()
    net.eval()
    fine_tune(module, net, 1, Data(), "cpu")
    assert not torch.equal(net[1].running_mean, before)
    assert not module.training


def test_the_loss_is_the_mean_of_the_batches(parts) -> None:
    module, net = parts
    seen: list[float] = []

    class Seen(lq.QuantModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append(float(loss.detach()))
            return loss

    spy = Seen(module.model, recipe=None, optimizer=sgd)
    rows = fine_tune(spy, net, 2, Data(), "cpu")
    assert [row["train/loss"] for row in rows] == pytest.approx(
        [(seen[0] + seen[1]) / 2, (seen[2] + seen[3]) / 2]
    )


def test_a_damaged_checkpoint_is_trained_over(parts, tmp_path, caplog) -> None:
    module, net = parts
    whole = copy.deepcopy(net)
    fine_tune(module, whole, 1, Data(), "cpu")
    (tmp_path / "last.ckpt").write_bytes(b"half of it")
    fine_tune(module, net, 1, Data(), "cpu", folder=tmp_path)
    assert "Training begins again" in caplog.text
    assert equal(net.state_dict(), whole.state_dict())


def test_training_is_told_apart() -> None:
    def told(**settings: float) -> str:
        module = lq.QuantModule(
            digits_cnn(), recipe=None, optimizer=lambda p: torch.optim.SGD(p, **settings)
        )
        return training_of(module, Data())

    assert told(lr=0.1) == told(lr=0.1)
    assert told(lr=0.1) != told(lr=0.2)
    assert told(lr=0.1) != told(lr=0.1, weight_decay=1e-4)


def test_schedules_and_losses_are_told_apart() -> None:
    class Other(lq.QuantModule):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    def told(base: float, cls: type = lq.QuantModule) -> str:
        def schedule(optimizer):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: base**epoch)

        return training_of(cls(digits_cnn(), recipe=None, lr_scheduler=schedule), Data())

    assert told(0.5) == told(0.5)
    assert told(0.5) != told(0.9)
    assert told(0.5) != told(0.5, Other)
