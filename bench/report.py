"""Tables for a person, from the records that the benchmarks append as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import methods, pydvl

Record = dict[str, Any]

LIBRARIES = ("torch.mm", "oneDNN", "OpenBLAS")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


def median(timing: Any) -> float:
    return timing["median"] if isinstance(timing, dict) else timing.median


def spread(timing: Any) -> str:
    own = timing if isinstance(timing, dict) else vars(timing)
    return f"{own['fastest'] * 1e3:.2f} to {own['slowest'] * 1e3:.2f}"


def ratio(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def verdict(record: Record) -> str:
    return ("met" if record["met"] else "not met") + ("" if record.get("counts", True) else " (does not count here)")


def ops(records: Sequence[Record]) -> None:
    rows = []
    for record in records:
        seconds = {name: median(timing) for name, timing in record["seconds"].items()}
        own = seconds.pop("ihvp")

        def best(*families: str, record: Record = record, seconds: dict[str, float] = seconds) -> str:
            found = [name for name in seconds if record["families"][name] in families]
            return min(found, key=seconds.__getitem__, default="")

        library, peer, mm = best(*LIBRARIES), best("peer", "torch.addmm_"), best("torch.mm")
        others = best("torch.linalg.cholesky", "torch.cholesky_solve", "einsum", "symmetric product")
        rows.append(
            [
                record["case"],
                str(record["threads"]),
                f"{own * 1e3:.2f}",
                spread(record["seconds"]["ihvp"]),
                f"{record['flops'] / own / 1e9:.0f}",
                f"{100 * record['share_of_peak']:.0f} %",
                f"{100 * record['share_of_copy']:.0f} %",
                ratio(seconds[peer] / own) if peer else "",
                ratio(seconds[mm] / own) if mm else "",
                f"{ratio(seconds[library] / own)} {library}" if library else "",
                f"{ratio(seconds[others] / own)} {others}" if others else "",
                record["order"] or ("" if record["implementation"] == "native" else record["implementation"]),
            ]
        )
    header = ["op", "threads", "ms", "spread", "GFLOP/s", "of peak", "of copy", "peer", "torch.mm", "best library"]
    print("\nTimes are medians; ratios are a rival's time over this op's. Spread: fastest to slowest sample, in ms.")
    print(f"torch's float32 matmul precision {records[0].get('precision', 'highest')!r}, for all.")
    table([*header, "other", "order"], rows)
    goals = [(record["case"], goal) for record in records for goal in record["goals"]]
    if goals:
        print()
        rows = [
            [
                case,
                goal["against"] + (f" ({goal['rival']})" if goal["rival"] != goal["against"] else ""),
                f"{100 * goal['least']:.0f} %" if goal["against"] == "peak" else ratio(goal["least"]),
                f"{100 * goal['figure']:.0f} %" if goal["against"] == "peak" else ratio(goal["figure"]),
                verdict(goal),
            ]
            for case, goal in goals
        ]
        table(["goal", "against", "at least", "figure", ""], rows)


def memory(records: Sequence[Record]) -> None:
    print("\nExtra memory beyond operands and result, at N examples and at more")
    rows = [
        [
            record["case"],
            str(record["threads"]),
            *(f"{size / 1e6:.1f} MB at N={N}" for size, N in zip(record["bytes"], record["examples"], strict=True)),
            f"{record['limit'] / 1e6:.1f} MB",
            verdict(record),
        ]
        for record in records
    ]
    table(["op", "threads", "", "", "limit", ""], rows)


def roofline(records: Sequence[Record]) -> None:
    print("\nWhat the machine does at most")
    rows = [
        [
            f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}",
            ", ".join(
                f"{kind} {rate / 1e9:.1f} {'GB/s' if kind == 'copy' else 'GFLOP/s'}"
                for kind, rate in record["rates"].items()
            ),
        ]
        for record in records
    ]
    table(["", ""], rows)


def processor(records: Sequence[Record]) -> None:
    for record in records:
        print(f"\n{record['case']}\n{json.dumps(record['machine'])}")


def orders(records: Sequence[Record]) -> None:
    print("\nContraction orders: the chosen one's time over the best one's")
    rows = []
    for op in dict.fromkeys(record["op"] for record in records):
        own = [record for record in records if record["op"] == op]
        missed = [record for record in own if not record["met"]]
        same = sum(record["chosen"] == record["best"] for record in own)
        worst = max(record["ratio"] for record in own)
        rows.append([op, str(len(own)), str(same), str(len(missed)), ratio(worst), "not met" if missed else "met"])
    table(["op", "shapes", "best chosen", "beyond 15 %", "worst", ""], rows)
    missed = sorted((record for record in records if not record["met"]), key=lambda record: -record["ratio"])
    if missed:
        print()
        rows = [
            [
                record["op"] + " " + " ".join(f"{name}{tuple(shape)}" for name, shape in record["shapes"].items()),
                ratio(record["ratio"]),
                record["chosen"],
                *(
                    f"{order} {median(timing) * 1e3:.3f} ms, predicted {record['predicted'][order] * 1e3:.3f} ms"
                    for order, timing in record["seconds"].items()
                ),
            ]
            for record in missed[:20]
        ]
        widest = max(map(len, rows))
        table(
            ["beyond 15 %, the worst first", "times", "chosen", *[""] * (widest - 3)],
            [row + [""] * (widest - len(row)) for row in rows],
        )


def pipeline(records: Sequence[Record]) -> None:
    for record in records:
        if "totals" not in record:
            print(f"\nan older record of {record['model']}, without totals: run the bench again for its table")
            continue
        own = record["totals"]["ihvp"]
        print(f"\nEKFAC, {record['title']}; medians, float32 matmul precision {record['precision']!r} in all libraries")
        rows = [
            [
                library,
                *(f"{values[what]:.3f} s" for what in ("fit", "scores", "fit + scores")),
                f"{values['memory']:.0f} MB",
                *(ratio(values[what] / own[what]) for what in ("fit", "scores", "fit + scores", "memory")),
            ]
            for library, values in record["totals"].items()
        ]
        rows += [[own["missing"], *[""] * 8] for own in record.values() if isinstance(own, dict) and "missing" in own]
        table(["library", "fit", "scores", "both", "memory", "times: fit", "scores", "both", "memory"], rows)
        for library in record["totals"]:
            for step, values in record[library]["seconds"].items():
                print(f"  {library} {step}: {', '.join(f'{value:.3f}' for value in values)} s")
        print()
        rows = [
            [
                goal["what"],
                goal["against"],
                f"at least {ratio(goal['least'])}" if "least" in goal else f"at most {ratio(goal['most'])}",
                ratio(goal["figure"]),
                verdict(goal),
            ]
            for goal in record["goals"]
        ]
        table(["goal", "against", "", "figure", ""], rows)


def small_layers(records: Sequence[Record]) -> None:
    print("\nA scoring pass over many small layers: one call for a group of layers, against a call a layer")
    rows = []
    for record in records:
        seconds = {name: median(timing) for name, timing in record["times"].items()}
        rows.append(
            [
                f"{record['layers']} layers, {record['positions']} positions, {record['device']}",
                *(f"{seconds[name] * 1e3:.1f} ms" for name in ("capture", "grouped", "loop")),
                spread(record["times"]["grouped"]),
                ratio(record["ratio"]),
            ]
        )
    table(["", "capture alone", "grouped", "a call a layer", "spread of grouped", "times"], rows)


TABLES = {
    "processor": processor,
    "roofline": roofline,
    "ops": ops,
    "memory": memory,
    "orders": orders,
    "pipeline": pipeline,
    "pydvl": pydvl.table,
    "methods": methods.table,
    "small layers": small_layers,
}


def report(records: Sequence[Record]) -> None:
    """One table for each kind of record that is there."""
    unknown = {record["bench"] for record in records} - TABLES.keys()
    if unknown:
        raise SystemExit(f"records must be of {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    for kind, show in TABLES.items():
        own = [record for record in records if record["bench"] == kind]
        if own:
            show(own)


def run(path: Path) -> None:
    report([json.loads(line) for line in path.read_text().splitlines() if line.strip()])
