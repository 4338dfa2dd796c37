"""What begins when in quantization-aware training."""

import pytest
import torch
from torch import nn

import lq
from lq.qat import freeze_scales
from lq.quantized_training import QuantizedTraining
from lq.quantizer import Mode
from lq.schedule import Schedule


def network(recipe="tensorrt_int8") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    return lq.quantize(net, recipe)


def modes_over(training: QuantizedTraining, epochs: int, batches: int) -> list[tuple[str, str]]:
    """Train, and return the modes of the first layer's quantizers at every batch."""
    layer = training.model[0]
    optimizer = torch.optim.SGD(training.model.parameters(), 0.01)
    found = []
    for epoch in range(epochs):
        training.model.train()
        for batch in range(batches):
            training.before_batch(epoch, epoch * batches + batch)
            found.append((layer.weight_quantizer.mode.value, layer.input_quantizer.mode.value))
            optimizer.zero_grad()
            training.model(torch.randn(8, 8)).square().mean().backward()
            optimizer.step()
            training.after_batch()
    return found


FLOAT, COLLECT, BOTH = ("bypass", "bypass"), ("bypass", "observe"), ("quantize", "quantize")
WEIGHTS, COLLECT_INPUTS = ("quantize", "bypass"), ("quantize", "observe")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        pytest.param(Schedule(), [COLLECT] * 2 + [BOTH] * 4, id="at-once"),
        pytest.param(
            Schedule(start_epoch=1), [FLOAT] * 3 + [COLLECT] * 2 + [BOTH], id="start-epoch"
        ),
        pytest.param(
            Schedule(start_step=2), [FLOAT] * 2 + [COLLECT] * 2 + [BOTH] * 2, id="start-step"
        ),
        pytest.param(
            Schedule(inputs_start_epoch=1),
            [WEIGHTS] * 3 + [COLLECT_INPUTS] * 2 + [BOTH],
            id="inputs-later",
        ),
        pytest.param(
            Schedule(start_step=1, inputs_start_step=2),
            [FLOAT, WEIGHTS, *[COLLECT_INPUTS] * 2, BOTH, BOTH],
            id="inputs-step",
        ),
    ],
)
def test_what_quantizes_when(schedule: Schedule, expected: list[tuple[str, str]]) -> None:
    training = QuantizedTraining(network(), "max", 2, schedule)

    assert modes_over(training, epochs=2, batches=3) == expected


def test_weights_keep_their_ranges_when_inputs_follow() -> None:
    training = QuantizedTraining(network(), "mse", 2, Schedule(inputs_start_epoch=1))
    modes_over(training, epochs=1, batches=1)
    before = training.model[0].weight_quantizer.scale.clone()

    modes_over(training, epochs=2, batches=3)

    assert torch.equal(training.model[0].weight_quantizer.scale, before)
    assert training.model[0].input_quantizer.is_calibrated


def test_weights_that_learned_meanwhile_stay_learned_when_inputs_follow() -> None:
    recipe = {"weights": {"format": "int8", "range": "lsq"}}
    training = QuantizedTraining(network(recipe), "max", 2, Schedule(inputs_start_epoch=1))
    scale = training.model[0].weight_quantizer.scale
    optimizer = torch.optim.SGD(training.model.parameters(), 1.0)
    for step in range(5):
        training.before_batch(int(step > 2), step)
        training.model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
        learned = scale.clone()
        found = training.after_batch()

    assert found is not None
    assert torch.equal(scale, learned)


def test_an_abort_leaves_nothing_of_the_training_behind() -> None:
    spec = {"format": "int4", "range": "moving_average"}
    schedule = Schedule(bits={0: 8, 1: 4}, freeze_scales_epoch=0, freeze_batchnorm_epoch=0)
    training = QuantizedTraining(network({"inputs": spec}), "max", 1, schedule)
    modes_over(training, epochs=1, batches=2)
    layer, norm = training.model[:2]
    assert layer.input_quantizer.grid.format == "int8"
    assert layer.input_quantizer.is_frozen
    assert not norm.training

    training.abort()

    assert layer.input_quantizer.grid is layer.input_quantizer.spec
    assert not layer.input_quantizer.is_frozen
    assert norm.training


def test_an_abort_before_calibration_leaves_a_model_that_refuses_to_run() -> None:
    training = QuantizedTraining(network(), "max", 5)
    modes_over(training, epochs=1, batches=2)
    training.abort()
    with pytest.raises(RuntimeError, match="not calibrated"):
        training.model(torch.randn(8, 8))


def test_scales_that_the_user_froze_stay_frozen() -> None:
    model = network({"inputs": {"format": "int8", "range": "moving_average"}})
    lq.calibrate(model, [torch.randn(8, 8)], progress=False)
    training = QuantizedTraining(model, "max", 1)
    freeze_scales(model)
    modes_over(training, epochs=2, batches=2)
    training.end()
    assert model[0].input_quantizer.is_frozen


