"""`python -m prt_hf.cli`, which launchers of several processes can start."""

import sys

from . import main

sys.exit(main())
