"""Live data that drift: exact clip rates, thresholds crossed once, several threads."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from torch import nn

import lq
from lq.engines import open_engine
from lq.engines.clipping import calibrated_inputs
from lq.engines.drift import Drift
from lq.engines.window import Window
from tests.digits import trained_digits


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A trained net, float and quantized, its ONNX file, and images to run."""
    model, data = trained_digits(epochs=4)
    quantized = lq.quantize(copy.deepcopy(model), "tensorrt_int8")
    lq.calibrate(quantized, data.calibration_dataloader(), progress=False)
    paths = {}
    for target in ("tensorrt", "onnxruntime"):
        paths[target] = tmp_path_factory.mktemp(target) / "m.onnx"
        lq.export_onnx(quantized, next(iter(data.val_dataloader())), paths[target], target=target)
    batches = [x for x, _ in data.test_dataloader()]
    return model, quantized, paths, batches


def numpy_clip_rate(path, x):
    """The share of values that the file's own first QuantizeLinear clips."""
    graph = onnx.load(path).graph
    held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    node = next(n for n in graph.node if n.input[:1] == [graph.input[0].name])
    assert node.op_type == "QuantizeLinear"
    scale, zero = held[node.input[1]], held[node.input[2]]
    codes = np.rint(x.numpy() / scale) + zero.astype(np.float32)
    info = np.iinfo(zero.dtype)
    return ((codes < info.min) | (codes > info.max)).mean()


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("brightness", [1.0, 1.3, 3.0])
def test_clip_rates_equal_numpy(served, target, brightness):
    _, _, paths, batches = served
    monitor = lq.DriftMonitor(paths[target], samples=10_000)
    for x in batches:
        monitor.run(x * brightness)
    rate = numpy_clip_rate(paths[target], torch.cat(batches) * brightness)
    assert list(monitor.report().clip_rates.values()) == [rate]
    assert (rate > 0.01) == (brightness > 1)


def test_outputs_are_those_of_the_runner(served):
    model, _, paths, batches = served
    monitor, plain = (
        lq.DriftMonitor(paths["tensorrt"], shadow=model),
        open_engine(paths["tensorrt"]),
    )
    assert torch.equal(monitor.run(batches[0])[0], plain.run(batches[0])[0])
    assert (monitor.name, monitor.size_mb) == (plain.name, plain.size_mb)
    assert lq.evaluate(monitor, [(batches[0], torch.zeros(len(batches[0])).long())]).n == 64


def test_clean_data_are_silent_and_brightened_data_warn_once(served, caplog):
    model, _, paths, batches = served
    monitor = lq.DriftMonitor(paths["tensorrt"], shadow=model, every=1, samples=64)
    with caplog.at_level(logging.INFO):
        for x in batches:
            monitor.run(x)
        assert not caplog.records
        for x in batches:
            monitor.run(x * 1.5)
        warned = [r.getMessage() for r in caplog.records if "beyond" in r.getMessage()]
        assert len(warned) == 1
        for x in batches:
            monitor.run(x)
        for x in batches:
            monitor.run(x + 1)
        warned = [r.getMessage() for r in caplog.records if "beyond" in r.getMessage()]
        assert len(warned) == 2  # once a crossing
    name = onnx.load(paths["tensorrt"]).graph.input[0].name
    assert f"values of {name!r} are beyond the calibrated range, over 1.00%" in warned[0]


def test_agreement_is_with_the_float_model_on_sampled_batches(served):
    model, _, paths, batches = served
    told = []
    monitor = lq.DriftMonitor(
        paths["tensorrt"], shadow=model, every=2, samples=128, max_clip_rate=1, on_drift=told.append
    )
    noisy = [x + torch.randn_like(x) * 40 for x in batches[:-1]]
    runner, seen = open_engine(paths["tensorrt"]), []
    with torch.no_grad():
        for i, x in enumerate(noisy):
            monitor.run(x)
            if i % 2 == 0:
                seen.append(runner.run(x)[0].argmax(1) == model(x).argmax(1))
                expected = torch.cat(seen[-2:]).double().mean()
                assert monitor.report().agreement == pytest.approx(float(expected))
    assert [type(d) for d in told] == [Drift]
    assert (told[0].figure, told[0].name, told[0].threshold) == ("agreement", "torch", 0.95)
    assert told[0].value < 0.95
    assert "agree with torch, under 95.0%" in str(told[0])


def test_activations_of_a_torch_model(served):
    _, quantized, _, batches = served
    told = []
    monitor = lq.DriftMonitor(
        quantized, every=2, samples=1, max_clip_rate=1e-4, on_drift=told.append
    )
    inputs = {}

    def look(name):
        def hook(quantizer, args):
            inputs.setdefault(name, (quantizer, args[0]))  # an addition's is quantized already

        return hook

    found = lq.surgery.input_quantizers(quantized)
    hooks = [q.register_forward_pre_hook(look(name)) for name, q in found.items()]
    monitor.run(batches[0] * 2)
    for hook in hooks:
        hook.remove()
    rates = monitor.report().clip_rates
    assert set(rates) == set(inputs)
    for name, (quantizer, x) in inputs.items():
        codes = np.rint(x.detach().numpy() / quantizer.scale.numpy())
        assert rates[name] == ((codes < -128) | (codes > 127)).mean()
    assert {d.name for d in told} == {name for name, rate in rates.items() if rate > 1e-4}
    assert len(told) > 1
    monitor.run(batches[0])  # not sampled
    assert monitor.report().clip_rates == rates
    assert not any(q._forward_pre_hooks for q in lq.surgery.quantizers(quantized).values())


