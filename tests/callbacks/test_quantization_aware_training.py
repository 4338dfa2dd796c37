"""QAT of a module that knows nothing of it, through its whole life."""

import copy
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

import lq
from lq.callbacks import QuantizationAwareTraining
from lq.collector import RangeCollector
from lq.surgery import quantized_layers, quantizers
from tests.lit import (
    LitAutoEncoder,
    LitSmall,
    LitWithEvaluation,
    autoencoder,
    loader,
    norm,
    trainer,
    with_ranges,
)


class Modes(L.Callback):
    """Notes the mode of the first quantizer at every hook."""

    def __init__(self):
        self.seen = []

    def note(self, what, module):
        self.seen.append((what, next(iter(quantizers(module).values())).mode.value))

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.note("sanity" if trainer.sanity_checking else "val", pl_module)

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.note("train", pl_module)


def test_plain_module_is_quantized_and_trains(tmp_path):
    module = autoencoder()
    encoder, weight = module.encoder, module.encoder[0].weight
    trainer(tmp_path, [QuantizationAwareTraining(calibration_batches=2)]).fit(module, loader())
    assert module.encoder is encoder
    assert module.encoder[0].weight is weight
    assert len(quantized_layers(module)) == 4
    assert all(q.is_calibrated for q in quantizers(module).values())
    assert type(module) is LitAutoEncoder


def test_only_the_named_submodule(tmp_path):
    module = autoencoder()
    callback = QuantizationAwareTraining(module="encoder", calibration_batches=2)
    trainer(tmp_path, [callback]).fit(module, loader())
    assert set(quantized_layers(module)) == {"encoder.0", "encoder.2"}


def test_modes_over_a_fit(tmp_path):
    modes = Modes()
    callback = QuantizationAwareTraining(calibration_batches=3, start_epoch=1)
    module = autoencoder(LitWithEvaluation)
    fit = trainer(tmp_path, [callback, modes], limit_train_batches=4, limit_val_batches=1)
    fit.fit(module, loader(), loader())
    assert modes.seen == [
        ("sanity", "bypass"),
        *[("train", "bypass")] * 4,
        ("val", "bypass"),
        *[("train", "observe")] * 3,
        ("train", "quantize"),
        ("val", "quantize"),
    ]


def test_ranges_are_those_of_the_training_batches(tmp_path):
    # Validation data are ten times as large, and validated in the middle of the calibration.
    callback = QuantizationAwareTraining(calibration_batches=4)
    module = autoencoder(LitWithEvaluation)
    fit = trainer(tmp_path, [callback], max_epochs=1, val_check_interval=2)
    fit.fit(module, loader(), loader(scale=10.0))
    seen = torch.cat([x for x, _ in list(loader())[:4]])
    assert module.encoder[0].input_quantizer.amax == pytest.approx(float(seen.max()), rel=1e-6)


def test_short_training_makes_do(tmp_path):
    module = autoencoder()
    callback = QuantizationAwareTraining(calibration_batches=1000)
    trainer(tmp_path, [callback]).fit(module, loader())
    assert all(q.is_calibrated for q in quantizers(module).values())


def test_auto_takes_for_each_quantizer_what_the_last_batch_likes_best(tmp_path, caplog):
    # Nothing is learned, so that the batches can be gone through again by hand.
    batches = list(loader())[:3]
    module = autoencoder()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    callback = QuantizationAwareTraining({"inputs": "int4"}, "encoder", "auto", 3)
    with caplog.at_level("INFO", logger="lq.callbacks"):
        trainer(tmp_path, [callback], max_epochs=1).fit(module, loader())
    by_hand = lq.quantize(autoencoder().encoder, {"inputs": "int4"})
    collector = RangeCollector(by_hand, "auto")
    collector.start()
    for x, _ in batches[:2]:
        by_hand(x.flatten(1))
    collector.start_scoring()
    by_hand(batches[2][0].flatten(1))
    ranges = collector.finish()
    assert {found.calibrator for found in ranges.found.values()} > {"mse"}
    for name, quantizer in quantizers(module.encoder).items():
        assert torch.equal(quantizer.amax, quantizers(by_hand)[name].amax)
        assert quantizer.mode is lq.Mode.QUANTIZE
    assert ranges.table() in caplog.text


