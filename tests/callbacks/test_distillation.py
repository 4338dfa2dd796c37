"""Distillation in somebody's fit equals training with the summed loss, through a fit's life."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks import Distillation, QuantizationAwareTraining
from lq.distillation import distillation_loss, feature_loss
from tests.lit import Crash, autoencoder, loader, needs_gloo, trainer


class LitClassifier(L.LightningModule):
    """Automatic optimization of a submodule."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 4)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Manual(LitClassifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Whole(LitClassifier):
    """Calls its own forward."""

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


def data(samples=64, batch_size=8):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 8, generator=generator)
    y = torch.randint(0, 4, (samples,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


def other_net():
    return LitClassifier(seed=7).net


def trained_by_hand(teacher, accumulate=1, autocast=False, epochs=2):
    """The plain loop with the sum of the losses."""
    module = LitClassifier()
    net, optimizer = module.net.train(), module.configure_optimizers()
    teacher = copy.deepcopy(teacher).eval()
    for i, (x, y) in enumerate([batch for _ in range(epochs) for batch in data()]):
        if i % accumulate == 0:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = net[:3](x)
            logits = net[3](hidden)
            with torch.no_grad():
                expected = teacher[:3](x)
                target = teacher[3](expected)
            extra = 0.5 * distillation_loss(logits, target, 3.0)
            loss = F.cross_entropy(logits, y) + extra + 2.0 * feature_loss(hidden, expected)
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize(
    ("cls", "module", "settings", "by_hand"),
    [
        pytest.param(LitClassifier, "net", {}, {}, id="automatic"),
        pytest.param(Manual, "net", {}, {}, id="manual"),
        pytest.param(Whole, None, {}, {}, id="whole"),
        pytest.param(
            LitClassifier,
            "net",
            {"accumulate_grad_batches": 4},
            {"accumulate": 4},
            id="accumulated",
        ),
        pytest.param(
            LitClassifier, "net", {"precision": "bf16-mixed"}, {"autocast": True}, id="bf16-mixed"
        ),
    ],
)
def test_fit_equals_the_loop_by_hand(tmp_path, cls, module, settings, by_hand):
    teacher = other_net()
    expected = trained_by_hand(teacher, **by_hand)
    features = ["2"] if module else ["net.2"]
    given = teacher
    if cls is Whole:
        given = Whole()
        given.net = teacher
    callback = Distillation(given, 3.0, 0.5, features, 2.0, module)
    lit = cls()
    trainer(tmp_path, [callback], **settings).fit(lit, data())
    for name, value in lit.net.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("cls", [LitClassifier, Manual])
def test_the_loss_scaler_scales_it_too(tmp_path, cls):
    def fit(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        lit, teacher = cls(), other_net()
        callback = Distillation(teacher, 3.0, 0.5, ["2"], 2.0, "net")
        trainer(tmp_path, [callback], plugins=[plugin]).fit(lit, data())
        return lit.net.state_dict()

    one, scaled = fit(1.0), fit(2.0**10)
    for name in one:
        torch.testing.assert_close(one[name], scaled[name], rtol=1e-2, atol=1e-3, msg=name)
    expected = trained_by_hand(other_net())
    for name in one:
        torch.testing.assert_close(scaled[name], expected[name], rtol=5e-2, atol=5e-3, msg=name)


def test_teacher_is_nowhere_in_the_module(tmp_path):
    lit = LitClassifier()
    parameters, modules = len(list(lit.parameters())), len(list(lit.modules()))
    callback = Distillation(module="net")
    run = trainer(tmp_path, [callback, WeightAveraging()], max_epochs=1)
    run.fit(lit, data())
    assert len(list(lit.parameters())) == parameters
    assert len(list(lit.modules())) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lit.modules())
    run.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == lit.state_dict().keys()
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert len(group["params"]) == parameters
    (state,) = [v for k, v in checkpoint["callbacks"].items() if k.startswith("Distillation")]
    assert state.keys() == {"teacher"}
    assert len(state["teacher"]) == 64


def test_self_is_the_float_net_before_training(tmp_path):
    lit = LitClassifier()
    before = copy.deepcopy(lit.net)
    callback = Distillation(module="net")
    qat = QuantizationAwareTraining(module="net", calibration_batches=2)
    trainer(tmp_path, [qat, callback]).fit(lit, data())
    teacher = callback._distiller.teacher
    assert [type(m) for m in teacher] == [type(m) for m in before]
    weights = teacher.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in before.state_dict().items())
    assert not torch.equal(lit.net[0].weight, teacher[0].weight)
    # Going on with the same module keeps the teacher; a new module has its own.
    digest = callback._digest
    trainer(tmp_path, [qat, callback]).fit(lit, data())
    assert callback._digest == digest
    trainer(tmp_path, [qat, callback]).fit(LitClassifier(seed=5), data())
    assert callback._digest != digest


def qat_fit(folder, lit=None, ckpt_path=None, crash=None, first="qat", **kwargs):
    callbacks = [
        QuantizationAwareTraining({"weights": "int4"}, "net", calibration_batches=3),
        Distillation(**{"module": "net", "features": ["2"], "temperature": 2.0, **kwargs}),
    ]
    lit = lit or LitClassifier()
    run = trainer(
        folder,
        [
            *(callbacks if first == "qat" else callbacks[::-1]),
            ModelCheckpoint(folder, save_last=True),
            *([] if crash is None else [Crash(crash)]),
        ],
        max_epochs=4,
    )
    try:
        run.fit(lit, data(), ckpt_path=ckpt_path, weights_only=True)
    except SystemExit:  # Lightning's answer to the keyboard
        assert crash is not None
    return run, lit.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_order_of_the_callbacks_does_not_matter(tmp_path):
    one, other = (qat_fit(tmp_path / first, first=first)[1] for first in ("qat", "distillation"))
    assert same(one, other)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resume_equals_the_uninterrupted_fit(tmp_path, epoch):
    _, whole = qat_fit(tmp_path / "whole")
    _, stopped = qat_fit(tmp_path / "crash", crash=epoch)
    assert not same(whole, stopped)
    last = tmp_path / "crash" / "last.ckpt"
    for first in ("qat", "distillation"):
        _, resumed = qat_fit(tmp_path / "resumed", ckpt_path=last, first=first)
        assert same(whole, resumed)


def test_resume_with_another_teacher_is_refused_with_the_remedy(tmp_path):
    _, whole = qat_fit(tmp_path / "whole")
    qat_fit(tmp_path / "crash", crash=2)
    last = tmp_path / "crash" / "last.ckpt"
    with pytest.raises(RuntimeError, match=r"teacher that this fit began with.*teacher=<path>"):
        qat_fit(tmp_path / "r", LitClassifier(seed=5), last)
    save_file(LitClassifier().net.state_dict(), tmp_path / "float.safetensors")
    _, resumed = qat_fit(
        tmp_path / "r", LitClassifier(seed=5), last, teacher=tmp_path / "float.safetensors"
    )
    assert same(whole, resumed)


def test_float_checkpoint_is_the_teacher(tmp_path):
    trained = LitClassifier()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(trained, data())
    run.save_checkpoint(tmp_path / "float.ckpt")
    lit, callback = LitClassifier(seed=5), Distillation(module="net")
    qat = QuantizationAwareTraining({"weights": "int4"}, "net", calibration_batches=2)
    callbacks = [callback, qat]
    again = trainer(tmp_path, callbacks)
    again.fit(lit, data(), ckpt_path=tmp_path / "float.ckpt", weights_only=True)
    teacher = callback._distiller.teacher.state_dict()
    assert same(teacher, trained.net.state_dict())
    # The same weights, read from the file of the whole module.
    by_path = Distillation(str(tmp_path / "float.ckpt"), module="net")
    trainer(tmp_path, [by_path]).fit(LitClassifier(seed=5), data())
    assert by_path._digest == callback._digest
    # A fit that began with this checkpoint goes on from one of its own only with the same teacher.
    again.save_checkpoint(tmp_path / "qat.ckpt")
    with pytest.raises(RuntimeError, match="teacher that this fit began with"):
        qat_fit(tmp_path, LitClassifier(seed=5), tmp_path / "qat.ckpt")


def test_quantized_checkpoint_of_a_fit_without_distillation_is_refused(tmp_path):
    qat = [QuantizationAwareTraining(module="net", calibration_batches=2)]
    run = trainer(tmp_path, qat, max_epochs=1)
    run.fit(LitClassifier(), data())
    run.save_checkpoint(tmp_path / "q.ckpt")
    with pytest.raises(RuntimeError, match=r"of quantized training without.*teacher=<path>"):
        trainer(tmp_path, [*qat, Distillation(module="net")]).fit(
            LitClassifier(), data(), ckpt_path=tmp_path / "q.ckpt", weights_only=True
        )


def test_quant_module_learns_from_its_starting_weights(tmp_path):
    def module():
        torch.manual_seed(0)
        return lq.QuantModule("lq.models.digits_cnn", weights=tmp_path / "w.safetensors")

    torch.manual_seed(1)
    start = lq.models.digits_cnn().state_dict()
    save_file(start, tmp_path / "w.safetensors")
    callback = Distillation()
    images = DataLoader(
        TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))), batch_size=8
    )
    qat = QuantizationAwareTraining(calibration_batches=1)
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, [callback, qat], logger=logger, log_every_n_steps=1, max_epochs=1)
    run.fit(module(), images)
    assert same(callback._distiller.teacher.state_dict(), start)
    assert float(run.logged_metrics["distillation/loss"]) > 0


