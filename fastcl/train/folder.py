"""The folder of a run's results: what is in it is kept, continued or replaced, as asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from fastcl.train import checkpoints
from fastcl.train.settings import RunSettings

_MAY_CHANGE = {
    "out", "resume", "overwrite", "init", "epochs", "workers", "max_unreadable", "download_dir",
    "evaluate_every", "accelerator", "devices", "num_nodes", "precision",
}  # fmt: skip
_NEEDED = {"epoch", "global_step", "loops", "optimizer_states"}  # by Lightning, to resume
_RESULTS = ("config.yaml", "metrics.csv")


class ResultsFolder:
    """Where one run writes.

    Args:
        method: the run's.
        settings: the run's.

    Attributes:
        checkpoint: the run's file.
        resumes: whether it is there, and is to be continued.

    Raises:
        ValueError: not a folder to write to; another run's results, which ``settings`` neither continue nor
            overwrite; a checkpoint of other settings.
    """

    def __init__(self, method: str, settings: RunSettings) -> None:
        self.method = method
        self.settings = settings
        self.checkpoint = settings.out / f"{method}.ckpt"
        _check_folder(settings.out)
        if settings.resume and settings.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        # the other ranks may come when the first one has begun to write
        if not settings.overwrite and getattr(rank_zero_only, "rank", 0) == 0:
            self._check_results()
        self.resumes = settings.resume and self.checkpoint.exists()
        self._trained: dict[str, Any] = self._check_resumed() if self.resumes else {}

    def identity(self) -> dict[str, object]:
        """What a checkpoint must have in common with the run that resumes it."""
        return {"method": self.method, **_without(self.settings, _MAY_CHANGE)}

    def check_weights(self, needed: Mapping[str, Tensor]) -> None:
        """Raise unless the checkpoint that is resumed has these weights.

        Raises:
            ValueError: it does not.
        """
        if self.resumes:
            try:
                checkpoints.check_weights(self._trained["state_dict"], needed)
            except ValueError as error:
                raise ValueError(f"{self.checkpoint} cannot be resumed: {error}") from error

    def prepare(self) -> None:
        """Write the settings; remove an older run's results, unless this one continues them."""
        out = self.settings.out
        if not self.resumes:
            for old in (*out.glob("*.ckpt"), *(out / name for name in _RESULTS)):
                old.unlink(missing_ok=True)
            shutil.rmtree(out / "tensorboard", ignore_errors=True)
            if self.settings.resume:
                print(f"no checkpoint in {out} yet: starting from the beginning")
        elif self.settings.init is not None:
            print(f"going on from {self.checkpoint}, not from {self.settings.init}")
        (out / "config.yaml").write_text(yaml.safe_dump(self.options(), sort_keys=False))

    def options(self) -> dict[str, object]:
        """The settings that make the same run again, as YAML takes them."""
        options = _without(self.settings, {"resume", "overwrite"})
        return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}

    def _check_results(self) -> None:
        out = self.settings.out
        found = sorted(path.name for path in out.glob("*.ckpt"))
        if self.settings.resume and found and self.checkpoint.name not in found:
            raise ValueError(f"out must hold a run of {self.method} to resume, {out} has {found[0]}")
        found += [name for name in _RESULTS if (out / name).exists()]
        if found and not self.settings.resume:
            raise ValueError(
                f"out must be a folder without a run, {out} has {found[0]}: --resume goes on with it, "
                "--overwrite replaces it"
            )

    def _check_resumed(self) -> dict[str, Any]:
        checkpoint = checkpoints.read(self.checkpoint)
        trained = checkpoint.get("callbacks", {}).get("Monitor", {}).get("settings")
        if trained is None or not checkpoint.keys() >= _NEEDED:
            raise ValueError(f"{self.checkpoint} was not written by fastcl train: it cannot be resumed")
        for name, value in self.identity().items():
            if trained.get(name) != value:
                raise ValueError(
                    f"{name} must be {trained.get(name)!r} as in {self.checkpoint} to resume it, "
                    f"got {value!r}"
                )
        if self.settings.epochs < checkpoint["epoch"] + 1:
            raise ValueError(
                f"epochs must be at least {checkpoint['epoch'] + 1}, those that {self.checkpoint} was "
                f"trained for, got {self.settings.epochs}"
            )
        return checkpoint


def _check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"out must be a folder to write to, got {out}: {error.strerror}") from error


def _without(settings: RunSettings, names: set[str]) -> dict[str, object]:
    return {name: value for name, value in asdict(settings).items() if name not in names}
