"""Lets the tests import the scripts of the folder above, from wherever pytest is started, and run them as scripts."""
import contextlib
import io
import os
import signal
import sys
import types
from pathlib import Path

import pytest

# Before torch is loaded, here and in all that the tests start: these networks and images are small. A second thread
# mostly waits, and on a busy machine for longer than the work takes.
os.environ["OMP_NUM_THREADS"] = "1"
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import HANGUP, Box2SegNet, DeepLabVGG16  # noqa: E402
# A shell's background jobs ignore Ctrl-C, and so does what they start; tests that press it need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def kept_signals():
    """Trainings handle Ctrl-C in their own way; afterwards it is as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, *HANGUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_as_main(script, *arguments, folder="."):
    """python SCRIPT ..., started in a folder, but within this process, which has loaded torch already -> (exit status,
    stdout, stderr)."""
    out, error = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    main, status = types.ModuleType("__main__"), None
    main.__file__ = str(script)
    output = contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)
    with kept_signals(), pytest.MonkeyPatch.context() as patch, output[0], output[1]:
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        patch.chdir(folder)
        for name in ("__main__", "__mp_main__"):            # the second is what worker processes call it
            patch.setitem(sys.modules, name, main)
        try:                                                # a traceback of ours is one here, too
            exec(compile(Path(script).read_text(encoding="utf-8"), script, "exec"), vars(main))
        except SystemExit as ended:
            status = ended.code
        if isinstance(status, str):                         # sys.exit("a message")
            print(status, file=error)
            status = 1
    return status or 0, *(stream.buffer.getvalue().decode() for stream in (out, error))


def refused(script, *arguments):
    """python SCRIPT ..., which must refuse with one line -> that line."""
    status, out, error = run_as_main(script, *arguments)
    assert status == 2 and len(error.strip().splitlines()) == 1 and "Traceback" not in error, (status, out, error)
    return error


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
