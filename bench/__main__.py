"""python -m bench ops | orders | pipeline | methods | pydvl | small-layers | gpu | report FILE; --help says more."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench import gpu, gpu_cases, gpu_pipeline, memory, methods, ops, orders, pipeline, pydvl, report, small_layers
from bench.settings import SETTINGS

DEVICES = ("cpu", "cuda")
PRECISIONS = ("highest", "high")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pipeline", help="EKFAC end to end against other libraries")
    command.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: a net of GPT-2 small's shape, alone")
    command.add_argument("--model", choices=tuple(SETTINGS), help="on the CPU; default: all, quick: the mlp")
    command.add_argument("--quick", action="store_true", help="fewer repeats, and kronfluence alone")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command.add_argument(
        "--precision", choices=PRECISIONS, default="highest", help="torch's float32 matmul precision, for both"
    )
    command = commands.add_parser("ops", help="every op against float64, the machine's peak, libraries and the peer")
    command.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: the kernels, as bench gpu does")
    command.add_argument("--quick", action="store_true", help="only what has a goal, fewer samples")
    command.add_argument("--threads", type=int, choices=(1, 2), default=2, help="of the ops; default: %(default)s")
    command.add_argument("--only", default="", metavar="PATTERN", help="cases whose name fits *PATTERN*")
    command.add_argument("--precision", choices=PRECISIONS, default="highest", help="torch's float32 matmul precision")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command = commands.add_parser("orders", help="the cost model's choice against every order measured")
    command.add_argument("--quick", action="store_true", help="every seventh shape")
    command.add_argument("--threads", type=int, choices=(1, 2), default=2, help="default: %(default)s")
    command.add_argument("--only", default="", metavar="NAME", help="ops whose name holds NAME")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command = commands.add_parser("report", help="the tables again, from JSON lines")
    command.add_argument("file", type=Path)
    command = commands.add_parser("methods", help="every method and calculator looks for mislabelled digits")
    command.add_argument("--quick", action="store_true", help="fewer examples and epochs")
    command.add_argument("--only", default="", metavar="NAME", help="methods whose name holds NAME")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command.add_argument("--figure", type=Path, default=Path("detection.png"), help="default: %(default)s")
    command = commands.add_parser("gpu", help="the GPU kernels against tuned torch, on a CUDA device")
    command.add_argument("--expected", action="store_true", help="print what the counts predict; needs no GPU")
    command.add_argument("--quick", action="store_true", help="fewer repeats")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command.add_argument("--proven", type=Path, metavar="FILE", help="write the record of what may be chosen here")
    command.add_argument("--passed", action="store_true", help="the tests marked gpu passed on this device")
    command = commands.add_parser("small-layers", help="500 adapters in one scoring pass against a call a layer")
    command.add_argument("--device", choices=DEVICES, default="cpu")
    command.add_argument("--positions", type=int, default=16, help="of each example; default: %(default)s")
    command.add_argument("--quick", action="store_true", help="fewer repeats")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command = commands.add_parser("pydvl", help="the influence classes of pyDVL against its signatures over ihvp")
    command.add_argument("--quick", action="store_true", help="one run of each")
    command.add_argument("--threads", type=int, default=2, help="of torch, in both libraries; default: %(default)s")
    command.add_argument("--only", default="", metavar="NAME", help="methods whose name holds NAME")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    child = commands.add_parser("_pydvl")
    child.add_argument("library", choices=pydvl.LIBRARIES)
    child.add_argument("name", choices=tuple(pydvl.METHODS))
    child.add_argument("file", type=Path)
    child.add_argument("repeats", type=int)
    child.add_argument("threads", type=int)
    child = commands.add_parser("_memory")
    child.add_argument("threads", type=int)
    child.add_argument("growth", type=int)
    child.add_argument("precision", choices=PRECISIONS)
    child = commands.add_parser("_method")
    child.add_argument("name")
    child.add_argument("folder", type=Path)
    child = commands.add_parser("_child")
    child.add_argument("library")
    child.add_argument("model")
    child.add_argument("folder", type=Path)
    child.add_argument("repeats", type=int)
    child.add_argument("precision")
    arguments = parser.parse_args()
    if arguments.command == "ops" and arguments.device == "cuda":
        if arguments.only or arguments.threads != 2 or arguments.precision != "highest":
            parser.error("--only, --threads and --precision are for the CPU")
        gpu.run(arguments.output, None, False, arguments.quick)
    elif arguments.command == "pipeline" and arguments.device == "cuda":
        if arguments.model or arguments.quick or arguments.precision != "highest":
            parser.error("--model, --quick and --precision are for the CPU")
        gpu_pipeline.run(arguments.output, torch.device("cuda"), gpu_pipeline.FULL)
    elif arguments.command == "small-layers":
        small_layers.run(arguments.output, torch.device(arguments.device), arguments.positions, arguments.quick)
    elif arguments.command == "ops":
        ops.run(arguments.quick, arguments.threads, arguments.only, arguments.precision, arguments.output)
    elif arguments.command == "orders":
        orders.run(arguments.quick, arguments.threads, arguments.only, arguments.output)
    elif arguments.command == "report":
        report.run(arguments.file)
    elif arguments.command == "_memory":
        print(
            json.dumps(
                memory.measure_all(json.load(sys.stdin), arguments.threads, arguments.growth, arguments.precision)
            )
        )
    elif arguments.command == "pipeline":
        models = [arguments.model] if arguments.model else list(SETTINGS)[: 1 if arguments.quick else None]
        pipeline.run(models, arguments.quick, arguments.output, arguments.precision)
    elif arguments.command == "gpu":
        if arguments.expected:
            print(gpu_cases.expected())
        else:
            gpu.run(arguments.output, arguments.proven, arguments.passed, arguments.quick)
    elif arguments.command == "methods":
        methods.run(arguments.quick, arguments.output, arguments.figure, arguments.only)
    elif arguments.command == "pydvl":
        pydvl.run(arguments.quick, arguments.threads, arguments.output, arguments.only)
    elif arguments.command == "_pydvl":
        torch.set_num_threads(arguments.threads)
        print(json.dumps(pydvl.run_child(arguments.library, arguments.name, arguments.file, arguments.repeats)))
    elif arguments.command == "_method":
        print(json.dumps(methods.run_child(arguments.name, arguments.folder)))
    else:
        own = pipeline.run_child(
            arguments.library, arguments.model, arguments.folder, arguments.repeats, arguments.precision
        )
        print(json.dumps(own))


if __name__ == "__main__":
    main()
