"""Launch configurations: measured once and fixed, or searched on request."""

import os
from collections.abc import Callable
from typing import Any

import triton


def tuned(*configurations: triton.Config, key: tuple[str, ...]) -> Callable[[Any], Any]:
    """Decorates a Triton kernel that runs in the first of `configurations`.

    With GGRO_AUTOTUNE=1, set before the first call, it runs in the one that is fastest on this device, measured once
    for each value of the arguments named by `key`. A key never has the number of rows: no result may depend on it.
    """
    searching = os.environ.get("GGRO_AUTOTUNE") == "1"
    return triton.autotune(configs=list(configurations if searching else configurations[:1]), key=list(key))
