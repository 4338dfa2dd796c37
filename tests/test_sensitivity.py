"""Sweeps measure what whole passes measure, whatever the model, and lose nothing."""

import copy
import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import lq
from lq.models import digits_cnn, resnet20
from lq.sensitivity import LayerSensitivity, Measures, Sensitivity
from lq.sensitivity.adaptive import still_open
from lq.sensitivity.comparing import compare, describe, measures
from lq.sensitivity.gradient import fisher_vector
from lq.sensitivity.states import States


class Twice(nn.Module):
    """Calls a layer two or three times, as the data say, in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x.mul_(0.5)
        x = self.relu(self.first(x))
        y = self.relu(self.again(x))
        if y.mean() > 0.2:
            y = self.relu(self.again(y))
        y = self.relu(self.again(y))
        y += x
        return self.fc(y.mean((2, 3)))


class Branches(nn.Module):
    """Reads one tensor in two branches, and calls its parts in an order that the data decide."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.unused = nn.Linear(8, 8)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        order = (self.left, self.right) if x.sum() > 0 else (self.right, self.left)
        y = {branch: branch(x) for branch in order}
        return self.fc(torch.cat([y[self.left], y[self.right]], 1).mean((2, 3)))


class Shared(nn.Module):
    """Two layers read one tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


class Attention(nn.Module):
    """A transformer, which torch runs without calling its layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.encoder(x.flatten(2).transpose(1, 2).repeat(1, 1, 6)[..., :16]).mean(1))


