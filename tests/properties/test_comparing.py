"""A comparison looks at every element, and at every bit where a law is about bits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from oracle.precision import exact
from properties.harness.comparing import compare, compare_exactly, same, same_bits
from properties.harness.running import LawBroken

RIGHT = torch.arange(1.0, 7.0).view(2, 3)
RADIUS = np.full((2, 3), 2.0**-10)


def changed(place: int, by: float) -> Tensor:
    """Return the right result, but for one element."""
    result = RIGHT.clone()
    result.view(-1)[place] += by
    return result


def test_right_results_are_right() -> None:
    wanted = {"o": exact(RIGHT)}
    (found,) = compare({"o": changed(5, 2.0**-10)}, wanted, {"o": RADIUS})
    assert (found.ratio, found.elements, found.unjudged) == (1, 6, 0)
    (found,) = compare_exactly({"o": RIGHT}, wanted)
    assert found.exact
    assert len(same_bits({"o": RIGHT}, {"o": RIGHT.clone()})) == 1


@pytest.mark.parametrize("by", [2.0**-9, -20.0, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("place", range(6))
def test_one_wrong_element_is_found_wherever_it_is(place: int, by: float) -> None:
    wanted, wrong = {"o": exact(RIGHT)}, {"o": changed(place, by)}
    at = rf"o\[{place // 3}, {place % 3}\]"
    with pytest.raises(LawBroken, match=rf"{at} is wrong"):
        compare(wrong, wanted, {"o": RADIUS})
    with pytest.raises(LawBroken, match=rf"{at} is wrong"):
        compare_exactly(wrong, wanted)
    for compared in (same, same_bits):
        with pytest.raises(LawBroken, match=rf"{at} must not change"):
            compared({"o": RIGHT}, wrong)
        with pytest.raises(LawBroken, match=rf"{at} must not change"):
            compared(wrong, {"o": RIGHT})


@pytest.mark.parametrize(("one", "other"), [(0x00000000, 0x80000000), (0x7FC00000, 0x7FC00001)], ids=["zero", "NaN"])
def test_equal_numbers_may_have_other_bits(one: int, other: int) -> None:
    x, y = (torch.tensor([1, word]).to(torch.int32).view(torch.float32) for word in (one, other))
    assert same({"o": x}, {"o": y})
    with pytest.raises(LawBroken, match="the bits of o must not change, but those of element 1"):
        same_bits({"o": x}, {"o": y})
