"""What only a GPU can show; skipped where there is none.

    python -m pytest -q tests/test_gpu.py
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import evaluate
import losses
import test_train_box2seg
import test_train_boxsup
import train_box2seg
import train_boxsup
from model import Box2SegNet, DeepLabVGG16, predict
from test_train_box2seg import log_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
DEVICE, ROOT = "cuda", Path(__file__).resolve().parent.parent
COMMON = ("--recipe small --crop 65 --batch-size 4 --epochs 2 --scale 0.5 1 --workers 0 --log-every 1 "
          f"--deterministic --device {DEVICE}").split()
FLAGS = {train_box2seg: [*COMMON, "--width", "8", "--pretrain-epochs", "1"],
         train_boxsup: [*COMMON, "--top-k", "2"]}
SAME = {train_box2seg: test_train_box2seg.assert_same_run, train_boxsup: test_train_boxsup.assert_same_run}
both = pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return test_train_boxsup.draw(tmp_path_factory.mktemp("toy"), 12, 0)


@pytest.fixture(autouse=True)
def as_before():
    """Deterministic kernels and handlers of signals are the process's; other tests want their own."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    torch.use_deterministic_algorithms(False)
    signal.signal(signal.SIGINT, handlers[0])
    signal.signal(signal.SIGTERM, handlers[1])


def train(script, toy, out, *flags):
    return script.main(["--data", str(toy), "--out", str(out), *FLAGS[script], *map(str, flags)])


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------

def drawn_batch(device, dtype):
    make = torch.Generator().manual_seed(0)
    logits, alpha, beta = (torch.randn(2, C, 23, 31, generator=make, dtype=torch.float64).to(device, dtype)
                           .requires_grad_() for C in (6, 5, 8))
    B, M = (torch.randint(0, 7, (2, 23, 31), generator=make).where(torch.rand(2, 23, 31, generator=make) < 0.9, 255)
            for _ in range(2))
    B, M = (torch.where(t == 6, 255, t).to(device, torch.uint8) for t in (B, M))
    return (logits, alpha, beta), B, M


LOSSES = {
    "cross_entropy_loss": lambda y, a, e, B, M: losses.cross_entropy_loss(y, M),
    "attention_weighted_loss": lambda y, a, e, B, M: losses.attention_weighted_loss(y, a.sigmoid(), B),
    "attention_box_loss": lambda y, a, e, B, M: losses.attention_box_loss(a.sigmoid(), B),
    "fill_rate_loss": lambda y, a, e, B, M: losses.fill_rate_loss(a.sigmoid(), B, M),
    # all pixels are drawn alike, so that the draw does not matter
    "affinity_loss": lambda y, a, e, B, M: losses.affinity_loss(e, y.softmax(1), torch.zeros_like(M), 23 * 31),
    "filling_rate_loss": lambda y, a, e, B, M: losses.filling_rate_loss(
        y, B, torch.full((5,), 0.5, device=y.device, dtype=y.dtype))}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradients_are_those_of_the_cpu(name):
    results = []
    for device in ("cpu", DEVICE):
        inputs, B, M = drawn_batch(device, torch.float64)
        loss = LOSSES[name](*inputs, B, M)
        loss.backward()
        results.append([loss.detach().cpu(), *(0 if x.grad is None else x.grad.cpu() for x in inputs)])
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*LOSSES, "box2seg_loss"])
def test_a_loss_never_waits_for_the_gpu(name):
    """As losses.py says of itself: a read of one number makes the CPU wait until the GPU has nothing left to do."""
    inputs, B, M = drawn_batch(DEVICE, torch.float32)
    generator = torch.Generator(DEVICE)
    work = LOSSES.get(name) or (lambda y, a, e, B, M: losses.box2seg_loss(
        y, a.sigmoid(), e, B, M, losses.pair_samples(M, 6), generator=generator)[0])
    work(*inputs, B, M).backward()                      # what a first call sets up may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        work(*inputs, B, M).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_costs_are_those_of_the_cpu():
    rng = np.random.default_rng(0)
    given = dict(logits=torch.from_numpy(rng.standard_normal((6, 40, 50))),
                 superpixels=torch.from_numpy(rng.integers(0, 60, (40, 50), np.int32)),
                 members=torch.from_numpy(rng.random((200, 60)) < 0.2),
                 boxes=torch.tensor([[0, 0, 30, 20], [10, 5, 50, 40], [12, 8, 20, 30]], dtype=torch.int32),
                 classes=torch.tensor([1, 5, 2], dtype=torch.uint8))
    there = {name: value.to(DEVICE) for name, value in given.items()}
    torch.testing.assert_close(losses.regression_cost(**given), losses.regression_cost(**there).cpu())
    shares = [losses.recognized_share(x["logits"], x["boxes"], x["classes"]) for x in (given, there)]
    torch.testing.assert_close(shares[0], shares[1].cpu())


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network", [Box2SegNet(4, "resnet18", width=8), DeepLabVGG16(4, large_fov=True)],
                         ids=["Box2SegNet", "DeepLabVGG16"])
