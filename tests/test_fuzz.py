"""A few hundred of the cases of ``python tests/fuzz.py``."""

import fuzz
import pytest

from fastcl import testing

pytestmark = pytest.mark.skipif(not testing.IN_FLOAT64, reason="the cases come in float64 too")


@pytest.mark.parametrize("part", range(10))
def test_random_calls(part):
    found, _ = fuzz.run(0, range(30 * part, 30 * (part + 1)), testing.backends())
    assert not found, "\n".join(found)
