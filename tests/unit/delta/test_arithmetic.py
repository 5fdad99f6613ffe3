from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.delta.arithmetic import BLOCK_ELEMENTS, Arithmetic, Formula, draws
from pipeline.delta.survival import Survival
from pipeline.delta.task_vector import Known, Tuned
from pipeline.weights.floats import Array, count_not_finite, narrow, narrow_randomly, of_tensor, widen

WEIGHTS = arrays(np.float32, st.integers(1, 200), elements=st.floats(-100, 100, width=32))
SCALES = st.floats(-4, 4)


def subtract(
    base: torch.Tensor, tuned: torch.Tensor, formula: Formula, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Survival]:
    out = torch.empty(base.numel(), dtype=dtype)
    change = Tuned(of_tensor(tuned))
    survival = Arithmetic(formula).subtract("w", 0, of_tensor(base), change, of_tensor(out))
    assert survival is not None
    return out, survival


def rounded_randomly(values: torch.Tensor, dtype: torch.dtype, numbers: Array) -> torch.Tensor:
    out = torch.empty(values.numel(), dtype=dtype)
    rounded = values.clone()
    narrow_randomly(of_tensor(rounded), numbers, of_tensor(out))
    assert torch.equal(rounded, out.float())
    return out


def pair(
    seed: int, num_elements: int, delta_std: float, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(num_elements, generator=generator) * 0.02).to(dtype)
    return base, base.float() + torch.randn(num_elements, generator=generator) * delta_std


