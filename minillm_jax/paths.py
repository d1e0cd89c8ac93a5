"""Paths that a user gives: they name files and folders of this machine, and no addresses."""

import re
from pathlib import Path
from urllib.parse import unquote

from minillm_jax.errors import InputError, cause, shortened

# A `Path` of an address has a single slash: Path("gs://bucket") is "gs:/bucket". Only these schemes are recognised so.
KNOWN_SCHEMES = ("abfs", "abfss", "az", "file", "ftp", "gcs", "gs", "hdfs", "hf", "http", "https", "s3", "s3a", "ssh")

HUB_ADDRESS = re.compile(r"(?:hf:/+|https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/)(?:datasets/)?([^/]+/[^/@?#]+)")


def local_path(text: str | Path, what: str, hub: bool = False) -> Path:
    """The path on this machine that a user's text names, with `~` expanded.

    Args:
      text: the user's text.
      what: the noun for it in messages, `output folder` for example.
      hub: whether a Hub id, `owner/name`, is accepted in the place of a path.

    Raises:
      InputError: the text is empty or no path, an address such as `gs://bucket/folder`, or its home folder is unknown.
    """
    name = str(text)
    if not name or "\0" in name:
        raise InputError(f"the {what} {shortened(name)!r} is no path; give a path on this machine{_or_hub(hub)}")
    if (scheme := scheme_of(name)) is not None:
        raise InputError(f"{shortened(name, 200)}: {_not_an_address(name, scheme, what, hub)}")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}: the {what} has no known home folder; give the whole path") from error


def scheme_of(name: str) -> str | None:
    """The scheme of an address, `gs` of `gs://bucket/folder`; None for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)", name)
    if match is None or (match[2] == "/" and match[1].lower() not in KNOWN_SCHEMES):
        return None
    return match[1].lower()


def _not_an_address(name: str, scheme: str, what: str, hub: bool) -> str:
    hub_id = HUB_ADDRESS.match(name)
    if hub and hub_id is not None:
        return f"the {what} is a path on this machine or a Hub id, not an address; give {hub_id[1]}"
    if scheme == "file":
        path = unquote(re.sub(r"^file:(//localhost(?=/)|//(?=/))?", "", name, flags=re.IGNORECASE))
        return f"the {what} is a path on this machine, not an address; give {path}"
    return (
        f"the {what} is a path on this machine, and {scheme}:// is neither read nor written; "
        "use a local folder and copy the files from or to it, or mount the storage as a folder"
    )


def _or_hub(hub: bool) -> str:
    return " or a Hub id like owner/name" if hub else ""


def absolute_path(text: str | Path, what: str) -> Path:
    """`local_path`, made absolute.

    Raises:
      InputError: as for `local_path`; or the working directory no longer exists.
    """
    path = local_path(text, what)
    try:
        return path.absolute()
    except OSError as error:
        raise InputError(
            f"{path}: the working directory cannot be found ({cause(error)}), and the {what} is relative to it; "
            "change to a folder that exists, or give the whole path"
        ) from error