class Random(nn.Sequential):
    """Draws numbers in eval mode too."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x) * 1e-3)


class Stateful(nn.Module):
    """Keeps a feature of one layer aside, where another finds it."""

    def __init__(self):
        super().__init__()
        self.kept = {}
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)
        self.gate = Gate(self.kept)

    def forward(self, x):
        y = self.gate(self.first(x))
        y = self.second(y).mean((2, 3))
        return self.fc(y * self.kept["mean"])


class Gate(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        self.kept["mean"] = x.mean((2, 3))
        return x.relu()


def deep():
    """Twelve layers, of which some have outlying weights."""
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(11)]
    for i in (1, 2, 5, 8):
        with torch.no_grad():
            layers[i][0].weight[:, i] *= 20
    return nn.Sequential(*layers, nn.Linear(16, 5))


def batches(count=3, size=8, channels=3, classes=5, samples=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(samples, channels, size, size, generator=generator),
            torch.randint(0, classes, (samples,), generator=generator),
        )
        for _ in range(count)
    ]


def model_of(cls, *args, **kwargs):
    torch.manual_seed(0)
    return cls(*args, **kwargs).eval()


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(x.clone()) for x, _ in data])


def in_format(model, data, format, layers, every):
    """The model with some layers in a format, by the functions a user would call."""
    skipped = tuple(lq.Rule(name=n, format="skip") for n in every if n not in layers)
    specs = {"weights": lq.QuantSpec(format, axis=0), "inputs": lq.QuantSpec(format)}
    changed = lq.quantize(copy.deepcopy(model), lq.Recipe(**specs, rules=skipped))
    if format != "fp16":
        full = lq.quantize(copy.deepcopy(model), lq.Recipe(**specs))
        lq.calibrate(full, [(x.clone(), t) for x, t in data], progress=False)
        scales = full.state_dict()
        for name, q in lq.surgery.quantizers(changed).items():
            q.restore(scales[f"{name}.scale"])
    return changed


MODELS = {
    "digits": (digits_cnn, {"channels": 1, "classes": 10}),
    "twice": (Twice, {}),
    "branches": (Branches, {}),
    "attention": (Attention, {}),
}


@pytest.mark.parametrize("format", ["int8", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_whole_passes(name, format):
    cls, shape = MODELS[name]
    model, data = model_of(cls), batches(**shape)
    found = lq.sweep(model, data, [format], progress=False)
    assert found.fallback == ""
    every = [layer for layers in found.units.values() for layer in layers]
    reference, target = logits(model, data), torch.cat([t for _, t in data])
    for row in found:
        if row.layer == "unused":
            assert row.kl == 0
            continue
        changed = in_format(model, data, format, found.units[row.layer], every)
        values = compare(reference, logits(changed, data), target).numpy()
        expected = measures({"": values}, describe(reference, target)[:, 4].double().numpy())[""]
        for metric in ("top1", "top5", "loss", "kl", "sqnr"):
            assert row.value(metric) == expected.value(metric), (row.layer, metric)
        assert row.intervals == expected.intervals


def test_left_float_is_measured_in_the_quantized_model():
    model, data = model_of(digits_cnn), batches(channels=1, classes=10)
    found = lq.sweep(model, data, ["int8"], left_float=True, progress=False)
    reference, target = logits(model, data), torch.cat([t for _, t in data])
    for row in found:
        others = [name for name in found.units if name != row.layer]
        changed = in_format(model, data, "int8", others, list(found.units))
        values = compare(reference, logits(changed, data), target).numpy().astype(np.float64)
        assert row.left_float.kl == pytest.approx(values[:, 3].mean(), rel=1e-9)
    whole = in_format(model, data, "int8", list(found.units), list(found.units))
    values = compare(reference, logits(whole, data), target).numpy().astype(np.float64)
    assert found.whole["int8"].kl == pytest.approx(values[:, 3].mean(), rel=1e-9)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Random, "other outputs when it is run again"), (Stateful, "keeps something")],
)
def test_what_cannot_be_replayed_is_named_and_run_whole(cls, reason, caplog):
    parts = [nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)] if cls is Random else []
    model, data = model_of(cls, *parts), batches()
    found = lq.sweep(model, data, progress=False)
    assert reason in found.fallback
    assert reason in caplog.text
    if cls is Stateful:
        reference = logits(model, data)
        for row in found:
            changed = in_format(model, data, "int8", [row.layer], list(found.units))
            values = compare(reference, logits(changed, data), None).numpy().astype(np.float64)
            assert row.kl == pytest.approx(values[:, 3].mean(), rel=1e-9)


def test_the_model_is_left_as_it_was():
    model, data = model_of(digits_cnn).train(), batches(channels=1, classes=10)
    classes = {name: type(m) for name, m in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for method in ("exact", "gradient", "adaptive"):
        lq.sweep(model, data, method=method, progress=False)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_a_failing_batch_leaves_the_model_as_it_was():
    model = model_of(digits_cnn)
    data = [*batches(1, channels=1, classes=10), (torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]
    with pytest.raises(RuntimeError, match="channels"):
        lq.sweep(model, data, calibration=data[:1], progress=False)
    assert str(model) == str(digits_cnn().eval())


def test_parts_add_weights_and_inputs():
    model, data = model_of(digits_cnn), batches(channels=1, classes=10)
    found = lq.sweep(
        model, data, ["int8", "fp16"], parts=["both", "weights", "inputs"], progress=False
    )
    assert len(found) == 5 * (3 + 1)  # fp16 layers compute in one format
    only = in_format(model, data, "int8", ["4"], list(found.units))
    only.get_submodule("4").input_quantizer.mode = lq.Mode.BYPASS
    values = compare(logits(model, data), logits(only, data), None).numpy().astype(np.float64)
    assert found.row("4", "int8", "weights").kl == pytest.approx(values[:, 3].mean(), rel=1e-9)


def test_int4_is_of_weights_alone():
    model, data = model_of(digits_cnn), batches(channels=1, classes=10)
    found = lq.sweep(model, data, ["int4"], parts=["both", "weights"], progress=False)
    assert found.row("9", "int4").kl == found.row("9", "int4", "weights").kl > 0


def test_units():
    model, data = model_of(digits_cnn), batches(channels=1, classes=10)
    blocks = lq.sweep(model, data, units="blocks", progress=False)
    assert blocks.units == {"0": ("0",), "3": ("3.conv1", "3.conv2"), "4": ("4",), "9": ("9",)}
    named = lq.sweep(model, data, units={"convs": ["0", "3.*", "4"], "fc": "9"}, progress=False)
    assert named.units == {"convs": ("0", "3.conv1", "3.conv2", "4"), "fc": ("9",)}
    every = [layer for layers in blocks.units.values() for layer in layers]
    changed = in_format(model, data, "int8", blocks.units["3"], every)
    values = compare(logits(model, data), logits(changed, data), None).numpy().astype(np.float64)
    assert blocks.row("3", "int8").kl == pytest.approx(values[:, 3].mean(), rel=1e-9)
    inputs = lq.sweep(model_of(Shared), batches(), units="inputs", progress=False)
    assert list(inputs.units) == ["stem", "left+right", "fc"]


def test_what_a_recipe_skips_is_not_swept():
    model, data = model_of(digits_cnn), batches(channels=1, classes=10)
    recipe = {"rules": [{"name": "0", "format": "skip"}]}
    assert "0" not in lq.sweep(model, data, recipe=recipe, progress=False).layers


def test_bootstrap_intervals_cover_the_normal_ones():
    rng = np.random.default_rng(0)
    values = rng.normal(0.1, 1.0, (2000, 5)).astype(np.float32)
    values[:, 4] = rng.gamma(2.0, 1.0, 2000)
    found = measures({"": values}, np.full(2000, 100.0))[""]
    for i, metric in enumerate(("top1", "top5", "loss", "kl")):
        low, high = found.intervals[metric]
        margin, mean = (
            1.96 * float(values[:, i].std()) / math.sqrt(2000),
            float(values[:, i].mean()),
        )
        assert low == pytest.approx(mean - margin, abs=0.1 * margin)
        assert high == pytest.approx(mean + margin, abs=0.1 * margin)
    assert found.sqnr_db == pytest.approx(10 * math.log10(100 / values[:, 4].mean()), abs=1e-6)


def test_outcomes_are_those_of_torchmetrics():
    from torchmetrics.functional.classification import multiclass_accuracy

    torch.manual_seed(0)
    reference, changed = torch.randn(2, 200, 12)
    target = torch.randint(0, 12, (200,))
    values = compare(reference, changed, target).double().mean(0)
    for i, k in ((0, 1), (1, 5)):
        before, after = (
            multiclass_accuracy(y, target, 12, top_k=k, average="micro")
            for y in (reference, changed)
        )
        assert values[i] == pytest.approx(float(before - after), abs=1e-6)
    p, q = reference.log_softmax(1), changed.log_softmax(1)
    kl = nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert values[3] == pytest.approx(float(kl), rel=1e-5)


def test_an_overflow_is_infinitely_bad():
    found = compare(torch.zeros(2, 3), torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
    measured = measures({"": found.numpy()}, np.ones(2))[""]
    assert measured.kl == measured.loss_increase == math.inf
    assert measured.top1_drop > 0
    assert measured.cost("sqnr") == math.inf


def test_noise_is_marked():
    model, data = model_of(digits_cnn), batches(channels=1, classes=10)
    found = lq.sweep(model, data, ["int8", "fp16"], metric="top1", progress=False)
    assert all(row.noise == (row.low <= 0 <= row.high) for row in found)
    assert any(row.noise for row in found)
    assert ", noise" in found.table()


def test_gradient_is_the_kl_divergence_of_small_changes():
    model, data = model_of(digits_cnn), batches(8, channels=1, classes=10, samples=64)
    model(torch.cat([x for x, _ in data]))
    exact = lq.sweep(model, data, ["int8", "fp16"], metric="kl", progress=False)
    estimate = lq.sweep(model, data, ["int8", "fp16"], method="gradient", progress=False)
    for one, other in zip(exact, estimate, strict=True):
        assert other.kl == pytest.approx(one.kl, rel=0.25), one.layer
        assert math.isnan(other.top1_drop)


def test_gradient_counts_a_quantized_shortcut_once():
    torch.manual_seed(0)
    model, data = resnet20().eval(), batches(2, size=16, classes=10, samples=48)
    units = {"block": "layer1.1.*"}
    exact = lq.sweep(model, data, ["int8"], metric="kl", units=units, progress=False)
    estimate = lq.sweep(model, data, ["int8"], method="gradient", units=units, progress=False)
    assert estimate.score("block", "int8") == pytest.approx(exact.score("block", "int8"), rel=0.4)


def test_gradient_of_attention_in_either_layout():
    for batch_first in (True, False):
        model = model_of(Attention)
        for layer in model.encoder.layers:
            layer.self_attn.batch_first = batch_first
        data = batches(4, samples=32)
        exact = lq.sweep(model, data, ["int8"], metric="kl", progress=False)
        estimate = lq.sweep(model, data, ["int8"], method="gradient", progress=False)
        for one, other in zip(exact, estimate, strict=True):
            assert other.kl == pytest.approx(one.kl, rel=0.5), one.layer


def test_fisher_vectors_have_the_fisher_matrix_for_a_covariance():
    output = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    p = output.softmax(1)[0]
    drawn = torch.cat([fisher_vector(output, seed) for seed in range(4000)])
    expected = torch.diag(p) - p[:, None] * p
    assert torch.allclose(drawn.T @ drawn / 4000, expected, atol=0.02)


def test_adaptive_finds_the_same_top_with_less_work():
    model = model_of(deep)
    data = [(x.flatten(1)[:, :16], t) for x, t in batches(24, samples=32)]
    full = lq.sweep(model, data, metric="kl", progress=False)
    quick = lq.sweep(model, data, method="adaptive", metric="kl", top=4, progress=False)
    assert quick.passes <= 0.4 * full.passes
    names = [{row.layer for row in found.ranked()[:4]} for found in (full, quick)]
    assert names[0] == names[1]
    assert {row.n for row in quick} != {full.n}


def test_still_open_is_what_a_paired_test_leaves_open():
    rng = np.random.default_rng(0)
    common = rng.gamma(1.0, 1.0, 400)
    values = {str(i): common * (1 + i) + rng.normal(0, 0.01, 400) for i in range(6)}
    assert still_open(values, 2, 4000) == {}
    values["3"] = values["4"] + rng.normal(0, 0.1, 400)
    assert set(still_open(values, 2, 4000)) == {"3", "4"}


def test_json_and_csv(tmp_path):
    model, data = model_of(digits_cnn), batches(channels=1, classes=10)
    found = lq.sweep(model, data, ["int8"], left_float=True, progress=False)
    found.to_json(tmp_path / "sweep.json")
    again = Sensitivity.from_json(tmp_path / "sweep.json")
    assert again == found
    assert found.model_hash == lq.digest.model_digest(model)
    found.to_csv(tmp_path / "sweep.csv")
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert len(lines) == 1 + len(found)
    hashes = {"model_hash", "data_hash", "recipe_hash"}
    assert {"layer", "kl", "kl_low", "left_float_kl", *hashes} <= set(lines[0].split(","))
    plain = json.loads((tmp_path / "sweep.json").read_text())
    text = json.dumps(lq.Recipe().to_dict(), sort_keys=True)
    assert plain["recipe_hash"] == found.recipe_hash == hashlib.sha256(text.encode()).hexdigest()
    assert hashes <= set(plain)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        Sensitivity.from_json(tmp_path / "sweep.json")


def test_rank_correlation_is_that_of_ranks():
    model, data = model_of(digits_cnn), batches(channels=1, classes=10)
    one = lq.sweep(model, data, ["int4"], metric="kl", progress=False)
    other = lq.sweep(model, data, ["int4"], metric="sqnr", progress=False)
    ranks = [
        np.argsort(np.argsort([s.score(unit, "int4") for unit in s.layers])) for s in (one, other)
    ]
    assert one.rank_correlation(one, "int4") == pytest.approx(1)
    assert one.rank_correlation(other, "int4") == pytest.approx(np.corrcoef(*ranks)[0, 1])


class Interleaved(nn.Module):
    """Runs a layer between one branch's layer and its activation."""

    def __init__(self):
        super().__init__()
        self.a, self.k, self.b = nn.Linear(8, 16), nn.Linear(8, 16), nn.ReLU()
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        a = self.a(x)
        k = self.k(x)
        return self.head(self.b(a) + k)


