"""Solutions with rows that are shared between devices, for test_solver.py; see mesh_child for how it runs."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from minillm_jax.devices.sharding import MeshShape, make_mesh
from minillm_jax.pruning import device_system
from minillm_jax.pruning.device_system import Numbers, placed, placed_kernel, shared_rows
from minillm_jax.pruning.solver import DeviceFit, Groups, HostFit, Problem, Solver
from tests.pruning.problems import problem

# Four devices hold 32 rows and 8 columns each.
SIZES = {"inputs": 128, "outputs": 32}
CASES = {
    "channels": problem(groups=Groups(512), inputs=512, outputs=32),
    "heads of two parts": problem(groups=Groups(16, 2), **SIZES),
    "biased": problem(True, groups=Groups(32), **SIZES),
    "given ridge": problem(ridge=0.05, groups=Groups(128), **SIZES),
    "does not divide": problem(groups=Groups(12), inputs=12),
}


# Cases of the quick tests; the slow ones take all.
QUICK = ("biased", "does not divide")


def on_mesh(name: str) -> Problem:
    """A case whose moments go to two times four devices."""
    return replace(CASES[name], mesh=make_mesh(MeshShape(2, 4)))


def shared(names: str) -> dict[str, Any]:
    """Of some cases whether rows are shared, and how far the solution is from that of the host."""
    return {name: compared(on_mesh(name)) for name in names.split("+")}


def largest_arrays(names: str) -> dict[str, int]:
    """Of some cases the numbers of the largest array on a device."""
    return {name: largest(on_mesh(name)) for name in names.split("+")}


def compared(case: Problem) -> dict[str, Any]:
    """One case on a mesh beside the host."""
    keep = case.groups.count // 2
    host, device = HostFit(replace(case, mesh=None), Solver()), DeviceFit(case)
    (kept, rows), (same, found) = (fit.choose_and_refit(keep) for fit in (host, device))
    orders = [fit.order(keep) for fit in (host, device)]
    again, scale = device.refit(same), np.abs(rows.kernel).max()
    shift = 0.0 if rows.shift is None or found.shift is None else np.abs(rows.shift - np.asarray(found.shift)).max()
    mesh = case.mesh
    assert mesh is not None
    return {
        "shared": shared_rows(*case.kernel.shape, case.groups.count, mesh).axis is not None,
        "kept": bool((kept == same).all()),
        "order": sorted(orders[0].groups.tolist()) == sorted(orders[1].groups.tolist()),
        "errors": float(np.abs(orders[0].errors / orders[1].errors - 1).max()),
        "kernel": float(np.abs(rows.kernel - np.asarray(found.kernel)).max() / scale),
        "again": float(np.abs(np.asarray(again.kernel) - np.asarray(found.kernel)).max() / scale),
        "shift": float(shift / scale),
    }


def largest(case: Problem) -> int:
    """Numbers of the largest array in the programs of a device, from the moments to the rows."""
    assert case.held_out is not None
    groups, places = (
        case.groups,
        {"mesh": case.mesh, "rows": shared_rows(*case.kernel.shape, case.groups.count, case.mesh)},
    )
    gram, *others = placed(case.total, **places)
    less, kernel = placed(case.held_out, **places), placed_kernel(case.kernel, **places)
    kept = jnp.ones(groups.count, bool)
    making = gram, tuple(others), less, kernel, Numbers.of(1, 1.0, 1.0)
    made = partial(device_system.system, biased=case.biased, **places)
    system = jax.eval_shape(made, *making)
    counts = {"count": groups.count, "parts": groups.parts}
    lowered = (
        device_system.system.lower(*making, biased=case.biased, **places),
        device_system.order.lower(system.matrix, system.right, jnp.int32(1), **counts, **places),
        device_system.solutions.lower(system, kept, jnp.ones(2), **places),
        device_system.best_share.lower(system, kept, jnp.zeros((2, *case.kernel.shape)), **places),
        device_system.refit.lower((gram, *others), kernel, making[-1], kept, biased=case.biased, **places),
    )
    shapes = [shape for one_of in lowered for shape in re.findall(r"f32\[([\d,]+)\]", one_of.compile().as_text())]
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


FUNCTIONS: dict[str, Callable[..., Any]] = {"shared": shared, "largest": largest_arrays}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(FUNCTIONS[sys.argv[1]](*sys.argv[2:])))
