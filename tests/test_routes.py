"""How far two routes to the same logits lie apart; `test_verify.py` takes the routes."""

import numpy as np
import pytest

from mlx_gptoss.routes import Difference, difference


def test_difference_by_hand():
    want = np.log([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    got = np.log([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]]) + 7
    d = difference(want, got)
    assert d.top1 == 0.5 and d.mean_kl == pytest.approx(0.5 * np.log(2) / 4)
    assert d.largest == pytest.approx(7 + np.log(2))
    nothing = difference(want, np.full_like(want, np.nan))
    assert nothing == Difference(mean_kl=np.inf, top1=0.0, largest=np.inf)
