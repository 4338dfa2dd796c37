from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lq
from lq.checkpoint import read_checkpoint, read_weights
from lq.state import RECIPE, decode_recipe, encode_recipe, recipe_of
from lq.surgery import is_calibrated, quantized_layers

SPECIAL = {"rules": [{"name": "1.fc", "format": "int4"}, {"name": "0", "format": "fp16"}]}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.relu())


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), Head())


def calibrated(recipe: Any = "tensorrt_int8", seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    model, x = net(seed), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    return lq.calibrate(lq.quantize(model, recipe), [x], progress=False), x


@pytest.mark.parametrize("was_calibrated", [False, True], ids=["fresh", "calibrated"])
def test_a_float_state_dict_loads_strictly_and_leaves_no_ranges(was_calibrated: bool) -> None:
    source = net(seed=1)
    model, x = calibrated() if was_calibrated else (lq.quantize(net(), "tensorrt_int8"), None)
    given = source.state_dict()
    keys = list(given)

    result = model.load_state_dict(given, strict=True)

    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(given) == keys, "the caller's dict is untouched"
    assert torch.equal(model[0].weight, source[0].weight)
    assert not is_calibrated(model)
    with pytest.raises(RuntimeError, match=r"'0\.(input|weight)_quantizer' is not calibrated"):
        model(torch.randn(5, 6) if x is None else x)


def test_a_float_state_dict_still_has_to_be_complete() -> None:
    state = net().state_dict()
    del state["0.bias"]

    with pytest.raises(RuntimeError, match=r"0\.bias"):
        lq.quantize(net(), "tensorrt_int8").load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("with_recipe", [True, False], ids=["recipe", "no-recipe"])
class TestIncomplete:
    def test_missing_is_named(self, with_recipe: bool, strict: bool) -> None:
        model, _ = calibrated()
        state = model.state_dict()
        del state["1.fc.input_quantizer.scale"]
        if not with_recipe:
            del state[RECIPE]

        with pytest.raises(RuntimeError, match=r"1 missing \(1\.fc\.input_quantizer\), 0 not in"):
            calibrated()[0].load_state_dict(state, strict=strict)

    def test_extra_is_named(self, with_recipe: bool, strict: bool) -> None:
        state = calibrated()[0].state_dict()
        model, _ = calibrated({"rules": [{"name": "0", "format": "skip"}]})
        if not with_recipe:
            del state[RECIPE]

        with pytest.raises(
            RuntimeError, match=r"2 not in the model \(0\.input_quantizer, 0\.weight_quantizer\)"
        ):
            model.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        pytest.param("int8", "int4", id="int8-into-int4"),
        pytest.param("int4", "int8", id="int4-into-int8"),
        pytest.param("int8", "fp8_e4m3", id="int8-into-fp8"),
        pytest.param("fp16", "bf16", id="fp16-into-bf16"),
        pytest.param("fp16", "skip", id="fp16-into-float"),
        pytest.param("skip", "fp16", id="float-into-fp16"),
    ],
)
def test_another_format_names_the_layer(saved: str, loading: str, strict: bool) -> None:
    """Otherwise the model restores without a word and computes other numbers."""
    state = calibrated({"rules": [{"name": "1.fc", "format": saved}]})[0].state_dict()
    model, _ = calibrated({"rules": [{"name": "1.fc", "format": loading}]})

    with pytest.raises(RuntimeError, match=r"'1\.fc'"):
        model.load_state_dict(state, strict=strict)