def test_outputs_that_are_no_classes(tmp_path):
    lit, callback = autoencoder(), Distillation(module="decoder", weight=0, features=[""])
    qat = QuantizationAwareTraining(calibration_batches=2)
    run = trainer(tmp_path, [qat, callback])
    run.fit(lit, loader())
    assert float(run.callback_metrics["distillation/loss"]) > 0


def test_a_module_that_is_not_called_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"'LitAutoEncoder'.*name another `module`"):
        trainer(tmp_path, [Distillation()]).fit(autoencoder(), loader())


class Direct(LitClassifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx).backward()


def test_a_backward_pass_past_the_trainer_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="manual_backward"):
        trainer(tmp_path, [Distillation(module="net")]).fit(Direct(), data())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"temperature": 0}, "temperature", id="temperature"),
        pytest.param({"weight": 0}, "nothing would be distilled", id="nothing"),
        pytest.param({"weight": -1}, "above 0", id="negative"),
        pytest.param({"features": "net"}, "list of names", id="text"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        Distillation(**arguments)


def test_weights_of_another_net_are_refused(tmp_path):
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "w.safetensors")
    callback = Distillation(tmp_path / "w.safetensors", module="net")
    with pytest.raises(ValueError, match=r"w.safetensors.*to fit.*float weights of Sequential"):
        trainer(tmp_path, [callback]).fit(LitClassifier(), data())


class Save(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.net.state_dict(), self.folder / f"{trainer.global_rank}.pt")


class PartOfTheBatch(Whole):
    """Each process takes its share; no BatchNorm, which would see only that."""

    def __init__(self):
        super().__init__()
        self.net[1] = nn.Identity()

    def training_step(self, batch, batch_idx):
        share = slice(self.global_rank, None, self.trainer.world_size)
        return super().training_step([part[share] for part in batch], batch_idx)


@needs_gloo
def test_two_processes_train_as_one_with_the_joint_batch(tmp_path):
    teacher = PartOfTheBatch()
    teacher.net[3] = nn.Linear(16, 4)
    single = PartOfTheBatch()
    trainer(tmp_path, [Distillation(teacher)]).fit(single, data())
    two = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": False}
    run = trainer(tmp_path, [Distillation(teacher), Save(tmp_path)], **two)
    run.fit(PartOfTheBatch(), data())
    for rank in (0, 1):
        ended = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in single.net.state_dict().items():
            torch.testing.assert_close(ended[name], value, rtol=1e-4, atol=1e-6, msg=name)
