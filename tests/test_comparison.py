"""Comparisons measure what they say, and go on where a killed one stopped."""

import copy
import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.comparison import Comparison, Method, compare, default_methods, parse_methods
from lq.comparison.making import Maker
from lq.comparison.method import formats_of
from lq.comparison.row import pack, unpack
from lq.comparison.speed import measure_speed, speedup
from lq.models import digits_cnn
from lq.plan import PrecisionPlan
from lq.timing import interleaved


def images(seed: int, n: int = 64) -> list:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return [(x[i : i + 32], torch.randint(10, (32,), generator=generator)) for i in (0, n - 32)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return digits_cnn().eval()


BATCHES, HELD_OUT, TEST = images(0), images(1), images(2)
PTQ = {"max": Method("ptq"), "mse": Method("ptq", calibrator="mse")}


def run(model, folder, methods=PTQ, **kwargs) -> Comparison:
    return compare(model, BATCHES, HELD_OUT, TEST, methods, folder, progress=False, **kwargs)


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory) -> tuple[Comparison, object]:
    folder = tmp_path_factory.mktemp("comparison")

    def train(net: nn.Module, epochs: int, own) -> list[dict[str, float]]:
        assert own == folder / "methods" / "QAT"
        return [{"epoch": float(i), "train/loss": 1.0 / (i + 1)} for i in range(epochs)]

    methods = {
        **PTQ,
        "FP16": Method("ptq", {"weights": "fp16", "inputs": "fp16"}),
        "repaired": Method("ptq", repair=True),
        "QAT": Method("qat", epochs=2),
        "mixed": Method("mixed", constraints=lq.PrecisionConstraints(min_compression=2.0)),
        "low": Method("ptq", {"weights": "int3", "inputs": "int8"}),
        "gone": Method("file", path=str(folder / "nowhere.onnx")),
    }
    return run(model, folder, methods, train=train, batch_sizes=(1, 4), threads=(1,)), folder


def predictions(path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x.numpy()})[0].argmax(1) for x, _ in TEST])


def test_rows_are_what_the_files_do(compared) -> None:
    found, folder = compared
    target = torch.cat([t for _, t in TEST]).numpy()
    truth = predictions(folder / found["float"].file) == target
    for name in ("float", "max", "mse", "QAT"):
        right = predictions(folder / found[name].file) == target
        assert found[name].evaluation.top1 == right.mean()
        np.testing.assert_array_equal(unpack(found[name].right, found.n).numpy(), right)
        assert found[name].evaluation.size_mb * 1e6 == (folder / found[name].file).stat().st_size
        if name != "float":
            lost = found[name].evaluation.versus.drop.mean
            assert lost == pytest.approx(truth.mean() - right.mean())
    assert found["max"].evaluation.latencies[0].threads == 1


def test_each_kind_gives_its_model(compared) -> None:
    found, folder = compared
    assert set(found["FP16"].plan.values()) == {"fp16"}
    assert not found["FP16"].is_integer
    assert found["max"].is_integer
    assert [line["epoch"] for line in found["QAT"].history] == [0.0, 1.0]
    assert found["repaired"].note.startswith("Repairs: ")
    assert found.sensitivity is not None
    assert found.compression(found["mixed"]) > 1.5
    assert dict(PrecisionPlan.of(folder / found["mixed"].file)) == found["mixed"].plan


def test_what_came_to_nothing_says_why(compared) -> None:
    found, _ = compared
    assert "nowhere.onnx" in found["gone"].failed
    assert found["gone"] not in found.measured
    assert f"gone: {found['gone'].failed}" in found.table()
    # No target runs int3: it is measured in torch, and its time is not told.
    assert "Measured in torch" in found["low"].note
    assert found["low"].evaluation.simulated
    assert found["low"].speedups == ()


