"""Reading a fitted IHVP object back from its file."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors import SafetensorError, safe_open

from ihvp.methods.base import IHVP
from ihvp.methods.factory import METHODS
from ihvp.model import InfluenceModel

CLASSES: dict[str, type[IHVP]] = {method.__name__: method for method in METHODS.values()}


def load(path: str | os.PathLike[str], model: InfluenceModel) -> IHVP:
    """The IHVP object that `save` wrote, for the same tracked layers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of ihvp's, or its layers are not those of `model`; both are named.
    """
    if not isinstance(model, InfluenceModel):
        raise TypeError(f"model must be an ihvp.InfluenceModel, got {type(model).__name__}")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a safetensors file: {error}") from None
    if metadata.get("ihvp") != "1" or metadata.get("method") not in CLASSES:
        raise ValueError(f"{os.fspath(path)!r} is not a file that an IHVP object of this version saved")
    saved: dict[str, Any] = {name: tuple(shape) for name, shape in json.loads(metadata["layers"]).items()}
    own = {name: layer.shape for name, layer in model.layers.items()}
    if saved != own:
        raise ValueError(f"{os.fspath(path)!r} is of another model: it has layers (O,I') {saved}, this model {own}")
    result = CLASSES[metadata["method"]](model, **json.loads(metadata["config"]))
    result.load_state_dict(state)
    return result
