"""Runs that end early say so in one line, and leave their last checkpoint whole."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from short_runs import FASTCL, OPTIONS, SMALL, losses

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train import RunStoppedError, prepare
from fastcl.train.checkpoints import write_atomically


@pytest.fixture(autouse=True)
def signals_of_a_terminal() -> Iterator[None]:
    """Signals do what they do in a terminal, also where ``nohup`` or a shell's ``&`` has turned them off."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestStopping:
    def test_a_diverging_run_stops_and_leaves_its_checkpoint(self, tmp_path: Path) -> None:
        run = prepare("simclr", out=tmp_path, epochs=4, **SMALL)
        step = run.method.training_step

        def diverging(batch: object, batch_idx: int) -> torch.Tensor:
            return step(batch, batch_idx) * (float("nan") if run.method.global_step == 5 else 1.0)

        run.method.training_step = diverging
        with pytest.raises(RunStoppedError, match=r"no finite number by step 2 of epoch 3; .* is whole"):
            run.fit()
        checkpoint = torch.load(tmp_path / "simclr.ckpt", weights_only=True)
        assert checkpoint["epoch"] == 1
        assert all(x.isfinite().all() for x in checkpoint["state_dict"].values())
        assert len(losses(tmp_path)) == 2

    def test_a_signal_stops_with_one_line(self, tmp_path: Path) -> None:
        """Of the command itself, whose terminal sends it."""
        process = subprocess.Popen(
            [FASTCL, "train", "simclr", *OPTIONS, "--epochs=100", f"--out={tmp_path}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        checkpoint = tmp_path / "simclr.ckpt"
        assert process.stdout is not None
        assert any(line.startswith("epoch 10/") for line in process.stdout)
        while process.poll() is None:  # the tests of runs in this process send SIGTERM, once
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 1, err
        assert f"stopped by SIGINT; {checkpoint} is whole" in err.splitlines()[-1]
        assert "Traceback" not in err
        assert torch.load(checkpoint, weights_only=True)["epoch"] >= 8

    def test_a_signal_before_the_first_step_is_no_traceback(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Python's own handler raises a KeyboardInterrupt, here while the data are read."""
        monkeypatch.setattr("fastcl.train.data.choice.read_digits", lambda settings: signal.raise_signal(2))
        with pytest.raises(SystemExit) as stop:
            main(["train", "simclr", *OPTIONS, f"--out={tmp_path}"])
        assert stop.value.code == 1
        assert capsys.readouterr().err == "fastcl train: error: stopped by SIGINT\n"

    def test_a_terminal_that_goes_away_stops_a_run_unless_it_was_started_with_nohup(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def hang_up() -> None:
            os.kill(os.getpid(), signal.SIGHUP)

        run = prepare("simclr", out=tmp_path, epochs=1, **SMALL)
        run.method.on_train_epoch_start = hang_up
        with pytest.raises(RunStoppedError, match="stopped by SIGHUP"):
            run.fit()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run = prepare("simclr", out=tmp_path, epochs=1, overwrite=True, **SMALL)
        run.method.on_train_epoch_start = hang_up
        run.fit()
        assert len(losses(tmp_path)) == 1

    @pytest.mark.parametrize("becomes", [None, ValueError("a library's own")])
    def test_a_signal_that_a_library_swallowed_stops_the_run_all_the_same(
        self, becomes: ValueError | None, tmp_path: Path
    ) -> None:
        run = prepare("simclr", out=tmp_path, epochs=3, **SMALL)

        def swallowed() -> None:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                if becomes is not None:
                    raise becomes from None

        run.method.on_train_epoch_start = swallowed
        with pytest.raises(RunStoppedError, match="stopped by SIGTERM, before the first checkpoint"):
            run.fit()

    def test_a_signal_amid_a_checkpoint_waits_for_its_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save, saved = torch.save, []

        class Interrupting(io.BytesIO):
            def write(self, part: Any) -> int:
                if len(saved) == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().write(part)

        def interrupted_at_the_third(content: object, file: IO[bytes]) -> None:
            saved.append(content)
            written = Interrupting()
            save(content, written)
            file.write(written.getvalue())

        monkeypatch.setattr(torch, "save", interrupted_at_the_third)
        with pytest.raises(RunStoppedError, match=r"stopped by SIGTERM; .*simclr.ckpt is whole"):
            prepare("simclr", out=tmp_path, epochs=4, **SMALL).fit()
        assert torch.load(tmp_path / "simclr.ckpt", weights_only=True)["epoch"] == 2

    def test_a_full_disk_leaves_the_last_checkpoint_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save, saved = torch.save, []

        def full_at_the_third(content: object, file: object) -> None:
            saved.append(content)
            if len(saved) == 3:
                file.write(b"the beginning of a checkpoint")  # type: ignore[attr-defined]
                raise OSError(errno.ENOSPC, "No space left on device")
            save(content, file)

        monkeypatch.setattr(torch, "save", full_at_the_third)
        with pytest.raises(RunStoppedError, match=r"No space left on device; .*simclr.ckpt is whole"):
            prepare("simclr", out=tmp_path, epochs=4, **SMALL).fit()
        assert torch.load(tmp_path / "simclr.ckpt", weights_only=True)["epoch"] == 1
        monkeypatch.undo()
        prepare("simclr", out=tmp_path, epochs=4, resume=True, **SMALL).fit()
        assert len(losses(tmp_path)) == 4

    def test_a_gpu_out_of_memory_is_one_line(self, tmp_path: Path) -> None:
        run = prepare("simclr", out=tmp_path, epochs=1, **SMALL)

        def full(batch: object, batch_idx: int) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        run.method.training_step = full
        with pytest.raises(RunStoppedError, match="stopped by an error: CUDA out of memory, before the"):
            run.fit()

    def test_what_is_no_file_is_not_called_whole(self, tmp_path: Path) -> None:
        (tmp_path / "simclr.ckpt").mkdir()
        with pytest.raises(RunStoppedError, match=r"Is a directory.*, before the first checkpoint"):
            prepare("simclr", out=tmp_path, epochs=1, overwrite=True, **SMALL).fit()

    def test_a_real_write_error_is_an_os_error_and_leaves_no_file_behind(self, tmp_path: Path) -> None:
        """A limit on the size of files stands for the end of the disk."""
        write_atomically(tmp_path / "x.ckpt", {"whole": 1})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                write_atomically(tmp_path / "x.ckpt", torch.zeros(1_000_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert torch.load(tmp_path / "x.ckpt") == {"whole": 1}
        assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]
