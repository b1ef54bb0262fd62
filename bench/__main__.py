"""python -m bench pipeline [--quick] [--precision high] [--output FILE]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench import gpu, gpu_pipeline, pipeline


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pipeline", help="EKFAC end to end against kronfluence")
    command.add_argument("--quick", action="store_true", help="fewer repeats")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command.add_argument(
        "--precision", choices=("highest", "high"), default="highest", help="torch's float32 matmul precision, for both"
    )
    command = commands.add_parser("gpu", help="the GPU kernels against tuned torch, on a CUDA device")
    command.add_argument("--expected", action="store_true", help="print what the counts predict; needs no GPU")
    command.add_argument("--quick", action="store_true", help="fewer repeats")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    command.add_argument("--proven", type=Path, metavar="FILE", help="write the record of what may be chosen here")
    command.add_argument("--passed", action="store_true", help="the tests marked gpu passed on this device")
    command = commands.add_parser("gpu-pipeline", help="EKFAC end to end on a CUDA device, GPT-2 small's shape")
    command.add_argument("--output", type=Path, help="append JSON lines to this file")
    child = commands.add_parser("_child")
    child.add_argument("library", choices=("ihvp", "kronfluence"))
    child.add_argument("folder", type=Path)
    child.add_argument("repeats", type=int)
    child.add_argument("precision")
    arguments = parser.parse_args()
    if arguments.command == "pipeline":
        pipeline.run(arguments.quick, arguments.output, arguments.precision)
    elif arguments.command == "gpu":
        if arguments.expected:
            print(gpu.expected())
        else:
            gpu.run(arguments.output, arguments.proven, arguments.passed, arguments.quick)
    elif arguments.command == "gpu-pipeline":
        gpu_pipeline.run(arguments.output, torch.device("cuda"), gpu_pipeline.FULL)
    else:
        torch.set_float32_matmul_precision(arguments.precision)
        run = pipeline.run_ihvp if arguments.library == "ihvp" else pipeline.run_kronfluence
        print(json.dumps(run(arguments.folder, arguments.repeats)))


if __name__ == "__main__":
    main()
