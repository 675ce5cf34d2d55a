"""The `ggro` command as a module, for launchers such as `accelerate launch`."""

import sys

from ggro_hf.cli import main

sys.exit(main())
