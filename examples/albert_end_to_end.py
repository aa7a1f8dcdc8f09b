"""ALBERT end to end on two CPU cores: pretrain on text, fine-tune, and see what pretraining gives.

    python -m examples.albert_end_to_end --text wiki_paragraphs.txt --sst2 sst2 --squad squad

`--sst2` is a folder with `train.tsv` and `dev.tsv`, `--squad` one with `train-v1.1.json` and
`dev-v1.1.json`. Pretraining begins with short rows, from which a model learns soonest how words
follow each other, and goes on with longer ones. Both tasks are learnt three times from the
pretrained weights and three times from random ones, by the same commands otherwise, and scored on
the same held-out examples. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from albert_task._cli import main as albert

STAGES = ((16, 256, 2500), (64, 64, 700), (128, 32, 600))
"""Of pretraining: tokens in a row, rows in a batch, steps."""


def run(*arguments: str) -> None:
    """An `albert` command, which has to succeed."""
    print(f"\n$ albert {' '.join(arguments)}", flush=True)
    status = albert(list(arguments))
    if status:
        raise SystemExit(status)


def pretrained(text: str, out: Path, stages: Sequence[tuple[int, int, int]]) -> Path:
    """The folder of the last stage, each of which begins with the weights of the one before."""
    model = "small"
    for seq_len, rows, steps in stages:
        folder = out / f"pretrained_{seq_len}"
        run(
            "pretrain", "--text", text, "--model", model, "--seq-len", str(seq_len),
            "--batch-size", str(rows), "--steps", str(steps), "--val-rows", "512",
            "--out", str(folder),
        )  # fmt: skip
        model = str(folder)
    return Path(model)


def some_questions(source: Path, target: Path, count: int) -> Path:
    """A SQuAD file of the first questions of each article, so many in all."""
    articles = json.loads(source.read_text(encoding="utf-8"))["data"]
    each = -(-count // len(articles))
    kept, total = [], 0
    for article in articles:
        paragraphs: list[Any] = []
        room = min(each, count - total)
        for paragraph in article["paragraphs"]:
            qas = paragraph["qas"][:room]
            room -= len(qas)
            total += len(qas)
            if qas:
                paragraphs.append({"context": paragraph["context"], "qas": qas})
        kept.append({"title": article["title"], "paragraphs": paragraphs})
    target.write_text(json.dumps({"version": "1.1", "data": kept}), encoding="utf-8")
    return target


def fine_tuned(name: str, out: Path, models: dict[str, str], arguments: list[str]) -> list[str]:
    """Learns one task from each model, and returns lines for the table."""
    lines = []
    for start, model in models.items():
        folder = out / f"{name}_{start}"
        run("finetune", "--model", model, "--out", str(folder), *arguments)
        result = json.loads((folder / "result.json").read_text())
        for metric in ("accuracy", "exact_match", "f1"):
            if metric in result["summary"] and not (name == "sst2" and metric == "f1"):
                one = result["summary"][metric]
                each = ", ".join(f"{s['scores'][metric]:.1%}" for s in result["seeds"])
                lines.append(
                    f"{name:<8}{start:<12}{metric:<13}{one['mean']:7.1%} ± {one['spread']:.1%}"
                    f"   ({each})"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, help="to pretrain on")
    parser.add_argument("--sst2", type=Path, required=True)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/end_to_end"))
    parser.add_argument(
        "--stage",
        type=int,
        nargs=3,
        action="append",
        metavar=("TOKENS", "ROWS", "STEPS"),
        help=f"of pretraining; several in order (default: {STAGES})",
    )
    parser.add_argument("--sentences", type=int, default=70_000, help="of SST-2, at most")
    parser.add_argument("--questions", type=int, default=5000, help="of SQuAD to learn from")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = str(pretrained(options.text, options.out, options.stage or STAGES) / "model")
    models = {"pretrained": model, "random": str(Path(model) / "config.json")}
    learn = ["--batch-size", "32", "--seeds", str(options.seeds)]
    lines = fine_tuned(
        "sst2",
        options.out,
        models,
        [
            "--train", str(options.sst2 / "train.tsv"),
            "--validation", str(options.sst2 / "dev.tsv"),
            "--limit", str(options.sentences), "--max-length", "64", "--epochs", "1",
            "--lr", "4e-4", *learn,
        ],
    )  # fmt: skip
    train = some_questions(
        options.squad / "train-v1.1.json", options.out / "train.json", options.questions
    )
    dev = some_questions(options.squad / "dev-v1.1.json", options.out / "dev.json", 1000)
    lines += fine_tuned(
        "squad",
        options.out,
        models,
        [
            "--task", "qa", "--train", str(train), "--validation", str(dev),
            "--max-length", "128", "--doc-stride", "64", "--epochs", "2", "--lr", "1e-3", *learn,
        ],
    )  # fmt: skip
    print("\ntask    start       metric          mean ± spread (each seed)")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