def test_explains(compared, model) -> None:
    found, _ = compared
    explanation = found.explanation
    assert explanation.calibration.samples == 64
    worst = found.sensitivity.ranked()[0].layer
    assert explanation.weights[0].name == worst
    assert explanation.histograms[0].name == f"{worst}.input_quantizer"
    conv = model[0].weight.detach().abs().amax((1, 2, 3))
    torch.testing.assert_close(torch.tensor(explanation.ranges["0.weight_quantizer"]), conv)


def test_is_read_back_as_it_was(compared) -> None:
    found, folder = compared
    text = (folder / "comparison.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert strict["version"] == 1
    again = Comparison.load(folder)
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())
    assert again.difference(again["mse"], again["max"]) == found.difference(
        found["mse"], found["max"]
    )
    with pytest.raises(ValueError, match="compare again"):
        Comparison.load(folder / "explanation.json")


def test_a_killed_comparison_goes_on(model, tmp_path, monkeypatch) -> None:
    made, make = [], Maker.make

    def killed(self, method, folder):
        if method.calibrator == "mse" and len(made) < 2:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(method.calibrator)
        return make(self, method, folder)

    monkeypatch.setattr(Maker, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path)
    assert not (tmp_path / "comparison.json").exists()
    found = run(model, tmp_path)
    assert made == ["max", "killed", "mse"]
    whole = run(model, tmp_path.with_name("whole"))
    for name in ("max", "mse"):
        assert found[name].right == whole[name].right
        assert found[name].plan == whole[name].plan


@pytest.mark.parametrize(
    ("change", "again"),
    [
        pytest.param({}, 0, id="nothing"),
        pytest.param({"methods": {**PTQ, "mse": Method("ptq", calibrator="entropy")}}, 1, id="one"),
        pytest.param({"recipe": "tensorrt_int8"}, 2, id="recipe"),
    ],
)
def test_only_what_changed_is_done_again(model, tmp_path, monkeypatch, change, again) -> None:
    run(model, tmp_path)
    made, make = [], Maker.make
    monkeypatch.setattr(Maker, "make", lambda *args: made.append(args[1]) or make(*args))
    run(model, tmp_path, **change)
    assert len(made) == again


def test_other_weights_are_compared_anew(model, tmp_path) -> None:
    first = run(model, tmp_path)
    torch.manual_seed(1)
    second = run(digits_cnn().eval(), tmp_path)
    assert first["max"].right != second["max"].right


class Shrinks(nn.Module):
    """Changes its inputs in place; what it computes with them, neither weights nor repr tell."""

    def __init__(self, by: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by, self.net = by, digits_cnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.mul_(self.by)) if self.by > 0 else self.net(x) * self.by


def test_inputs_changed_in_place_do_not_change_the_users_data(tmp_path) -> None:
    before = [x.clone() for x, _ in (*BATCHES, *HELD_OUT, *TEST)]
    found = run(Shrinks(0.5).eval(), tmp_path)
    assert all(
        torch.equal(a, b) for a, (b, _) in zip(before, (*BATCHES, *HELD_OUT, *TEST), strict=True)
    )
    assert found["max"].evaluation is not None


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: Shrinks(-1.0).eval(), id="code"),
        pytest.param(lambda: Shrinks(1.0).eval().apply(_tanh), id="activation"),
    ],
)
def test_other_models_of_the_same_weights_are_compared_anew(tmp_path, other) -> None:
    run(Shrinks(1.0).eval(), tmp_path)
    found, alone = (run(other(), folder) for folder in (tmp_path, tmp_path.with_name("alone")))
    assert [row.right for row in found] == [row.right for row in alone]


def _tanh(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Tanh())


