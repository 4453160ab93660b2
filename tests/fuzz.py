"""Random calls against a dense float64 oracle: ``python tests/fuzz.py --cases 50000 --seed 0 --jobs 2``.

A flag is an error of more than twice plain PyTorch's in the same dtype, plus a few ulps of the terms that
cancel: one ulp of a row's largest logit moves each of its probabilities by as much, relatively. One line
per flag; ``--only NUMBER`` runs one case again.
"""

import argparse
import sys
import time
import traceback
from multiprocessing import get_context

import fuzz_cases
import torch
from fuzz_oracle import NORM_EPS, norms, weights_like

import fastcl
from fastcl import PairRule, testing
from fastcl.similarity.numerics import compute_dtype

ULPS = 8.0
DOUBLE_ULPS = 3 * ULPS  # where the oracle is no more precise than what it judges
LINEAR = 0.1  # beyond it, what rounding does to the logits decides who has the probability


def flags(case):
    """What is wrong with the product's answer to ``case``, as lines of text; None if it cannot be judged."""
    with fastcl.use_backend(case.backend):
        return _topk_flags(case) if case.call == "topk" else _flags(case)


def _gradients(outputs, leaves, wanted):
    live = [y for y in outputs if y.requires_grad]
    if not live or not wanted:
        return {}
    weights = [weights_like(y).to(y) for y in live]
    inputs = [leaves[name] for name in wanted]
    grads = torch.autograd.grad(live, inputs, weights, allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, grads, strict=True))


