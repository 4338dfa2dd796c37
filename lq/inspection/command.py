"""The command ``lq inspect``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from lq.inspection.inspecting import inspect
from lq.messages import one_line


def main(arguments: list[str]) -> int:
    """Run ``lq inspect`` and return its exit code: 0, or 2 on a file that cannot be read."""
    options = _parser().parse_args(arguments)
    try:
        found = inspect(options.path)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"lq: error: {one_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(_finite(found.to_dict()), indent=1) if options.json else found)
    return 0


def _finite(value: Any) -> Any:
    """Return plain values with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lq inspect",
        description="Say which formats, ranges and sizes a file holds, and what is not calibrated.",
        epilog="Exit code: 0, or 2 on a file that cannot be read.",
    )
    parser.add_argument(
        "path",
        type=Path,
        help="a checkpoint, weights, an ONNX file whoever wrote it, an engine with its sidecar, a "
        "recipe or plan, a sweep, ranges, or a comparison",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    return parser
