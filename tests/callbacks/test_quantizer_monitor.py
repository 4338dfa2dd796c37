"""Curves, histograms, tables and runs to sort, as TensorBoard reads them."""

import io
import logging
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from torch.utils.tensorboard._utils import figure_to_image

import lq
from lq.callbacks import (
    Calibration,
    EngineComparison,
    OscillationControl,
    QuantizationAwareTraining,
    QuantizerMonitor,
    SensitivitySweep,
)
from lq.data import DigitsDataModule
from lq.plan import PrecisionPlan
from lq.plots import plot_plan, plot_sensitivity_heatmap
from lq.quantizer_health import quantizer_health
from tests.lit import LitSmall, autoencoder, loader, trainer, with_ranges

INPUT = "quantizer/encoder.0.input_quantizer"
FIGURES = {"sqnr_db", "clip_rate", "dead_channels", "scale", "amax", "drift"}


def events_of(logger):
    return EventAccumulator(logger.log_dir, {"tensors": 0, "histograms": 0, "images": 0}).Reload()


def fit(folder, monitor, module=None, extra=(), recipe="tensorrt_int8", **kwargs):
    callbacks = [QuantizationAwareTraining(recipe, calibration_batches=2), *extra, monitor]
    module = module or autoencoder()
    trainer(folder, callbacks, **kwargs).fit(module, loader())
    return module