def test_another_float_format_everywhere_names_a_layer() -> None:
    state = lq.quantize(net(), {"weights": "fp16", "inputs": "fp16"}).state_dict()
    model = lq.quantize(net(), {"weights": "bf16", "inputs": "bf16"})

    with pytest.raises(RuntimeError, match="'0'"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "recipe",
    [
        "tensorrt_int8",
        "weight_only_int8",
        SPECIAL,
        {"inputs": {"format": "int8", "range": "lsq"}},
        {"weights": {"format": "int8", "axis": None}, "inputs": "fp8_e4m3"},
        {"weights": "fp16", "inputs": "fp16"},
    ],
    ids=["int8", "weight-only", "mixed", "learned", "per-tensor-fp8", "fp16"],
)
class TestRoundTrip:
    def test_weights_only_file_is_bit_equal(self, recipe: Any, tmp_path: Path) -> None:
        model, x = calibrated(recipe)
        torch.save(model.state_dict(), tmp_path / "model.pth")
        other = lq.quantize(net(seed=1), recipe)

        other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))

        assert torch.equal(other(x), model(x))

    def test_recipe_travels(self, recipe: Any, tmp_path: Path) -> None:
        model, x = calibrated(recipe)
        save_file(model.state_dict(), tmp_path / "model.safetensors")

        weights = read_weights(tmp_path / "model.safetensors")
        stored = decode_recipe(weights[RECIPE])
        other = lq.quantize(net(seed=1), stored)
        other.load_state_dict(weights)

        assert weights[RECIPE].dtype is torch.uint8
        assert stored == lq.Recipe.parse(recipe) == recipe_of(model) == recipe_of(other)
        assert torch.equal(other(x), model(x))

    @pytest.mark.parametrize("depth", [1, 2], ids=lambda d: f"depth={d}")
    def test_as_child_of_another_module(self, recipe: Any, depth: int) -> None:
        model, x = calibrated(recipe)
        other = lq.quantize(net(seed=1), recipe)
        outer, outer_other = model, other
        for _ in range(depth):
            outer, outer_other = nn.Sequential(outer), nn.Sequential(outer_other)
        state = outer.state_dict()
        assert "0." * depth + RECIPE in state

        outer_other.load_state_dict(state)

        assert torch.equal(outer_other(x), model(x))

    def test_assign(self, recipe: Any) -> None:
        model, x = calibrated(recipe)
        other = lq.quantize(net(seed=1), recipe)

        other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)

        assert torch.equal(other(x), model(x))


def test_float_weights_load_into_a_child() -> None:
    outer = nn.Sequential(lq.quantize(net(), "tensorrt_int8"))

    outer.load_state_dict(nn.Sequential(net(seed=1)).state_dict())

    assert torch.equal(outer[0][0].weight, net(seed=1)[0].weight)
    assert not is_calibrated(outer)


def test_errors_in_a_child_name_the_whole_path() -> None:
    outer = nn.Sequential(calibrated()[0])
    state = outer.state_dict()
    del state["0.1.fc.input_quantizer.scale"]

    with pytest.raises(RuntimeError, match=r"1 missing \(0\.1\.fc\.input_quantizer\)"):
        outer.load_state_dict(state)


