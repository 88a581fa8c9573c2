"""`python -m surm_seg.bench`."""

import sys

from surm_seg.bench import main

sys.exit(main())
