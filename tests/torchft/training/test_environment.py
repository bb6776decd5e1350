"""The time since the command."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from torchft.training.environment import seconds_since_start

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


def test_seconds_since_the_process_was_made():
    assert seconds_since_start() == pytest.approx(
        time.time() - psutil.Process().create_time(), abs=1.1
    )  # its boot time is in whole seconds


def test_the_interpreters_own_start_counts():
    code = "import time; time.sleep(0.5); from torchft.training.environment import seconds_since_start as s; print(s())"
    began = time.perf_counter()
    printed = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 0.5 < printed <= time.perf_counter() - began + 0.02