@given(WEIGHTS, SCALES, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_the_order_of_operations_is_the_documented_one(values: np.ndarray, scale: float, seed: int) -> None:
    tuned = values + np.random.default_rng(seed).standard_normal(values.shape).astype(np.float32)
    out, _ = subtract(torch.from_numpy(values), torch.from_numpy(tuned), Formula(scale))
    assert np.array_equal(out.numpy(), values - np.float32(scale) * (tuned - values))


@given(WEIGHTS)
@settings(deadline=None, max_examples=50)
def test_scale_0_gives_the_base(values: np.ndarray) -> None:
    base = torch.from_numpy(values)
    out, survival = subtract(base, base * 3 + 1, Formula(0.0))
    assert torch.equal(out, base)
    assert survival.num_changed == 0


@given(WEIGHTS, st.floats(-2, 2), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_adding_a_delta_back_gives_the_base_within_rounding(
    values: np.ndarray, scale: float, seed: int
) -> None:
    base = torch.from_numpy(values)
    delta = torch.from_numpy(np.random.default_rng(seed).standard_normal(values.shape).astype(np.float32))
    there, back = torch.empty_like(base), torch.empty_like(base)
    change = Known(of_tensor(delta))
    Arithmetic(Formula(scale)).subtract("w", 0, of_tensor(base), change, of_tensor(there))
    Arithmetic(Formula(-scale)).subtract("w", 0, of_tensor(there), change, of_tensor(back))
    largest = base.abs() + abs(scale) * delta.abs()
    assert ((back - base).abs() <= 2 * largest * 2.0**-24 + 1e-38).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(cuts=st.lists(st.integers(1, 2 * BLOCK_ELEMENTS + 998), max_size=5))
@settings(deadline=None, max_examples=5)
def test_any_slicing_gives_the_same_bytes(dtype: torch.dtype, rounding: str, cuts: list[int]) -> None:
    base, tuned = pair(0, 2 * BLOCK_ELEMENTS + 999, 1e-4)
    formula = Formula(0.7, rounding, seed=3)  # type: ignore[arg-type]
    whole, _ = subtract(base, tuned, formula, dtype)
    edges = sorted({0, *cuts, base.numel()})
    pieces = torch.empty_like(whole)
    arithmetic = Arithmetic(formula)
    for start, stop in pairwise(edges):
        base_part, tuned_part, out = (of_tensor(tensor[start:stop]) for tensor in (base, tuned, pieces))
        arithmetic.subtract("w", start, base_part, Tuned(tuned_part), out)
    assert torch.equal(pieces, whole)


def test_survival_in_bfloat16_is_as_measured_in_the_design() -> None:
    base, tuned = pair(1, 1_000_000, 1e-5)
    _, nearest = subtract(base, tuned, Formula(0.1), torch.bfloat16)
    _, stochastic = subtract(base, tuned, Formula(0.1, "stochastic"), torch.bfloat16)
    figures = nearest.figures(0.1)
    assert figures["share_changed"] == pytest.approx(0.012, abs=0.001)
    assert figures["cosine"] == pytest.approx(0.15, abs=0.01)
    assert figures["projection"] == pytest.approx(0.03, abs=0.005)
    assert stochastic.figures(0.1)["projection"] == pytest.approx(0.99, abs=0.03)
    assert stochastic.figures(0.1)["norm_ratio"] == pytest.approx(8, abs=1)


def test_a_larger_change_survives_better() -> None:
    base, tuned = pair(2, 1_000_000, 1e-4)
    _, nearest = subtract(base, tuned, Formula(0.7), torch.bfloat16)
    _, stochastic = subtract(base, tuned, Formula(0.7, "stochastic"), torch.bfloat16)
    assert nearest.figures(0.7)["projection"] == pytest.approx(0.95, abs=0.01)
    assert nearest.figures(0.7)["norm_ratio"] == pytest.approx(1.05, abs=0.01)
    assert stochastic.figures(0.7)["projection"] == pytest.approx(1.00, abs=0.01)
    assert stochastic.figures(0.7)["norm_ratio"] == pytest.approx(1.19, abs=0.01)


def spikes(count: int) -> torch.Tensor:
    """A large number in every row of the sums, among small ones."""
    values = torch.full([count], 1e-4)
    values[::1024] = 1.0
    return values


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-30, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [lambda count: pair(3, count, 0)[0].float(), lambda count: torch.full([count], 0.7), spikes]
)
def test_survival_sums_are_the_float64_ones(
    size: float, dtype: torch.dtype, make: Callable[[int], torch.Tensor]
) -> None:
    base = make(BLOCK_ELEMENTS + 5000) * size
    tuned = base * 1.1
    out, survival = subtract(base, tuned, Formula(0.3), dtype)
    delta = (tuned - base).double()
    change = out.double() - base.to(dtype).double()
    right = {
        "base_square": base.double().square().sum(),
        "delta_square": delta.square().sum(),
        "change_square": change.square().sum(),
        "delta_change": (delta * change).sum(),
    }
    assert survival.num_elements == base.numel()
    assert survival.num_changed == int((out != base.to(dtype)).sum())
    for name, value in right.items():
        assert getattr(survival, name) == pytest.approx(float(value), rel=4e-6, abs=0), name


def test_a_float32_base_stored_in_16_bits_is_compared_with_itself_rounded() -> None:
    base, _ = pair(4, 10_000, 0, torch.float32)
    out, survival = subtract(base, base, Formula(0.5), torch.bfloat16)
    assert torch.equal(out, base.bfloat16())
    assert survival.num_changed == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_takes_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(100_000, generator=generator) * torch.logspace(-9, 3, 100_000)
    rounded = rounded_randomly(values, dtype, draws(0, "w", 0, values.numel()))
    exponent = torch.log2(values.abs().double()).floor()
    step = 2.0 ** (exponent - 7 if dtype == torch.bfloat16 else (exponent - 10).clamp(min=-24))
    error = (rounded.double() - values.double()).abs()
    assert (error < step).all()
    assert (error > step / 2).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0001, -0.02013, 3.1e-5, -7e-8, 6.1e-5])
def test_stochastic_rounding_keeps_the_mean(dtype: torch.dtype, value: float) -> None:
    num_draws = 400_000
    values = torch.full((num_draws,), value)
    rounded = rounded_randomly(values, dtype, draws(7, "w", 0, num_draws)).double()
    low, high = rounded.min().item(), rounded.max().item()
    assert low <= values[0].item() <= high
    error = abs(rounded.mean().item() - values[0].double().item())
    assert error <= 4 * (high - low) / num_draws**0.5 / 2 + 2.0**-16 * (high - low)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_leaves_exact_values_alone(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-24, 0.0625, -6.1035e-5]).to(dtype).float()
    for number in (0, 1, 65535):
        numbers = np.full(len(values), number, np.uint16)
        assert torch.equal(
            rounded_randomly(values, dtype, numbers).float().view(torch.int32), values.view(torch.int32)
        )