def test_bits_for_now_are_not_exported(tmp_path) -> None:
    training = QuantizedTraining(
        network({"weights": "int4"}), "max", 1, Schedule(bits={0: 8, 1: 4})
    )
    modes_over(training, epochs=1, batches=2)

    with pytest.raises(ValueError, match=r"'0.weight_quantizer'.*int4.*8 for now.*after training"):
        lq.export_onnx(training.model.eval(), torch.randn(2, 8), tmp_path / "m.onnx")


def test_batchnorm_stays_frozen_when_training_mode_is_set_again() -> None:
    training = QuantizedTraining(network(), "max", 1, Schedule(freeze_batchnorm_epoch=0))
    for step in range(3):
        training.model.train()
        training.before_batch(0, step)
        assert not training.model[1].training


def test_a_calibrated_model_goes_on_where_it_was() -> None:
    model = lq.calibrate(network(), [torch.randn(8, 8)], progress=False)

    training = QuantizedTraining(model, "max", 2, Schedule(start_epoch=1))

    assert modes_over(training, epochs=1, batches=2) == [BOTH] * 2


def test_bits_fall_epoch_by_epoch_and_end_as_the_recipe_says() -> None:
    recipe = {"weights": "int4", "inputs": "int6", "rules": [{"name": "3", "format": "fp16"}]}
    training = QuantizedTraining(network(recipe), "max", 1, Schedule(bits={0: 8, 1: 6, 2: 4}))
    layer = training.model[0]
    seen = []
    for epoch in range(3):
        training.before_batch(epoch, epoch)
        formats = layer.weight_quantizer.grid.format, layer.input_quantizer.grid.format
        seen.append(formats)
        training.model(torch.randn(8, 8))
        training.after_batch()

    assert seen == [("int8", "int8"), ("int6", "int6"), ("int4", "int6")]
    training.pause(0)
    assert layer.weight_quantizer.grid.format == "int8"
    training.end()
    assert layer.weight_quantizer.grid is layer.weight_quantizer.spec


def test_frozen_parts_stay() -> None:
    spec = {"format": "int8", "range": "moving_average"}
    schedule = Schedule(freeze_scales_epoch=1, freeze_batchnorm_epoch=1)
    training = QuantizedTraining(network({"inputs": spec}), "max", 1, schedule)
    modes_over(training, epochs=1, batches=4)
    scale, mean = training.model[0].input_quantizer.scale.clone(), training.model[1].running_mean
    mean = mean.clone()

    modes_over(training, epochs=2, batches=1)  # its first epoch still moves both
    moved = training.model[0].input_quantizer.scale.clone()
    assert not torch.equal(moved, scale)
    training.before_batch(1, 9)
    assert not training.model[1].training
    training.model(torch.full((8, 8), 30.0))
    assert torch.equal(training.model[0].input_quantizer.scale, moved)


def test_too_few_batches_make_do_and_none_refuse_to_run() -> None:
    training = QuantizedTraining(network(), "max", 5)
    modes_over(training, epochs=1, batches=2)
    assert training.end() is not None
    assert lq.surgery.is_calibrated(training.model)

    idle = QuantizedTraining(network(), "max", 5)
    idle.end()
    assert {q.mode for q in lq.surgery.quantizers(idle.model).values()} == {Mode.QUANTIZE}
    with pytest.raises(RuntimeError, match="not calibrated"):
        idle.model(torch.randn(8, 8))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"start_epoch": -1}, "`start_epoch`.*-1", id="negative"),
        pytest.param(
            {"start_epoch": 2, "inputs_start_epoch": 1}, "`inputs_start_epoch`.*2.*1", id="inputs"
        ),
        pytest.param({"bits": {0: 4, 2: 8}}, "`progressive_bits`.*fall.*4.*8", id="rising"),
        pytest.param({"bits": {-1: 8, 2: 4}}, "`progressive_bits`", id="negative-epoch"),
        pytest.param({"bits": {0: 16, 2: 4}}, "`progressive_bits`.*2 to 8.*16", id="no-format"),
    ],
)
def test_impossible_schedules(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        Schedule(**arguments)


@pytest.mark.parametrize(
    ("schedule", "epochs", "steps", "match"),
    [
        pytest.param(Schedule(start_epoch=3), 3, None, "`start_epoch`.*max_epochs.*3", id="epoch"),
        pytest.param(Schedule(start_step=50), 9, 50, "`start_step`.*max_steps.*50", id="step"),
        pytest.param(Schedule(bits={0: 8, 5: 4}), 5, None, "`progressive_bits`.*5", id="bits"),
    ],
)
def test_what_would_never_begin(schedule, epochs, steps, match) -> None:
    with pytest.raises(ValueError, match=match):
        schedule.check_reached(epochs, steps)
    schedule.check_reached(None, None)
    schedule.check_reached(-1, None)


def test_what_freezes_may_lie_beyond_the_end() -> None:
    """So that a config can be tried for fewer epochs."""
    Schedule(freeze_scales_epoch=3, freeze_batchnorm_epoch=4).check_reached(1, None)


def test_bits_that_end_above_the_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fewest bits of the recipe, 4.*8"):
        QuantizedTraining(network({"weights": "int4"}), "max", 1, Schedule(bits={0: 8}))
