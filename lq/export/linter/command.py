"""The command ``lq lint``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lq.export.linter.fixing import fix
from lq.export.linter.linting import lint
from lq.export.linter.target_rules import CODES


def main(arguments: list[str]) -> int:
    """Run ``lq lint`` and return its exit code: 1 with findings, 0 without, 2 on a bad file."""
    options = _parser().parse_args(arguments)
    try:
        if options.fix:
            output = options.model.with_suffix(".fixed.onnx")
            before = len(lint(options.model, options.target))
            findings = fix(options.model, output, options.target)
            print(f"Wrote {output}: {before - len(findings)} of {before} findings fixed")
        else:
            findings = lint(options.model, options.target)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"lq: error: {error}", file=sys.stderr)
        return 2
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings for {options.target}")
    return 1 if findings else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lq lint",
        description="Find what makes a Q/DQ ONNX file slow or wrong on its target.",
        epilog="Exit code: 0 without findings, 1 with findings, 2 on a file that cannot be read.",
    )
    parser.add_argument("model", type=Path, help="an ONNX file, whoever wrote it")
    parser.add_argument("--target", choices=list(CODES), default="tensorrt", help="what runs it")
    parser.add_argument(
        "--fix",
        action="store_true",
        help="write MODEL.fixed.onnx with the fixes that change no output, and check that",
    )
    return parser