def test_a_moved_folder_goes_on(model, tmp_path, monkeypatch) -> None:
    run(model, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setattr(Maker, "make", lambda *args: pytest.fail("made again"))
    monkeypatch.chdir(tmp_path)
    found = run(model, "b")
    assert (tmp_path / "b" / found["max"].file).is_file()


def test_damaged_files_are_made_again(model, tmp_path) -> None:
    first = run(model, tmp_path)
    (tmp_path / first["max"].file).write_bytes(b"half of it")
    row = tmp_path / "methods" / "mse" / "row.json"
    stored = json.loads(row.read_text())
    del stored["kept"]["speedups"]  # as of an older version
    row.write_text(json.dumps(stored))
    again = run(model, tmp_path)
    for name in ("max", "mse"):
        assert again[name].right == first[name].right
        assert (tmp_path / again[name].file).stat().st_size > 1000


def test_keys_of_a_newer_version_are_passed_over(compared, tmp_path) -> None:
    found, _ = compared
    plain = json.loads(json.dumps(found.to_dict()))
    plain["more"] = plain["rows"][0]["more"] = 1
    (tmp_path / "comparison.json").write_text(json.dumps(plain))
    assert json.dumps(Comparison.load(tmp_path).to_dict()) == json.dumps(found.to_dict())


def test_integer_operators_are_int8(model, tmp_path) -> None:
    lq.export_onnx(model, BATCHES[0], tmp_path / "float.onnx", target="onnxruntime")
    dynamic = tmp_path / "dynamic.onnx"
    quantize_dynamic(tmp_path / "float.onnx", dynamic, op_types_to_quantize=["MatMul", "Gemm"])
    methods = {"dynamic": Method("file", path=dynamic)}
    found = run(model, tmp_path / "out", methods)
    assert found["dynamic"].is_integer
    assert not found["float"].is_integer


def test_segmentation_counts_images(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1)).eval()
    parts = [
        [(x, torch.randint(3, (len(x), 8, 8))) for x, _ in p] for p in (BATCHES, HELD_OUT, TEST)
    ]
    found = compare(net, *parts, {"max": Method("ptq")}, tmp_path, progress=False)
    assert found.n == 64
    assert list(found.places) == [64] * 64
    assert found["max"].lost.n == 64
    assert found.difference(found["max"], found["float"]) == found["max"].lost


def test_killed_while_a_folder_was_begun(model, tmp_path) -> None:
    (tmp_path / "methods" / "max").mkdir(parents=True)
    (tmp_path / "methods" / "max" / ".begun.123.json").write_text("{")
    assert run(model, tmp_path)["max"].evaluation is not None


def test_a_file_of_one_batch_size(model, tmp_path) -> None:
    fixed = tmp_path / "fixed.onnx"
    lq.export_onnx(model, TEST[0], fixed, "onnxruntime", dynamic_batch=False)
    methods = {"fixed": Method("file", path=fixed), **PTQ}
    found = run(model, tmp_path / "out", methods, batch_sizes=(1, 32))
    assert found["fixed"].evaluation.top1 == found["float"].evaluation.top1
    assert [s.batch_size for s in found["fixed"].speedups] == [32]
    assert found.settings == [(1, 0), (32, 0)]
    assert found.cells(found["fixed"])[-2:] == ["-", "-"]  # the table is of batch 1
    assert found.header()[-2] == "ms, batch 1"


def test_nothing_is_timed_where_times_say_nothing(model, tmp_path) -> None:
    found = run(model, tmp_path, target="tensorrt")
    assert 'latency_ms": "nan"' in (tmp_path / "comparison.json").read_text()
    assert all(not row.speedups and not row.evaluation.latencies for row in found)
    assert found.cells(found["max"])[-2:] == ["-", "-"]


def test_mappings_whose_labels_a_model_can_take(tmp_path) -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = digits_cnn()

        def forward(self, image: torch.Tensor, labels: torch.Tensor | None = None):
            logits = self.net(image)
            if labels is None:
                return {"logits": logits}
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    data = [[{"image": x, "labels": y} for x, y in part] for part in (BATCHES, HELD_OUT, TEST)]
    found = compare(Labelled().eval(), *data, PTQ, tmp_path, progress=False)
    assert found["max"].evaluation.n == 64


def test_files_of_the_user_are_left_alone(model, tmp_path) -> None:
    own = tmp_path / "methods" / "max" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("years of work")
    with pytest.raises(ValueError, match="holds other files; name another `folder`"):
        run(model, tmp_path)
    assert own.read_text() == "years of work"


