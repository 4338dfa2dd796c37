"""Accuracy against sklearn and numpy, size against the file, and honest latencies."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import nn

import lq
from lq.evaluation import Evaluation, comparison_table, outcome_of
from lq.outcome import BINS
from lq.paired import paired_drop
from lq.timing import time_runs


def data(classes: int, batches: int = 3):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(17, 6, generator=generator),
            torch.randint(0, classes, (17,), generator=generator),
        )
        for _ in range(batches)
    ]


def joined(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


@pytest.mark.parametrize("classes", [3, 10])
def test_equals_sklearn(classes) -> None:
    torch.manual_seed(0)
    model, batches = nn.Linear(6, classes), data(classes)
    result = lq.evaluate(model, batches, progress=False)
    x, y = joined(batches)
    logits, labels = model(x).detach(), range(classes)
    assert result.top1 == pytest.approx(top_k_accuracy_score(y, logits, k=1, labels=labels))
    top5 = 1.0 if classes <= 5 else top_k_accuracy_score(y, logits, k=5, labels=labels)
    assert result.top5 == pytest.approx(top5)
    assert result.loss == pytest.approx(
        log_loss(y, logits.double().softmax(1), labels=labels), rel=1e-5
    )
    assert result.n == 51
    assert result.size_mb == sum(p.numel() for p in model.parameters()) * 4 / 1e6
    assert result.weights_mb == result.size_mb
    assert result.latency_ms > 0
    assert not result.simulated


def test_calibration_error_is_numpys() -> None:
    """Mean distance between confidence and accuracy in bins of equal width."""
    torch.manual_seed(0)
    model, batches = nn.Linear(6, 4), data(4, batches=8)
    x, y = joined(batches)
    confidence, predicted = (t.numpy() for t in model(x).detach().softmax(1).max(1))
    right = predicted == y.numpy()
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    expected = sum(
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
        for b in set(bins)
    )
    found = lq.evaluate(model, batches, progress=False).calibration_error
    assert found == pytest.approx(expected, rel=1e-4)


def test_calibration_error_of_outputs_that_look_like_probabilities() -> None:
    """And of any split into batches: outputs are logits, whatever their range."""
    logits, y = torch.rand(200, 10), torch.randint(10, (200,))
    logits[0, 0] = 1.5
    whole, split = (
        lq.evaluate(
            nn.Identity(), list(zip(logits.split(n), y.split(n), strict=True)), progress=False
        )
        for n in (200, 100)
    )
    shifted = lq.evaluate(nn.Identity(), [(logits - 5, y)], progress=False)
    assert whole.calibration_error == pytest.approx(split.calibration_error, rel=1e-4)
    assert whole.calibration_error == pytest.approx(shifted.calibration_error, rel=1e-3)


def test_places_of_dense_outputs_count_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1)
    batches = [(torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))) for _ in range(3)]
    result = lq.evaluate(model, batches, reference=nn.Conv2d(3, 4, 1), progress=False)
    x, y = joined(batches)
    logits = model(x).detach()
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert result.top1 == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert result.n == y.numel()
    assert result.versus.drop.n == 6  # images


def test_beside_the_float_model() -> None:
    torch.manual_seed(0)
    batches = data(4, batches=20)
    reference, model = nn.Linear(6, 4), nn.Linear(6, 4)
    model.load_state_dict(
        {k: v + 0.2 * torch.randn_like(v) for k, v in reference.state_dict().items()}
    )
    x, y = joined(batches)
    before, after = (net(x).argmax(1) for net in (reference, model))

    versus = lq.evaluate(model, batches, reference=reference, progress=False).versus
    outcome = outcome_of(lq.open_engine(reference), batches, progress=False)

    assert versus.agreement == pytest.approx(float((before == after).float().mean()))
    assert 0.5 < versus.agreement < 1
    assert versus.drop == paired_drop(before == y, after == y)
    assert versus.drop.low <= versus.drop.mean <= versus.drop.high
    for c, drop in versus.class_drops.items():
        accuracy = [float((p == y)[y == c].float().mean()) for p in (before, after)]
        assert drop == pytest.approx(accuracy[0] - accuracy[1])
    assert versus.class_drops.keys() == set(y.tolist())
    assert lq.evaluate(model, batches, reference=outcome, progress=False).versus == versus
    assert lq.evaluate(model, batches, progress=False).versus is None


def test_other_samples_than_the_reference_saw() -> None:
    batches = data(4)
    outcome = outcome_of(lq.open_engine(nn.Linear(6, 4)), batches, progress=False)
    with pytest.raises(ValueError, match=r"same samples.*51 and 34 samples.*does not shuffle"):
        lq.evaluate(nn.Linear(6, 4), batches[:2], reference=outcome, progress=False)
    with pytest.raises(ValueError, match="gone through again"):
        lq.evaluate(nn.Linear(6, 4), iter(batches), reference=nn.Linear(6, 4), progress=False)


def test_file_and_model_agree(tmp_path) -> None:
    torch.manual_seed(0)
    batches = data(10)
    model = lq.calibrate(lq.quantize(nn.Linear(6, 10), "tensorrt_int8"), batches, progress=False)
    lq.export_onnx(model, batches[0], tmp_path / "m.onnx", batches=batches)
    in_torch, in_file = (
        lq.evaluate(x, batches, progress=False) for x in (model, tmp_path / "m.onnx")
    )
    assert in_torch.top1 == in_file.top1
    assert in_torch.simulated
    assert not in_file.simulated
    assert in_file.size_mb == (tmp_path / "m.onnx").stat().st_size / 1e6
    assert 60 + 10 * 4 * 2 <= in_file.weights_mb * 1e6 < in_file.size_mb * 1e6
    table = comparison_table({"QAT": in_torch, "file": in_file})
    assert "simulated" in table.splitlines()[1]  # fake-quant's time is not INT8's
    assert "simulated" not in table.splitlines()[2]
    assert "drop" not in table
    beside = lq.evaluate(model, batches, reference=tmp_path / "m.onnx", progress=False)
    assert beside.versus.agreement == 1.0
    assert "+0.00%" in comparison_table({"QAT": beside, "file": in_file})


def test_in_a_line() -> None:
    told = Evaluation("torch", 0.98, 1.0, 400, 1.234, 0.31, False, loss=0.05)
    assert str(told) == (
        "torch: top-1 98.00%, top-5 100.00%, loss 0.0500, 400 samples; "
        "1.23 ms for one sample, 0.310 MB"
    )
    batches = data(4)
    model = lq.calibrate(lq.quantize(nn.Linear(6, 4), {"weights": "int8"}), batches, progress=False)
    beside = str(lq.evaluate(model, batches, reference=nn.Linear(6, 4), progress=False))
    assert "drop" in beside
    assert "agreement" in beside
    assert "time simulated" in beside


def test_times_by_batch_size_and_threads(tmp_path) -> None:
    model, batches = nn.Linear(6, 4), data(4)
    lq.export_onnx(model, batches[0], tmp_path / "m.onnx")
    for what in (model, tmp_path / "m.onnx"):
        result = lq.evaluate(what, batches, batch_sizes=(1, 40), threads=(0, 1), progress=False)
        assert [(t.batch_size, t.threads) for t in result.latencies] == [
            (1, 0), (40, 0), (1, 1), (40, 1),
        ]  # fmt: skip
        for time in result.latencies:
            assert 0 < time.p50_ms <= time.p90_ms <= time.p99_ms
            assert time.throughput == pytest.approx(1000 * time.batch_size / time.p50_ms)
        assert result.latency_ms == result.latencies[0].p50_ms
    lq.export_onnx(model, batches[0], tmp_path / "fixed.onnx", dynamic_batch=False)
    fixed = lq.evaluate(tmp_path / "fixed.onnx", batches, batch_sizes=(17,), progress=False)
    assert [time.batch_size for time in fixed.latencies] == [17]
    with pytest.raises(ValueError, match="`threads` to hold at least one number"):
        lq.evaluate(model, batches, threads=(), progress=False)
    with pytest.raises(ValueError, match=r"`threads` to be 0"):
        lq.evaluate(lq.open_engine(tmp_path / "m.onnx"), batches, threads=(2,), progress=False)
    with pytest.raises(ValueError, match=r"`batch_sizes` to be at least 1, but got 0"):
        lq.evaluate(model, batches, batch_sizes=(0,), progress=False)


def test_threads_of_torch_are_given_back() -> None:
    seen, before = [], torch.get_num_threads()

    class Threads(nn.Module):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return x

    lq.evaluate(Threads(), data(4), threads=(before + 1,), progress=False)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_slow_runs_are_timed_for_three_seconds(monkeypatch) -> None:
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr("lq.timing.time.perf_counter", lambda: next(clock))
    found = time_runs(lambda: None, 2)
    assert (found.runs, found.p50_ms, found.throughput) == (20, 500, 4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells")
def test_memory_is_what_running_takes() -> None:
    class Hungry(nn.Module):
        def forward(self, x):
            return x + torch.ones(50_000_000).mean()

    hungry = lq.evaluate(Hungry(), data(4), progress=False)
    assert 190 < hungry.peak_memory_mb < 500


def test_memory_where_the_system_does_not_tell(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("lq.peak_memory._PROCESS", tmp_path / "none")
    assert lq.evaluate(nn.Linear(6, 4), data(4), progress=False).peak_memory_mb is None


def test_as_plain_values() -> None:
    batches = data(4)
    result = lq.evaluate(nn.Linear(6, 4), batches, reference=nn.Linear(6, 4), progress=False)
    assert Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    old = {"engine": "torch", "top1": 1.0, "top5": 1.0, "n": 3, "latency_ms": 1.0, "size_mb": 1.0}
    assert math.isnan(Evaluation.from_dict({**old, "simulated": False}).loss)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        pytest.param([], "at least one batch", id="empty"),
        pytest.param([torch.randn(2, 6)], "pairs", id="no targets"),
        pytest.param(
            [(torch.full((2, 6), torch.nan), torch.zeros(2).long())], "finite outputs", id="NaN"
        ),
    ],
)
def test_refusals(batches, match) -> None:
    with pytest.raises(ValueError, match=match):
        lq.evaluate(nn.Linear(6, 3), batches, progress=False)


def dense(seed: int, images: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rightness of two models on images of 50 places, the second wrong on whole images at once."""
    rng = np.random.default_rng(seed)
    before = rng.random((images, 50)) < 0.9
    after = before & (rng.random((images, 1)) > 0.1)
    return torch.from_numpy(before.ravel()), torch.from_numpy(after.ravel()), torch.full((40,), 50)


