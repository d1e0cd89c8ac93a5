"""Output folders: a folder is complete or does not exist, whatever ends the process that writes it."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TextIO

from minillm_jax.devices import hosts
from minillm_jax.errors import InputError, reason, shortened, size_text
from minillm_jax.paths import absolute_path

# Attempts to remove a folder, a tenth of a second apart.
ATTEMPTS = 20

WHAT = "output folder"

# Longest part of the output's name in the name of its scratch folder, in bytes; a file name has at most 255.
_LONGEST_STEM = 100

# Host, process and start time of the process that a scratch folder belongs to.
_OWNER = re.compile(r"\..*\.minillm-jax-([0-9a-f]{8})-(\d{1,10})-(\d{1,20})-[0-9a-f]{8}", re.DOTALL)


# ------------------------------------------------------------------------------------------------------------- checks


def check_new(output: str | Path, source: str | Path | None = None) -> Path:
    """The absolute path of an output folder, after a check that it can be created.

    With several processes only process 0 checks, because only process 0 writes. Scratch folders that dead processes
    left beside the output are removed.

    Args:
      output: the output folder.
      source: folder of the model that is read; the output may not lie in it. A Hub id is no folder.

    Raises:
      InputError: the path exists, lies in the folder of the model, or no folder can be created there.
    """
    path = absolute_path(output, WHAT)

    def check() -> None:
        _check_free(path, source)
        remove_leftovers(path.parent)

    hosts.decide(check)
    return path


def _check_free(path: Path, source: str | Path | None = None) -> None:
    try:
        mode, parent = _mode(path), nearest(path)
        within = source is not None and _lies_in(path, Path(source).expanduser())
    except (OSError, RuntimeError) as error:
        raise InputError(f"{shortened(str(path), 200)}: no folder can be made there ({reason(error)})") from error
    if within:
        raise InputError(f"{path}: the output folder lies in the folder of the model, {source}; choose one beside it")
    if mode is not None:
        found = "folder" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "file"
        raise InputError(f"{path}: the output {found} already exists; choose another or remove it first")
    if not parent.is_dir():
        found = "leads nowhere" if parent.is_symlink() and not parent.exists() else "is a file and not a folder"
        raise InputError(f"{path}: no folder can be made there; {parent} {found}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no folder can be made there; {parent} is not a writable folder")


def _mode(path: Path) -> int | None:
    """The mode of a file, folder or link; None where there is none."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def nearest(path: Path) -> Path:
    """The nearest parent of an absolute path that exists."""
    return next(parent for parent in path.parents if _mode(parent) is not None)


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is an existing folder, or lies in it."""
    if not os.path.isdir(folder):  # noqa: PTH112  Path.is_dir raises an error for a name that is too long
        return False
    whole, outer = path.resolve(), folder.resolve()
    return outer == whole or outer in whole.parents


def check_space(output: str | Path, needed: int) -> None:
    """Check that the file system of an output folder has room for it; only process 0 checks.

    Args:
      output: the output folder, which need not exist.
      needed: bytes that will be written.

    Raises:
      InputError: fewer bytes are free.
    """
    path = absolute_path(output, WHAT)
    hosts.decide(lambda: _check_space(path, needed))


def _check_space(path: Path, needed: int) -> None:
    free = _free(path)
    if free is not None and free < needed:
        raise InputError(
            f"{path}: the folder needs {size_text(needed)}, but {nearest(path)} has {size_text(free)} free; "
            "free some space or choose another output folder"
        )


def _free(path: Path) -> int | None:
    """The bytes that are free for an output folder; None where the file system does not say."""
    try:
        usage = shutil.disk_usage(nearest(path))
    except OSError:
        return None
    return usage.free if usage.total else None


# ------------------------------------------------------------------------------------------------------------ writing


@contextmanager
def new_folder(output: str | Path, needed: int | None = None) -> Iterator[Path]:
    """A scratch folder beside `output`, renamed to `output` at the end of the block and removed if the block raises.

    The files and the folder are on the disk, and not in the memory of the system alone, before the folder gets its
    name. The umask decides who can read them.

    Args:
      output: the output folder, which must not exist.
      needed: bytes that will be written, for messages.

    Raises:
      InputError: `output` exists, or writing fails, for example on a full disk.
    """
    path = absolute_path(output, WHAT)
    _check_free(path)
    created = [parent for parent in path.parents if _mode(parent) is None]
    scratch = path.parent / _scratch_name(path.name)
    with one_sentence(path, needed):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            scratch.mkdir()
            yield scratch
            _sync_tree(scratch)
            _check_free(path)
            scratch.rename(path)
        except BaseException:
            _remove(scratch)
            for parent in created:  # innermost first, so that each is empty
                with suppress(OSError):
                    parent.rmdir()
            raise
        for folder in {path.parent, *(parent.parent for parent in created)}:
            _sync_folder(folder)


def _remove(folder: Path) -> None:
    """Removes a folder; again for a moment where threads of Orbax still write into it."""
    for _ in range(ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextmanager
def one_sentence(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns errors of the file system inside the block into one sentence.

    Args:
      path: the output folder.
      needed: bytes that will be written.

    Raises:
      InputError: in the place of an `OSError` or `UnicodeError`.
    """
    try:
        yield
    except (OSError, UnicodeError) as error:
        free, space = _free(path), ""
        if needed is not None and free is not None:
            space = f"; the folder needs {size_text(needed)}, and {size_text(free)} are free"
        raise InputError(f"{path}: cannot be written ({_failure(error)}){space}; no folder was left there") from error


