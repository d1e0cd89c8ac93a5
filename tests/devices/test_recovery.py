"""A recovery on several devices has the losses of one device."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.devices.processes import finish, start


@cache
def losses(mesh: str) -> dict[str, Any]:
    """The losses of a recovery in a process with four virtual devices."""
    return finish([start(4, "recovery_child", "losses", mesh)])[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,model=2", "data=4", "model=4"])
def test_a_mesh_gives_the_losses_of_one_device(mesh: str) -> None:
    one, many = losses("auto"), losses(mesh)
    for method, found in many.items():
        expected = np.asarray(one[method], dtype=float)
        # The refit multiplies the differences between float32 moments whose sums have another order.
        tolerance = 1e-4 if method == "refit" else 3e-6
        np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=tolerance, err_msg=method)
        assert expected[-1, 1] != expected[0, 1]