def test_auto_needs_a_batch_to_try(tmp_path, caplog):
    with pytest.raises(ValueError, match="at least 2 for 'auto'"):
        QuantizationAwareTraining(calibrator="auto", calibration_batches=1)
    module = autoencoder()
    callback = QuantizationAwareTraining(calibrator="auto")
    trainer(tmp_path, [callback], max_epochs=1, limit_train_batches=1).fit(module, loader())
    assert "ranges are those of mse" in caplog.text
    assert all(q.is_calibrated for q in quantizers(module).values())


def checkpointed(folder):
    return ModelCheckpoint(folder, save_last=True, save_top_k=-1, filename="{epoch}")


def test_resume_equals_the_uninterrupted_fit(tmp_path):
    def fit(epochs, module, ckpt_path=None, folder="a"):
        callbacks = [
            QuantizationAwareTraining(calibration_batches=4),
            checkpointed(tmp_path / folder),
        ]
        run = trainer(tmp_path, callbacks, max_epochs=epochs)
        run.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
        return module.state_dict()

    whole = fit(4, autoencoder())
    fit(2, autoencoder(), folder="b")
    resumed = fit(4, autoencoder(), tmp_path / "b" / "last.ckpt", folder="c")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_restored_outputs_are_bit_equal(tmp_path):
    module = autoencoder(LitWithEvaluation)
    callbacks = [QuantizationAwareTraining(calibration_batches=2), checkpointed(tmp_path)]
    run = trainer(tmp_path, callbacks)
    run.fit(module, loader(), loader())
    x = torch.rand(5, 784)
    expected = module.encoder(x)
    tested = run.test(module, loader(), verbose=False)  # after the fit

    other = autoencoder(LitWithEvaluation)
    again = trainer(tmp_path, [QuantizationAwareTraining()])
    last = tmp_path / "last.ckpt"
    assert again.test(other, loader(), ckpt_path=last, weights_only=True, verbose=False) == tested
    assert torch.equal(other.encoder(x), expected)

    parts = copy.deepcopy(lq.dequantize(autoencoder()))
    loaded = lq.load_from_checkpoint(
        LitAutoEncoder, last, encoder=parts.encoder, decoder=parts.decoder
    )
    assert torch.equal(loaded.encoder(x), expected)


def test_weights_only_checkpoint_keeps_the_recipe(tmp_path):
    module = autoencoder()
    run = trainer(tmp_path, [QuantizationAwareTraining("int8_fp16_fallback", "encoder")])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    fresh = autoencoder()
    loaded = lq.load_from_checkpoint(
        LitAutoEncoder, tmp_path / "w.ckpt", encoder=fresh.encoder, decoder=fresh.decoder
    )
    assert set(quantized_layers(loaded)) == {"encoder.0", "encoder.2"}
    assert loaded.encoder[2].layer_spec.weights.format == "fp16"


def test_fit_twice(tmp_path):
    module = autoencoder()
    for _ in range(2):
        trainer(tmp_path, [QuantizationAwareTraining(calibration_batches=2)]).fit(module, loader())
    assert len(quantized_layers(module)) == 4


def test_untrained_module_refuses_to_be_tested(tmp_path):
    with pytest.raises(RuntimeError, match=r"encoder.0.*not calibrated"):
        trainer(tmp_path, [QuantizationAwareTraining()]).test(
            autoencoder(LitWithEvaluation), loader()
        )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision(tmp_path, precision):
    module = autoencoder()
    callback = QuantizationAwareTraining(calibration_batches=2)
    trainer(tmp_path, [callback], precision=precision).fit(module, loader())
    assert all(q.scale.dtype == torch.float32 for q in quantizers(module).values())


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, WeightAveraging], ids=["ema", "mean"])
def test_averaging_after_ours(tmp_path, averaging):
    module = autoencoder()
    callbacks = [QuantizationAwareTraining(calibration_batches=4), averaging()]
    trainer(tmp_path, callbacks).fit(module, loader())
    assert all(q.scale.isfinite().all() for q in quantizers(module).values())
    assert module.encoder(torch.rand(2, 784)).isfinite().all()


