"""Linears over quantized weights against products of the exact values in fp64."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from stagemesh.errors import CheckpointError, InternalError
from stagemesh.stage_worker.native import ops, structures
from stagemesh.stage_worker.native.program.operations import NoKernel
from stagemesh.stage_worker.native.quantized import pack_quantized, quantized_linear, quantized_panels

pytestmark = pytest.mark.skipif(
    ops.library() is None, reason="NO COMPILED KERNELS: not built, or a processor without AVX512-BF16"
)
FP4 = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


@dataclass(frozen=True)
class Given:
    """A quantized weight, as readers of checkpoints hand it over."""

    kind: str
    codes: Tensor
    scales: Tensor
    group: int
    zeros: Tensor | float | None = None
    row_scale: Tensor | None = None
    order: Tensor | None = None

    def rows(self, first: int, last: int) -> Given:
        return replace(
            self,
            codes=self.codes[first:last],
            scales=self.scales[first:last],
            zeros=self.zeros[first:last] if isinstance(self.zeros, Tensor) else self.zeros,
            row_scale=None if self.row_scale is None else self.row_scale[first:last],
        )

    def values(self) -> Tensor:
        """fp64 [n, k]."""
        if self.kind in ("int8", "fp8"):
            values = self.codes.view(torch.int8 if self.kind == "int8" else torch.float8_e4m3fn).double()
        else:
            codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1)
            table = {"int4": list(range(16)), "fp4": FP4, "nf4": NF4}[self.kind]
            values = torch.tensor(table, dtype=torch.float64)[codes.long()]
        values = values.unflatten(1, (-1, self.group))
        if self.zeros is not None:
            values = values - (self.zeros.double()[..., None] if isinstance(self.zeros, Tensor) else self.zeros)
        values = (values * self.scales.double()[..., None]).flatten(1)
        if self.row_scale is not None:
            values = values * self.row_scale.double()[:, None]
        return values if self.order is None else torch.empty_like(values).index_copy_(1, self.order.long(), values)


def make(
    kind: str,
    n: int,
    k: int,
    group: int,
    *,
    zeros: str | float | None = None,
    scales: torch.dtype = torch.float16,
    row_scale: bool = False,
    order: bool = False,
) -> Given:
    seed = torch.Generator().manual_seed(n * k + group)
    codes = torch.randint(0, 256, (n, k if kind in ("int8", "fp8") else k // 2), generator=seed, dtype=torch.uint8)
    if kind == "fp8":
        codes[(codes & 127) == 127] = 1
    shape = n, k // group
    return Given(
        kind,
        codes,
        (0.001 + 0.02 * torch.rand(shape, generator=seed)).to(scales),
        group,
        torch.randint(0, 16, shape, generator=seed).to(scales) if zeros == "each" else zeros,
        0.5 + torch.rand(n, generator=seed) if row_scale else None,
        torch.randperm(k, generator=seed).int() if order else None,
    )


def pack(given: Given, step: int = 0) -> tuple[structures.Linear, Tensor]:
    """`step`: rows that are packed at a time; 0 for all. The tensor is the memory of the weight."""
    n = len(given.codes)
    linear = quantized_linear(given, n)
    memory = quantized_panels(linear)
    memory.fill_(255 - step)  # All of it is written, that of missing rows too.
    for first in range(0, n, step or n):
        pack_quantized(linear, given.rows(first, min(n, first + (step or n))), first, memory)
    linear.weights = memory.data_ptr()
    return linear, memory


def inputs(m: int, k: int, seed: int = 1) -> Tensor:
    """Returns bf16 rows [m, k] that a norm without a weight does not change, as `multiply` passes them through one."""
    rows = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for _ in range(20):
        normed = (rows.float() * rows.float().square().mean(1, keepdim=True).rsqrt()).bfloat16()
        if torch.equal(normed, rows):
            return rows
        rows = normed
    raise AssertionError("no fixed point")


def engine(bf16: bool, hidden: int, threads: int = 1) -> ops.StageEngine:
    return ops.StageEngine(
        structures.Shape(dtype=int(bf16), hidden=hidden, page_size=16, buffers=1, threads=threads, tp_size=1)
    )


def multiply(linear: structures.Linear, x: Tensor) -> Tensor:
    """Returns fp32 products [m, n] of bf16 rows [m, k], as the engine computes logits."""
    out = torch.empty(len(x), linear.n)
    norm = structures.Operation(width=linear.k)
    rows = torch.arange(len(x), dtype=torch.int32)
    engine(True, linear.k).head(norm, linear, x.data_ptr(), rows, out)
    return out


def multiply_layer(linear: structures.Linear, x: Tensor, threads: int = 1) -> Tensor:
    """Returns products [m, n] of rows [m, k], in their dtype, as the engine computes linears of layers."""
    m, (k, n) = len(x), (linear.k, linear.n)
    hidden = torch.zeros(m, k + n + (k + n) % 2, dtype=x.dtype)
    hidden[:, :k] = x
    place = structures.Place
    operation = structures.Operation(
        kind=structures.KINDS["Multiply"], source=place(0, 0, k), to=place(0, k, n), factor=1.0, linear=linear
    )
    run_layer(operation, hidden, threads)
    return hidden[:, k : k + n].clone()


def run_layer(operation: structures.Operation, hidden: Tensor, threads: int = 1) -> None:
    """Runs one operation over hidden states [T, H], in place."""
    m = len(hidden)
    arrays = [array("i", values) for values in ([0], [m], [0], range(m // 16 + 1))]
    step = ops.Step(1, m, *[a.buffer_info()[0] for a in arrays], 0)
    run = engine(hidden.dtype == torch.bfloat16, hidden.shape[1], threads)
    run.begin(step)
    run.run((structures.Operation * 1)(operation), hidden.data_ptr())


def most(given: Given, x: Tensor) -> Tensor:
    """The largest error that these sums may have.

    fp8 is multiplied by bf16 inputs without rounding, by fp32 ones as the sum of two bf16 numbers. For the others,
    inputs are rounded to 2^-15 of the largest one of their block (for nf4 to 2^-13, and its table to 1 / 8190). All are
    summed in fp32.
    """
    columns = torch.arange(x.shape[1]) if given.order is None else given.order.long()
    block = min(given.group, 64 if given.kind == "nf4" else 128)
    values, rows = given.values()[:, columns].abs(), x.double()[:, columns].abs()
    bound = 2.0**-20 * rows @ values.T
    if given.zeros is not None:
        flat = replace(given, zeros=None).values()[:, columns].abs()
        bound += 2.0**-20 * rows @ (flat + (flat - values).abs()).T
    if given.kind == "fp8":
        return bound if x.dtype == torch.bfloat16 else 8 * bound
    largest = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in _blocks(rows, given.group, block)], 1)
    bound += largest * 2.0 ** (-13 if given.kind == "nf4" else -15) @ values.T
    if given.kind == "nf4":
        ones = replace(given, codes=torch.full_like(given.codes, 255)).values()[:, columns].abs()
        bound += (rows + largest * 2.0**-13) @ ones.T / 8190
    return bound


def _blocks(rows: Tensor, group: int, block: int) -> list[Tensor]:
    return [part for of_group in rows.split(group, 1) for part in of_group.split(block, 1)]


KINDS = [
    *[("int8", zeros) for zeros in (None, "each", -7.0)],
    *[("int4", zeros) for zeros in (None, "each", 8.0, 7.5)],
    *[(kind, None) for kind in ("fp8", "fp4", "nf4")],
]
SHAPES = [(256, 16), (512, 32), (512, 64), (512, 128), (896, 128), (512, 256), (1024, 512)]
WHOLE_ROWS = [(2048, 2048), (200, 200), (66, 66), (96, 6), (22, 2)]
"""Columns and groups: among them some that fill no block, no line of the packed layout, and no vector."""


@pytest.mark.parametrize(("kind", "zeros"), KINDS)
def test_products_are_those_of_the_exact_values(kind: str, zeros: str | float | None) -> None:
    types = torch.float16, torch.bfloat16, torch.float32
    for i, (k, group) in enumerate(SHAPES + WHOLE_ROWS):
        for n in (1, 32, 47, 81):
            given = make(
                *(kind, n, k, group), zeros=zeros, scales=types[(i + n) % 3], row_scale=n % 2 == 1, order=n in (32, 81)
            )
            linear, memory = pack(given)
            x = inputs(40, k)
            error = (multiply(linear, x) - x.double() @ given.values().T).abs()
            assert (error <= most(given, x)).all(), (k, group, n, (error / most(given, x)).max())
            del memory


@pytest.mark.parametrize(
    ("kind", "accuracy"), [("int8", 2e-5), ("fp8", 1e-6), ("int4", 2e-5), ("fp4", 2e-5), ("nf4", 3e-4)]
)
def test_errors_are_far_below_those_of_bf16(kind: str, accuracy: float) -> None:
    """bf16 results are off by 2e-3 at the root mean square, whatever computes them."""
    given = make(kind, 64, 2048, 64)
    linear, memory = pack(given)
    x = inputs(64, 2048)
    want = x.double() @ given.values().T
    assert (multiply(linear, x) - want).square().mean().sqrt() < accuracy * want.square().mean().sqrt()
    del memory


@pytest.mark.parametrize("kind", structures.CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linears_of_layers_in_both_types(kind: str, dtype: torch.dtype) -> None:
    given = make(kind, 81, 512, 64, row_scale=True)
    linear, memory = pack(given)
    x = torch.randn(23, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    want = x.double() @ given.values().T
    got = multiply_layer(linear, x)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    assert ((got - want).abs() <= most(given, x) + rounding * want.abs()).all()
    assert torch.equal(multiply_layer(linear, x, threads=3), got)
    del memory


@pytest.mark.parametrize("kind", structures.CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_has_the_same_bits_whatever_other_rows_are_there(kind: str, dtype: torch.dtype) -> None:
    given = make(kind, 70, 384, 48, order=True)
    linear, memory = pack(given)
    x = torch.randn(250, 384, generator=torch.Generator().manual_seed(3)).to(dtype)
    alone = torch.cat([multiply_layer(linear, x[i : i + 1]) for i in range(len(x))])
    for m in (*range(2, 41), 100, 120, 121, 250):
        first = m % 7 if m < 200 else 0
        assert torch.equal(multiply_layer(linear, x[first : first + m]), alone[first : first + m]), m
    del memory


@pytest.mark.parametrize("kind", structures.CODES)
def test_extreme_codes_and_inputs_do_not_overflow(kind: str) -> None:
    code = {"int8": 0x80, "fp8": 0xFE, "int4": 0xFF, "fp4": 0x77, "nf4": 0xFF}[kind]
    for k, group in ((1024, 64), (1024, 1024)):
        given = make(kind, 32, k, group, scales=torch.float32)
        given.codes.fill_(code)
        linear, memory = pack(given)
        x = torch.full((1, k), 1.9921875).bfloat16()
        want = x.double() @ given.values().T
        assert ((multiply_layer(linear, x) - want).abs() <= 2.0**-8 * want.abs()).all()
        del memory


@pytest.mark.parametrize("kind", structures.CODES)
def test_a_large_input_costs_only_its_own_block_accuracy(kind: str) -> None:
    given = make(kind, 32, 1024, 128)
    given.codes[:, : given.codes.shape[1] // 8] = 7 if kind == "nf4" else 0
    if kind == "nf4":
        given.codes[:, : given.codes.shape[1] // 8] = 0x77
    linear, memory = pack(given)
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(4))
    x[:, 5] = 3e7
    want = x.double() @ given.values().T
    assert (multiply_layer(linear, x) - want).abs().max() < 1e-3 * want.abs().max()
    del memory


@pytest.mark.parametrize("kind", structures.CODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_seen_in_its_row_alone(kind: str, bad: float) -> None:
    given = make(kind, 40, 256, 64)
    linear, memory = pack(given)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    want = multiply_layer(linear, x)
    x[1, 77] = bad
    got = multiply_layer(linear, x)
    assert not got[1].isfinite().any()
    assert torch.equal(got[::2], want[::2])
    assert not multiply_layer(linear, torch.zeros_like(x)).any()
    del memory


@pytest.mark.parametrize("kind", structures.CODES)
def test_rows_can_be_packed_some_at_a_time_and_stay_in_their_bits(kind: str) -> None:
    given = make(kind, 150, 512, 64, row_scale=True, order=True)
    whole, parts = pack(given)[1], pack(given, step=64)[1]
    assert torch.equal(whole, parts)
    stored = given.codes.nbytes + given.scales.nbytes + 150 * 4
    assert whole.nbytes == 512 * 4 + stored * 160 // 150


@pytest.mark.parametrize("kind", structures.CODES)
def test_experts_follow_each_other(kind: str) -> None:
    """A mixture gives what it gives over the same values in fp32."""
    count, hidden, width, m = 5, 96, 48, 9
    own = {"row_scale": True, "order": True}
    gate_up = [replace(make(kind, 2 * width, hidden, 32, **own), scales=torch.rand(96, 3) / 50) for _ in range(count)]
    down = [replace(make(kind, hidden, width, 16, **own), scales=torch.rand(96, 3) / 50) for _ in range(count)]

    def plain(experts: list[Given]) -> tuple[structures.Linear, Tensor]:
        values = [given.values().float() for given in experts]
        memory = torch.stack([ops.panels(*weight.shape, torch.float32) for weight in values])
        for weight, at in zip(values, memory, strict=True):
            ops.pack(weight, at)
        return structures.Linear(memory.data_ptr(), None, *values[0].shape), memory

    def quantized(experts: list[Given]) -> tuple[structures.Linear, Tensor]:
        linear, first = pack(experts[0])
        memory = torch.stack([first, *[pack(given)[1] for given in experts[1:]]])
        linear.weights = memory.data_ptr()
        return linear, memory

    x = torch.randn(m, hidden + count + hidden, generator=torch.Generator().manual_seed(6))
    results = []
    for weights in (plain, quantized):
        (first, first_memory), (second, second_memory) = weights(gate_up), weights(down)
        router = structures.Router(experts=count, used=2, scores=0, groups=1, normalise=1, factor=1.0)
        each = first_memory[0].nbytes, second_memory[0].nbytes
        operation = structures.Operation(
            kind=structures.KINDS["Mix"],
            activation=structures.ACTIVATIONS.index("silu"),
            source=structures.Place(0, 0, hidden),
            other=structures.Place(0, hidden, count),
            to=structures.Place(0, hidden + count, hidden),
            mixture=structures.Mixture(router, first, second, width, 0, *each),
        )
        states = x.clone()
        run_layer(operation, states)
        results.append(states[:, hidden + count :])
    assert (results[0] - results[1]).abs().max() < 1e-3 * results[0].abs().max()


def test_combinations_without_a_kernel_are_refused() -> None:
    good = make("fp8", 32, 256, 64)
    zeros = torch.zeros_like(good.scales)
    for bad, why in (
        (replace(good, zeros=zeros), "zeros"),
        (replace(good, kind="int3"), "int3"),
        (replace(good, scales=good.scales.double()), "float64"),
        (replace(good, group=100), "groups of 100"),
        (replace(good, row_scale=torch.ones(32).half()), "float16"),
        (replace(good, kind="int8", zeros=zeros.float()), "like the scales"),
    ):
        with pytest.raises(NoKernel, match=why):
            quantized_linear(bad, 32)


def test_damaged_and_foreign_rows_are_refused() -> None:
    given = make("fp8", 64, 256, 64)
    linear = quantized_linear(given, 64)
    memory = quantized_panels(linear)
    for rows, first in ((given, 16), (given, 32), (replace(given, scales=given.scales.bfloat16()), 0)):
        with pytest.raises(InternalError, match="packed"):
            pack_quantized(linear, rows, first, memory)
    given.codes[3, 7] = 0xFF
    with pytest.raises(CheckpointError, match="NaN"):
        pack_quantized(linear, given, 0, memory)
