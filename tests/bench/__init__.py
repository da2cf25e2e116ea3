"""`make bench`: what Miaotui costs and gains against named peers, in one run on one machine."""

import os

# Before numpy is imported, as the gateway does it: `leave_other_cores` says why.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
