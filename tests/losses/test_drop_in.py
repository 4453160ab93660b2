"""Where info_nce differs from info-nce-pytorch 0.1.4, on purpose: the table of its page, row by row.

That it is the same everywhere else, tests/test_contract.py says.
"""

from pathlib import Path

import pytest
import torch

import fastcl

pypi = pytest.importorskip("info_nce")

PAGE = Path(__file__).parents[2] / "docs" / "losses" / "info_nce.md"
ROWS, KEYS, NEGATIVES = (
    torch.linspace(-1, 1, n * 3).sin().reshape(n, 3).roll(s, 1) for n, s in ((4, 0), (4, 1), (5, 2))
)
ZERO_ROW = ROWS.half().index_fill(0, torch.tensor([1]), 0)
IN_BATCH = pypi.info_nce(ROWS, KEYS)


def call(query=ROWS, key=KEYS, *rest, autocast=False, **options):
    def run(module):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module.info_nce(query, key, *rest, **options)

    return run


def zero_rows_gradient(module):
    rows = ROWS.index_fill(0, torch.tensor([1]), 0).requires_grad_()
    module.info_nce(rows, KEYS).backward()
    return rows.grad[1].abs().max()


def is_nan(loss):
    return bool(loss.isnan())


def is_a_loss(loss):
    return bool(loss.isfinite())


def of(dtype):
    return lambda loss: loss.dtype == dtype


def is_right(loss):
    return torch.allclose(loss, IN_BATCH, rtol=1e-6)


def is_off(loss):
    return not torch.allclose(loss, IN_BATCH, rtol=1e-4)


VECTOR = torch.full((4,), 0.1)
DOUBLE = torch.full((1,), 0.1, dtype=torch.float64)

# the calls of each row of the table: what the package returns or raises, what fastcl does
DIFFERENCES = {
    "an unknown `negative_mode`": [
        (call(negative_mode="x"), is_right, ValueError),
        (call(ROWS, KEYS, NEGATIVES, negative_mode="x"), UnboundLocalError, ValueError),
    ],
    "a temperature of 0, infinity or NaN": [
        (call(temperature=0), is_nan, ValueError),
        (call(temperature=float("nan")), is_nan, ValueError),
        (call(temperature=float("inf")), is_a_loss, ValueError),
    ],
    "a temperature of `True`, a complex number or text": [
        (call(temperature=True), is_a_loss, TypeError),
        (call(temperature=1j), NotImplementedError, TypeError),
        (call(temperature="0.1"), TypeError, TypeError),
    ],
    "a temperature of shape (N,), or (N, N)": [
        (call(temperature=VECTOR), is_right, ValueError),
        (call(temperature=VECTOR.expand(4, 4)), is_right, ValueError),
    ],
    "a temperature of shape (1,) in float64, rows in float32": [
        (call(temperature=DOUBLE), of(torch.float64), of(torch.float32)),
    ],
    "rows in float16 or bfloat16": [
        (call(ROWS.half(), KEYS.half()), of(torch.float16), of(torch.float32)),
        (call(ROWS.bfloat16(), KEYS.bfloat16()), of(torch.bfloat16), of(torch.float32)),
    ],
    "a zero row in float16": [(call(ZERO_ROW, KEYS.half()), is_nan, is_a_loss)],
    "the gradient of a zero row": [(zero_rows_gradient, lambda x: x > 1e10, lambda x: x == 0)],
    "float32 rows whose squares overflow": [(call(ROWS * 1e25), is_off, is_right)],
    "a loss below the precision of 1": [
        (call(torch.eye(4), torch.eye(4), temperature=0.05), lambda x: x == 0, lambda x: 0 < x < 1e-8),
    ],
    "float32 rows under autocast": [(call(autocast=True), is_off, is_right)],
    "rows of different dtypes": [
        (call(ROWS.double()), RuntimeError, TypeError),
        (call(ROWS, KEYS.double(), NEGATIVES), of(torch.float64), TypeError),
    ],
    "rows that are not floating, or no tensors": [
        (call(ROWS.long(), KEYS.long()), RuntimeError, TypeError),
        (call(ROWS.cfloat(), KEYS.cfloat()), NotImplementedError, TypeError),
        (call(ROWS.tolist()), AttributeError, TypeError),
    ],
    "rows on different devices": [(call(ROWS.to("meta")), of(torch.float32), ValueError)],
}


@pytest.mark.parametrize(
    ("run", "theirs", "ours"),
    [case for cases in DIFFERENCES.values() for case in cases],
    ids=[row for row, cases in DIFFERENCES.items() for _ in cases],
)
def test_each_difference_is_as_the_table_says(run, theirs, ours):
    for module, expected in ((pypi, theirs), (fastcl, ours)):
        if isinstance(expected, type):
            with pytest.raises(expected):
                run(module)
        else:
            assert expected(run(module)), module.__name__


def test_the_table_has_these_rows():
    table = PAGE.read_text().split("info-nce-pytorch 0.1.4 |")[1].splitlines()[2:]
    rows = [line.split("|")[1].strip() for line in table if line.startswith("|")]
    assert rows == [*DIFFERENCES, "the texts of errors"]


def test_errors_have_other_texts():
    for module in (pypi, fastcl):
        with pytest.raises(ValueError, match="query") as caught:
            module.info_nce(ROWS[0], KEYS)
        assert ("(3,)" in str(caught.value)) == (module is fastcl)