def test_two_quantized_children_each_have_their_recipe() -> None:
    first, second = calibrated()[0], calibrated(SPECIAL)[0]
    outer = nn.ModuleDict({"student": first, "teacher": second})
    state = outer.state_dict()
    assert decode_recipe(state[f"teacher.{RECIPE}"]) == lq.Recipe.parse(SPECIAL)

    outer.load_state_dict(state)
    state[f"student.{RECIPE}"], state[f"teacher.{RECIPE}"] = (
        state[f"teacher.{RECIPE}"],
        state[f"student.{RECIPE}"],
    )
    with pytest.raises(RuntimeError, match="another recipe"):
        outer.load_state_dict(state)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = Head()
        self.b = self.a
        self.c = nn.ModuleList([self.a.fc, nn.Linear(4, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.c[1](self.a(x)) + self.c[1](self.c[0](self.b.fc.weight[:, :8]))[:1]


def test_shared_modules_round_trip() -> None:
    x = torch.randn(3, 8)
    torch.manual_seed(0)
    model = lq.calibrate(lq.quantize(Shared(), "tensorrt_int8"), [x], progress=False)
    state = model.state_dict()
    names = {k for k in state if k.endswith("input_quantizer.scale")}
    assert names == {f"{n}.input_quantizer.scale" for n in ("a.fc", "b.fc", "c.0", "c.1")}
    other = lq.quantize(Shared(), "tensorrt_int8")

    other.load_state_dict(state)

    assert torch.equal(other(x), model(x))
    other.load_state_dict(Shared().state_dict())
    assert not is_calibrated(other)


def test_state_dict_is_a_snapshot_of_plain_tensors() -> None:
    state = calibrated()[0].state_dict()

    assert all(isinstance(v, Tensor) for v in state.values())
    assert state["0.input_quantizer.scale"].shape == ()
    assert state["0.weight_quantizer.scale"].shape == (8,)


def test_recipe_codes_back() -> None:
    recipe = lq.Recipe.parse(SPECIAL)

    assert decode_recipe(encode_recipe(recipe)) == recipe
    assert recipe_of(nn.Linear(1, 1)) is None


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class TestReadCheckpoint:
    @pytest.mark.parametrize("name", ["none.ckpt", "none.safetensors"])
    def test_missing(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(FileNotFoundError, match=name):
            read_checkpoint(tmp_path / name)

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="checkpoint"):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999], ids=lambda s: f"{s:.1%}")
    def test_truncated(self, tmp_path: Path, share: float) -> None:
        buffer = io.BytesIO()
        torch.save(net().state_dict(), buffer)
        content = buffer.getvalue()
        path = tmp_path / "cut.ckpt"
        path.write_bytes(content[: int(len(content) * share)])

        with pytest.raises(ValueError, match=r"cut\.ckpt.*cannot be read"):
            read_checkpoint(path)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\n",
            b"not a checkpoint at all",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            b"<!DOCTYPE html><html></html>",
            b"PK\x03\x04" + bytes(100),
            b"\x80\x02",
            b"\x80\x04\x95\xff\xff\xff\xff",
            b"\x89HDF\r\n\x1a\n" + bytes(100),
            bytes(range(256)) * 4,
            bytes(1000),
        ],
        ids=[
            "empty",
            "newline",
            "text",
            "lfs",
            "html",
            "zip",
            "pickle",
            "frame",
            "hdf5",
            "all",
            "zeros",
        ],
    )
    @pytest.mark.parametrize("suffix", ["ckpt", "pth", "safetensors"])
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_garbage(self, tmp_path: Path, content: bytes, suffix: str) -> None:
        path = tmp_path / f"garbage.{suffix}"
        path.write_bytes(content)

        with pytest.raises(ValueError, match=rf"garbage\.{suffix}.*cannot be read"):
            read_checkpoint(path)

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_random_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "random.ckpt"
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            content = torch.randint(0, 256, (64,), generator=generator, dtype=torch.uint8)
            path.write_bytes(b"\x80\x02" * (seed % 2) + bytes(content.tolist()))
            with pytest.raises(ValueError, match=r"random\.ckpt"):
                read_checkpoint(path)

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_pickled_module(self, tmp_path: Path, zipped: bool) -> None:
        torch.save(net(), tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)

        with pytest.raises(ValueError, match=r"model\.pt.*pickled objects.*state_dict\(\)"):
            read_checkpoint(tmp_path / "model.pt")

    @pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
    def test_nothing_is_executed(self, tmp_path: Path, how: str) -> None:
        path, trace = tmp_path / "evil.ckpt", tmp_path / "executed"
        content = {"state_dict": net().state_dict(), "extra": Payload(trace)}
        if how == "pickle":
            path.write_bytes(pickle.dumps(Payload(trace)))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=how == "zip")

        with pytest.raises(ValueError, match=r"evil\.ckpt"):
            read_checkpoint(path)

        assert not trace.exists()

    def test_safetensors(self, tmp_path: Path) -> None:
        state = net().state_dict()
        save_file(state, tmp_path / "good.safetensors")

        read = read_checkpoint(tmp_path / "good.safetensors")

        assert read.keys() == state.keys()
        assert all(torch.equal(read[k], v) for k, v in state.items())

    @pytest.mark.parametrize("keep", [4, 20, -8], ids=lambda k: f"keep={k}")
    def test_cut_safetensors(self, tmp_path: Path, keep: int) -> None:
        path = tmp_path / "cut.safetensors"
        save_file(net().state_dict(), path)
        path.write_bytes(path.read_bytes()[:keep])

        with pytest.raises(ValueError, match=r"cut\.safetensors.*cannot be read"):
            read_checkpoint(path)

    @pytest.mark.parametrize("content", [[1, 2], torch.ones(2), 3], ids=["list", "tensor", "int"])
    def test_no_dict(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "x.pt")

        with pytest.raises(ValueError, match=rf"x\.pt.*dict.*{type(content).__name__}"):
            read_checkpoint(tmp_path / "x.pt")

    def test_plain_values_are_read(self, tmp_path: Path) -> None:
        content = {"state_dict": net().state_dict(), "epoch": 3, "hyper_parameters": {"a": [1.5]}}
        torch.save(content, tmp_path / "x.ckpt")

        assert read_checkpoint(str(tmp_path / "x.ckpt"))["hyper_parameters"] == {"a": [1.5]}