def test_branches_that_interleave_are_replayed():
    model, data = model_of(Interleaved), batches(size=1, channels=8, classes=4)
    data = [(x.flatten(1), t) for x, t in data]
    found = lq.sweep(model, data, ["int8"], metric="kl", progress=False)
    assert not found.fallback
    changed = in_format(model, data, "int8", ["k"], list(found.units))
    values = compare(logits(model, data), logits(changed, data), None).numpy().astype(np.float64)
    assert found.row("k", "int8").kl == pytest.approx(values[:, 3].mean(), rel=1e-9)


def test_layers_of_resnet18_take_half_their_passes():
    """A naive sweep takes 22."""
    model = model_of(torchvision.models.resnet18)
    data = [torch.randn(4, 3, 64, 64)]
    found = lq.sweep(model, data, metric="kl", progress=False)
    assert len(found.units) == 21
    assert not found.fallback
    assert found.passes < 11.1
    estimate = lq.sweep(model, data, method="gradient", progress=False)
    assert estimate.passes <= 3.2


def test_a_fused_transformer_takes_no_more_passes_than_naive():
    model, data = model_of(Attention), batches()
    found = lq.sweep(model, data, metric="kl", progress=False)
    assert 1 < found.passes <= 1 + len(found.units)


@pytest.mark.parametrize("ends", ["fp16", "skip"])
def test_first_and_last_are_swept_in_the_format_or_skipped(ends):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).eval()
    data = [(x.flatten(1)[:, :16], t) for x, t in batches()]
    arguments = {"formats": ["int4", "int8"], "metric": "kl", "progress": False}
    plain = lq.sweep(model, data, recipe=lq.Recipe(), **arguments)
    found = lq.sweep(model, data, recipe=lq.Recipe(first_and_last=ends), **arguments)
    assert found.layers == (("1",) if ends == "skip" else ("0", "1", "2"))
    for row in found:
        assert row.kl == plain.row(row.layer, row.format).kl