def test_places_of_an_image_do_not_count_as_samples() -> None:
    """Of 400 series the interval holds the truth in about 95; counted one by one, in far fewer."""
    held = alone = 0
    for seed in range(400):
        before, after, places = dense(seed)
        drop, naive = paired_drop(before, after, places), paired_drop(before, after)
        assert drop.mean == naive.mean
        assert drop.n == 40
        held += drop.low <= 0.09 <= drop.high
        alone += naive.low <= 0.09 <= naive.high
    assert 0.9 <= held / 400 <= 0.99
    assert alone / 400 < 0.7


def test_one_place_a_sample_is_the_formula_of_agresti_and_min() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 50, 700):
        before, after = (torch.from_numpy(rng.random(n) < p) for p in (0.8, 0.7))
        b, c = int((before & ~after).sum()), int((~before & after).sum())
        centre = (b - c) / (n + 2)
        margin = 1.959964 * ((b + c + 1 - (b - c) ** 2 / (n + 2)) ** 0.5) / (n + 2)
        drop = paired_drop(before, after)
        assert (drop.low, drop.high) == pytest.approx((centre - margin, centre + margin))
        assert drop == paired_drop(before, after, torch.ones(n, dtype=torch.long))


def test_dense_outputs_have_the_interval_of_their_samples() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(3, (16, 8, 8))
    models = [nn.Conv2d(3, 3, 1).eval() for _ in range(2)]
    found = lq.evaluate(models[1], [(x, y)], reference=models[0], progress=False)
    right = [(m(x).argmax(1) == y).flatten() for m in models]
    assert found.versus.drop == paired_drop(*right, torch.full((16,), 64))
    assert found.versus.drop.n == 16


def test_outputs_without_a_targets_class() -> None:
    with pytest.raises(ValueError, match="Expected outputs for class 4, but got 3 classes"):
        lq.evaluate(nn.Identity(), [(torch.eye(3), torch.tensor([0, 1, 4]))], progress=False)
