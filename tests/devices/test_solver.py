"""Systems whose rows are shared between devices have the solutions of the host; no device holds a whole matrix."""

from typing import Any

import pytest

from tests.devices.processes import finish, start
from tests.devices.solver_child import CASES


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """The results of one process with eight devices, four of which share the rows."""
    return finish([start(8, "solver_child", "shared")])[0]


@pytest.mark.parametrize("name", list(CASES))
def test_shared_rows_have_the_solutions_of_the_host(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert found["shared"] == (name != "does not divide")
    assert found["kept"]
    assert found["order"]
    assert found["errors"] < 1e-2  # of groups that cost nearly the same, either may be the first
    assert max(found["kernel"], found["again"], found["shift"]) < 1e-4, found


def test_no_device_holds_a_whole_matrix(results: dict[str, Any]) -> None:
    """The largest array are the 256 gathered rows of the order of removal, on every device."""
    assert results["channels"]["largest"] == 256 * 512, results["channels"]
    assert results["does not divide"]["largest"] >= 12 * 12
