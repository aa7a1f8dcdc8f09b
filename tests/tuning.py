"""A tiny pretrained ALBERT, and examples from which it learns what is good and what is bad."""

import jax
import numpy as np

from albert_task import AlbertConfig, AlbertForPreTraining, save_pretrained, train_tokenizer

GOOD, BAD = ("good fine great nice", "bad poor awful sad")
WORDS = f"{GOOD} {BAD} the a film was it and play who where Anna Berlin wrote lives in"

LEARN = ["--optimizer", "muon", "--lr", "1e-2", "--batch-size", "8", "--devices", "1"]
"""Options with which a tiny model learns in a few steps."""


def save_tiny(folder, seed=0):
    """Random weights, and a tokenizer."""
    tokenizer = train_tokenizer([WORDS] * 30, 90)
    config = AlbertConfig.preset(
        "tiny", vocab_size=tokenizer.get_vocab_size(), classifier_dropout_prob=0.0
    )
    save_pretrained(AlbertForPreTraining.init(config, jax.random.key(seed)), folder, tokenizer)
    return folder


def save_sentences(folder):
    """`train.tsv` and `dev.tsv`."""
    for name, count, seed in (("train", 160, 0), ("dev", 40, 1)):
        lines = ["sentence\tlabel", *("\t".join(one) for one in sentences(count, seed))]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def sentences(count, seed):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        label = int(generator.integers(0, 2))
        word = generator.choice((BAD, GOOD)[label].split())
        yield f"the {generator.choice(['film', 'play'])} was {word}", ("bad", "good")[label]


def short(pretrained, data, out, *more):
    """Arguments of a run of ten steps."""
    return [
        "finetune", "--model", str(pretrained), "--train", str(data / "train.tsv"), "--validation",
        str(data / "dev.tsv"), "--limit", "40", "--epochs", "2", "--out", str(out), *LEARN, *more,
    ]  # fmt: skip
