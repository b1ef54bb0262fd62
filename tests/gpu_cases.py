"""What a kernel for GPUs has to get right, as data: odd sizes, masks over NaN, every layout, 16-bit operands."""

from __future__ import annotations

from typing import Any

from op_cases import BF16, F16, F32, F64

CASES: dict[str, tuple[dict[str, int | None], dict[str, Any]]] = {
    "one of each": ({"N": 1, "M": 1, "T": 1, "S": 1, "I": 1, "O": 1, "Q": 1, "R": 1}, {}),
    "flat": ({"T": None, "N": 9}, {"bias": True, "masked": True}),
    "one position": ({"T": 1, "S": 1, "N": 35, "I": 33, "O": 9}, {"layout": "strided", "accumulator": F64}),
    "tiles": ({"N": 3, "T": 19, "I": 70, "O": 67}, {"bias": True, "masked": True, "layout": "strided"}),
    "more positions than a tile": ({"N": 2, "T": 70, "S": 67, "Q": 9}, {"masked": True, "other": True}),
    "many queries": ({"N": 3, "T": 40, "Q": 20}, {"bias": True, "layout": "transposed"}),
    "bfloat16": ({"T": 5, "I": 18}, {"bias": True, "masked": True, "dtype": BF16, "layout": "transposed"}),
    "bfloat16 tokens": ({"T": None}, {"dtype": BF16, "factors": F32, "accumulator": F64, "other": True}),
    "float16 tokens": ({"T": 5}, {"dtype": F16, "factors": F32, "masked": True, "layout": "expanded"}),
    "no examples": ({"N": 0}, {"bias": True, "masked": True}),
    "no positions": ({"T": 0}, {"masked": True}),
    "no queries": ({"Q": 0}, {}),
    "no inputs": ({"I": 0}, {}),
    "bias alone": ({"I": 0}, {"bias": True}),
    "no outputs": ({"O": 0}, {}),
}
GROUPS: dict[str, dict[str, Any]] = {
    "float32": {"bias": True, "masked": True, "layout": "strided"},
    "flat": {"T": None, "layout": "transposed"},
    "bfloat16": {"dtype": BF16},
    "no examples": {"N": 0},
    "no positions": {"T": 0},
    "no queries": {"Q": 0},
}
# Several tiles each way, long sums, and the widest tiles: too much for an interpreter.
LARGE: dict[str, tuple[dict[str, int | None], dict[str, Any]]] = {
    "vector loads": ({"N": 9, "T": 128, "I": 256, "O": 384, "Q": 20, "R": 32}, {}),
    "vector loads, bfloat16": ({"N": 9, "T": 128, "I": 256, "O": 384, "Q": 3}, {"dtype": BF16}),
    "narrow, in place": ({"N": 9, "T": 128, "I": 200, "O": 136, "Q": 3}, {"dtype": F16, "accumulator": F64}),
    "narrow, copied": ({"N": 3, "T": 70, "I": 131, "O": 67, "Q": 3}, {"dtype": BF16, "bias": True, "masked": True}),
    "no vector load": ({"N": 9, "T": 131, "I": 259, "O": 385, "Q": 20, "R": 70}, {"bias": True, "masked": True}),
    "many positions": ({"N": 2, "T": 9001, "S": 65, "I": 130, "O": 70}, {"bias": True, "masked": True}),
    "many examples": ({"N": 9001, "T": None, "I": 130, "O": 70}, {"bias": True, "masked": True}),
}
