"""`python -m surm_seg.reproduce`."""

import sys

from surm_seg.reproduce import main

sys.exit(main())