def test_files_of_other_tools_stand_beside_ours(model, tmp_path) -> None:
    lq.export_onnx(model, BATCHES[0], tmp_path / "float.onnx", target="onnxruntime")
    name = ort.InferenceSession(tmp_path / "float.onnx").get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{name: x.numpy()} for x, _ in BATCHES])

        def get_next(self):
            return next(self.feeds, None)

    theirs = tmp_path / "theirs.onnx"
    quantize_static(tmp_path / "float.onnx", theirs, Reader())
    found = run(model, tmp_path / "out", {"theirs": Method("file", path=str(theirs)), **PTQ})
    right = predictions(theirs) == torch.cat([t for _, t in TEST]).numpy()
    # Its kernels round elsewhere than a session without our options, which may flip a sample.
    assert found["theirs"].evaluation.top1 == pytest.approx(right.mean(), abs=1 / found.n)
    assert found["theirs"].is_integer
    assert found["theirs"].speedups


def test_checkpoints_are_methods(model, tmp_path) -> None:
    net = lq.quantize(copy.deepcopy(model), "onnxruntime_int8")
    lq.calibrate(net, BATCHES, progress=False)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}}, path)
    found = run(model, tmp_path / "out", {"trained": Method("file", path=str(path)), **PTQ})
    assert found["trained"].right == found["max"].right
    assert found["trained"].plan == found["max"].plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"methods": {"float": Method("ptq")}}, "another name", id="reserved name"),
        pytest.param({"methods": {"..": Method("ptq")}}, "another name", id="parent folder"),
        pytest.param({"methods": {"x" * 300: Method("ptq")}}, "another name", id="long"),
        pytest.param({"target": "onnxruntim"}, "did you mean 'onnxruntime'", id="target"),
        pytest.param({"batch_sizes": (0,)}, "`batch_sizes` to be at least 1", id="sizes"),
    ],
)
def test_refuses(model, tmp_path, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path, **change)


def test_refuses_quantized_models_and_batches_that_end(model, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"call lq\.dequantize"):
        run(lq.quantize(digits_cnn(), "tensorrt_int8"), tmp_path)
    shuffled = DataLoader(TensorDataset(*TEST[0]), 8, shuffle=True)
    with pytest.raises(ValueError, match="its loader shuffles"):
        compare(model, BATCHES, HELD_OUT, shuffled, PTQ, tmp_path)
    with pytest.raises(ValueError, match="`test` to be a list"):
        compare(model, BATCHES, HELD_OUT, iter(TEST), PTQ, tmp_path)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_refuses_empty_data(model, tmp_path, empty) -> None:
    data = [BATCHES, HELD_OUT, TEST]
    data[empty] = []
    with pytest.raises(ValueError, match="to hold at least one batch, but got none"):
        compare(model, *data, PTQ, tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param({"weights": "fp16", "inputs": "fp16"}, id="no integers"),
        pytest.param("weight_only_int8", id="weights alone"),
    ],
)
def test_recipes_without_ranges_of_inputs(model, tmp_path, recipe) -> None:
    found = run(model, tmp_path, {"max": Method("ptq")}, recipe=recipe)
    assert found["max"].evaluation is not None
    assert found.explanation.calibration is None


