"""Interrupted runs, and runs of several processes: both end where an undisturbed single process ends."""

from __future__ import annotations

import csv
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train import RunStoppedError, prepare
from fastcl.train.checkpoints import write_atomically

FASTCL = Path(sys.executable).parent / "fastcl"
OPTIONS = ("--data=digits", "--width=4", "--batch-size=256", "--limit=512")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SMALL = {"data": "digits", "width": 4, "batch_size": 256, "limit": 512}


def start(out: Path, method: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [FASTCL, "train", method, *OPTIONS, f"--out={out}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a run that must succeed printed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"epoch {epoch}/"):
            return
    raise AssertionError(f"ended before epoch {epoch}: {process.communicate()[1]}")


def metrics(out: Path) -> str:
    return (out / "metrics.csv").read_text()


def losses(out: Path) -> list[float]:
    with (out / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


class TestResume:
    def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(self, tmp_path: Path) -> None:
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        undisturbed = start(whole, "moco", "--epochs=4")
        process = start(killed, "moco", "--epochs=4", "--resume")
        wait_for_epoch(process, 2)
        time.sleep(0.1)
        process.kill()
        process.communicate()
        finish(start(killed, "moco", "--epochs=4", "--resume"))
        finish(undisturbed)
        assert metrics(killed) == metrics(whole)
        states = (torch.load(out / "moco.ckpt", weights_only=True)["state_dict"] for out in (killed, whole))
        for (name, resumed), (_, expected) in zip(*(state.items() for state in states), strict=True):
            assert resumed.equal(expected), name

    def test_a_finished_run_is_evaluated_again_only(self, tmp_path: Path) -> None:
        prepare("simclr", out=tmp_path, epochs=1, **SMALL).fit()
        first = metrics(tmp_path)
        prepare("simclr", out=tmp_path, epochs=1, resume=True, **SMALL).fit()
        assert metrics(tmp_path) == first

    def test_without_a_checkpoint_the_run_starts_from_the_beginning(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prepare("simclr", out=tmp_path, epochs=1, resume=True, **SMALL).fit()
        assert "no checkpoint in" in capsys.readouterr().out
        assert len(losses(tmp_path)) == 1

    def test_a_checkpoint_that_does_not_fit_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prepare("simclr", out=tmp_path, epochs=1, **SMALL).fit()
        with pytest.raises(ValueError, match=r"width must be 4 as in .*simclr.ckpt to resume it, got 8"):
            prepare("simclr", out=tmp_path, epochs=1, resume=True, **(SMALL | {"width": 8}))
        (tmp_path / "simclr.ckpt").write_bytes(b"not a checkpoint")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["train", "simclr", *OPTIONS, "--epochs=1", f"--out={tmp_path}", "--resume"])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "simclr.ckpt is not a checkpoint" in line


class TestStopping:
    def test_a_signal_stops_with_one_line(self, tmp_path: Path) -> None:
        runs = {number: start(tmp_path / number.name, "simclr", "--epochs=100") for number in SIGNALS}
        for number, process in runs.items():
            checkpoint = tmp_path / number.name / "simclr.ckpt"
            wait_for_epoch(process, 10)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1
            assert f"stopped by {number.name}; {checkpoint} is whole" in err.splitlines()[-1]
            assert "Traceback" not in err
            assert torch.load(checkpoint, weights_only=True)["epoch"] >= 8

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


class TestTwoProcesses:
    def test_simclr_has_the_loss_of_one_process_but_for_batch_normalization(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        several = start(two, "simclr", "--epochs=2", "--devices=2", "--accelerator=cpu")
        prepare("simclr", out=one, epochs=2, **SMALL).fit()
        finish(several)
        # half a batch normalized by itself, and other views: near, but not the same
        assert losses(two) == pytest.approx(losses(one), rel=0.05)

    def test_moco_shuffles_and_fills_one_queue(self, tmp_path: Path) -> None:
        finish(start(tmp_path, "moco", "--epochs=1", "--devices=2", "--accelerator=cpu"))
        state = torch.load(tmp_path / "moco.ckpt", weights_only=True)["state_dict"]
        assert state["queue.pointer"] == 512, "two batches of 256 from both ranks"
