"""Systems whose rows are shared between devices have the solutions of the host; no device holds a whole matrix."""

from typing import Any

import pytest

from tests.devices.processes import finish, start
from tests.devices.solver_child import CASES, QUICK


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """The results of one process with eight devices, four of which share the rows."""
    return finish([start(8, "solver_child", "shared", "+".join(QUICK))])[0]


@pytest.fixture(scope="module")
def more_results() -> dict[str, Any]:
    """Those of the slow cases."""
    return finish([start(8, "solver_child", "shared", "+".join(CASES.keys() - set(QUICK)))])[0]


@pytest.mark.parametrize("name", QUICK)
def test_shared_rows_have_the_solutions_of_the_host(results: dict[str, Any], name: str) -> None:
    check_shared(results, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES.keys() - set(QUICK)))
def test_shared_rows_of_more_systems_have_the_solutions_of_the_host(more_results: dict[str, Any], name: str) -> None:
    check_shared(more_results, name)


def check_shared(results: dict[str, Any], name: str) -> None:
    """The same groups, and nearly the same numbers."""
    found = results[name]
    assert found["shared"] == (name != "does not divide")
    assert found["kept"]
    assert found["order"]
    assert found["errors"] < 1e-2  # of groups that cost nearly the same, either may be the first
    assert max(found["kernel"], found["again"], found["shift"]) < 1e-4, found


@pytest.mark.slow
def test_no_device_holds_a_whole_matrix() -> None:
    """The largest array are the 256 gathered rows of the order of removal, on every device."""
    (found,) = finish([start(8, "solver_child", "largest", "channels+does not divide")])
    assert found["channels"] == 256 * 512
    assert found["does not divide"] >= 12 * 12
