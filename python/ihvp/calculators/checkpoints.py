"""Other weights in the user's net, for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str] | Callable[[], Mapping[str, Tensor]]
"""A net's state_dict, a file that holds one, or a function that returns one."""


def read_checkpoint(net: nn.Module, checkpoint: Checkpoint, who: str) -> dict[str, Tensor]:
    """The checkpoint's tensors, as `net.state_dict()` has them. A file is mapped, and read as its tensors are used.

    Raises ValueError when a tensor is missing, superfluous or misshapen; it is named.
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        state = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    else:
        state = checkpoint() if callable(checkpoint) else checkpoint
    if not isinstance(state, Mapping):
        raise TypeError(f"{who} must be a state_dict, a file of one or a function, got {type(state).__name__}")
    own = {key: x for key, x in net.state_dict().items() if isinstance(x, Tensor)}
    for key, x in own.items():
        if key not in state:
            raise ValueError(f"{who} has no {key!r}; it is of another architecture")
        if tuple(state[key].shape) != tuple(x.shape):
            raise ValueError(
                f"{who}: {key!r} must be {tuple(x.shape)}, got {tuple(state[key].shape)}; it is of another architecture"
            )
    for key in state:
        if key not in own and isinstance(state[key], Tensor):
            raise ValueError(f"{who} has {key!r}, which the net has not; it is of another architecture")
    return {key: state[key] for key in own}


@contextlib.contextmanager
def weights_of(net: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """The net with the state's parameters and buffers in the place of its own, which come back whatever happens.

    The net's own tensors are put aside, not copied over: not a bit of them changes.
    """
    owned = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}
    with torch.inference_mode(False):
        aside = {key: owned[key].data for key in state}
        try:
            for key, value in state.items():
                value = value.clone() if value.is_inference() else value.detach()
                owned[key].data = value.to(owned[key].device, owned[key].dtype)
            yield
        finally:
            for key, value in aside.items():
                owned[key].data = value