class Counter(nn.Sequential):
    """Counts its passes in a buffer, in eval mode too."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


def test_buffers_that_a_pass_changes_are_given_back(tmp_path):
    model, data = Counter(digits_cnn()).eval(), batches(channels=1, classes=10)
    before = lq.digest.model_digest(model)
    found = lq.sweep(model, data, journal=tmp_path / "j", progress=False)
    assert found.model_hash == before == lq.digest.model_digest(model)
    assert lq.sweep(model, data, journal=tmp_path / "j", progress=False) == found


class Odd(nn.Module):
    """Allows no subclass that records."""

    def __init_subclass__(cls, **kwargs):
        if cls.__name__.startswith("Recorded"):
            raise TypeError("no subclass")

    def forward(self, x):
        return x


def test_a_module_that_cannot_be_recorded_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), Odd(), nn.Linear(8, 4)).eval()
    with pytest.raises(TypeError, match="no subclass"):
        lq.sweep(model, [torch.randn(4, 8)], progress=False)
    assert [type(m) for m in model] == [nn.Linear, Odd, nn.Linear]


def test_an_interrupted_change_leaves_the_model_as_it_was(monkeypatch):
    changed, before = [], str(digits_cnn().eval())
    change = States._set

    def interrupted(self, name, module, slots):
        change(self, name, module, slots)
        changed.append(name)
        if len(changed) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(States, "_set", interrupted)
    model = model_of(digits_cnn)
    with pytest.raises(KeyboardInterrupt):
        lq.sweep(model, batches(channels=1, classes=10), progress=False)
    assert str(model) == before


def test_what_stays_open_is_told(caplog):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))).eval()
    data = [(x.flatten(1)[:, :16], t) for x, t in batches(8, samples=4)]
    full = lq.sweep(model, data, metric="top1", progress=False)
    found = lq.sweep(model, data, method="adaptive", metric="top1", progress=False)
    assert found.passes <= 0.5 * full.passes  # a batch over the budget at the most
    assert "Still open when the work was spent" in caplog.text


class Stop(Exception):
    """Ends a sweep in its midst."""


class Counting(nn.Module):
    """Counts the samples that reach it, and stops everything after so many batches."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.calls, self.stop_after = 0, stop_after

    def forward(self, x):
        if len(x) > 2:  # not the few that a sweep begins with
            self.calls += 1
        if self.calls == self.stop_after:
            raise Stop
        return x