def test_recipes_and_paths_as_objects(tmp_path) -> None:
    assert Method("file", path=tmp_path / "m.onnx").to_dict()["path"] == str(tmp_path / "m.onnx")
    recipe = lq.Recipe.parse("tensorrt_int8")
    assert json.dumps(Method("ptq", recipe).to_dict()) == json.dumps(
        Method("ptq", recipe.to_dict()).to_dict()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"kind": "ptqq"}, "did you mean 'ptq'", id="kind"),
        pytest.param({"kind": "qat", "epochs": 0}, "`epochs` to be at least 1", id="epochs"),
        pytest.param({"kind": "file"}, "Expected a `path`", id="path"),
        pytest.param({"kind": "file", "repair": True}, "but got `repair`", id="of another kind"),
        pytest.param({"kind": "ptq", "calibrator": "maxx"}, "did you mean 'max'", id="calibrator"),
        pytest.param({"kind": "ptq", "recipe": "int8"}, "`recipe`", id="recipe"),
    ],
)
def test_methods_are_checked(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Method(**settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"kind": "ptqq"}, "Method 'a': .*did you mean 'ptq'", id="kind"),
        pytest.param({"kind": "ptq", "calibrater": "mse"}, "'a': .*'calibrator'", id="key"),
        pytest.param(
            {"kind": "mixed", "constraints": {"max_drop": 1}},
            "'a': .*'max_drop'",
            id="limit",
        ),
        pytest.param({"kind": "qat", "epochs": "many"}, "Method 'a'", id="epochs"),
        pytest.param(None, "Method 'a': Expected a `kind`", id="nothing"),
    ],
)
def test_methods_of_a_config_are_named(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse_methods({"a": given})


def test_methods_of_a_config() -> None:
    limits = {"max_accuracy_drop": 0.01}
    found = parse_methods({8: {"kind": "mixed", "constraints": limits, "formats": ["int8"]}})
    wanted = Method("mixed", constraints=lq.PrecisionConstraints(**limits), formats=("int8",))
    assert found == {"8": wanted}


def test_formats_that_the_target_does_not_run_are_refused_before_the_sweep() -> None:
    assert formats_of(Method("mixed"), "onnxruntime") == ("int8", "fp16")
    assert formats_of(Method("mixed"), "openvino") == ("int8",)
    with pytest.raises(ValueError, match=r"openvino runs .*but got 'fp16'"):
        formats_of(Method("mixed", formats=("int8", "fp16")), "openvino")


def test_default_methods() -> None:
    assert [*default_methods("onnxruntime", trains=False)] == [
        "FP16", "PTQ max", "PTQ percentile", "PTQ entropy", "PTQ mse", "PTQ repaired", "mixed",
    ]  # fmt: skip
    openvino = default_methods("openvino", trains=True)
    assert "FP16" not in openvino
    assert "QAT" in openvino


def test_packing_keeps_every_sample() -> None:
    right = torch.rand(1001) > 0.5
    assert torch.equal(unpack(pack(right), 1001), right)


def test_the_interval_of_a_speedup_holds_its_median() -> None:
    """Of 2,000 series of a known median, 95% of the intervals hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        times = np.exp(rng.normal(0, 0.3, 50))
        found = speedup(np.full(50, 2.0), times)
        assert found.low <= found.ratio <= found.high
        held += found.low <= 2.0 <= found.high
    assert 0.94 <= held / 2000 <= 0.98


def test_functions_are_called_in_turn() -> None:
    calls: list[str] = []
    found = interleaved({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=10)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys("abc", 10)
    rounds = ["".join(calls[i : i + 3]) for i in range(len(calls) - 30, len(calls), 3)]
    assert rounds[:4] == ["abc", "bca", "cab", "abc"]


def test_what_an_engine_does_not_run_is_left_out(compared, caplog) -> None:
    _, folder = compared
    files = {name: folder / "methods" / name / "model.onnx" for name in ("float", "max")}
    fixed = folder.with_name("fixed.onnx")
    lq.export_onnx(digits_cnn().eval(), TEST[0][0][:4], fixed, "onnxruntime", dynamic_batch=False)
    speeds = measure_speed(
        {**files, "fixed": fixed}, TEST[0], "onnxruntime", (1, 4), progress=False
    )
    assert [len(speeds[name][0]) for name in ("float", "max", "fixed")] == [2, 2, 1]
    assert "for 1 samples" in caplog.text


def test_a_comparison_is_inspected(compared) -> None:
    found, folder = compared
    told = lq.inspect(folder / "comparison.json")
    assert told.kind == "comparison"
    assert told.facts["samples"] == found.n
    assert [row["method"] for row in told.rows] == [row.name for row in found.measured]
