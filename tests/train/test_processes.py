"""What the methods keep, and what they compare with, is that of all processes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastcl.train")

from processes import on_every_rank
from test_clusters import clusters_are_the_same_on_every_rank
from test_memories import a_memory_is_the_same_on_every_rank
from test_prototypical import dino_has_one_centre, swav_is_balanced_over_all_ranks
from test_two_sides import losses_are_those_of_all_ranks_pairs


def test_balance_centre_clusters_memory_and_pairs_are_of_all_processes(tmp_path: Path) -> None:
    checks = (
        swav_is_balanced_over_all_ranks,
        dino_has_one_centre,
        clusters_are_the_same_on_every_rank,
        a_memory_is_the_same_on_every_rank,
        losses_are_those_of_all_ranks_pairs,
    )
    on_every_rank(checks, 2, tmp_path)
