"""Settings for every test, before anything imports torch."""

import os

# One thread, and no spinning: two processes of default threads crawl on a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Our Triton kernels run on the CPU; the flag counts when a kernel's module is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# No test reaches for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # consoles take it for good when they are made; tests set their own

from hypothesis import HealthCheck, settings

# The same examples in every run; no deadline, because a busy machine is no failure.
settings.register_profile(
    "lowkey", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lowkey")
