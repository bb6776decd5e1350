"""The first signal is noted, its echo too; a later one ends the process; outside all is as it was."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from torchft.training import interrupt
from torchft.training.interrupt import Interruptible, Stopped


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_the_first_signal_is_noted(number, caplog):
    before = signal.getsignal(number)
    with Interruptible() as stop:
        assert not stop.asked
        for _ in range(2):  # a terminal and the launcher both send it
            os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) is before
    assert caplog.text.count("finishing this step") == 1 and number.name in caplog.text


def test_nothing_is_caught_outside_of_the_main_thread():
    before, found = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Interruptible() as stop:
            found.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, before)]


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number):
    code = f"""
import os, time
from torchft.training import interrupt
interrupt.SAME_S = 0.05
with interrupt.Interruptible():
    os.kill(os.getpid(), {number})
    time.sleep(0.1)
    os.kill(os.getpid(), {number})
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -number and done.stdout == ""


def test_stopped_is_exit_code_0():
    assert Stopped().code == 0
