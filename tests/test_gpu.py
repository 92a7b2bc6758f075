"""What only a GPU shows: the operators there, races, graphs, addresses beyond 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import shear_ops
from rollouts_for_tests import CONFIG, arguments
from shear_ops import SpanConfig
from shear_ops.ops import backends

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.interpreted(), reason="no CUDA or ROCm GPU"
)
GPU_BACKENDS = [b for b in ("cuda", "triton") if backends.why_not(b) is None]
GRAPHS = [
    (backend, distance)
    for backend in GPU_BACKENDS
    for distance in ("sinkhorn", "chamfer", "mmd", "cosine")
    if distance in backends.DISTANCES[backend]
]


def on_gpu(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    given = arguments(dtype)
    return {**given, "hidden": given["hidden"].cuda()}


@pytest.mark.parametrize("name", ["span_weights", "span_weights_and_pairs", "span_distances"])
def test_opcheck(name: str) -> None:
    from torch.library import opcheck

    op = getattr(torch.ops.shear, name).default
    opcheck(op, tuple(on_gpu().values()), CONFIG)


def test_the_operator_is_chosen_and_compiles_in_one_graph() -> None:
    given, config = on_gpu(), SpanConfig(**CONFIG)
    wanted = shear_ops.span_weights(**given, config=config)
    compiled = torch.compile(
        lambda **k: shear_ops.span_weights(**k, config=config) * 2, fullgraph=True, dynamic=True
    )
    torch.testing.assert_close(compiled(**given), 2 * wanted)
    cpu = shear_ops.span_weights(**arguments(), config=config)
    torch.testing.assert_close(wanted.cpu(), cpu, rtol=2e-3, atol=0)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_bits_from_run_to_run(backend: str) -> None:
    """Enough pairs that programs race for the queue."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(8 * 700, 256, generator=generator).cuda().bfloat16()
    given: dict[str, Any] = {
        "hidden": hidden, "cu_seqlens": torch.arange(9) * 700, "group_ids": [0] * 8,
        "labels": [1, 0] * 4,
    }  # fmt: skip
    wanted = shear_ops.span_distances(**given, backend=backend)
    for prune in (True, True, False):
        seen = shear_ops.span_distances(**given, backend=backend, prune=prune)
        for name in ("distance", "nearest", "residual", "iterations"):
            assert torch.equal(getattr(seen, name), getattr(wanted, name)), name


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_on_a_stream_of_its_own(backend: str) -> None:
    """States that another stream's work has yet to write are not read before they are."""
    config = SpanConfig(**CONFIG)
    wanted = shear_ops.span_weights(**on_gpu(), config=config, backend=backend)
    source, side = on_gpu(), torch.cuda.Stream()
    late = {**source, "hidden": torch.full_like(source["hidden"], torch.nan)}
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late["hidden"].copy_(source["hidden"])
        seen = shear_ops.span_weights(**late, config=config, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize(("backend", "distance"), GRAPHS)
def test_graph_capture_and_replay(backend: str, distance: str) -> None:
    given = on_gpu()
    config = SpanConfig(**CONFIG, check_finite=False, distance=distance)
    call = lambda: shear_ops.span_weights(**given, config=config, backend=backend)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = call()
    for scale in (1.0, 2.0, 0.5):
        given["hidden"].copy_(scale * arguments()["hidden"] + scale)
        graph.replay()
        assert torch.equal(seen, call())


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_call_does_not_wait(backend: str) -> None:
    """Packed states, integers on the CPU, check_finite=False: nothing waits for the device."""
    given, config = on_gpu(), SpanConfig(**CONFIG, check_finite=False)
    shear_ops.span_weights(**given, config=config, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        shear_ops.span_weights(**given, config=config, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_capture_says_what_it_wants(backend: str) -> None:
    given, config = on_gpu(), SpanConfig(span=11, stride=3, check_finite=False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"config": SpanConfig(check_finite=True)}, "check_finite must be False while a graph is"),
        ({"labels": given["labels"].cuda()}, "labels must be on the CPU while a graph is captured"),
    ]
    padded_case = {"hidden": given["hidden"][None], "cu_seqlens": None}
    padded_case["mask"] = torch.ones(padded_case["hidden"].shape[:2], dtype=torch.bool).cuda()
    cases.append((padded_case, "hidden must be packed"))
    if backend == "triton":  # the CUDA backend sends its tables as arguments of kernels
        cases.append(({}, "make the same call once before"))
    for change, message in cases:
        with (
            pytest.raises(RuntimeError, match=message),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            shear_ops.span_weights(**{**given, "config": config, "backend": backend, **change})
        torch.cuda.synchronize()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_addresses_beyond_2_to_the_31(backend: str) -> None:
    """N * d past 2^31: the second group's weights are those of the same rollouts alone."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("takes 12 GiB")
    dim, tokens = 8192, 270_000
    hidden = torch.zeros(tokens, dim, dtype=torch.bfloat16, device="cuda")
    own = torch.randn(400, dim, generator=torch.Generator().manual_seed(6)).cuda().bfloat16()
    hidden[-400:] = own
    labels = torch.tensor([1, 0])
    alone = shear_ops.span_weights(
        own, cu_seqlens=torch.tensor([0, 200, 400]), group_ids=[0, 0], labels=labels,
        backend=backend,
    )  # fmt: skip
    both = shear_ops.span_weights(
        hidden, cu_seqlens=torch.tensor([0, tokens - 400, tokens - 200, tokens]),
        group_ids=[1, 0, 0], labels=torch.tensor([1, 1, 0]), backend=backend,
    )  # fmt: skip
    assert torch.equal(both[-400:], alone)
