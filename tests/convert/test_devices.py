"""Conversion runs on the CPU, whatever the default device is; reading a model uses the default device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from convert.__main__ import convert, main
from tests.helpers import hugging_face_folder


def test_conversion_puts_arrays_on_the_cpu_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default device during a conversion is the CPU, also where the caller has chosen another."""
    folder = hugging_face_folder(tmp_path / "model")
    seen: list[Any] = []
    put = jax.device_put

    def recorded(value: Any, device: Any = None, **more: Any) -> jax.Array:
        if device is None:
            seen.append(jax.config.jax_default_device)
        return put(value, device, **more)

    monkeypatch.setattr(jax, "device_put", recorded)
    convert("to-flax", str(folder), str(tmp_path / "flax"))
    convert("to-torch", str(tmp_path / "flax"), str(tmp_path / "torch"))
    assert len(seen) > 10
    assert set(seen) == {jax.local_devices(backend="cpu")[0]}
    assert jax.config.jax_default_device is None


def test_command_keeps_jax_off_the_accelerators(tmp_path: Path) -> None:
    before = jax.config.jax_platforms
    try:
        with pytest.raises(SystemExit):
            main(["to-flax", "./nowhere", str(tmp_path / "out")])
        assert jax.config.jax_platforms == "cpu"
    finally:
        jax.config.update("jax_platforms", before)


CHILD = """
import json, sys
import jax
jax.config.update("jax_default_device", jax.devices()[1])
from convert import reader, writer
from convert.__main__ import convert

folder, out = sys.argv[1:]
numbers = lambda arrays: sorted({device.id for array in arrays for device in array.devices()})
during = []
write = writer.write_model

def recorded(model, *rest):
    during.append(numbers([*jax.tree.leaves(model.decoder), *jax.live_arrays()]))
    written = write(model, *rest)
    during.append(numbers(jax.live_arrays()))
    return written

writer.write_model = recorded
convert("to-flax", folder, out + "/flax")
convert("to-torch", out + "/flax", out + "/torch", format="padded")
loaded = [numbers(jax.tree.leaves(reader.read_model(one).decoder)) for one in (folder, out + "/flax")]
print(json.dumps({"during": during, "loaded": loaded}))
"""


@pytest.mark.slow
def test_arrays_of_a_conversion_lie_on_the_first_cpu_device(tmp_path: Path) -> None:
    """Two virtual devices, and the second is the default: it stands for an accelerator."""
    folder = hugging_face_folder(tmp_path / "model")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    child = [sys.executable, "-c", CHILD, str(folder), str(tmp_path)]
    done = subprocess.run(
        child, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    devices = json.loads(done.stdout.splitlines()[-1])
    assert devices == {"during": [[0]] * 4, "loaded": [[1], [1]]}