def _run(function, case, tensors, wanted):
    leaves = {name: x.detach() for name, x in tensors.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    outputs = function(case, dict(leaves))
    return [y.detach() for y in outputs], _gradients(outputs, leaves, wanted)


def _flags(case):
    leaves = {k: v.detach().double().requires_grad_() for k, v in case.tensors.items()}
    exact = fuzz_cases.exact(case, dict(leaves))
    if exact is None:
        return None
    names = list(leaves)
    logits = [block.logits for block in exact.blocks]
    live = [y for y in exact.outputs if y.requires_grad]
    grads = torch.autograd.grad(
        live,
        [*leaves.values(), *logits],
        [weights_like(y) for y in live],
        allow_unused=True,
        materialize_grads=True,
    )
    value_floors, floors = _floors(case, leaves, exact, grads[len(names) :])
    exact_grads = dict(zip(names, grads, strict=False))
    got, got_grads = _run(fuzz_cases.product, case, case.tensors, case.wanted)

    scaled, powers = _scaled(case)
    base, base_grads = _run(fuzz_cases.dense, case, scaled, case.wanted)
    compute = compute_dtype(case.dtype)
    found = []
    for i, (mine, wanted, theirs) in enumerate(zip(got, exact.outputs, base, strict=True)):
        if mine.dtype != compute:
            found.append(f"output {i} is {mine.dtype}")
        found += _compare(f"output {i}", mine, wanted.detach(), theirs, value_floors[i], compute)
    longest = 1.0
    if case.options.get("form") == "paired" and len(
        case.tensors["query"]
    ):  # logits' gradients multiply them as they are
        longest = norms(case.tensors["negative_keys"].double()).max().clamp_min(1.0).item()
    for name in case.wanted:
        if name == "temperature":
            of_scale = floors[name] * leaves[name].detach().square()
            if of_scale.max() > torch.finfo(compute).max / 2:
                continue
        mine, theirs = got_grads[name], base_grads[name].double() * powers.get(name, 1.0)
        if mine.dtype != case.tensors[name].dtype:
            found.append(f"gradient of {name} is {mine.dtype}")
        label, reach = f"gradient of {name}", longest
        if longest > 1 and mine.dim() > 1:
            reach = longest / norms(case.tensors[name].double()).clamp_min(NORM_EPS).min().item()
        found += _compare(label, mine, exact_grads[name], theirs, floors[name], compute, reach)
    return found


def _scaled(case):
    """Inputs with rows of about unit length, the same to a loss that normalizes them, and gradients' factors.

    Plain PyTorch overflows where rows are long: it would be no measure.
    """
    scaled, powers = dict(case.tensors), {}
    if not case.normalized:
        return scaled, powers
    for name, x in case.tensors.items():
        length = norms(x.double())
        if x.dim() < 2:
            continue
        power = torch.exp2(-length.log2().floor()).where(length > NORM_EPS, 1.0)[..., None]
        zero = length[..., None] == 0
        scaled[name], powers[name] = (x.double() * power).to(x.dtype), power.masked_fill(zero, 0.0)
    return scaled, powers


def _sizes(exact):
    """How large the terms of each block's logits are, and the largest of each row."""
    sizes = [
        b.factor
        * b.left_norms[:, None]
        * (b.right_norms if b.right_norms.dim() == 2 else b.right_norms[None])
        for b in exact.blocks
    ]
    sizes = [s.expand(b.logits.shape) for s, b in zip(sizes, exact.blocks, strict=True)]
    largest = torch.stack(
        [
            (s + b.offset).amax(1) if s.shape[1] else s.new_zeros(s.shape[0])
            for s, b in zip(sizes, exact.blocks, strict=True)
        ]
    ).amax(0)
    return sizes, largest


def _floors(case, x, exact, pulls):
    """What one ulp, of size 1, of every logit does to the outputs, and to each input's gradient by rows."""
    info = torch.finfo(compute_dtype(case.dtype))
    sizes, largest = _sizes(exact)
    floors = {name: torch.zeros(y.shape[: max(y.dim() - 1, 0)] or y.shape) for name, y in x.items()}
    floors |= {name: torch.zeros_like(x[name].detach()) for name in ("key_bias", "key_scale") if name in x}
    floors = {name: floor.double() for name, floor in floors.items()}
    row_total = torch.zeros_like(largest)
    for b, size, pull in zip(exact.blocks, sizes, pulls, strict=True):
        size = size.detach()
        reach = largest[:, None].expand(size.shape)
        if b.columns and size.numel():
            reach = torch.maximum(reach, (size + b.offset).amax(0, keepdim=True))
        terms = (pull.abs() if b.terms is None else b.terms).clamp_min(info.tiny / info.eps)
        loose = ULPS * info.eps * reach > LINEAR
        mass = terms.sum(1, keepdim=True)
        if exact.rows:
            mass = mass + exact.rows[1][:, None]
        if b.columns:
            mass = mass + terms.sum(0, keepdim=True)
        terms = torch.where(loose, mass, terms) * reach.clamp_min(1.0)
        row_total += terms.sum(1)
        own = b.right_norms.dim() == 2
        for name, part in b.left((terms * b.factor * b.right_norms).sum(1)).items():
            floors[name] = floors[name] + part
        to_right = terms * b.factor * b.left_norms[:, None]
        for name, part in b.right(to_right if own else to_right.sum(0)).items():
            if name in floors:
                floors[name] = floors[name] + part.reshape(floors[name].shape)
        for name in ("temperature", "logit_scale", "scale"):
            if name in x:
                floors[name] = floors[name] + (terms * size).sum() / x[name].detach().abs()
        if "key_bias" in x:
            floors["key_bias"] += terms.sum(0)
        if "key_scale" in x:
            floors["key_scale"] += (terms * size).sum(0) / x["key_scale"].detach().abs()
    if exact.rows:
        rows, weights = exact.rows
        outer = weights * rows.abs() if case.options.get("base_temperature") else 0 * rows
        if "temperature" in x:
            floors["temperature"] = floors["temperature"] + outer.sum() / x["temperature"].detach().abs()
        by_row = row_total + weights * rows.abs()
        values = [by_row / weights if case.options["reduction"] == "none" else by_row.sum()]
    else:
        values = _statistics_floors(case, exact, sizes[0].detach() + exact.blocks[0].offset)
    if case.normalized:
        for name, y in x.items():
            if y.dim() >= 2:
                floors[name] = floors[name] / norms(y).clamp_min(NORM_EPS)
    return values, floors


def _statistics_floors(case, exact, sizes):
    values = []
    o = case.options
    n, m = sizes.shape
    positive = torch.zeros(n, m) if o["positive"] is None else o["positive"][0][:, None] == o["positive"][1]
    for transposed in (False, True)[: 1 + o["columns"]]:
        size, pos = (y.T if transposed else y for y in (sizes, positive))
        largest = size.amax(1) if size.shape[1] else size.new_zeros(size.shape[0])
        values += [largest + 1, largest + 1, (size * pos).sum(1), 0 * largest, largest]
    return values


def _compare(name, got, exact, base, floor, compute, longest=1.0):
    """Errors by rows in units of ``floor``, the worst row's against plain PyTorch's worst.

    ``longest``: the norm of the longest row by which what may underflow is multiplied.
    """
    if got.shape != exact.shape:
        return [f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"]
    if not got.numel():
        return []
    info = torch.finfo(got.dtype)
    floor = floor.reshape(floor.shape + (1,) * (exact.dim() - floor.dim())) + torch.zeros_like(exact)
    floor = floor.clamp_min(1e-300)
    fits = (exact.abs() < info.max / 2) & (floor < info.max / 2)  # the sum, and what is summed
    if got.dtype == torch.float16:  # a gradient of two parts may fit where one of them does not
        fits &= base.isfinite() & (base.abs() < info.max / 2)
    unasked = got.isnan() & ~exact.isnan() & (fits | exact.isinf())
    if unasked.any():
        return [f"{name}: NaN where {exact[unasked][0]:.3g} is expected"]
    if (~got.isfinite() & fits).any():
        return [f"{name}: infinite where {exact[~got.isfinite() & fits].flatten()[0]:.3g} is expected"]
    if (exact.isinf() & (got != exact)).any():
        return [f"{name}: finite where infinity is expected"]
    fits &= exact.isfinite()
    size = (exact.abs() / floor).masked_fill(~fits, 0.0)
    tiny = 4 * info.tiny * longest if got.dtype != torch.float16 else 2 * info.tiny * info.eps
    error = (((got.double() - exact).abs() - tiny).clamp_min(0) / floor).masked_fill(~fits, 0.0)
    known = fits & base.isfinite()
    theirs = ((base.double() - exact).abs() / floor).masked_fill(~known, 0.0).max().item()
    ulps = DOUBLE_ULPS if compute == torch.float64 else ULPS
    allowed = 2 * theirs + ulps * (torch.finfo(compute).eps + info.eps * size.max().item())
    if got.dtype in (torch.float16, torch.bfloat16):  # so products are, whose weights are rounded once
        allowed += info.eps / 2
    worst = error.max().item()
    if worst <= allowed:
        return []
    at = error.argmax()
    return [
        f"{name}: {worst / allowed:.2g} times what is allowed; {got.flatten()[at]:.9g}, "
        f"expected {exact.flatten()[at]:.9g}; plain PyTorch's error is {theirs / worst:.2g} of this"
    ]


def _topk_flags(case):
    o, (query, key) = case.options, case.tensors.values()
    rule = PairRule(exclude=o["exclude"])
    values, indices = fastcl.similarity_topk(query, key, o["k"], rule=rule, normalize=o["normalize"])
    q, k = (fuzz_cases.oracle.unit(x.double(), o["normalize"]) for x in (query, key))
    table = fuzz_cases.oracle.product(q, k)
    if o["exclude"] is not None:
        table = table.masked_fill(o["exclude"][0][:, None] == o["exclude"][1], -torch.inf)
    padded = torch.nn.functional.pad(table, (0, o["k"]), value=-torch.inf)
    exact = padded.sort(dim=1, descending=True).values[:, : o["k"]]
    scaled, _ = _scaled(case)
    a, b = scaled.values()
    if o["normalize"]:
        a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    plain = (a @ b.T).masked_fill(table == -torch.inf, -torch.inf)
    plain = torch.nn.functional.pad(plain, (0, o["k"]), value=-torch.inf).topk(o["k"]).values
    floor = (norms(q) * norms(k).max())[:, None].expand(exact.shape)
    compute = compute_dtype(case.dtype)
    found = _compare("values", values, exact, plain, floor, compute)
    picked = padded.gather(1, indices.where(indices >= 0, len(k)))
    found += _compare(
        "similarities at the indices", picked.to(compute), values.double(), plain * 0, floor * 4, compute
    )
    ordered = (values[:, 1:] < values[:, :-1]) | (indices[:, 1:] > indices[:, :-1]) | (indices[:, 1:] < 0)
    if not ordered.all():
        found.append("indices: a tie does not go to the lower index, or values ascend")
    return found


def run(seed, numbers, backends):
    """The flags of those cases, and how many could not be judged."""
    found, skipped = [], 0
    for number in numbers:
        case = fuzz_cases.make(seed, number, backends)
        try:
            lines = flags(case)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            lines = [f"{type(error).__name__} at {where.name}: {str(error).splitlines()[0]}"]
        skipped += lines is None
        found += [f"--seed {seed} --only {number}: {case}: {'; '.join(lines)}"] if lines else []
    return found, skipped


def _job(arguments):
    torch.set_num_threads(1)
    return run(*arguments), len(arguments[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, help="one case, by its number")
    arguments = parser.parse_args()
    backends = testing.backends()
    if arguments.only is not None:
        parts, jobs = [(arguments.seed, [arguments.only], backends)], 1
    else:
        starts = range(0, arguments.cases, 100)
        parts = [(arguments.seed, range(s, min(s + 100, arguments.cases)), backends) for s in starts]
        jobs = arguments.jobs
    done = flagged = unjudged = 0
    start = time.perf_counter()
    with get_context("spawn").Pool(jobs) as pool:
        for (found, skipped), count in pool.imap(_job, parts):
            done, flagged, unjudged = done + count, flagged + len(found), unjudged + skipped
            print(*found, sep="\n", end="\n" if found else "", flush=True)
            rate = done / (time.perf_counter() - start)
            print(f"{done} cases, {flagged} flagged, {rate:.0f}/s", end="\r", file=sys.stderr, flush=True)
    print(f"{done} cases, {flagged} flagged, {unjudged} not judged (rounding decides which keys are hardest)")
    return 1 if flagged else 0


if __name__ == "__main__":
    sys.exit(main())