def check_new_file(path: Path) -> None:
    """Check that a file can be created.

    Args:
      path: absolute.

    Raises:
      InputError: the path exists, or there is no writable folder for it.
    """
    if _mode(path) is not None:
        raise InputError(f"{path}: the output file already exists; choose another or remove it first")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no file can be made there; {path.parent} is not a writable folder")


def add_texts(folder: str | Path, texts: Mapping[str, str], replace: bool = False) -> None:
    """Add files to a written folder, each whole or not at all; only process 0 calls it.

    Args:
      folder: the folder.
      texts: file name → text.
      replace: whether a file takes the place of one that exists already.

    Raises:
      InputError: a file cannot be written, or exists already.
    """
    target = absolute_path(folder, WHAT)
    for name, text in texts.items():
        try:
            with new_file(target / name, replace) as file:
                file.write(text)
        except (OSError, UnicodeError) as error:
            raise InputError(f"{target / name}: cannot be written ({reason(error)})") from error


@contextmanager
def new_file(path: Path, replace: bool = False) -> Iterator[TextIO]:
    """A text file that takes its name when it is complete; it overwrites another file only with `replace`."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists() and not replace:
            raise FileExistsError(errno.EEXIST, "a file of that name exists already", path)
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


def _failure(error: BaseException) -> str:
    """The reason of an error, behind the name of the file that it is about."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        source, _, why = error.args[0][0]
        return f"{Path(source).name}: {why}"
    file = getattr(error, "filename", None)
    return reason(error) if file is None else f"{Path(os.fsdecode(file)).name}: {reason(error)}"


def _sync_tree(folder: Path) -> None:
    """Write a folder and all its files to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with Path(parent, name).open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems and file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------------- leftovers


def _scratch_name(name: str) -> str:
    stem = os.fsdecode(os.fsencode(name)[:_LONGEST_STEM])
    stem = stem.encode(errors="ignore").decode()  # a character may have been cut in two
    pid = os.getpid()
    return f".{stem}.minillm-jax-{_host()}-{pid}-{_started(pid) or 0}-{secrets.token_hex(4)}"


def remove_leftovers(parent: Path) -> None:
    """Remove the scratch folders that dead processes of this user on this host left in a folder.

    A killed process cannot remove its scratch folder. Folders of living processes, of other hosts and of other users
    are left alone.
    """
    if not hasattr(os, "geteuid"):  # not a POSIX system
        return
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            owner = _OWNER.fullmatch(entry.name)
            if owner is None or owner[1] != _host() or not entry.is_dir(follow_symlinks=False):
                continue
            mine = entry.stat(follow_symlinks=False).st_uid == os.geteuid()
            if mine and not _is_alive(int(owner[2]), int(owner[3])):
                shutil.rmtree(entry.path, ignore_errors=True)


@cache
def _host() -> str:
    """Eight digits that stand for this host and its space of process numbers, which a container may not share."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text().strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode(errors="replace")).hexdigest()[:8]


def _is_alive(pid: int, started: int) -> bool:
    """Whether the process with a number and start time runs; where start times are unknown, any with the number."""
    if started:
        return _started(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _started(pid: int) -> int | None:
    """The start time of a process in ticks since the system's start; None where it does not run, or is unknown."""
    try:
        # The name of the program, in brackets, may hold any character.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
