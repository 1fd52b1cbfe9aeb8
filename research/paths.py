"""Parses the paths that users give: local ones, gs:// or s3://."""

import os
from pathlib import Path
from typing import cast

from upath import UPath

from research.errors import UserError

_EXTRAS = {"gs": "gcs", "s3": "s3"}  # the object stores to which Orbax can write, and the extra that each needs


def open_path(text: str) -> Path:
    """Parses a URL, or a local path that may begin with ~, the user's home.

    Raises:
      UserError: the scheme is not gs:// or s3://, its package is not installed, the storage cannot be reached, the URL
        contains a password, or the text contains characters outside the locale's encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogates: Python could not decode the command line in this locale
        raise UserError(
            f"{text!a}: this name contains characters outside the locale's encoding: set LC_ALL=C.UTF-8, or use an "
            "ASCII name"
        ) from None
    if "://" not in text:
        return Path(os.path.expanduser(text))
    check_no_password(text)
    scheme, _, place = text.partition("://")
    if scheme == "file":
        return Path(place)
    if scheme not in _EXTRAS:
        raise UserError(f"{text}: {scheme}:// is not supported: use a local folder, gs:// or s3://, and copy the files")
    try:
        path = UPath(text)
        _ = path.fs  # imports the file system's package
    except ImportError:
        raise UserError(
            f'{text}: the package for {scheme}:// is not installed: pip install "meshwork[{_EXTRAS[scheme]}]"'
        ) from None
    except Exception as error:  # each file system raises its own types, such as for missing credentials
        raise UserError(f"{text} cannot be opened: {error}") from None
    # To a type checker a UPath is not a pathlib.Path, but it has the same methods.
    return cast(Path, path)


def check_no_password(text: str) -> None:
    """Raises `UserError`, which does not quote it, if a URL contains a password: logs and records contain the URL."""
    before, at, _ = text.partition("://")[2].partition("/")[0].rpartition("@")
    if at and ":" in before:
        raise UserError(
            f"{text.partition('://')[0]}://...: a URL with a password would appear in logs and records: remove the "
            "password from it, and set it in the environment or a credentials file (fsspec.json, ~/.pgpass)"
        )