def test_draws_depend_on_seed_name_and_place_alone() -> None:
    whole = draws(1, "w", 0, 1000)
    assert np.array_equal(
        np.concatenate([draws(1, "w", 0, 7), draws(1, "w", 7, 500), draws(1, "w", 507, 493)]), whole
    )
    assert not np.array_equal(draws(2, "w", 0, 1000), whole)
    assert not np.array_equal(draws(1, "v", 0, 1000), whole)
    assert whole.dtype == np.uint16
    assert np.array_equal(draws(1, "w", (1 << 40) + 5, 3), draws(1, "w", 1 << 40, 8)[5:])


def test_draws_are_even() -> None:
    counts = np.bincount(draws(0, "w", 0, 1 << 18) >> 8, minlength=256)
    chi_square = float(((counts - 1024.0) ** 2 / 1024).sum())
    assert 170 < chi_square < 350  # 255 degrees of freedom


def test_the_bytes_of_stochastic_rounding_never_change() -> None:
    """A part written by another version of numpy must fit: these are what the first version drew."""
    assert draws(0, "w", 0, 4).tolist() == [59750, 62196, 63077, 14721]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_numbers_widen_as_torch_widens_them(dtype: torch.dtype) -> None:
    values = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
    widened = widen(of_tensor(values), np.empty(1 << 16, np.float32))
    assert np.array_equal(widened, values.float().numpy(), equal_nan=True)
    assert count_not_finite(of_tensor(values)) == int((~torch.isfinite(values)).sum())


SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    3.4e38,
    -3.4e38,
    65504.0,
    65519.9,
    65520.0,
    1e-45,
    1.17e-38,
    2.0**-25,
    2.0**-24 * 1.5,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@given(values=arrays(np.float32, st.integers(0, 100), elements=st.floats(width=32)))
@settings(deadline=None, max_examples=200)
def test_narrowing_is_torchs(dtype: torch.dtype, values: Array) -> None:
    bits = np.random.default_rng(values.size).integers(0, 1 << 32, 1000, dtype=np.uint32).view(np.float32)
    several = torch.from_numpy(np.concatenate([values, bits, np.array(SPECIAL, np.float32)]))
    with np.errstate(all="ignore"):
        out = torch.empty(several.numel(), dtype=dtype)
        rounded = several.clone()
        narrow(of_tensor(rounded), of_tensor(out))
    right = several.to(dtype)
    assert dtype == torch.float64 or torch.equal(rounded.nan_to_num(1.0), right.float().nan_to_num(1.0))
    assert torch.equal(out.isnan(), right.isnan())
    assert torch.equal(out.nan_to_num(1.0).signbit(), right.nan_to_num(1.0).signbit())
    assert torch.equal(out.nan_to_num(1.0), right.nan_to_num(1.0))


@given(
    arrays(
        np.uint32,
        st.integers(0, 100),
        elements=st.integers(0x32000000, 0x47800000) | st.integers(0, 0x7FFFFFFF),
    ),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_narrowing_to_float16_is_numpys_bit_for_bit(sizes: Array, is_negative: bool) -> None:
    """Above all between 2**-27 and 65536, where float16 has numbers; without larger ones, another way is
    taken.
    """
    finite = sizes[sizes < 0x477FF000]
    for bits in (sizes, finite):
        values = (bits | np.uint32(is_negative << 31)).view(np.float32)
        with np.errstate(all="ignore"):
            right = values.astype(np.float16)
            out = np.empty_like(right)
            narrow(values, out)
        assert np.array_equal(out.view(np.uint16), right.view(np.uint16))
        assert np.array_equal(values.view(np.uint32), right.astype(np.float32).view(np.uint32))


@given(st.integers(0, 0x477FDFFF), st.integers(0, 65535), st.booleans())
@settings(deadline=None, max_examples=500)
def test_the_bytes_of_stochastic_float16_never_change(size: int, number: int, is_negative: bool) -> None:
    """Up where the number's upper 13 bits reach beyond the fraction, or, among the subnormal, where it is
    below it.
    """
    value = float(np.array(size, np.uint32).view(np.float32))
    is_normal = value >= 2.0**-14
    step = 2.0 ** (np.frexp(value)[1] - 11) if is_normal else 2.0**-24
    places, fraction = divmod(value / step, 1.0)
    is_up = fraction * 2**13 + (number >> 3) >= 2**13 if is_normal else number < fraction * 2**16
    right = (places + is_up) * step * (-1 if is_negative else 1)
    values = torch.tensor([-value if is_negative else value])
    rounded = rounded_randomly(values, torch.float16, np.array([number], np.uint16))
    assert rounded.double().item() == right and rounded.signbit().item() == is_negative
