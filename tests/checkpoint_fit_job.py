"""A fit that tests let fail: `python checkpoint_fit_job.py FOLDER [--limit BYTES]`.

Prints the step at each batch's end, and says whether it went through.
"""

import argparse
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tasks import Classifier, quiet, rows

from jaxlightning import Callback, DataLoader
from jaxlightning.callbacks import ModelCheckpoint


class Limits(Callback):
    """From a step on no file may be larger than so many bytes: the disk is full."""

    def __init__(self, size, step):
        self.size, self.step = size, step

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        print(trainer.global_step, flush=True)
        if self.size is not None and trainer.global_step == self.step:
            trainer.wait_for_checkpoints()
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--at", type=int, default=3)
    options = parser.parse_args()
    saves = ModelCheckpoint(dirpath=options.folder, every_n_train_steps=2, save_top_k=-1)
    trainer = quiet(
        max_steps=7,
        enable_checkpointing=None,
        callbacks=[Limits(options.limit, options.at), saves],
    )
    trainer.fit(Classifier(), DataLoader(rows(), 4), resume="auto")
    print("through", flush=True)


if __name__ == "__main__":
    main()
