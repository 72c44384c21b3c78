"""Lets the tests import the scripts of the folder above, from wherever pytest is started."""
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Box2SegNet, DeepLabVGG16  # noqa: E402
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


@pytest.fixture
def devices_named(monkeypatch):
    """What a script makes without a word about its device, where a GPU would want one, is a meta tensor as long as this
    lasts, and holds no values: most operations refuse to mix it with others, and what comes of those that do not is
    missing from the result, so compare that with an ordinary run's. Two things are made on the CPU on purpose, and
    still are: networks, before .to(device), and a loader's batches. Other threads are left out."""
    def on_cpu(function):
        def wrapped(*args, **options):
            with torch.device("cpu"):
                return function(*args, **options)
        return wrapped

    for network in (Box2SegNet, DeepLabVGG16):
        monkeypatch.setattr(network, "__init__", on_cpu(network.__init__))
    batches = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda loader: iter(on_cpu(lambda: list(batches(loader)))()))
    with torch.device("meta"):
        yield
