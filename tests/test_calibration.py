from __future__ import annotations

import logging
import math
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lq
from lq.batches import model_inputs
from lq.calibration import calibrate_weights
from lq.collector import RangeCollector
from lq.modes import eval_mode, quantizer_mode, set_mode
from lq.surgery import quantizers


def everything(tensors: list[Tensor]) -> np.ndarray:
    return np.concatenate([np.abs(x.float().numpy()).ravel() for x in tensors])


class Net(nn.Module):
    """Convolution, BatchNorm, Dropout and a head; its input has one name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 2)

    def forward(self, image: Tensor, gain: float = 1.0) -> Tensor:
        x = self.dropout(self.bn(self.conv(image)).relu())
        return self.fc(x.mean((2, 3)) * gain)


SKIP_UNUSED = {"rules": [{"name": "unused", "format": "skip"}]}


def net() -> Net:
    torch.manual_seed(0)
    return lq.quantize(Net(), SKIP_UNUSED)


def images(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 + i, 3, 6 + i, 7, generator=generator) for i in range(n)]


def ranges(model: nn.Module) -> dict[str, list[float]]:
    return {n: q.scale.flatten().tolist() for n, q in quantizers(model).items()}


def inputs_seen(model: Net, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """What reaches each layer of the float model in eval mode, by a hook and not by lq."""
    model, seen = lq.dequantize(model).eval(), {}
    for name in ("conv", "fc"):
        seen[name] = []
        getattr(model, name).register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(args[0].detach())
        )
    with torch.no_grad():
        for x in batches:
            model(x)
    return seen


@pytest.mark.parametrize("calibrator", ["max", "percentile(95)"])
def test_ranges_are_numpys_over_everything(calibrator: str) -> None:
    model = lq.calibrate(net(), images(), calibrator, progress=False)

    for name, tensors in inputs_seen(net(), images()).items():
        found, values = getattr(model, name).input_quantizer.amax.item(), everything(tensors)
        if calibrator == "max":
            assert found == pytest.approx(values.max(), rel=1e-6)
        else:
            exact = np.percentile(values, 95, method="inverted_cdf")
            assert exact * (1 - 1 / 128) <= found <= exact  # the lower edge of its bin
    weights = np.abs(model.conv.weight.detach().numpy()).max((1, 2, 3))
    np.testing.assert_allclose(model.conv.weight_quantizer.amax.numpy(), weights, rtol=1e-6)


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param(lambda: images(), id="tensors"),
        pytest.param(lambda: [(x, torch.zeros(len(x))) for x in images()], id="pairs"),
        pytest.param(lambda: [[x, torch.zeros(len(x))] for x in images()], id="lists"),
        pytest.param(lambda: [(x,) for x in images()], id="singles"),
        pytest.param(lambda: [((x, 1.0), torch.zeros(1)) for x in images()], id="nested"),
        pytest.param(lambda: [(x, 1.0, torch.zeros(1)) for x in images()], id="triples"),
        pytest.param(lambda: [{"image": x} for x in images()], id="dicts"),
        pytest.param(lambda: [{"image": x, "label": 1, "gain": 1.0} for x in images()], id="label"),
        pytest.param(lambda: (x for x in images()), id="generator"),
        pytest.param(lambda: tuple(images()), id="tuple"),
        pytest.param(
            lambda: torch.utils.data.DataLoader(images(), batch_size=None), id="dataloader"
        ),
    ],
)
def test_any_kind_of_batches(batches: Callable[[], Any]) -> None:
    expected = ranges(lq.calibrate(net(), images(), progress=False))

    model = net()
    assert lq.calibrate(model, batches(), progress=False) is model

    assert ranges(model) == expected
    assert all(q.mode is lq.Mode.QUANTIZE for q in quantizers(model).values())


def test_a_label_that_forward_takes_is_passed() -> None:
    class Labelled(nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> None: ...

    batch = {"x": torch.ones(1), "label": torch.ones(1), "targets": torch.ones(1)}

    assert model_inputs(Labelled(), batch)[1].keys() == {"x", "label"}


def test_an_empty_sequence_is_no_batch() -> None:
    with pytest.raises(ValueError, match="empty sequence"):
        lq.calibrate(net(), [[]], progress=False)


def test_modes_and_statistics_of_the_model_stay() -> None:
    model = net().train()
    model.bn.eval()
    flags = {n: m.training for n, m in model.named_modules()}
    buffers = {n: b.clone() for n, b in model.named_buffers() if n.startswith("bn")}
    parameters = [p.clone() for p in model.parameters()]

    lq.calibrate(model, images(), progress=False)

    assert {n: m.training for n, m in model.named_modules()} == flags
    assert all(torch.equal(b, model.get_buffer(n)) for n, b in buffers.items())
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_training_mode_is_not_used() -> None:
    """Ranges are those of eval mode: neither Dropout nor batch statistics reach them."""
    training = lq.calibrate(net().train(), images(), progress=False)
    evaluated = lq.calibrate(net().eval(), images(), progress=False)

    assert ranges(training) == ranges(evaluated)


def test_calibrating_again_forgets_the_first_time() -> None:
    model = lq.calibrate(net(), [100 * x for x in images()], progress=False)

    lq.calibrate(model, images(), progress=False)

    assert ranges(model) == ranges(lq.calibrate(net(), images(), progress=False))


def breaking(kind: str) -> Iterator[Tensor]:
    good = images()
    yield good[0]
    yield good[1]
    if kind == "nan":
        good[2][0, 0, 0, 0] = math.nan
    elif kind == "inf":
        good[2][0, 0, 0, 0] = math.inf
    elif kind == "interrupt":
        raise KeyboardInterrupt
    elif kind == "loader":
        raise OSError("disk gone")
    elif kind == "shape":
        good[2] = good[2][:, :1]
    yield good[2]


@pytest.mark.parametrize("calibrated", [False, True], ids=["fresh", "calibrated"])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("nan", RuntimeError, r"'conv\.input_quantizer'.*batch 2"),
        ("inf", RuntimeError, r"'conv\.input_quantizer'.*batch 2"),
        ("interrupt", KeyboardInterrupt, None),
        ("loader", OSError, "disk gone"),
        ("shape", RuntimeError, "channels"),
    ],
    ids=lambda v: v if isinstance(v, str) and " " not in v and "'" not in v else "",
)
@pytest.mark.parametrize("calibrator", ["max", "auto"])
def test_a_calibration_that_breaks_leaves_the_model_as_it_was(
    calibrator: str, kind: str, error: type[BaseException], message: str | None, calibrated: bool
) -> None:
    model = net().train()
    if calibrated:
        lq.calibrate(model, [x * 2 for x in images()], progress=False)
    model.fc.input_quantizer.mode = lq.Mode.BYPASS
    before = as_it_is(model)

    with pytest.raises(error, match=message):
        lq.calibrate(model, breaking(kind), calibrator, progress=False)

    assert as_it_is(model) == before


def as_it_is(model: nn.Module) -> str:
    """Modes, observers, ranges and training flags; as text, in which NaN equals NaN."""
    found = quantizers(model)
    return str(
        (
            {n: (q.mode, q.observer) for n, q in found.items()},
            ranges(model),
            {n: m.training for n, m in model.named_modules()},
        )
    )


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_weights_that_are_not_finite_leave_the_model_as_it_was(value: float) -> None:
    model = net()
    with torch.no_grad():
        model.fc.weight[0, 0] = value
    before = as_it_is(model)

    with pytest.raises(RuntimeError, match=r"finite weights.*'fc'"):
        lq.calibrate(model, images(), progress=False)

    assert as_it_is(model) == before


def test_no_batches() -> None:
    model = net()
    before = as_it_is(model)

    with pytest.raises(ValueError, match="at least one batch"):
        lq.calibrate(model, [], progress=False)

    assert as_it_is(model) == before


@pytest.mark.parametrize(
    "batches", [images()[0], {"image": images()[0]}, 7], ids=lambda b: type(b).__name__
)
def test_what_is_no_iterable_of_batches(batches: Any) -> None:
    with pytest.raises(ValueError, match=r"iterable of batches.*pass \[batch\]"):
        lq.calibrate(net(), batches, progress=False)


def test_an_unknown_calibrator_is_refused_before_any_work() -> None:
    def never() -> Iterator[Tensor]:
        pytest.fail("a batch was taken")
        yield torch.ones(1)

    with pytest.raises(ValueError, match="did you mean 'percentile'"):
        lq.calibrate(net(), never(), "percentle", progress=False)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lq\.quantize"):
        lq.calibrate(nn.Linear(2, 2), [torch.ones(1, 2)], progress=False)


def test_quantizers_without_data_are_named_and_stay_uncalibrated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = lq.quantize(Net(), "tensorrt_int8")

    with caplog.at_level(logging.WARNING, "lq.calibration"):
        lq.calibrate(model, images(), progress=False)

    assert "unused.input_quantizer" in caplog.text
    assert "conv.input_quantizer" not in caplog.text
    assert not model.unused.input_quantizer.is_calibrated
    assert model.fc.input_quantizer.is_calibrated
    with pytest.raises(RuntimeError, match=r"'unused\.input_quantizer' is not calibrated"):
        model.unused(torch.ones(1, 4))


def test_no_quantizer_saw_data() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = lq.quantize(Around(), "tensorrt_int8")
    before = as_it_is(model)

    with pytest.raises(RuntimeError, match="no quantizer saw data"):
        lq.calibrate(model, [torch.ones(1, 2)], progress=False)

    assert as_it_is(model) == before


def test_weight_only_models_need_no_observer() -> None:
    model = lq.quantize(nn.Sequential(nn.Linear(3, 2)), "weight_only_int8")

    lq.calibrate(model, [torch.ones(1, 3)], progress=False)

    assert model[0].weight_quantizer.is_calibrated
    assert model(torch.ones(1, 3)).isfinite().all()


def test_all_zero_inputs_get_a_positive_scale() -> None:
    for calibrator in ("max", "percentile"):
        model = lq.calibrate(net(), [torch.zeros(2, 3, 6, 6)], calibrator, progress=False)

        assert model.conv.input_quantizer.scale.item() == pytest.approx(1 / 127)
        assert model(torch.zeros(2, 3, 6, 6)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("calibrator", ["max", "percentile"])
def test_16_bit_models(dtype: torch.dtype, calibrator: str) -> None:
    model, batches = net().to(dtype), [x.to(dtype) for x in images()]

    lq.calibrate(model, batches, calibrator, progress=False)

    largest = max(x.abs().max().item() for x in batches)
    assert model.conv.input_quantizer.amax.item() == pytest.approx(largest, rel=0.01)
    assert model(batches[0]).dtype is dtype


def test_integer_inputs_are_not_observed() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fc = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.fc(self.embedding(tokens))

    model = lq.quantize(Embedded(), "tensorrt_int8")

    lq.calibrate(model, [torch.arange(5)], progress=False)

    amax = model.embedding.weight.abs().max().item()
    assert model.fc.input_quantizer.amax.item() == pytest.approx(amax, rel=1e-6)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    lq.calibrate(net(), images(), progress=False)
    assert capsys.readouterr().err == ""

    lq.calibrate(net(), images())
    assert "Calibrating" in capsys.readouterr().err


def test_nothing_is_collected_while_paused() -> None:
    model, expected = net().eval(), net().eval()
    collector = RangeCollector(model)
    collector.start()
    with torch.no_grad():
        for x in images():
            model(x)
            collector.next_batch()
        float_output = lq.dequantize(expected)(images()[0])
        collector.pause()
        assert torch.equal(model(images()[0] * 1), float_output)
        model(images()[0] * 1000)
        collector.resume()
    collector.finish()

    assert ranges(model) == ranges(lq.calibrate(net().eval(), images(), progress=False))


def test_modes_for_a_while() -> None:
    model = lq.calibrate(net().eval(), images(), progress=False)
    model.fc.weight_quantizer.mode = lq.Mode.BYPASS
    before = as_it_is(model)
    expected = lq.dequantize(net().eval())(images()[0])

    with quantizer_mode(model, lq.Mode.BYPASS):
        assert torch.equal(model(images()[0]), expected)
    assert as_it_is(model) == before
    with eval_mode(model.train()):
        assert not model.bn.training
        assert not torch.is_grad_enabled()
    for context in (quantizer_mode(model, lq.Mode.BYPASS), eval_mode(model)):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
    assert model.training
    assert as_it_is(model.eval()) == before

    set_mode(model, lq.Mode.OBSERVE)
    assert {q.mode for q in quantizers(model).values()} == {lq.Mode.OBSERVE}


def test_weights_alone() -> None:
    model = net()

    calibrate_weights(model)

    assert model.conv.weight_quantizer.is_calibrated
    assert not model.conv.input_quantizer.is_calibrated


# ----------------------------------------------------------------------- several processes


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


RANKS = """
import sys, torch, lq
from torch import nn
rank, port, calibrator, split, folder = int(sys.argv[1]), *sys.argv[2:6]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
batches = torch.load(f"{folder}/batches.pt")
mine = batches[:1] if rank == 0 else batches[1:]
torch.manual_seed(0)
model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = model
    def forward(self, x):
        # The second layer may see data on one rank only.
        x = self.layers[0](x)
        return self.layers[1](x) if split == "all" or rank == 1 else x
