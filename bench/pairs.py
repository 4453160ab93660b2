"""Methods for samples with two sides, a few minutes each: ``python -m bench.pairs [RUN ...]``.

CLIP and SigLIP on glyphs and their names, SimCSE on definitions and their words. Each metrics.csv goes to
bench/results/pairs, from which a table and a picture of all curves are made anew.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from matplotlib.figure import Figure

from bench.accuracy import draw, read, run

RESULTS = Path(__file__).parent / "results" / "pairs"
RUNS = {
    "clip-first": (
        *("clip", "--distortion=0", "--layers=2", "--epochs=5", "--lr=1e-3", "--weight-decay=1e-2"),
        *("--warmup-epochs=0", "--word-dropout=0", "--piece-std=1"),
    ),
    "clip": ("clip",),
    "siglip": ("siglip", "--epochs=3"),
    "simcse": ("simcse", "--epochs=3"),
    "simcse-supervised": ("simcse", "--supervised", "--word-dropout=0.1", "--piece-std=0.05"),
}
FIRST = "clip-first was the first run that was measured; a text was then the plain mean of its words."
MEASURES = ("zero_shot_fonts", "zero_shot_characters", "recall_1", "recall_10")
BASELINES = ("tfidf", "tfidf_trigrams")


def main() -> None:
    """Train, copy the metrics, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", default=list(RUNS), choices=RUNS)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in parser.parse_args().runs:
        out = Path("runs") / "pairs" / name
        run(command(name, out), out, RESULTS / f"{name}.csv")
        for examples in out.glob("zero_shot.png"):
            shutil.copy(examples, RESULTS / f"{name}-examples.png")
    report()


def command(name: str, out: Path) -> list[str]:
    """What is typed for one run."""
    return ["fastcl", "train", *RUNS[name], f"--out={out}"]


def report() -> None:
    """The table and the picture of all runs in :data:`RESULTS`."""
    runs = read(RESULTS)
    text = ["| run | measure | untrained | trained |", "|---|---|--:|--:|"]
    for name, rows in runs.items():
        for measure in MEASURES:
            if measure in rows[0]:
                before, after = (float(rows[place][measure]) for place in (0, -1))
                text.append(f"| {name} | {measure} | {before:.3f} | {after:.3f} |")
    # of the data, not of a run
    found = {measure: value for rows in runs.values() for measure, value in rows[0].items()}
    for baseline in BASELINES:
        for measure in MEASURES:
            if value := found.get(f"{baseline}_{measure}"):
                text.append(f"| {baseline} | {measure} | | {float(value):.3f} |")
    commands = [" ".join(command(name, Path("runs") / name)) for name in runs]
    (RESULTS / "README.md").write_text("\n".join(["```sh", *commands, "```", "", FIRST, "", *text, ""]))
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, measure in zip(figure.subplots(2, 2).flat, MEASURES, strict=True):
        draw(axes, runs, measure, measure)
    figure.savefig(RESULTS / "curves.png", dpi=100)


if __name__ == "__main__":
    main()
