"""Tables of pointers and strides: how one launch reaches many tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


def table(rows: Sequence[int], entries: int, device: torch.device) -> Tensor:
    """(layers, entries) int64 on the device, copied from pinned memory: the stream is not waited for."""
    host = torch.frombuffer(array("q", rows), dtype=torch.int64).view(-1, entries)
    return host.clone() if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
