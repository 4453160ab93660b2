"""Interrupted runs end where an undisturbed one ends; what is in a folder of results is kept."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from short_runs import OPTIONS, SMALL, losses, metrics, start, wait_for_epoch
from test_data import make_tree

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train import RunStoppedError, prepare

OWN = {
    "moco-v3": {
        "hidden": 16,
        "arch": "vit_tiny",
        "temperature_end": 0.1,
        "batch_size": 64,
        "limit": 128,
        "evaluate_every": 0,
    },
    "dino": {"hidden": 16, "prototypes": 24, "target_temperature_end": 0.07},
    "pcl": {"clusters": "16,8", "cluster_from_epoch": 1, "temperature_end": 0.1},
    "cmc": {"noise": 8, "batch_size": 8, "arch": "resnet8", "warmup_epochs": 0},
}


class TestResume:
    def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(
        self, tmp_path: Path, threads: Callable[[int], None]
    ) -> None:
        threads(1)  # as the command has
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        process = start(killed, "moco", "--epochs=4", "--resume")
        prepare("moco", out=whole, epochs=4, **SMALL).fit()
        wait_for_epoch(process, 2)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        prepare("moco", out=killed, epochs=4, resume=True, **SMALL).fit()
        assert metrics(killed) == metrics(whole)
        states = (torch.load(out / "moco.ckpt", weights_only=True)["state_dict"] for out in (killed, whole))
        for (name, resumed), (_, expected) in zip(*(state.items() for state in states), strict=True):
            assert resumed.equal(expected), name

    @pytest.mark.parametrize("method", ["byol", "simsiam", "vicreg", "moco-v3", "dino", "pcl", "cmc"])
    def test_methods_of_each_kind_go_on_from_a_checkpoint_as_if_not_stopped(
        self, method: str, tmp_path: Path
    ) -> None:
        options = {**SMALL, "epochs": 3, "dim": 16, **OWN.get(method, {"hidden": 16})}
        if method == "cmc":
            options["data"] = str(make_tree(tmp_path / "tree", 16))
        prepare(method, out=tmp_path / "whole", **options).fit()
        stopped = prepare(method, out=tmp_path / "stopped", **options)
        begin = stopped.method.on_train_epoch_start

        def stop() -> None:
            begin()
            if stopped.method.current_epoch == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        stopped.method.on_train_epoch_start = stop
        with pytest.raises(RunStoppedError, match="stopped by SIGTERM"):
            stopped.fit()
        assert len(losses(tmp_path / "stopped")) == 2
        prepare(method, out=tmp_path / "stopped", **options, resume=True).fit()
        assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
        states = [
            torch.load(tmp_path / name / f"{method}.ckpt", weights_only=True)["state_dict"]
            for name in ("stopped", "whole")
        ]
        assert all(x.equal(states[1][name]) for name, x in states[0].items())

    def test_epochs_may_grow_and_the_rate_follows(self, tmp_path: Path) -> None:
        prepare("simclr", out=tmp_path, epochs=2, **SMALL).fit()
        before = metrics(tmp_path).splitlines()
        with pytest.raises(ValueError, match=r"epochs must be at least 2, those that .*simclr.ckpt was"):
            prepare("simclr", out=tmp_path, epochs=1, resume=True, **SMALL)
        run = prepare("simclr", out=tmp_path, epochs=4, resume=True, **SMALL)
        rates, set_rates = [], type(run.method.optimization).set_rates

        def recorded(*arguments: object) -> float:
            rates.append(set_rates(*arguments))
            return rates[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(run.method.optimization), "set_rates", recorded)
            run.fit()
        assert metrics(tmp_path).splitlines()[:4] == before
        assert len(losses(tmp_path)) == 4
        # one call when the optimizer is made, then steps 4 to 7 of 8
        falling = [rates[0] * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(4, 8)]
        assert rates[1:] == pytest.approx(falling)

    def test_a_finished_run_is_evaluated_again_only(self, tmp_path: Path) -> None:
        prepare("simclr", out=tmp_path, epochs=1, **SMALL).fit()
        first = metrics(tmp_path)
        prepare("simclr", out=tmp_path, epochs=1, resume=True, **SMALL).fit()
        assert metrics(tmp_path) == first

    def test_a_run_that_goes_on_says_that_it_does_not_start_from_other_weights(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prepare("simclr", out=tmp_path, epochs=1, **SMALL).fit()
        gone = tmp_path / "gone.ckpt"
        capsys.readouterr()
        prepare("simclr", out=tmp_path, epochs=1, resume=True, init=gone, **SMALL).fit()
        assert f"going on from {tmp_path / 'simclr.ckpt'}, not from {gone}" in capsys.readouterr().out

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
        with pytest.raises(ValueError, match=r"out must hold a run of moco to resume, .* has simclr\.ckpt"):
            prepare("moco", out=tmp_path, epochs=1, resume=True, **SMALL)
        checkpoint = torch.load(tmp_path / "simclr.ckpt", weights_only=True)
        optimizers = checkpoint.pop("optimizer_states")
        torch.save(checkpoint, tmp_path / "simclr.ckpt")
        with pytest.raises(ValueError, match="was not written by fastcl train: it cannot be resumed"):
            prepare("simclr", out=tmp_path, epochs=1, resume=True, **SMALL)
        checkpoint["optimizer_states"] = optimizers
        for name in ("encoder.0.weight", "projector.0.bias"):
            del checkpoint["state_dict"][name]
        torch.save(checkpoint, tmp_path / "simclr.ckpt")
        with pytest.raises(ValueError, match=r"resumed: it lacks weights 'encoder.0.weight' and 1 more$"):
            prepare("simclr", out=tmp_path, epochs=1, resume=True, **SMALL)
        (tmp_path / "simclr.ckpt").write_bytes(b"not a checkpoint")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["train", "simclr", *OPTIONS, "--epochs=1", f"--out={tmp_path}", "--resume"])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "simclr.ckpt is not a checkpoint" in line


class TestResults:
    def test_an_older_run_is_kept_unless_it_is_to_be_overwritten(self, tmp_path: Path) -> None:
        prepare("simclr", out=tmp_path, epochs=1, **SMALL).fit()
        kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        for method in ("simclr", "supcon"):
            with pytest.raises(
                ValueError, match=r"has simclr.ckpt: --resume goes on .* --overwrite replaces"
            ):
                prepare(method, out=tmp_path, epochs=1, **SMALL)
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == kept
        prepare("supcon", out=tmp_path, epochs=1, overwrite=True, **SMALL).fit()
        assert [path.name for path in tmp_path.glob("*.ckpt")] == ["supcon.ckpt"]

    def test_a_run_starts_from_the_weights_of_another(self, tmp_path: Path) -> None:
        first = prepare("moco", out=tmp_path / "first", epochs=1, **SMALL)
        first.fit()
        checkpoint = tmp_path / "first" / "moco.ckpt"
        trained = first.method.state_dict()
        same = prepare("moco", init=checkpoint, out=tmp_path / "same", epochs=1, seed=1, **SMALL).method
        assert all(x.equal(trained[name]) for name, x in same.state_dict().items())
        other = prepare("byol", init=checkpoint, out=tmp_path / "other", epochs=1, **SMALL).method
        assert all(x.equal(trained[f"encoder.{name}"]) for name, x in other.encoder.state_dict().items())
        with pytest.raises(ValueError, match=r"init must fit this run, .*'0.weight' is \(4, 1, 3, 3\) in it"):
            prepare("byol", init=checkpoint, out=tmp_path / "wide", epochs=1, **(SMALL | {"width": 8}))
