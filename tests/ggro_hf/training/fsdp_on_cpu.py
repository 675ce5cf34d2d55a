"""`ggro`, with an accelerate that shards models on CPUs too, which it does on accelerators alone; FSDP itself can."""

import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from ggro_hf.cli import main

_prepare = PartialState.__init__


def _as_if_on_gpus(self: PartialState, *args: Any, **options: Any) -> None:
    _prepare(self, *args, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _as_if_on_gpus
    sys.exit(main(sys.argv[1:]))