@pytest.mark.parametrize("method", ["exact", "gradient", "adaptive"])
def test_a_stopped_sweep_goes_on_from_its_journal(method, tmp_path):
    data, calibration = batches(6, channels=1, classes=10), batches(1, channels=1, classes=10)
    model = nn.Sequential(digits_cnn(), Counting()).eval()
    arguments = {"method": method, "metric": "kl", "calibration": calibration, "progress": False}
    journal = tmp_path / "sweep.jsonl"
    whole = lq.sweep(model, data, **arguments)
    total = model[1].calls
    model[1].calls, model[1].stop_after = 0, total // 2
    with pytest.raises(Stop):
        lq.sweep(model, data, journal=journal, **arguments)
    whole = str(whole)  # since NaN is not NaN
    with open(journal, "a") as file:
        file.write('{"variant": "only:int8:both:0.0", "batch": 5, "n')  # cut off in writing
    before = [json.loads(line) for line in journal.read_text().splitlines()[:-1]]
    model[1].calls, model[1].stop_after = 0, None
    again = lq.sweep(model, data, journal=journal, **arguments)
    assert str(again) == whole
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert lines[: len(before)] == before
    keys = [(line["variant"], line["batch"]) for line in lines if "variant" in line]
    assert len(keys) == len(set(keys))  # nothing twice
    calls = model[1].calls
    assert str(lq.sweep(model, data, journal=journal, **arguments)) == whole
    assert model[1].calls - calls <= 3  # calibration and the first look, no measurement


