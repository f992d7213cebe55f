"""experiments/copier.py against counting by hand."""

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb.common.arrays import ROOT

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "experiments")
    copier = importlib.import_module("copier")

tokens = st.lists(st.integers(1, 4), max_size=12)


@given(st.lists(tokens, max_size=3), st.lists(st.integers(1, 4), min_size=3, max_size=3), tokens)
@settings(deadline=None)
def test_what_followed_the_longest_context_that_was_found(texts, before, chunk):
    whole = before + chunk
    for place, (n, chance) in enumerate(copier.forecasts(texts, before, chunk), start=len(before)):
        followed = {}
        for length in (1, 2, 3):
            context = whole[place - length : place]
            followed[length] = [t[i] for t in texts for i in range(length, len(t)) if t[i - length : i] == context]
        longest = max((length for length in followed if followed[length]), default=0)
        assert n == longest
        right = followed[n].count(whole[place]) / len(followed[n]) if n else 0
        assert chance == pytest.approx(right)


def test_the_gain_is_that_of_the_best_weights_and_never_negative():
    nats, found = np.array([2.0, 1.0, 3.0, 0.5]), np.array([0, 3, 3, 2])
    nothing = copier.gain(nats, found, np.zeros(4))
    assert nothing == 0
    copied = np.array([0.0, 1.0, 0.0, 0.0])
    losses = [-np.log((1 - w) * np.exp([-1.0, -3.0]) + w * np.array([1.0, 0.0])).sum() for w in copier.WEIGHTS]
    assert copier.gain(nats, found, copied) == pytest.approx((4 - min(losses)) / 6.5)
