"""python -m bench pipeline | methods; --help of each says more."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench import methods, pipeline


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pipeline", help="EKFAC end to end against kronfluence")
    command.add_argument("--quick", action="store_true", help="fewer repeats")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command.add_argument(
        "--precision", choices=("highest", "high"), default="highest", help="torch's float32 matmul precision, for both"
    )
    command = commands.add_parser("methods", help="every method and calculator looks for mislabelled digits")
    command.add_argument("--quick", action="store_true", help="fewer examples and epochs")
    command.add_argument("--only", default="", metavar="NAME", help="methods whose name holds NAME")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command.add_argument("--figure", type=Path, default=Path("detection.png"), help="default: %(default)s")
    child = commands.add_parser("_method")
    child.add_argument("name")
    child.add_argument("folder", type=Path)
    child = commands.add_parser("_child")
    child.add_argument("library", choices=("ihvp", "kronfluence"))
    child.add_argument("folder", type=Path)
    child.add_argument("repeats", type=int)
    child.add_argument("precision")
    arguments = parser.parse_args()
    if arguments.command == "pipeline":
        pipeline.run(arguments.quick, arguments.output, arguments.precision)
    elif arguments.command == "methods":
        methods.run(arguments.quick, arguments.output, arguments.figure, arguments.only)
    elif arguments.command == "_method":
        print(json.dumps(methods.run_child(arguments.name, arguments.folder)))
    else:
        torch.set_float32_matmul_precision(arguments.precision)
        run = pipeline.run_ihvp if arguments.library == "ihvp" else pipeline.run_kronfluence
        print(json.dumps(run(arguments.folder, arguments.repeats)))


if __name__ == "__main__":
    main()
