"""What is said about several seeds is what statistics says."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from refilled.compare.summary import mean_and_spread, paired_gain

accuracies = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=9).filter(
    lambda pairs: len({round(a - b, 6) for a, b in pairs}) > 1
)


@given(accuracies)
def test_the_interval_is_that_of_a_paired_t_test(pairs):
    ours, theirs = zip(*pairs, strict=True)
    gain = paired_gain(ours, theirs)
    interval = ttest_1samp([a - b for a, b in pairs], 0).confidence_interval(0.95)
    assert gain.low == pytest.approx(interval.low, abs=1e-6)
    assert gain.high == pytest.approx(interval.high, abs=1e-6)
    assert gain.established == (gain.low > 0 or gain.high < 0)


def test_one_seed_establishes_nothing():
    gain = paired_gain([70.0], [60.0])
    assert gain.mean == 10
    assert math.isinf(gain.low)
    assert not gain.established
    assert "not established" in str(gain)


def test_a_spread_is_written_only_where_there_is_one():
    assert mean_and_spread([70.0]) == "70.00"
    assert mean_and_spread([70.0, 72.0]) == "71.00 ± 1.41"
