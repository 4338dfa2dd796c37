"""The examples run, as their headers say."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lq
from lq.data import DigitsDataModule
from tests.digits import trained_digits

ROOT = Path(__file__).parent.parent


@pytest.fixture
def digits(tmp_path):
    """The ONNX file of a trained net in int8, and that of the same in float."""
    model, data = trained_digits(epochs=3)
    x = next(iter(data.val_dataloader()))
    paths = tmp_path / "int8.onnx", tmp_path / "float.onnx"
    lq.export_onnx(model, x, paths[1])
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), data.calibration_dataloader(), progress=False)
    lq.export_onnx(model, x, paths[0])
    return paths


def ask(port, image):
    body = json.dumps({"image": image.tolist()}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["class"]


def wait_until_healthy(port, server):
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass
        assert server.poll() is None
        time.sleep(0.2)
    pytest.fail("the server did not start")


def test_litserve_serves_the_file_and_warns_of_drift(digits, tmp_path):
    pytest.importorskip("litserve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, ROOT / "examples/litserve_digits.py", digits[0]]
    command += ["--shadow", digits[1], "--port", str(port)]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            list(map(str, command)),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        try:
            wait_until_healthy(port, server)
            data = DigitsDataModule()
            data.setup("test")
            images = torch.cat([x for x, _ in data.test_dataloader()])[:128]
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda image: ask(port, image), images))
                runner = lq.open_engine(digits[0])
                assert answers == runner.run(images)[0].argmax(1).tolist()
                assert "drifted" not in log.read_text()
                list(pool.map(lambda image: ask(port, image * 2), images))
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    assert log.read_text().count("are beyond the calibrated range") == 1
