"""The table of the peers compares what is the same."""

import pytest


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_both_sides_of_every_row_agree():
    for name in ("lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers", "transformers"):
        pytest.importorskip(f"fastcl.integrations.{name}")

    from bench.peers import assert_same, cases

    libraries = set()
    for case in cases(small=True):
        assert_same(case)
        libraries.add(case.library)
    assert len(libraries) == 5
