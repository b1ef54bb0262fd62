"""python -m bench ops | orders | pipeline | report FILE; --help of each says more."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench import memory, ops, pipeline, report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pipeline", help="EKFAC end to end against kronfluence")
    command.add_argument("--quick", action="store_true", help="fewer repeats")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command.add_argument(
        "--precision", choices=("highest", "high"), default="highest", help="torch's float32 matmul precision, for both"
    )
    command = commands.add_parser("ops", help="every op against float64, the machine's peak, libraries and the peer")
    command.add_argument("--quick", action="store_true", help="only the cases with goals, fewer samples")
    command.add_argument("--threads", type=int, choices=(1, 2), default=2, help="of the ops; default: %(default)s")
    command.add_argument("--only", default="", metavar="PATTERN", help="cases whose name fits *PATTERN*")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command = commands.add_parser("report", help="the tables again, from JSON lines")
    command.add_argument("file", type=Path)
    child = commands.add_parser("_memory")
    child.add_argument("threads", type=int)
    child = commands.add_parser("_child")
    child.add_argument("library", choices=("ihvp", "kronfluence"))
    child.add_argument("folder", type=Path)
    child.add_argument("repeats", type=int)
    child.add_argument("precision")
    arguments = parser.parse_args()
    if arguments.command == "ops":
        ops.run(arguments.quick, arguments.threads, arguments.only, arguments.output)
    elif arguments.command == "report":
        report.run(arguments.file)
    elif arguments.command == "_memory":
        print(json.dumps(memory.measure_all(json.load(sys.stdin), arguments.threads)))
    elif arguments.command == "pipeline":
        pipeline.run(arguments.quick, arguments.output, arguments.precision)
    else:
        torch.set_float32_matmul_precision(arguments.precision)
        run = pipeline.run_ihvp if arguments.library == "ihvp" else pipeline.run_kronfluence
        print(json.dumps(run(arguments.folder, arguments.repeats)))


if __name__ == "__main__":
    main()