net = lq.quantize(Net(), "tensorrt_int8")
lq.calibrate(net, mine, calibrator, progress=False)
torch.save(net.state_dict(), f"{folder}/rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP is tested on POSIX")
@pytest.mark.parametrize(
    ("calibrator", "split"),
    [("percentile(99)", "all"), ("max", "one-rank"), ("mse", "all"), ("auto", "one-rank")],
    ids=["percentile", "max-and-a-layer-only-one-rank-runs", "mse", "auto-likewise"],
)
def test_two_processes_find_the_ranges_of_one(tmp_path: Path, calibrator: str, split: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(50, 6, generator=generator) * s for s in (0.1, 1.0, 7.0)]
    torch.save(batches, tmp_path / "batches.pt")
    port = str(free_port())
    command = [sys.executable, "-c", RANKS]
    ranks = [
        subprocess.Popen([*command, str(rank), port, calibrator, split, str(tmp_path)])
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    one = lq.quantize(layers, "tensorrt_int8")
    lq.calibrate(one, batches, calibrator, progress=False)
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, expected in one.state_dict().items():
        if name.endswith("_quantizer.scale"):
            assert torch.equal(found[0][f"layers.{name}"], found[1][f"layers.{name}"])
            if calibrator != "auto" and (split == "all" or name.startswith("0")):
                assert torch.equal(found[0][f"layers.{name}"], expected)
    assert found[0]["layers.1.input_quantizer.scale"].isfinite()
