"""Interrupted runs, and runs of several processes: both end where an undisturbed single process ends."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from processes import Command, free_port
from test_data import make_tree

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train import RunStoppedError, prepare
from fastcl.train.checkpoints import write_atomically

FASTCL = Path(sys.executable).parent / "fastcl"
OPTIONS = ("--data=digits", "--width=4", "--batch-size=256", "--limit=512")
SMALL = {"data": "digits", "width": 4, "batch_size": 256, "limit": 512}
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


def start(out: Path, method: str, *options: str, ranks: int = 1) -> Command:
    devices = [f"--devices={ranks}", "--accelerator=cpu"] if ranks > 1 else []
    arguments = ["train", method, *OPTIONS, f"--out={out}", *options, *devices]
    return Command(out.with_name(f"{out.name} said"), *arguments, ranks=ranks)


def finish(run: Command) -> None:
    status, errors = run.wait()
    assert status == 0, errors


def wait_for_epoch(run: Command, epoch: int) -> None:
    for line in run.lines():
        if line.startswith(f"epoch {epoch}/"):
            return
    raise AssertionError(f"ended before epoch {epoch}: {run.wait()}")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As the processes have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def metrics(out: Path) -> str:
    return (out / "metrics.csv").read_text()


def losses(out: Path) -> list[float]:
    with (out / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


class TestResume:
    def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(self, tmp_path: Path) -> None:
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        process = start(killed, "moco", "--epochs=4", "--resume")
        with one_thread():
            prepare("moco", out=whole, epochs=4, **SMALL).fit()
        wait_for_epoch(process, 2)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with one_thread():
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

        def stop() -> None:
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
        process.send_signal(signal.SIGINT)  # the tests of runs in this process send SIGTERM
        _, err = process.communicate(timeout=240)
        assert process.returncode == 1, err
        assert f"stopped by SIGINT; {checkpoint} is whole" in err.splitlines()[-1]
        assert "Traceback" not in err
        assert torch.load(checkpoint, weights_only=True)["epoch"] >= 8

    def test_a_signal_that_a_library_swallowed_stops_the_run_all_the_same(self, tmp_path: Path) -> None:
        run = prepare("simclr", out=tmp_path, epochs=3, **SMALL)

        def swallowed() -> None:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)

        run.method.on_train_epoch_start = swallowed
        with pytest.raises(RunStoppedError, match="stopped by SIGTERM, before the first checkpoint"):
            run.fit()

    def test_a_signal_amid_a_write_leaves_the_last_checkpoint_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The writer of torch answers an interrupt with an error of its own."""
        save, saved = torch.save, []

        class Interrupting(io.BytesIO):
            def write(self, part: Any) -> int:
                written = super().write(part)
                if self.tell() > 10_000:
                    os.kill(os.getpid(), signal.SIGTERM)
                return written

        def interrupted_at_the_third(content: object, file: IO[bytes]) -> None:
            saved.append(content)
            save(content, Interrupting() if len(saved) == 3 else file)

        monkeypatch.setattr(torch, "save", interrupted_at_the_third)
        with pytest.raises(RunStoppedError, match=r"stopped by SIGTERM; .*simclr.ckpt is whole"):
            prepare("simclr", out=tmp_path, epochs=4, **SMALL).fit()
        assert torch.load(tmp_path / "simclr.ckpt", weights_only=True)["epoch"] == 1

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


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes, from the weights of another run."""
    folder = tmp_path_factory.mktemp("two")
    prepare("simclr", out=folder / "initial", epochs=1, **SMALL).fit()
    finish(start(folder, "simclr", "--epochs=2", f"--init={folder / 'initial' / 'simclr.ckpt'}", ranks=2))
    return folder


class TestTwoProcesses:
    def test_simclr_has_the_loss_of_one_process_but_for_batch_normalization(
        self, two: Path, tmp_path: Path
    ) -> None:
        prepare("simclr", out=tmp_path, epochs=2, init=two / "initial" / "simclr.ckpt", **SMALL).fit()
        # half a batch normalized by itself, and other views: near, but not the same
        assert losses(two) == pytest.approx(losses(tmp_path), rel=0.05)
        # linear classifiers end a little apart
        untrained = [metrics(out).splitlines()[1].split(",") for out in (two, tmp_path)]
        for several, one in zip(*untrained, strict=True):
            assert several == one or abs(float(several) - float(one)) < 0.01

    def test_moco_shuffles_and_fills_one_queue(self, tmp_path: Path) -> None:
        finish(start(tmp_path, "moco", "--epochs=1", ranks=2))
        state = torch.load(tmp_path / "moco.ckpt", weights_only=True)["state_dict"]
        assert state["queue.pointer"] == 512, "two batches of 256 from both ranks"

    def test_a_diverging_run_says_so_once(self, tmp_path: Path) -> None:
        """As the command itself starts them."""
        diverging = ("--epochs=2", "--optimizer=sgd", "--lr=1e30", "--devices=2", "--accelerator=cpu")
        command = [FASTCL, "train", "simclr", *OPTIONS, *diverging, f"--out={tmp_path}"]
        run = subprocess.run(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert run.returncode == 1
        assert sum("a loss that is no finite number" in line for line in run.stderr.splitlines()) == 1
        assert "Traceback" not in run.stderr

    def test_two_nodes_of_one_process_each(self, two: Path, tmp_path: Path) -> None:
        command = [FASTCL, "train", "simclr", *OPTIONS, "--epochs=2", "--num-nodes=2", "--accelerator=cpu"]
        command.append(f"--init={two / 'initial' / 'simclr.ckpt'}")
        torchrun = [FASTCL.with_name("torchrun"), "--nnodes=2", "--nproc-per-node=1"]
        torchrun += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
        nodes = [
            subprocess.Popen(
                [*torchrun, f"--node-rank={rank}", *command, f"--out={tmp_path}"],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in (0, 1)
        ]
        for node in nodes:
            _, err = node.communicate(timeout=240)
            assert node.returncode == 0, err
        assert metrics(tmp_path) == metrics(two)


class TestChunks:
    VIT = ("--arch=vit_tiny", "--optimizer=sgd", "--lr=0.5", "--epochs=2", "--evaluate-every=0")

    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_network_that_treats_rows_apart_is_trained_as_without_chunks(
        self, processes: int, tmp_path: Path
    ) -> None:
        chunked, whole = tmp_path / "chunked", tmp_path / "whole"
        each = ((chunked, ("--encode-chunk=32",)), (whole, ()))
        if processes == 1:
            for out, own in each:
                main(["train", "supcon", *OPTIONS, *self.VIT, *own, f"--out={out}"])
        else:
            for run in [start(out, "supcon", *self.VIT, *own, ranks=2) for out, own in each]:
                finish(run)
        initial = prepare("supcon", out=tmp_path / "initial", arch="vit_tiny", **SMALL).method.state_dict()
        weights = [
            torch.load(out / "supcon.ckpt", weights_only=True)["state_dict"] for out in (chunked, whole)
        ]
        moved = sum((weights[1][name] - x).square().sum() for name, x in initial.items())
        apart = sum((weights[0][name] - weights[1][name]).square().sum() for name in initial)
        assert apart < 1e-6 * moved

    def test_a_slow_copy_and_a_queue_are_encoded_in_chunks_too(self, tmp_path: Path) -> None:
        for method, own in (("moco-v3", {"hidden": 16}), ("simsiam", {"hidden": 16}), ("mochi", {})):
            out = tmp_path / method
            prepare(method, out=out, epochs=2, encode_chunk=64, **own, **SMALL).fit()
            assert all(math.isfinite(loss) for loss in losses(out))
        with pytest.raises(ValueError, match="encode_chunk must be a multiple of bn_splits = 8, got 4"):
            prepare("moco", out=tmp_path / "moco", encode_chunk=4, **SMALL)