@pytest.mark.parametrize(
    "averaging", [WeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-3)], ids=["ema", "swa"]
)
def test_averaging_before_ours_is_refused(tmp_path, averaging):
    with pytest.raises(RuntimeError, match="list it after QuantizationAwareTraining"):
        trainer(tmp_path, [averaging, QuantizationAwareTraining()]).fit(autoencoder(), loader())


@pytest.mark.parametrize("ours_first", [True, False], ids=["qat-pruning", "pruning-qat"])
def test_pruning_in_both_orders(tmp_path, ours_first):
    callbacks = [
        QuantizationAwareTraining(calibration_batches=2),
        ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False),
    ]
    module = autoencoder()
    trainer(tmp_path, callbacks if ours_first else callbacks[::-1]).fit(module, loader())
    layers = quantized_layers(module).values()
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    assert (weights == 0).float().mean() > 0.4
    for layer in layers:
        quantized = layer.weight_quantizer(layer.weight)
        assert (quantized[layer.weight == 0] == 0).all()


class WatchNorm(L.Callback):
    """Notes the running mean of the first BatchNorm before training, and after every epoch."""

    def __init__(self):
        self.seen = []

    def note(self, trainer, pl_module):
        self.seen.append(pl_module.encoder[1].running_mean.clone())

    on_fit_start = on_train_epoch_end = note


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("validates", [True, False], ids=["validates", "trains"])
def test_batchnorm_freezes(tmp_path, epoch, validates):
    """From the epoch on, also behind a sanity check and validation in the middle of it."""
    watch, module = WatchNorm(), LitSmall(norm)
    callbacks = [QuantizationAwareTraining(freeze_batchnorm_epoch=epoch), watch]
    run = trainer(tmp_path, callbacks, max_epochs=3, val_check_interval=0.5 if validates else 1.0)
    run.fit(module, loader(), loader() if validates else None)
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(watch.seen)]
    assert moved == [at < epoch for at in range(3)]
    assert module.encoder[1].training, "a second fit begins with norms that move"


def test_a_second_fit_moves_what_the_first_has_frozen(tmp_path):
    module, scales = LitSmall(), []
    for freeze in (1, None):
        callback = QuantizationAwareTraining(
            with_ranges("lsq"), calibration_batches=2, freeze_scales_epoch=freeze
        )
        trainer(tmp_path, [callback]).fit(module, loader())
        scales.append(module.encoder[0].input_quantizer.scale.detach().clone())
    assert not torch.equal(*scales)


def test_learned_scales_train_until_frozen(tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(pl_module.encoder[0].input_quantizer.scale.detach().clone())

    recipe = {"inputs": {"format": "int8", "range": "lsq"}}
    callback = QuantizationAwareTraining(
        recipe, "encoder", calibration_batches=2, freeze_scales_epoch=2
    )
    trainer(tmp_path, [callback, Watch()], max_epochs=4).fit(autoencoder(), loader())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])


class WithUnused(LitWithEvaluation):
    def __init__(self):
        super().__init__(nn.Linear(784, 8), nn.Linear(8, 784))
        self.unused = nn.Linear(3, 3)


def test_a_layer_without_data_does_not_repeat_the_calibration(tmp_path, caplog):
    modes, module = Modes(), WithUnused()
    callback = QuantizationAwareTraining(calibration_batches=2)
    fit = trainer(tmp_path, [callback, modes], max_epochs=3, limit_train_batches=4)
    fit.fit(module, loader())
    assert [mode for _, mode in modes.seen] == ["observe"] * 2 + ["quantize"] * 10
    assert "unused" in caplog.text
    with pytest.raises(RuntimeError, match=r"unused\..*not calibrated"):
        module.unused(torch.randn(1, 3))