def test_logs_every_quantizer_at_the_interval(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    module = fit(tmp_path, QuantizerMonitor(4), logger=logger)
    events = events_of(logger)
    tags = [t for t in events.Tags()["scalars"] if t.startswith("quantizer/")]
    assert len(tags) == 8 * len(FIGURES)  # two quantizers on each of four layers
    assert {t.rpartition("/")[2] for t in tags} == FIGURES
    # The first after calibration, then one in four.
    assert [e.step for e in events.Scalars(f"{INPUT}/scale")] == [3, 5, 9, 13]
    last = events.Scalars(f"{INPUT}/scale")[-1].value
    assert last == pytest.approx(float(module.encoder[0].input_quantizer.scale))
    assert events.Scalars(f"{INPUT}/drift")[-1].value == 0
    assert not any(m._forward_hooks for m in module.modules())


def test_figures_are_those_of_the_batch(tmp_path):
    logger, seen = TensorBoardLogger(tmp_path), []

    class Peek(QuantizerMonitor):
        def on_train_batch_start(self, run, pl_module, batch, batch_idx):
            quantizer = pl_module.encoder[0].input_quantizer
            if run.global_step == 4:
                x = batch[0].flatten(1)
                seen.append(quantizer_health(quantizer, x, quantizer(x), -1))
            super().on_train_batch_start(run, pl_module, batch, batch_idx)

    fit(tmp_path, Peek(4), logger=logger)
    events = events_of(logger)
    for name, value in seen[0].items():
        logged = {e.step: e.value for e in events.Scalars(f"{INPUT}/{name}")}
        assert logged[5] == pytest.approx(value)


def test_what_an_addition_is_given_is_measured_before_it_is_quantized(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    qat = QuantizationAwareTraining(calibration_batches=1)
    run = trainer(tmp_path, [qat, QuantizerMonitor(2, 2, True)], logger=logger, max_epochs=1,
                  limit_train_batches=4)  # fmt: skip
    run.fit(lq.QuantModule("lq.models.digits_cnn"), datamodule=DigitsDataModule())
    events = events_of(logger)
    tags = [t for t in events.Tags()["scalars"] if t.endswith("/sqnr_db")]
    assert all(np.isfinite(e.value) for tag in tags for e in events.Scalars(tag))
    shown = events.Tags()["histograms"]
    assert len(shown) == len(tags) == 10
    assert all([e.step for e in events.Histograms(tag)] == [2] for tag in shown)


def test_learned_ranges_have_gradients_and_drift(tmp_path):
    logger, recipe = TensorBoardLogger(tmp_path), with_ranges("lsq")
    norms = []

    class Norms(QuantizationAwareTraining):
        def on_before_optimizer_step(self, run, pl_module, optimizer):
            grad = pl_module.encoder[0].input_quantizer.scale.grad
            norms.append(None if grad is None else abs(grad.item()))

    monitor, module = QuantizerMonitor(4), LitSmall()
    run = trainer(tmp_path, [Norms(recipe, calibration_batches=2), monitor], logger=logger)
    run.fit(module, loader())
    events = events_of(logger)
    logged = {e.step - 1: e.value for e in events.Scalars(f"{INPUT}/scale_gradient")}
    assert set(logged) == {2, 4, 8, 12}
    assert all(value == pytest.approx(norms[step]) for step, value in logged.items())
    amax = [e.value for e in events.Scalars(f"{INPUT}/amax")]
    drifts = [e.value for e in events.Scalars(f"{INPUT}/drift")]
    assert amax[-1] != amax[0]
    assert drifts == pytest.approx([a / amax[0] - 1 for a in amax], abs=1e-6)


def test_drift_goes_on_from_the_calibrated_range_after_a_resume(tmp_path):
    recipe, checkpoint = with_ranges("lsq"), tmp_path / "half.ckpt"
    first = QuantizerMonitor(4)
    run = trainer(tmp_path, [QuantizationAwareTraining(recipe, calibration_batches=2), first],
                  max_epochs=1, logger=TensorBoardLogger(tmp_path))  # fmt: skip
    run.fit(LitSmall(), loader())
    run.save_checkpoint(checkpoint)
    logger, again = TensorBoardLogger(tmp_path), QuantizerMonitor(4)
    run = trainer(tmp_path, [QuantizationAwareTraining(recipe, calibration_batches=2), again],
                  logger=logger)  # fmt: skip
    run.fit(LitSmall(), loader(), ckpt_path=checkpoint, weights_only=True)
    events = events_of(logger)
    start = float(first._watch.first["encoder.0.input_quantizer"])
    amax = [e.value for e in events.Scalars(f"{INPUT}/amax")]
    drifts = [e.value for e in events.Scalars(f"{INPUT}/drift")]
    assert drifts == pytest.approx([a / start - 1 for a in amax], abs=1e-6)
    assert drifts[0] != 0


def test_accumulated_gradients_are_measured_once_a_step(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, QuantizerMonitor(2), LitSmall(), recipe=with_ranges("lsq"), logger=logger,
        accumulate_grad_batches=4)  # fmt: skip
    events = events_of(logger)
    steps = [e.step for e in events.Scalars(f"{INPUT}/scale_gradient")]
    assert steps == [e.step for e in events.Scalars(f"{INPUT}/scale")] == [1, 3]


def test_oscillations_are_logged_with_their_layer(tmp_path):
    logger, recipe = TensorBoardLogger(tmp_path), {"weights": "int4", "inputs": "int8"}
    control = OscillationControl("track", momentum=0.1)
    fit(tmp_path, QuantizerMonitor(4), LitSmall(), [control], recipe, logger=logger)
    logged = events_of(logger).Scalars("quantizer/encoder.0.weight_quantizer/oscillation")
    assert len(logged) == 4
    assert all(0 <= e.value <= 1 for e in logged)
    assert logged[-1].value > 0


def test_histograms_at_their_interval(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    module = fit(tmp_path, QuantizerMonitor(100, 8), logger=logger)
    events = events_of(logger)
    assert len(events.Tags()["histograms"]) == 4
    assert [e.step for e in events.Histograms("quantizer/encoder.0.weight_quantizer")] == [8]
    last = events.Histograms("quantizer/encoder.2.weight_quantizer")[-1].histogram_value
    weight = module.encoder[2].weight.detach()
    assert last.num == weight.numel()
    assert abs(last.max) < 2 * float(weight.abs().max())
    fit(tmp_path, QuantizerMonitor(100, 8, True), logger=(both := TensorBoardLogger(tmp_path)))
    assert len(events_of(both).Tags()["histograms"]) == 8


def test_tables_of_calibrators_and_of_the_plan(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    qat = QuantizationAwareTraining(calibrator="auto", calibration_batches=2)
    trainer(tmp_path, [qat, QuantizerMonitor()], logger=logger).fit(autoencoder(), loader())
    events = events_of(logger)

    def texts(tag):
        shown = events.Tensors(f"{tag}/text_summary")
        return [e.tensor_proto.string_val[0].decode() for e in shown]

    (calibrators,), (plan,) = texts("calibrators"), texts("plan")
    assert calibrators.replace("    ", "", 1).startswith("quantizer")
    assert all(line.strip() in calibrators for line in qat.ranges.table().splitlines())
    assert "encoder.0  int8" in plan


def pictures(events, tag):
    return [Image.open(io.BytesIO(e.encoded_image_string)) for e in events.Images(tag)]


def test_the_plan_as_a_figure(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    qat = QuantizationAwareTraining("int8_fp16_fallback", calibration_batches=1)
    run = trainer(tmp_path, [QuantizerMonitor(), qat], logger=logger, limit_train_batches=2)
    module = lq.QuantModule("lq.models.digits_cnn", recipe="int8_fp16_fallback")
    run.fit(module, datamodule=DigitsDataModule())
    (shown,) = pictures(events_of(logger), "plan/figure")
    batch = next(iter(DigitsDataModule().calibration_dataloader()))
    plan = PrecisionPlan.of(module.model)
    assert len(set(plan.values())) > 1
    expected = figure_to_image(plot_plan(plan, lq.count_costs(module.model, batch)))
    assert np.array_equal(np.asarray(shown.convert("RGB")), expected.transpose(1, 2, 0)[..., :3])
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_sensitivities_as_a_table_and_a_figure(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    sweep = SensitivitySweep(tmp_path / "s.json", ("int8", "fp16"), batches=1)
    run = trainer(tmp_path, [QuantizerMonitor(), sweep], logger=logger)
    module = lq.QuantModule("lq.models.digits_cnn", recipe=None)
    run.validate(module, DigitsDataModule(), verbose=False)
    events = events_of(logger)
    (shown,) = pictures(events, "sensitivity/figure")
    expected = figure_to_image(plot_sensitivity_heatmap(sweep.result))
    assert np.array_equal(np.asarray(shown.convert("RGB")), expected.transpose(1, 2, 0)[..., :3])
    assert "sensitivity/text_summary" in events.Tags()["tensors"]
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_the_layout_groups_the_curves_there_are(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, QuantizerMonitor(4), logger=logger)
    events = events_of(logger)
    proto = events.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(proto.string_val[0])
    assert {c.title for c in layout.category} == FIGURES - {"scale"}
    assert [chart.title for chart in layout.category[0].chart] == ["encoder", "decoder"]
    patterns = [t for c in layout.category for chart in c.chart for t in chart.multiline.tag]
    tags = events.Tags()["scalars"]
    assert all(sum(bool(re.fullmatch(p, tag)) for tag in tags) == 1 for p in patterns)


def sorted_runs(folder, metric):
    """What the HParams tab lists, sorted by a metric: settings and metrics of each run."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = Context(
        TBContext(logdir=str(folder), multiplexer=multiplexer, data_provider=provider)
    )
    column = api_pb2.ColParams(metric=api_pb2.MetricName(tag=metric), order=api_pb2.ORDER_ASC)
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, col_params=[column], allowed_statuses=statuses
    )
    found = Handler(RequestContext(), context, "", request).run()
    return [
        (
            {name: value.string_value for name, value in group.hparams.items()},
            {value.name.tag: value.value for value in group.metric_values},
        )
        for group in found.session_groups
    ]


def test_runs_sort_by_their_final_results(tmp_path):
    measured = []
    for calibrator in ("percentile(90)", "max"):
        torch.manual_seed(0)
        module = lq.QuantModule("lq.models.digits_cnn")
        comparison = EngineComparison()
        qat = QuantizationAwareTraining(calibrator=calibrator, calibration_batches=3)
        callbacks = [QuantizerMonitor(), qat, comparison]  # in whatever order
        run = trainer(tmp_path, callbacks, logger=TensorBoardLogger(tmp_path), max_epochs=1,
                      limit_train_batches=6)  # fmt: skip
        run.fit(module, datamodule=DigitsDataModule())
        measured.append((calibrator, comparison.rows["QAT"]))
    measured.sort(key=lambda pair: pair[1].versus.drop.mean)
    found = sorted_runs(tmp_path, "final/drop")
    assert [h["quantization/calibrator"] for h, _ in found] == [name for name, _ in measured]
    assert all(h["model"] == "lq.models.digits_cnn" for h, _ in found)
    for (_, metrics), (_, row) in zip(found, measured, strict=True):
        assert metrics["final/top1"] == pytest.approx(row.top1)
        assert metrics["final/drop"] == pytest.approx(row.versus.drop.mean)
        assert metrics["final/size_mb"] == pytest.approx(row.size_mb)
        assert np.isnan(metrics["final/latency_ms"])  # of a simulation it is not that of INT8


def test_runs_of_ptq_sort_too(tmp_path):
    measured = {}
    for calibrator in ("max", "percentile(90)"):
        torch.manual_seed(0)
        callbacks = [QuantizerMonitor(), Calibration(2, calibrator), EngineComparison()]
        run = trainer(tmp_path, callbacks, logger=TensorBoardLogger(tmp_path))
        module = lq.QuantModule("lq.models.digits_cnn")
        run.test(module, DigitsDataModule(), verbose=False)
        measured[calibrator] = callbacks[-1].rows["fake-quant"]
    found = sorted_runs(tmp_path, "final/drop")
    order = sorted(measured, key=lambda name: measured[name].versus.drop.mean)
    assert [h["quantization/calibrator"] for h, _ in found] == order
    for settings, metrics in found:
        row = measured[settings["quantization/calibrator"]]
        assert settings["quantization/weights"] == "int8"
        assert settings["quantization/method"] == "PTQ"
        assert metrics["final/drop"] == pytest.approx(row.versus.drop.mean)


class Numbers(Logger):
    """A logger that can do what it must, and nothing more."""

    def __init__(self):
        self.metrics, self.params = {}, {}

    name, version = "numbers", 0

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        self.params |= params


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_loggers_that_show_numbers_alone(tmp_path, caplog, several):
    numbers = Numbers()
    loggers = [numbers, CSVLogger(tmp_path)] if several else numbers
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(tmp_path, QuantizerMonitor(1, 1, True), logger=loggers)
    assert {k.rpartition("/")[2] for k in numbers.metrics if k.startswith("quantizer/")} == FIGURES
    assert numbers.params["quantization/calibrator"] == "max"
    assert sum("numbers alone" in r.getMessage() for r in caplog.records) == 1


def test_one_of_several_loggers_shows_all(tmp_path, caplog):
    board = TensorBoardLogger(tmp_path)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(tmp_path, QuantizerMonitor(4, 8), logger=[CSVLogger(tmp_path), board])
    assert events_of(board).Tags()["histograms"]
    assert not any("numbers alone" in r.getMessage() for r in caplog.records)


def test_no_logger_hooks_nothing(tmp_path):
    class Watch(QuantizerMonitor):
        def on_train_batch_end(self, run, pl_module, *args):
            assert not self._watch.is_on
            super().on_train_batch_end(run, pl_module, *args)

    fit(tmp_path, Watch(1, 1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((0,), "every_n_steps"), ((1, -1), "histogram_every_n_steps")],
    ids=["interval", "histograms"],
)
def test_bad_interval(arguments, match):
    with pytest.raises(ValueError, match=match):
        QuantizerMonitor(*arguments)


@pytest.mark.parametrize("accumulate", [3, 16])
def test_the_last_step_of_an_epoch_is_measured_too(tmp_path, accumulate):
    """Eight batches an epoch: the optimizer also steps on what is left over at its end."""
    logger = TensorBoardLogger(tmp_path)
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    module = fit(tmp_path, QuantizerMonitor(1), logger=logger, **settings)
    steps = [e.step for e in events_of(logger).Scalars(f"{INPUT}/scale")]
    assert steps == [*range(1, module.trainer.global_step + 1)]


def test_nothing_stays_hooked_where_a_batch_is_skipped(tmp_path):
    class Skips(LitSmall):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 4 else None

    logger = TensorBoardLogger(tmp_path)
    module = fit(tmp_path, QuantizerMonitor(1), Skips(), logger=logger, max_epochs=1)
    assert events_of(logger).Scalars(f"{INPUT}/scale")
    assert not any(m._forward_hooks for m in module.modules())


def test_what_was_kept_from_the_logger_stays_so(tmp_path):
    class Secretive(LitSmall):
        def __init__(self, secret="top-secret"):
            super().__init__()
            self.save_hyperparameters(logger=False)

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, QuantizerMonitor(4), Secretive(), logger=logger)
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("events.out.*"))
    assert b"quantization/" in written
    assert b"top-secret" not in written


def test_two_watch_two_parts(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callbacks = [
        QuantizationAwareTraining(calibration_batches=2),
        QuantizerMonitor(4, module="encoder"),
        QuantizerMonitor(4, module="decoder"),
    ]
    trainer(tmp_path, callbacks, logger=logger).fit(autoencoder(), loader())
    tags = events_of(logger).Tags()["scalars"]
    assert {"quantizer/0.input_quantizer/scale", "quantizer/2.input_quantizer/scale"} <= {*tags}


def test_no_batch_is_kept_without_a_logger(tmp_path):
    module, monitor = autoencoder(), QuantizerMonitor(1)
    fit(tmp_path, monitor, module, logger=False)
    assert monitor._findings._batch is None


def test_a_second_run_is_shown_what_the_first_was(tmp_path):
    monitor, seen = QuantizerMonitor(4), []
    for name in ("a", "b"):
        logger = TensorBoardLogger(tmp_path / name)
        fit(tmp_path, monitor, logger=logger)
        seen.append({t for t in events_of(logger).Tags()["tensors"] if "text" in t})
    assert seen[0] == seen[1]
    assert any("plan" in tag for tag in seen[1])


def test_gradients_are_those_before_the_loss_was_scaled(tmp_path):
    """A fused optimizer divides by the scale of the loss itself, after the hook."""

    class Scaled(MixedPrecision):
        def __init__(self):
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    class Trains(LitSmall):
        fused = False

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0, fused=self.fused)

    found = []
    for fused in (False, True):
        logger = TensorBoardLogger(tmp_path / str(fused))
        Trains.fused = fused
        settings = {"logger": logger, "plugins": [Scaled()], "max_epochs": 1}
        fit(tmp_path, QuantizerMonitor(1), Trains(), recipe=with_ranges("lsq"), **settings)
        found.append(events_of(logger).Scalars(f"{INPUT}/scale_gradient")[-1].value)
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-2)