class TestReadWeights:
    def test_of_a_lightning_checkpoint(self, tmp_path: Path) -> None:
        state = net().state_dict()
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.ckpt")

        assert read_weights(tmp_path / "x.ckpt").keys() == state.keys()

    @pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": 3}, {"state_dict": {"a": 1}}])
    def test_of_something_else(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "x.ckpt")

        with pytest.raises(ValueError, match=r"x\.ckpt.*state_dict"):
            read_weights(tmp_path / "x.ckpt")


class Plain(nn.Module):
    """Has the hooks of a LightningModule that matter, and no more."""

    def __init__(self, width: int, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Lit(lightning.LightningModule):
    """Builds its layers in ``configure_model``, idempotently."""

    def __init__(self, width: int, seed: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(self.hparams.seed)
            self.net = nn.Sequential(nn.Linear(6, self.hparams.width), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("cls", [Plain, Lit])
@pytest.mark.parametrize("part", ["", "net"], ids=["whole", "part"])
class TestLoadFromCheckpoint:
    def saved(self, cls: type[Any], part: str, path: Path, **hparams: Any) -> tuple[Any, Tensor]:
        model, x = cls(width=8, seed=0), torch.randn(5, 6)
        if hasattr(model, "configure_model"):
            model.configure_model()
        target = model.get_submodule(part)
        recipe = {"rules": [{"name": "*0", "format": "int4"}]}
        lq.calibrate(lq.quantize(target, recipe), [x], progress=False)
        torch.save({"state_dict": model.state_dict(), "hyper_parameters": hparams}, path)
        return model, x

    def test_bit_equal(self, cls: type[Any], part: str, tmp_path: Path) -> None:
        model, x = self.saved(cls, part, tmp_path / "a.ckpt", width=8, unknown_to_init=3)

        loaded = lq.load_from_checkpoint(cls, tmp_path / "a.ckpt")

        assert type(loaded) is cls
        assert torch.equal(loaded(x), model(x))
        assert list(quantized_layers(loaded)) == ["net.0", "net.1"]
        assert loaded.net[0].weight_quantizer.spec.format == "int4"
        assert loaded.state_dict().keys() == model.state_dict().keys()

    def test_arguments(self, cls: type[Any], part: str, tmp_path: Path) -> None:
        model, x = self.saved(cls, part, tmp_path / "a.ckpt", width=9)

        loaded = lq.load_from_checkpoint(cls, tmp_path / "a.ckpt", width=8)

        assert torch.equal(loaded(x), model(x))

    def test_a_float_checkpoint_is_refused(self, cls: type[Any], part: str, tmp_path: Path) -> None:
        model = cls(width=8)
        if hasattr(model, "configure_model"):
            model.configure_model()
        torch.save(
            {"state_dict": model.state_dict(), "hyper_parameters": {"width": 8}},
            tmp_path / "a.ckpt",
        )

        with pytest.raises(ValueError, match=r"a\.ckpt"):
            lq.load_from_checkpoint(cls, tmp_path / "a.ckpt")

    def test_not_lightnings(self, cls: type[Any], part: str, tmp_path: Path) -> None:
        torch.save(net().state_dict(), tmp_path / "a.ckpt")

        with pytest.raises(ValueError, match=r"a\.ckpt.*Lightning checkpoint"):
            lq.load_from_checkpoint(cls, tmp_path / "a.ckpt")
        with pytest.raises(FileNotFoundError, match=r"b\.ckpt"):
            lq.load_from_checkpoint(cls, tmp_path / "b.ckpt")


def test_a_damaged_recipe_names_the_recipe() -> None:
    state = calibrated()[0].state_dict()
    state[RECIPE] = torch.tensor([1, 2, 255], dtype=torch.uint8)

    with pytest.raises((ValueError, RuntimeError), match="recipe"):
        calibrated()[0].load_state_dict(state)


def test_a_saved_model_can_be_pruned_of_its_recipe() -> None:
    model, x = calibrated()
    expected = model(x)
    state = {k: v for k, v in model.state_dict().items() if k != RECIPE}
    other = lq.quantize(net(seed=1), "tensorrt_int8")

    other.load_state_dict(state)

    assert torch.equal(other(x), expected)
