"""Interrupts a training after one of its checkpoints."""

from contextlib import contextmanager

import pytest

from prunekit.training.callbacks import Checkpointing


@contextmanager
def interrupted_after_checkpoint(stage="train", *, epoch=None, global_step=None):
    """Expect a KeyboardInterrupt, which the checkpoint of this stage after so many epochs or steps raises."""
    save = Checkpointing.save

    def save_and_interrupt(callback, trainer):
        save(callback, trainer)
        reached = epoch in (None, trainer.position.epoch) and global_step in (None, trainer.global_step)
        if trainer.job.stage == stage and reached:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpointing, "save", save_and_interrupt)
        yield