class StopAfter(L.Callback):
    """Saves a checkpoint in the middle of an epoch."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Normed(LitAutoEncoder):
    def __init__(self):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(784, 16), nn.BatchNorm1d(16))
        super().__init__(encoder, nn.Linear(16, 784))


@pytest.mark.parametrize("step", [3, 8, 11, 16])
def test_resume_goes_on_where_it_was(tmp_path, step):
    def fit(callbacks, ckpt_path=None):
        module = Normed()
        qat = QuantizationAwareTraining(calibration_batches=2, freeze_batchnorm_epoch=1)
        run = trainer(tmp_path, [qat, *callbacks], max_epochs=3)
        run.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
        return module.state_dict()

    whole = fit([StopAfter(step, tmp_path / "mid.ckpt")])
    resumed = fit([], tmp_path / "mid.ckpt")
    same = {k for k in whole if torch.equal(whole[k], resumed[k])}
    if step % 8 == 0:  # epochs have 8 steps; in the middle Lightning reads the data from the start
        assert same == whole.keys()
    else:
        assert {k for k in whole if k.endswith("scale")} <= same
        # Statistics frozen from epoch 1 are those of the checkpoint, also when it was made later.
        assert ("encoder.1.running_mean" in same) is (step > 8)


def test_an_epoch_that_never_comes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="start_epoch"):
        trainer(tmp_path, [QuantizationAwareTraining(start_epoch=2)]).fit(autoencoder(), loader())


def test_learned_scales_under_ddp_name_the_strategy(tmp_path):
    callback = QuantizationAwareTraining({"inputs": {"format": "int8", "range": "lsq"}})
    run = trainer(tmp_path, [callback], strategy="ddp_spawn", devices=2)
    with pytest.raises(ValueError, match="find_unused_parameters_true"):
        callback.setup(run, autoencoder(), "fit")


class RebuildsLayers(LitAutoEncoder):
    def __init__(self):
        super().__init__(nn.Linear(784, 8), nn.Linear(8, 784))

    def configure_model(self):
        self.encoder = nn.Linear(784, 8)


class RebuildsInSetup(LitAutoEncoder):
    def __init__(self):
        super().__init__(nn.Linear(784, 8), nn.Linear(8, 784))

    def setup(self, stage):
        self.encoder = nn.Linear(784, 8)


class LateLayers(LitAutoEncoder):
    def __init__(self):
        super().__init__(nn.Linear(784, 8), None)

    def setup(self, stage):
        self.decoder = nn.Linear(8, 784)


class NoLayers(LitAutoEncoder):
    def __init__(self):
        super().__init__(nn.ReLU(), nn.ReLU())


@pytest.mark.parametrize(
    ("make", "arguments", "error", "match"),
    [
        pytest.param(LateLayers, {}, RuntimeError, r"decoder.*configure_model", id="late"),
        pytest.param(RebuildsLayers, {}, RuntimeError, r"encoder.*only once", id="rebuilt"),
        pytest.param(RebuildsInSetup, {}, RuntimeError, r"encoder.*came later", id="in setup"),
        pytest.param(NoLayers, {}, ValueError, "layers to quantize", id="none"),
        pytest.param(autoencoder, {"module": "encodr"}, ValueError, "'encoder'", id="typo"),
        pytest.param(
            autoencoder,
            {"recipe": {"rules": [{"name": "encoder.9", "format": "fp16"}]}},
            ValueError,
            r"encoder.9.*matches none",
            id="rule",
        ),
    ],
)
def test_refusals(tmp_path, make, arguments, error, match):
    with pytest.raises(error, match=match):
        trainer(tmp_path, [QuantizationAwareTraining(**arguments)]).fit(make(), loader())


def test_configure_model_runs_first(tmp_path):
    class Configured(LitAutoEncoder):
        def __init__(self):
            super().__init__(nn.Linear(784, 8), None)

        def configure_model(self):
            if self.decoder is None:
                self.decoder = nn.Linear(8, 784)

    module = Configured()
    trainer(tmp_path, [QuantizationAwareTraining(calibration_batches=2)]).fit(module, loader())
    assert set(quantized_layers(module)) == {"encoder", "decoder"}


def test_bad_data_stops_with_the_layer(tmp_path):
    bad = loader(scale=torch.nan)
    module = autoencoder()
    with pytest.raises(RuntimeError, match=r"encoder.0.input_quantizer.*NaN.*batch 0"):
        trainer(tmp_path, [QuantizationAwareTraining()]).fit(module, bad)
    assert all(q.observer is None for q in quantizers(module).values())
