"""Ctrl-C while an operator runs: the call ends soon, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys

import pytest

LONG = """
import os, signal, sys, threading, time, torch, shear_ops
from shear_ops import SpanConfig

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

def problem(tokens, seed=0):
    hidden = torch.randn(2 * tokens, 16, generator=torch.Generator().manual_seed(seed))
    return dict(hidden=hidden, cu_seqlens=torch.tensor([0, tokens, 2 * tokens]),
                group_ids=torch.tensor([0, 0]), labels=torch.tensor([1, 0]))

small, large = problem(300), problem(150_000)
config = SpanConfig(stride=5)
x, y = large["hidden"].chunk(2)
cost = torch.rand(1, 200, 200).expand(2000, 200, 200)
calls = {
    "span_weights": lambda: shear_ops.span_weights(**large, config=config),
    "chamfer": lambda: shear_ops.span_weights(
        **large, config=SpanConfig(distance="chamfer", stride=5)),
    "op": lambda: torch.ops.shear.span_distances(*large.values(), stride=5),
    "gradients": lambda: shear_ops.span_weights(
        **{**large, "hidden": large["hidden"].clone().requires_grad_()}, config=config),
    "pair_distances": lambda: shear_ops.pair_distances(x, y, config=config),
    "sinkhorn": lambda: shear_ops.sinkhorn(cost, reg=1e-3, tol=0.0, n_iters=20_000),
}
one_span = SpanConfig(span=3000, stride=3000, reg=0.003, tol=0.0, n_iters=50_000)
calls["one pair of long spans"] = lambda: shear_ops.span_weights(**problem(3000), config=one_span)
two = torch.rand(2, 3000, 3000)
calls["two long problems"] = lambda: shear_ops.sinkhorn(two, reg=1e-3, tol=0.0, n_iters=50_000)
def uneven():  # the calling thread is done long before another one
    lengths = torch.tensor([3000, 30] if torch.get_num_threads() > 1 else [30, 3000])
    return shear_ops.sinkhorn(two, reg=1e-3, tol=0.0, n_iters=50_000, n_rows=lengths, n_cols=lengths)
calls["uneven problems"] = uneven
wanted = shear_ops.span_weights(**small)

def send(number, after):
    threading.Timer(after, os.kill, (os.getpid(), number)).start()

def check_state():
    assert torch.equal(shear_ops.span_weights(**small), wanted)
"""

ONE = """
call = calls[sys.argv[1]]
begin = time.monotonic()
send(signal.SIGINT, 0.3)
try:
    call()
    sys.exit("the call was not interrupted")
except KeyboardInterrupt:
    print(time.monotonic() - begin)
check_state()
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LONG + code, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CALLS = (
    "span_weights", "chamfer", "op", "gradients", "pair_distances", "sinkhorn",
    "one pair of long spans", "two long problems", "uneven problems",
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_ends_a_call_that_would_take_minutes(call: str) -> None:
    assert 0.2 < float(run(ONE, call)) < 5  # a second, were the machine ours alone


HANDLERS = """
seen = []
def note(number, frame):
    seen.append(time.monotonic())
    check_state()  # a handler may use the operators
def stop(number, frame):
    raise TimeoutError("enough")
signal.signal(signal.SIGUSR1, note)
signal.signal(signal.SIGALRM, stop)
begin = time.monotonic()
send(signal.SIGUSR1, 0.3)
send(signal.SIGALRM, 1.5)
try:
    calls["op"]()
    sys.exit("the call was not interrupted")
except TimeoutError as error:
    assert str(error) == "enough"
    end = time.monotonic()
assert len(seen) == 1 and seen[0] < end - 0.3, "noted while the call went on"
check_state()
"""


def test_handlers_of_other_signals_run_during_a_call() -> None:
    run(HANDLERS)


THREADS = """
middle, out = problem(6000), []
thread = threading.Thread(target=lambda: out.append(shear_ops.span_weights(**middle)))
thread.start()
try:
    send(signal.SIGINT, 0.05)
    time.sleep(60)
except KeyboardInterrupt:
    pass
thread.join()
assert torch.equal(out[0], shear_ops.span_weights(**middle))
"""


def test_calls_of_other_threads_go_on() -> None:
    run(THREADS)
