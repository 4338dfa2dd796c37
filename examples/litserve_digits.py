"""Serve an exported ONNX file with LitServe, and hear when the data it is sent drift.

pip install litserve
lq fit --config configs/quickstart.yaml
python examples/litserve_digits.py runs/quickstart/digits.onnx \
    --shadow runs/quickstart/digits_float.onnx
python -c 'import json; print(json.dumps({"image": [[[0.1] * 8] * 8]}))' |
    curl localhost:8000/predict -H 'Content-Type: application/json' -d @-

An image is as the model was trained with: one channel of 8 by 8 values, normalized. Requests that
come at about the same time are run as one batch.
"""

import argparse

import litserve
import torch
from torch import Tensor

import lq


class Digits(litserve.LitAPI):
    """Answers an image with its class."""

    def __init__(self, path: str, shadow: str | None) -> None:
        super().__init__(max_batch_size=32, batch_timeout=0.002)
        self.path, self.shadow = path, shadow

    def setup(self, device: str) -> None:
        """Open the file in the worker; drift is logged as a warning."""
        self.model = lq.DriftMonitor(self.path, shadow=self.shadow, every=20, samples=64)

    def decode_request(self, request: dict) -> Tensor:
        """Return the image in a request."""
        return torch.tensor(request["image"], dtype=torch.float32)

    def predict(self, images: Tensor) -> Tensor:
        """Return the class of each image of a batch."""
        return self.model.run(images)[0].argmax(1)

    def encode_response(self, output: Tensor) -> dict:
        """Return the answer to one request."""
        return {"class": int(output)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="ONNX file to serve")
    parser.add_argument("--shadow", help="ONNX file of the float model")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    server = litserve.LitServer(Digits(given.path, given.shadow), accelerator="cpu")
    server.run(port=given.port, generate_client_file=False)
