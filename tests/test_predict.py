"""What the predictions of GPU times must be, whatever a GPU will say of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_metric_learning")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's kernels name no arguments", allow_module_level=True)

from bench import cost, gpu, machine_code, predict, steps
from bench.cards import CARDS
from bench.cases import FASTCL, Case
from bench.machine_code import Code, Counts

_LOOP = Counts(issued=900, fp32=200, alu=400, special=65, shared=90, copied=140, barriers=2, mma=1 << 17)
_CODE = Code(registers=128, shared=48 << 10, warps=4, loop=_LOOP, once=_LOOP._replace(mma=0))
_WITHOUT_LOOP = _CODE._replace(loop=Counts())


def _code_of(kernel, grid, args, options):
    return _CODE if kernel.fn.__name__ in steps._WALKS else _WITHOUT_LOOP


def _work(case):
    return steps.of_case(replace(case, dtype=torch.bfloat16, device="cuda"), "sm_90", _code_of)


@pytest.mark.parametrize("case", gpu.CASES, ids=lambda case: case.name)
def test_bands_are_ordered_and_above_the_floor(case):
    work = _work(replace(case, rows=min(case.rows, 2048)))
    for card in CARDS.values():
        found = cost.of_step(card, work)
        for band in (found.gpu, found.host, found.step()):
            assert 0 < band.low <= band.likely <= band.high
        assert sum(found.limits.values()) == pytest.approx(1)


@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("loss", ["nt_xent", "clip_loss", "info_nce", "siglip_loss"])
def test_twice_the_batch_is_four_times_the_work(loss, dim):
    def amounts(rows):
        work = _work(Case(loss, rows, dim))
        pairs = sum(n * x.pairs for x, n in work.items() if isinstance(x, steps.Kernel))
        return pairs, sum(n * x.m * x.n * x.k for x, n in work.items() if isinstance(x, steps.Product))

    (pairs, products), (more_pairs, more_products) = amounts(4096), amounts(8192)
    assert (more_pairs, more_products) == (4 * pairs, 4 * products)
    assert (products > 0) == (dim > 256)


def test_programs_visit_every_tile_once():
    options = {"BLOCK_M": 64, "BLOCK_N": 32}
    assert sum(steps._tiles((16, 3), 1000, options)) == 16 * 32
    on_and_above_the_diagonal = sum(32 - 2 * block for block in range(16))
    assert sum(steps._tiles((16, 3), 1000, {**options, "TRIANGLE": True})) == on_and_above_the_diagonal


def test_the_busiest_processor_has_the_longest_programs():
    assert cost._busiest((3,) * 5, 2, 1) == (9, 3)  # three waves, the last of one program
    assert cost._busiest((4, 3, 2, 1), 2, 2) == (6, 2)  # all at once
    assert cost._busiest((4, 3, 2, 1), 2, 1) == (5, 2)  # as processors become free


def test_more_programs_per_processor_hide_more():
    card = CARDS["H200"]
    alone, shared = (cost._cycles(card, _LOOP, 4, programs, 400)[0] for programs in (1, 3))
    assert alone.low == shared.low == max(cost.units(card, _LOOP, 4).values())
    assert alone.likely > shared.likely > shared.low
    assert alone.high > shared.high


def test_registers_and_shared_memory_limit_the_programs():
    card = CARDS["H200"]
    assert cost.resident(card, _CODE) == 4
    assert cost.resident(card, _CODE._replace(registers=255)) == 2
    assert cost.resident(card, _CODE._replace(shared=200 << 10)) == 1


_NVIDIA = """
.L_x_0:
        /*0100*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0110*/               @P0 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0120*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0130*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR24], RZ, !UPT ;
        /*0140*/                   MUFU.EX2 R4, R4 ;
        /*0150*/                   FFMA R4, R5, R6, R7 ;
        /*0160*/                   SHFL.BFLY PT, R3, R4, 0x2, 0x1f ;
        /*0170*/              @!P0 BRA `(.L_x_1) ;
        /*0180*/                   STG.E.64 desc[UR4][R2.64], R4 ;
.L_x_2:
        /*0190*/                   BRA `(.L_x_2) ;
"""
_AMD = """
.LBB0_1:
\tv_mfma_f32_32x32x8_bf16 v[34:49], v[118:119], v[66:67], 0
\tbuffer_load_dwordx4 v[62:65], v2, s[20:23], 0 offen
\tds_read_b128 v[0:3], v4
\tv_exp_f32_e32 v5, v5
\tv_pk_mul_f32 v[6:7], v[6:7], v[8:9]
\tv_cndmask_b32_e64 v9, v9, v10, s[0:1]
\ts_barrier
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_dwordx2 v[0:1], v[2:3], off
\ts_endpgm
"""


def test_instructions_are_counted_by_unit():
    loop, once = machine_code.count(_NVIDIA, amd=False)
    assert loop == Counts(issued=7, fp32=1, special=1, shared=5, loaded=16, copied=16, waits=1, wgmma=1 << 14)
    assert once == Counts(issued=3, integer_products=1, stored=8)
    loop, once = machine_code.count(_AMD, amd=True)
    units = {"fp32": 1, "alu": 1, "special": 1, "shared": 4, "loaded": 16, "waits": 1, "barriers": 1}
    assert loop == Counts(issued=8, **units, mma=1 << 13)
    assert once == Counts(issued=2, stored=8)


@pytest.fixture
def published():
    return json.loads((predict.RESULTS / "predicted.json").read_text())


def test_every_case_is_predicted_for_every_card(published):
    rows = Counter((x["card"], x["case"]) for x in published["rows"])
    assert rows == Counter((card, case.name) for card in CARDS for case in predict.cases())
    for x in published["rows"]:
        assert (x["floor_ms"] or 0) < x["quartiles"][0] <= x["ms"] <= x["quartiles"][1]
    assert predict.markdown(published) == (predict.RESULTS / "predicted.md").read_text()
    assert all(
        f"{goal} on {card}" in predict.markdown(published) for goal, (card, _) in predict.GOALS.items()
    )


def test_a_measurement_is_held_against_the_prediction(published):
    case, other = (case.name for case in predict.cases()[:2])
    known = {x["case"]: x for x in published["rows"] if x["card"] == "H200"}
    rows = [
        gpu.Row(case, FASTCL, ms=1.5 * known[case]["ms"], graph_ms=0.5 * known[case]["graph_quartiles"][0]),
        gpu.Row(other, FASTCL, ms=2 * known[other]["quartiles"][1]),
        gpu.Row(other, "plain", ms=1.0),
        gpu.Row(other, FASTCL, failed="RuntimeError"),
        gpu.Row("unknown", FASTCL, ms=1.0),
    ]
    measured = {"machine": {"gpu": "NVIDIA H200"}, "rows": [asdict(row) for row in rows]}
    title, _, *graded, last = predict.grade(measured, published)
    assert title.startswith("H200")
    assert [line.split("  ")[-1] for line in graded] == ["in the band", "faster", "slower"]
    assert "1.50" in graded[0]
    assert last == "1 of 3 in the band"
    with pytest.raises(ValueError, match="no prediction for a toaster: expected one of"):
        list(predict.grade({"machine": {"gpu": "a toaster"}, "rows": []}, published))
    assert next(predict.grade({"machine": {"gpu": None}, "rows": []}, published, "A100")).startswith("A100")
