"""fastcl against plain PyTorch on this machine, in seconds: ``python -m bench.demo``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from bench.agreement import assert_agreement
from bench.cases import CASES, FASTCL, PLAIN, step
from bench.machine import cpu_model
from bench.memory import peak_bytes
from bench.timing import paired

_CASES = ("nt_xent-256x128", "nt_xent-1024x128", "nt_xent-4096x128")
_CHECKED = "nt_xent-256x128"
_SECONDS = 1.0  # per row of the table


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    assert_agreement(CASES[_CHECKED])
    print(
        "\nThe SimCLR loss (NT-Xent) on a batch of B images, two views of each, 128 numbers per view.\n"
        "One step is the loss and its gradients, exact on both sides; lower is better.\n"
        f"{cpu_model()}, {torch.get_num_threads()} threads, float32, medians of interleaved runs.\n"
    )
    print(f"{'':6}  {'milliseconds per step':^31}   {'peak memory per step, MiB':^31}")
    sides = f"{'plain PyTorch':>13}  {'fastcl':>7}"
    print(f"{'B':>6}  {sides}  {'faster':>7}   {sides}  {'smaller':>7}")
    with ThreadPoolExecutor(max_workers=2) as pool:  # all memory first: it would disturb the clock
        plain_peaks = pool.map(lambda name: peak_bytes(name, PLAIN), _CASES)
        our_peaks = pool.map(lambda name: peak_bytes(name, FASTCL), _CASES)
    for name, plain_peak, our_peak in zip(_CASES, plain_peaks, our_peaks, strict=True):
        case = CASES[name]
        times = paired(step(case, PLAIN), step(case, FASTCL), _SECONDS)
        print(
            f"{case.rows:6}  {times.plain_ms:13.2f}  {times.ms:7.2f}  {times.ratio:6.1f}x   "
            f"{plain_peak / 2**20:13.1f}  {our_peak / 2**20:7.1f}  {plain_peak / max(our_peak, 1):6.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