def test_a_network_gives_what_it_gives_on_the_cpu(network, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)      # of float32's 23 bits TF32 multiplies 10
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (75, 101, 3), np.uint8))
    here = predict(network.cpu().eval(), image, scales=(0.7, 1.0), flip=True)
    there = predict(network.to(DEVICE), image, scales=(0.7, 1.0), flip=True).cpu()
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)
    assert (here.argmax(0) == there.argmax(0)).float().mean() > 0.99


def test_evaluate_and_its_crf(toy, tmp_path, capsys):
    """The same table from a GPU as from the CPU, to a few pixels in a thousand."""
    assert train(train_box2seg, toy, tmp_path, "--epochs", 4) == 0
    tables = []
    for device in ("cpu", DEVICE):
        for flags in ([], ["--crf", "--scales", "0.8", "1.0", "1.2"]):
            file = tmp_path / f"{device}{len(flags)}.json"
            assert evaluate.main(["--data", str(toy), "--checkpoint", str(tmp_path / "last.pt"), "--device", device,
                                  "--json", str(file), *flags]) == 0
            tables.append(file.read_text())
    capsys.readouterr()
    scores = [json.loads(table)["miou"] for table in tables]
    assert scores[0] == pytest.approx(scores[2], abs=0.01) and scores[1] == pytest.approx(scores[3], abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_run_that_died_goes_on_bit_for_bit(script, amp, toy, tmp_path, monkeypatch):
    """With --deterministic, at every precision; dies as from kill -9, in the middle of an epoch."""
    assert train(script, toy, tmp_path / "whole", "--amp", amp) == 0
    calls, original = [0], losses.cross_entropy_loss

    def dying(*args):
        calls[0] += 1
        if calls[0] > 4:
            raise RuntimeError("died")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "cross_entropy_loss", dying)
        with pytest.raises(RuntimeError, match="died"):
            train(script, toy, tmp_path / "died", "--amp", amp, "--save-every", 2)
    assert script.main(["--resume", "--out", str(tmp_path / "died")]) == 0
    SAME[script](tmp_path / "whole", tmp_path / "died")
    assert log_of(tmp_path / "died")[0]["device"] == torch.cuda.get_device_name()


@both
def test_ctrl_c(script, toy, tmp_path, monkeypatch):
    calls, original = [0], losses.cross_entropy_loss

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == 5:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    assert train(script, toy, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(losses, "cross_entropy_loss", interrupted)
        assert train(script, toy, tmp_path / "stopped") == 130
    assert script.main(["--resume", "--out", str(tmp_path / "stopped")]) == 0
    SAME[script](tmp_path / "whole", tmp_path / "stopped")


@both
def test_one_process_over_nccl(script, toy, tmp_path):
    """DistributedDataParallel, broadcasts, reductions and barriers over NCCL leave a run of one process as it is."""
    assert train(script, toy, tmp_path / "alone") == 0
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert train(script, toy, tmp_path / "nccl") == 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    SAME[script](tmp_path / "alone", tmp_path / "nccl")


@both
def test_out_of_memory_and_kill_9(script, toy, tmp_path):
    """One line with the remedy where memory runs out; and what a killed process left goes on."""
    command = [sys.executable, ROOT / f"{script.__name__}.py", "--data", toy, *FLAGS[script], "--amp", "off"]
    small = ("import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction(0.002); sys.argv = sys.argv[1:]; "
             "runpy.run_path(sys.argv[0], run_name='__main__')")
    ended = subprocess.run([sys.executable, "-c", small, *map(str, command[1:]), "--out", tmp_path / "full", "--crop",
                            "1025"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "--batch-size" in ended.stderr.splitlines()[-1]

    out = tmp_path / "killed"
    process = subprocess.Popen([*map(str, command), "--out", out, "--epochs", "8", "--save-every", "1"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and not (out / "last.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "last.pt").exists()
    assert script.main(["--resume", "--out", str(out)]) == 0
    assert log_of(out)[-1]["epoch"] == 8
