"""A file `convert.py` of the user: the commands do not depend on it, and the error names it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillm_jax import hidden
from minillm_jax.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported `convert` yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "convert"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", ["convert.py", "convert/__init__.py"])
def test_a_file_that_hides_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_convert: None, name: str
) -> None:
    hidden.check()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise RuntimeError('the file must not run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as caught:
        hidden.check()
    assert isinstance(caught.value, ImportError)
    shown = tmp_path / name if name == "convert.py" else tmp_path / "convert"
    assert str(caught.value) == (
        f"{shown} hides the package `convert`, which minillm-jax needs; rename it, or run Python in another folder"
    )


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, no_convert: None) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(InputError, match="the package `convert` of minillm-jax is not installed"):
        hidden.check()


def python(folder: Path, *arguments: str, path: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    environment |= {"PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "convert.py").write_text("print('the file of the user runs')")
    return tmp_path


def test_the_command_does_not_depend_on_the_working_directory(place: Path) -> None:
    """`python -m minillm_jax` puts it before the installed packages; the installed command does not."""
    script = "from minillm_jax.cli import main; main()"
    (place / "bin").mkdir()
    (place / "bin" / "minillm-jax").write_text(script)
    for command in (["-m", "minillm_jax"], [str(place / "bin" / "minillm-jax")]):
        done = python(place, *command, "recipe", "list", "--json", path=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        assert "the file of the user runs" not in done.stdout


def test_the_command_and_a_script_beside_the_file_say_one_sentence(place: Path) -> None:
    (place / "script.py").write_text("import minillm_jax as mj\nmj.load")
    done = python(place, "script.py", path=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        f"{place / 'convert.py'} hides the package `convert`, which minillm-jax needs; rename it, or run Python in "
        "another folder"
    )
    (place / "command.py").write_text("from minillm_jax.cli import main\nmain()")
    done = python(place, "command.py", "recipe", "list", path=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(f"minillm-jax: {place / 'convert.py'} hides the package `convert`")
    assert "the file of the user runs" not in done.stdout
