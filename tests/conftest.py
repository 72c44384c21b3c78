"""Lets the tests import the scripts of the folder above, from wherever pytest is started."""
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# A shell's background jobs ignore Ctrl-C, and so does what they start; tests that press it need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine with one GPU as far as torch.cuda.set_device, which does not take a plain "cuda": there it raises what
    this fixture is, if it is asked for by number."""
    class Enough(Exception):
        pass

    def set_device(device):
        assert device == torch.device("cuda", 0)
        raise Enough

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return Enough
