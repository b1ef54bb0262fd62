"""This library with the training data's tokens kept between its passes, 8 GiB of them at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.libraries import ihvp_ekfac
from bench.settings import Setting


def run(setting: Setting, folder: Path, repeats: int) -> dict[str, Any]:
    return ihvp_ekfac.run(setting, folder, repeats, cache_bytes=8 << 30)
