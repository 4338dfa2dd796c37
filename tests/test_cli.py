"""The command line: every subcommand, and what it says when something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lq import cli
from lq.models import digits_cnn
from lq.plan import PrecisionPlan


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(**changes):
    """A config file of the shortest useful QAT, with some keys replaced."""
    values = {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 1,
            "limit_train_batches": 4,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lq.callbacks.QuantizationAwareTraining"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": "ckpt", "save_last": True, "save_top_k": 0},
                },
            ],
        },
        "model": {"model": "lq.models.digits_cnn", "recipe": "tensorrt_int8"},
        "data": {"class_path": "lq.data.DigitsDataModule"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    Path("config.yaml").write_text(yaml.safe_dump(values))
    return ["--config", "config.yaml"]


def test_distillation_and_oscillation_control(capsys):
    callbacks = [
        {
            "class_path": "lq.callbacks.QuantizationAwareTraining",
            "init_args": {"recipe": {"weights": "int4"}, "calibration_batches": 1},
        },
        {
            "class_path": "lq.callbacks.Distillation",
            "init_args": {"teacher": "self", "temperature": 2.0, "features": ["2", "5"]},
        },
        {"class_path": "lq.callbacks.OscillationControl", "init_args": {"method": "dampen"}},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": "ckpt", "save_last": True, "save_top_k": 0},
        },
    ]
    settings = config(trainer__callbacks=callbacks, model__recipe={"weights": "int4"})
    cli.main(["fit", *settings])
    cli.main(["fit", *settings, "--ckpt_path=ckpt/last.ckpt", "--trainer.max_epochs=2"])
    cli.main(["test", *settings, "--ckpt_path=ckpt/last.ckpt"])
    assert "test/top1" in capsys.readouterr().out
    states = torch.load("ckpt/last.ckpt", weights_only=True)["callbacks"]
    (state,) = [v for k, v in states.items() if k.startswith("OscillationControl")]
    assert state["trackers"]["0"]["codes"].dtype is torch.int8


def test_fit_test_predict_export(capsys):
    settings = config()
    cli.main(["fit", *settings])
    cli.main(["test", *settings, "--ckpt_path=ckpt/last.ckpt"])
    cli.main(["predict", *settings, "--ckpt_path=ckpt/last.ckpt"])
    cli.main(["export", *settings, "--ckpt_path=ckpt/last.ckpt", "--path=out/digits.onnx"])
    printed = capsys.readouterr().out
    assert "test/top1" in printed
    assert "Wrote out/digits.onnx: " in printed
    assert Path("out/digits.onnx").is_file()
    assert Path("out/digits.engine.json").is_file()


def test_calibrate_keeps_ranges_for_the_callback(capsys):
    settings = config()
    torch.manual_seed(0)
    torch.save(digits_cnn().state_dict(), "float.pth")
    weights = "--model.weights=float.pth"
    cli.main(["calibrate", *settings, weights, "--batches=2", "--cache=out/ranges.json"])
    cli.main(["calibrate", *settings, weights, "--batches=2", "--cache=out/ranges.json"])
    first, second = capsys.readouterr().out.split("Ranges: out/ranges.json\n")[:2]
    assert "dB: max" in first
    assert "256 of 1197 images, random, seed 0" in first
    assert first[first.index("quantizer") :] == second[second.index("quantizer") :]
    with pytest.raises(SystemExit) as exit:
        cli.main(["calibrate", *settings, weights, "--batches=3", "--cache=out/ranges.json"])
    assert exit.value.code == 2
    assert "same data" in capsys.readouterr().err
    callback = {"batches": 2, "calibrator": "auto", "cache": "out/ranges.json"}
    settings = config(
        trainer__callbacks=[{"class_path": "lq.callbacks.Calibration", "init_args": callback}]
    )
    cli.main(["validate", *settings, weights])
    assert "val/top1" in capsys.readouterr().out


def test_search_writes_a_plan_that_is_a_recipe(capsys):
    settings = float_fit()
    cli.main(["fit", *settings])
    search = ["search", *settings, "--ckpt_path=ckpt/last.ckpt", "--batches=2"]
    search += ["--constraints.max_accuracy_drop=0.05", "--formats=[int8, int4]"]
    cli.main([*search, "--plan=out/plan.yaml"])
    printed = capsys.readouterr().out
    assert "Predicted, for limits on the size:" in printed
    assert not Path("out/plan.jsonl").exists()  # which a killed sweep goes on from
    assert "; measured drop " in printed
    plan = PrecisionPlan.from_yaml("out/plan.yaml")
    assert "int4" in plan.values()
    callback = {"class_path": "lq.callbacks.Calibration", "init_args": {"checkpoint": "ptq.ckpt"}}
    follow = config(model__recipe="out/plan.yaml", trainer__callbacks=[callback])
    cli.main(["validate", *follow, "--model.weights=ckpt/last.ckpt"])
    cli.main(["export", *follow, "--ckpt_path=ptq.ckpt", "--path=m.onnx", "--engine=false"])
    assert PrecisionPlan.of("m.onnx") == plan


def float_fit():
    """The arguments of a short fit without quantization."""
    checkpoint = {"dirpath": "ckpt", "save_last": True, "save_top_k": 0}
    path = "lightning.pytorch.callbacks.ModelCheckpoint"
    callbacks = [{"class_path": path, "init_args": checkpoint}]
    return config(model__recipe=None, trainer__limit_train_batches=38, trainer__callbacks=callbacks)


def test_sensitivity_goes_on_and_prints_the_worst_first(capsys):
    settings = config()
    torch.save(digits_cnn().state_dict(), "weights.pth")
    arguments = ["--model.weights=weights.pth", "--batches=2", "--path=out/s.json"]
    arguments += ["--formats=[int8,fp16]", "--metric=kl", "--parts=[both,weights]"]
    cli.main(["sensitivity", *settings, *arguments])
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if " both " in line]
    assert len(rows) == 10
    assert float(rows[0][6]) >= float(rows[4][6])
    assert sum(" weights " in line for line in printed.splitlines()) == 5  # fp16 has no parts
    assert Path("out/s.csv").is_file()
    before = Path("out/s.jsonl").read_text()
    cli.main(["sensitivity", *settings, *arguments])
    assert capsys.readouterr().out == printed
    assert Path("out/s.jsonl").read_text() == before
    assert "did you mean 'int8'" in fails(capsys, ["sensitivity", *settings, "--formats=[itn8]"])


def test_export_again_with_other_settings(capsys):
    settings = config()
    cli.main(["fit", *settings])
    export = ["export", *settings, "--ckpt_path=ckpt/last.ckpt", "--engine=false"]
    for path in ("a.onnx", "b.onnx"):
        cli.main([*export, f"--path={path}", "--batches=1"])
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    assert not Path("a.engine").exists()


def test_export_for_a_server(capsys):
    settings = config()
    cli.main(["fit", *settings])
    export = ["export", *settings, "--ckpt_path=ckpt/last.ckpt", "--path=out/digits.onnx"]
    cli.main([*export, "--serve=triton"])
    # The engine is one of TensorRT-RTX, if any, which the server does not run.
    assert (
        Path("out/triton/digits/1/model.onnx").read_bytes() == Path("out/digits.onnx").read_bytes()
    )
    assert 'backend: "onnxruntime"' in Path("out/triton/digits/config.pbtxt").read_text()
    assert "tritonserver --model-repository=out/triton" in capsys.readouterr().out
    assert "`serve` to be triton" in fails(capsys, [*export, "--serve=litserve"])


def test_optimizer_from_the_command_line():
    arguments = ["--model.optimizer=SGD", "--model.optimizer.lr=0.01"]
    cli.main(["fit", *config(), *arguments, "--trainer.fast_dev_run=1"])


def fails(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "usage:" not in error
    line = error.splitlines()[-1]
    assert line.startswith("lq: error: ")
    return line


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param({"model__recipe": "tensorrt_int9"}, "'tensorrt_int8'?", id="recipe"),
        pytest.param({"model__recipe": "no.yaml"}, "no.yaml", id="recipe file"),
        pytest.param(
            {"model__recipe": {"rules": [{"name": "conv9", "format": "fp16"}]}},
            "'conv9' matches none",
            id="rule",
        ),
        pytest.param({"model__recipe": {"wieghts": "int8"}}, "'weights'?", id="recipe key"),
        pytest.param({"model__model": "lq.models.digit_cnn"}, "digits_cnn", id="model"),
        pytest.param({"model__weights": "no.ckpt"}, "no.ckpt", id="weights"),
        pytest.param({"trainer__max_epoch": 3}, "max_epoch", id="trainer key"),
        pytest.param({"data__class_path": "lq.data.DigitDataModule"}, "DigitDataModule", id="data"),
        pytest.param(
            {"trainer__callbacks": [{"class_path": "lq.callbacks.Exprot"}]}, "Exprot", id="callback"
        ),
        pytest.param(
            {
                "trainer__callbacks": [
                    {"class_path": "lq.callbacks.Calibration", "init_args": {"batchs": 3}}
                ]
            },
            "'batchs' is not accepted",
            id="callback key",
        ),
        pytest.param({"model__optimizer": "Addam"}, "Addam", id="optimizer"),
        pytest.param({"data__init_args": {"batch_size": 0}}, "batch_size", id="batch of zero"),
        pytest.param(
            {"data__class_path": "lq.data.CIFAR10DataModule"}, "download=True", id="no images"
        ),
    ],
)
def test_mistakes_in_a_config(changes, match, capsys):
    error = fails(capsys, ["fit", *config(**changes)])
    assert match in error
    assert not Path("ckpt").exists()


def corrupt(path):
    path.write_bytes(b"not a checkpoint")


def pickled(path):
    torch.save({"state_dict": {}, "model": digits_cnn()}, path)


def cut_short(path):
    torch.save({"state_dict": digits_cnn().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:5000])


def without_weights(path):
    torch.save({"pytorch-lightning_version": "2.6.0"}, path)


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda path: None, "there is no file"),
        (corrupt, "nothing that torch.save wrote"),
        (Path.touch, "nothing that torch.save wrote"),
        (cut_short, "cannot be read"),
        (pickled, "pickled objects"),
        (without_weights, "checkpoint of a fit"),
    ],
    ids=["missing", "corrupt", "empty", "cut short", "pickled", "without weights"],
)
@pytest.mark.parametrize("command", ["fit", "test", "calibrate", "export", "search", "sensitivity"])
def test_bad_checkpoints(write, match, command, capsys):
    write(Path("bad.ckpt"))
    limit = ["--constraints.max_size_mb=1"] * (command == "search")
    error = fails(capsys, [command, *config(), "--ckpt_path=bad.ckpt", *limit])
    assert "'bad.ckpt'" in error
    assert match in error
    assert not list(Path().glob("*.onnx"))
    assert not Path("ranges.json").exists()


def test_a_checkpoint_of_another_model(capsys):
    weights = {"pytorch-lightning_version": "2.6.0", "state_dict": {"weight": torch.ones(1)}}
    torch.save(weights, "other.ckpt")
    for command in ("test", "export"):
        error = fails(capsys, [command, *config(), "--ckpt_path=other.ckpt"])
        assert "Missing key" in error
        assert len(error) < 500


def test_a_damaged_image_in_a_worker(capsys):
    for name in ("train/cat/1.png", "val/cat/1.png"):
        image = Path("images", name)
        image.parent.mkdir(parents=True)
        image.write_bytes(b"no image")
    data = {"class_path": "lq.data.ImageFolderDataModule", "init_args": {"root": "images"}}
    error = fails(capsys, ["validate", *config(), f"--data={data}", "--data.num_workers=1"])
    assert "Expected 'images/val/cat/1.png' to be an image" in error


def test_what_export_refuses_before_a_fit(capsys):
    Path("out.onnx").mkdir()
    for arguments, match in (
        ("path: out.onnx", "is a directory"),
        ("path: a, batches: 0", "least 1"),
    ):
        callback = f"{{class_path: lq.callbacks.Export, init_args: {{{arguments}}}}}"
        error = fails(capsys, ["fit", *config(), f"--trainer.callbacks+={callback}"])
        assert match in error
        assert not Path("ckpt").exists()


def test_export_of_no_batches(capsys):
    settings = config()
    cli.main(["fit", *settings])
    arguments = ["export", *settings, "--ckpt_path=ckpt/last.ckpt", "--batches=0"]
    assert "at least 1" in fails(capsys, arguments)
    assert not list(Path().glob("*.onnx"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param([], "at least one limit", id="no limit"),
        pytest.param(["--constraints.max_accuracy_drop=1"], "one point is 0.01", id="percent"),
        pytest.param(["--constraints.max_size_mb=1e-3"], "the nearest is 0.0411", id="size"),
        pytest.param(
            ["--constraints.max_size_mb=1", "--constraints.pinned={conv9: fp16}"],
            "'conv9' matches none",
            id="pin",
        ),
        pytest.param(
            ["--constraints.max_size_mb=1", "--sensitivity=no.json"], "no.json", id="no sweep"
        ),
        pytest.param(["--constraints.max_size_mb=1", "--batches=0"], "at least", id="no batches"),
    ],
)
def test_mistakes_in_a_search(arguments, match, capsys):
    assert match in fails(capsys, ["search", *config(model__recipe=None), *arguments])
    assert not Path("plan.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param(["--calibrator=entrpy"], "did you mean 'entropy'?", id="calibrator"),
        pytest.param(["--calibrator=percentile(0)"], "percentile in (0, 100]", id="percentile"),
        pytest.param(["--batches=0"], "at least one batch", id="no batches"),
        pytest.param(["--cache=folder"], "'folder' is a directory", id="a folder"),
        pytest.param(["--cache=config.yaml"], "hold ranges that lq saved", id="another file"),
    ],
)
def test_mistakes_in_a_calibration(arguments, match, capsys):
    Path("folder").mkdir()
    assert match in fails(capsys, ["calibrate", *config(), *arguments])
    assert not Path("ranges.json").exists()


def test_weights_instead_of_a_checkpoint(capsys):
    torch.save(digits_cnn().state_dict(), "w.pth")
    for command in ("test", "calibrate", "export"):
        error = fails(capsys, [command, *config(), "--ckpt_path=w.pth"])
        assert "--model.weights" in error


def test_ptq_checkpoint_exports_without_the_float_weights():
    torch.save(digits_cnn().state_dict(), "w.pth")
    settings = config(
        model__weights="w.pth",
        trainer__callbacks=[
            {"class_path": "lq.callbacks.Calibration", "init_args": {"checkpoint": "ptq.ckpt"}}
        ],
    )
    cli.main(["validate", *settings])
    Path("w.pth").unlink()
    cli.main(["export", *settings, "--ckpt_path=ptq.ckpt", "--path=m.onnx", "--engine=false"])
    assert Path("m.onnx").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.accelerator=gpu"],
        ["--trainer.devices=0"],
        ["--trainer.fast_dev_run=-1"],
        ["--model.model_args={num_classes: abc}"],
        ["--model.model_args={num_classes: 3}"],
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(arguments, capsys):
    if arguments == ["--trainer.accelerator=gpu"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fails(capsys, ["fit", *config(), *arguments])


def test_wrong_channels(capsys):
    changes = {"model__model_args": {"in_channels": 3}}
    assert "channels" in fails(capsys, ["fit", *config(**changes)])


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("LQ_TRACEBACK", "1")
    with pytest.raises(ValueError, match="tensorrt_int9"):
        cli.main(["fit", *config(model__recipe="tensorrt_int9")])


@pytest.mark.parametrize(
    "command",
    ["fit", "validate", "test", "predict", "calibrate", "sensitivity", "search", "export"],
)
def test_help_suffices(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "Preset" in shown
    assert "--ckpt_path" in shown


def test_version_and_module():
    ran = subprocess.run(
        [sys.executable, "-m", "lq", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("lq 0.")
