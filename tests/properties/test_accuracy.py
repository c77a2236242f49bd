"""The statistics of the law about twice the definition's errors."""

import math

from properties.test_accuracy import FALSE_ALARM, HEADS, most


def test_errors_of_twice_the_size_are_taken_for_more_as_rarely_as_stated() -> None:
    beyond = range(math.floor(most(HEADS)) + 1, HEADS + 1)
    assert sum(math.comb(HEADS, worse) for worse in beyond) <= FALSE_ALARM * 2**HEADS


def test_the_heads_are_as_many_as_it_takes_to_notice_four_times_the_error() -> None:
    # The ratio of two normal errors of one size is Cauchy's.
    share = 2 / math.pi * math.atan(4 / 2)
    assert most(HEADS // 2) / (HEADS // 2) > share > most(HEADS) / HEADS
