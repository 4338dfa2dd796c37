"""Accuracy against sklearn, size against the file, and honest latencies."""

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import nn

import lq
from lq.evaluation import comparison_table


def data(classes: int, batches: int = 3):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(17, 6, generator=generator),
            torch.randint(0, classes, (17,), generator=generator),
        )
        for _ in range(batches)
    ]


@pytest.mark.parametrize("classes", [3, 10])
def test_equals_sklearn(classes) -> None:
    torch.manual_seed(0)
    model, batches = nn.Linear(6, classes), data(classes)
    result = lq.evaluate(model, batches)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits, labels = model(x).detach().numpy(), range(classes)
    assert result.top1 == pytest.approx(top_k_accuracy_score(y, logits, k=1, labels=labels))
    top5 = 1.0 if classes <= 5 else top_k_accuracy_score(y, logits, k=5, labels=labels)
    assert result.top5 == pytest.approx(top5)
    assert result.n == 51
    assert result.size_mb == sum(p.numel() for p in model.parameters()) * 4 / 1e6
    assert result.latency_ms > 0
    assert not result.simulated


def test_file_and_model_agree(tmp_path) -> None:
    torch.manual_seed(0)
    batches = data(10)
    model = lq.calibrate(lq.quantize(nn.Linear(6, 10), "tensorrt_int8"), batches, progress=False)
    lq.export_onnx(model, batches[0], tmp_path / "m.onnx", batches=batches)
    in_torch, in_file = lq.evaluate(model, batches), lq.evaluate(tmp_path / "m.onnx", batches)
    assert in_torch.top1 == in_file.top1
    assert in_torch.simulated
    assert not in_file.simulated
    assert in_file.size_mb == (tmp_path / "m.onnx").stat().st_size / 1e6
    table = comparison_table({"QAT": in_torch, "file": in_file})
    assert "simulated" in table.splitlines()[1]  # fake-quant's time is not INT8's
    assert "simulated" not in table.splitlines()[2]


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        pytest.param([], "at least one batch", id="empty"),
        pytest.param([torch.randn(2, 6)], "pairs", id="no targets"),
        pytest.param([(torch.full((2, 6), torch.nan), torch.zeros(2))], "finite outputs", id="NaN"),
    ],
)
def test_refusals(batches, match) -> None:
    with pytest.raises(ValueError, match=match):
        lq.evaluate(nn.Linear(6, 3), batches)
