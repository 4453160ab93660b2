"""Runs of several processes, and of batches in chunks: both end where a single process ends."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from processes import free_port, on_every_rank
from short_runs import FASTCL, OPTIONS, SMALL, finish, losses, metrics, start

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from test_clusters import clusters_are_the_same_on_every_rank
from test_memories import a_memory_is_the_same_on_every_rank
from test_prototypical import dino_has_one_centre, swav_is_balanced_over_all_ranks
from test_two_sides import losses_are_those_of_all_ranks_pairs

from fastcl.train import prepare


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes, from the weights of another run."""
    folder = tmp_path_factory.mktemp("two")
    prepare("simclr", out=folder / "initial", epochs=1, **SMALL).fit()
    finish(start(folder, "simclr", "--epochs=2", f"--init={folder / 'initial' / 'simclr.ckpt'}", ranks=2))
    return folder


def test_balance_centre_clusters_memory_and_pairs_are_of_all_processes(tmp_path: Path) -> None:
    checks = (
        swav_is_balanced_over_all_ranks,
        dino_has_one_centre,
        clusters_are_the_same_on_every_rank,
        a_memory_is_the_same_on_every_rank,
        losses_are_those_of_all_ranks_pairs,
    )
    on_every_rank(checks, 2, tmp_path)


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