def test_a_killed_sweep_goes_on_from_its_journal(tmp_path):
    code = f"""
import os, torch, lq
from tests.test_sensitivity import batches, digits_cnn, model_of
from lq.sensitivity.journal import Journal
add = Journal.add
def dies(journal, *args):
    add(journal, *args)
    if sum(map(len, journal._values.values())) == 9:
        os._exit(9)
Journal.add = dies
lq.sweep(model_of(digits_cnn), batches(4, channels=1, classes=10), journal={str(tmp_path / "j")!r},
         progress=False)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert ran.returncode == 9, ran.stderr
    model, data = model_of(digits_cnn), batches(4, channels=1, classes=10)
    again = lq.sweep(model, data, journal=tmp_path / "j", progress=False)
    assert again == lq.sweep(model, data, progress=False)


def test_labels_in_mappings_count(tmp_path):
    class Named(nn.Sequential):
        def forward(self, u):
            return super().forward(u)

    model, x = Named(nn.Linear(8, 4)).eval(), torch.randn(16, 8)
    found = []
    for label in (0, 1):
        data = [{"u": x, "labels": torch.full((16,), label)}]
        found.append(lq.sweep(model, data, journal=tmp_path / str(label), progress=False))
    assert found[0].data_hash != found[1].data_hash
    with pytest.raises(ValueError, match="batch 0 is another"):
        lq.sweep(model, data, journal=tmp_path / "0", progress=False)


def test_a_journal_of_something_else_is_refused(tmp_path):
    model, data = model_of(digits_cnn), batches(channels=1, classes=10)
    journal = tmp_path / "sweep.jsonl"
    lq.sweep(model, data, journal=journal, calibration=data[:1], progress=False)
    with pytest.raises(ValueError, match="batch 0 is another"):
        lq.sweep(model, data[::-1], journal=journal, calibration=data[:1], progress=False)
    other = [(x, (t + 1) % 10) for x, t in data]
    with pytest.raises(ValueError, match="batch 0 is another"):
        lq.sweep(model, other, journal=journal, calibration=data[:1], progress=False)
    with pytest.raises(ValueError, match="its method is another"):
        lq.sweep(
            model, data, method="gradient", journal=journal, calibration=data[:1], progress=False
        )
    with pytest.raises(ValueError, match="its recipe is another"):
        lq.sweep(model, data, journal=journal, recipe="openvino_int8", progress=False)
    torch.nn.init.zeros_(model[9].weight)
    with pytest.raises(ValueError, match="its model is another"):
        lq.sweep(model, data, journal=journal, calibration=data[:1], progress=False)
    journal.write_text("not json\n")
    with pytest.raises(ValueError, match="cannot be read"):
        lq.sweep(model, data, journal=journal, calibration=data[:1], progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": ["int9"]}, "did you mean 'int"),
        ({"formats": "int8"}, "a list of formats"),
        ({"formats": ["fp32"]}, "compared with fp32"),
        ({"formats": ["int8", "int8"]}, "each once"),
        ({"method": "exakt"}, "did you mean 'exact'"),
        ({"metric": "top2"}, "did you mean 'top"),
        ({"metric": "top1", "method": "gradient"}, "metric 'kl'"),
        ({"parts": ["weight"]}, "did you mean 'weights'"),
        ({"units": "block"}, "did you mean 'blocks'"),
        ({"units": {"a": "conv9"}}, "matches none"),
        ({"units": {"a": "0", "b": "*"}}, "in one unit"),
        ({"calibrator": "auto"}, "one calibrator"),
        ({"left_float": True, "method": "adaptive"}, "method 'exact'"),
    ],
)
def test_wrong_arguments(arguments, message):
    model, data = model_of(digits_cnn), batches(1, channels=1, classes=10)
    with pytest.raises(ValueError, match=message):
        lq.sweep(model, data, progress=False, **arguments)


def test_wrong_models_and_batches():
    model, data = model_of(digits_cnn), batches(1, channels=1, classes=10)
    with pytest.raises(ValueError, match="at least one batch"):
        lq.sweep(model, [], progress=False)
    with pytest.raises(ValueError, match="gone through again"):
        lq.sweep(model, iter(data), progress=False)
    with pytest.raises(ValueError, match="class numbers"):
        lq.sweep(model, [data[0][0]], metric="top1", progress=False)
    with pytest.raises(ValueError, match="dequantize"):
        lq.sweep(lq.quantize(copy.deepcopy(model), "tensorrt_int8"), data, progress=False)
    assert lq.sweep(model, [data[0][0]], progress=False).metric == "kl"


def test_scores_are_costs():
    rows = [
        LayerSensitivity(layer="a", format="int8", sqnr_db=20.0, kl=0.1),
        LayerSensitivity(layer="b", format="int8", sqnr_db=30.0, kl=0.2),
    ]
    common = {"found": rows, "units": {"a": ("a",), "b": ("b",)}, "formats": ("int8",), "n": 1}
    by_noise = Sensitivity(**common, method="exact", metric="sqnr")
    assert by_noise.score("a", "int8") == pytest.approx(0.01)
    assert [row.layer for row in by_noise.ranked()] == ["a", "b"]
    assert [row.layer for row in Sensitivity(**common, method="exact", metric="kl").ranked()] == [
        "b",
        "a",
    ]
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        by_noise.score("a", "int7")
    assert Measures().intervals == {}