def test_many_threads_lose_no_count(served):
    model, _, paths, batches = served
    told = []

    def tell(drift):
        told.append((drift.figure, monitor.report().batches))  # no deadlock

    jobs = [x * brightness for x in batches[:-1] for brightness in (1.0, 1.5, 2.0)] * 4
    monitor = lq.DriftMonitor(
        paths["tensorrt"], shadow=model, every=5, samples=64 * len(jobs), on_drift=tell
    )
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(monitor.run, jobs))
    report = monitor.report()
    assert report.batches == len(jobs)
    expected = numpy_clip_rate(paths["tensorrt"], torch.cat(jobs))
    assert list(report.clip_rates.values()) == [expected]
    assert monitor._disagreed.total == 64 * -(-len(jobs) // 5)
    assert told == [("clip_rate", len(jobs))]
    assert not model.training


def test_a_message_that_fails_fails_no_request(served, caplog):
    def fail(drift):
        raise OSError("no network")

    monitor = lq.DriftMonitor(served[2]["tensorrt"], samples=1, on_drift=fail)
    assert len(monitor.run(served[3][0] * 5)) == 1
    assert "Cannot tell of drift" in caplog.text


GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
example (float[n, 4, 4, 2] x, float[n, 4] y, float[n, 4] z) => (float[n, 2, 4, 4] a, float[n, 4] b)
<float scale = {0.5}, uint8 zero = {3}>
{
    moved = Transpose <perm = [0, 3, 1, 2]> (x)
    codes = QuantizeLinear (moved, scale, zero)
    a = DequantizeLinear (codes, scale, zero)
    doubled = Add (y, y)
    codes2 = QuantizeLinear (doubled, scale, zero)
    c = DequantizeLinear (codes2, scale, zero)
    b = Add (c, z)
}
"""


def test_ranges_are_read_through_moves_and_not_through_arithmetic(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(parser.parse_model(GRAPH), path)
    grids = calibrated_inputs(path)
    assert list(grids) == ["x", "y", "z"]
    assert (grids["x"].scale, grids["x"].zero_point, grids["x"].codes) == (0.5, 3, (0, 255))
    assert grids["y"] is None
    assert grids["z"] is None
    monitor = lq.DriftMonitor(path)
    x = torch.full((1, 4, 4, 2), 126.0)
    x[0, 0, 0, 0], x[0, 1, 1, 1] = 126.4, -1.8  # codes 256 and -1
    monitor.run(x, y=torch.zeros(1, 4), z=torch.zeros(1, 4))
    assert monitor.report().clip_rates == {"x": 2 / 32}


def test_the_window_keeps_what_it_needs():
    window, random = Window(50), np.random.default_rng(0)
    batches = [(int(n), int(n) // 3, int(n) * 7) for n in random.integers(1, 40, 100)]
    for i, batch in enumerate(batches):
        window.add(*batch)
        kept = next(
            batches[j : i + 1]
            for j in range(i, -1, -1)
            if j == 0 or sum(b[0] for b in batches[j : i + 1]) >= 50
        )
        samples, counted, total = (sum(column) for column in zip(*kept, strict=True))
        assert (window.samples, window.share) == (samples, counted / total)
        assert window.is_full == (samples >= 50)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"every": 0}, "`every` to be at least 1"),
        ({"samples": 0}, "`samples` to be at least 1"),
        ({"max_clip_rate": 1.1}, "`max_clip_rate` to be between 0 and 1"),
        ({"min_agreement": -0.1}, "`min_agreement` to be between 0 and 1"),
        ({}, "`shadow` to compare with"),
    ],
    ids=["every", "samples", "clip-rate", "agreement", "nothing"],
)
def test_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        lq.DriftMonitor(nn.Linear(2, 2), **arguments)


class Answers(lq.engines.Runner):
    """Gives what it was told to, or raises it."""

    name, size_mb = "shadow", 0.0

    def __init__(self, answer):
        self.answer = answer

    def run(self, *args, **kwargs):
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(RuntimeError("shadow out of memory"), id="it fails"),
        pytest.param(torch.zeros(1, 10), id="another shape"),
    ],
)
def test_a_shadow_that_fails_fails_no_request(served, caplog, answer):
    _, quantized, _, batches = served
    monitor = lq.DriftMonitor(quantized, shadow=Answers(answer), every=1, samples=8)
    assert monitor.run(batches[0])[0].shape == (len(batches[0]), 10)
    assert monitor.report().agreement is None
    assert "Cannot compare with shadow." in caplog.text


def test_outputs_without_classes_are_not_compared(caplog):
    model = lq.quantize(nn.Sequential(nn.Linear(4, 1)), "tensorrt_int8")
    lq.calibrate(model, [torch.ones(1, 4)], progress=False)
    monitor = lq.DriftMonitor(model, shadow=nn.Linear(4, 1), every=1, samples=2)
    monitor.run(torch.ones(8, 4))
    assert monitor.report().agreement is None
    assert "classes" in caplog.text


def test_scalar_outputs_are_run(served):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x).mean()

    model = lq.quantize(Mean(), "tensorrt_int8")
    lq.calibrate(model, [torch.ones(1, 4)], progress=False)
    monitor = lq.DriftMonitor(model, every=1, samples=2)
    assert monitor.run(torch.ones(8, 4))[0].dim() == 0
    assert monitor.report().clip_rates == {"fc.input_quantizer": 0.0}


def test_nan_is_beyond_the_range_in_a_file_and_in_torch(served):
    _, quantized, paths, batches = served
    x = torch.full_like(batches[0], torch.nan)
    rates = []
    for model in (quantized, paths["tensorrt"]):
        monitor = lq.DriftMonitor(model, every=1, samples=8, on_drift=lambda drift: None)
        monitor.run(x)
        rates.append(next(iter(monitor.report().clip_rates.values())))
    assert rates == [1.0, 1.0]
