"""Lightning's Trainer around a training: devices, precision, progress, and what can go wrong."""

from __future__ import annotations

import logging
import signal
import warnings
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as Processes
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bitfront.cells.training import Training
from bitfront.errors import BitfrontError
from bitfront.processes import several
from bitfront.progress import Bar
from bitfront.quant.forwards.narrow import check_convolutions
from bitfront.saved import resume

WAIT = timedelta(days=1)  # of processes for the first one, which measures
CHECKPOINT = {"bitfront", "state_dict", "optimizer_states", "pytorch-lightning_version"}


class Progress(pl.Callback):
    """One bar over the whole training with the last epoch's numbers."""

    def on_train_start(self, trainer: pl.Trainer, training: pl.LightningModule) -> None:
        parts = trainer.accumulate_grad_batches
        self.bar = Bar(
            total=int(trainer.estimated_stepping_batches) * parts,
            initial=trainer.global_step * parts,
            unit="step",
        )

    def on_train_batch_end(self, trainer: pl.Trainer, training: pl.LightningModule, *_: Any) -> None:
        assert isinstance(training, Training)
        if training.history:
            last, primary = training.history[-1], training.task.primary[0]
            numbers = f"{primary} {last[f'valid/{primary}']:.4g}, {last['size_mb']:.3f} MB"
            self.bar.set_postfix_str(f"epoch {last['epoch']:.0f}: {numbers}", refresh=False)
        self.bar.update()

    def teardown(self, trainer: pl.Trainer, training: pl.LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def quiet() -> None:
    """Keep Lightning's banners and advertisements out of the output."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.handlers.clear()
    warnings.filterwarnings("ignore", module=r"lightning.*")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")


def accelerator(wanted: str) -> str:
    """Resolve "auto", and refuse a device that is not there.

    Raises:
        BitfrontError: no such device.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = {"cpu": True, "mps": torch.backends.mps.is_available()}
    there["gpu"] = there["cuda"] = torch.cuda.is_available()
    if not there.get(wanted, False):
        usable = ", ".join(name for name, available in there.items() if available)
        raise BitfrontError(f"trainer.accelerator={wanted} is not available here; available: auto, {usable}")
    return "cuda" if wanted == "gpu" else wanted


def check_trainer(trainer: dict[str, Any], device: torch.device) -> None:
    """Refuse a precision that this device would take for another one.

    Raises:
        BitfrontError: with one that it has.
    """
    if trainer["precision"] == "16-mixed" and device.type != "cuda":
        raise BitfrontError("trainer.precision=16-mixed is for GPUs; choose bf16-mixed or 32-true here")


def meet(trainer: dict[str, Any]) -> None:
    """Where a cell is of several processes, start those that no launcher has started, and wait for all.

    Args:
        trainer: as in ``fit``.
    """
    if several():
        quiet()
        own = {"accelerator": accelerator(trainer["accelerator"]), "devices": trainer["devices"]}
        Fabric(**own, strategy=Processes(timeout=WAIT)).launch()


def fit(training: Training, trainer: dict[str, Any]) -> None:
    """Train to the end of the recipe, from the checkpoint if there is one.

    Args:
        training: holds the model, which is trained in place, and the history.
        trainer: ``accelerator``, ``devices``, ``precision`` and ``accumulate_grad_batches`` of the configuration.

    Raises:
        BitfrontError: the loss is not finite, the GPU's memory or the disk is full; the last checkpoint stays. Or this
            processor's products are not to be trusted (``check_convolutions``).
    """
    quiet()
    if trainer["precision"] == "bf16-mixed":
        device = torch.device(accelerator(trainer["accelerator"]))
        check_convolutions(training.model.network, device, "trainer.precision=32-true", torch.bfloat16)
    checkpoint = training.checkpoint if resume(training.checkpoint, CHECKPOINT) else None
    runner = pl.Trainer(
        **trainer | {"accelerator": accelerator(trainer["accelerator"])},
        strategy=DDPStrategy(timeout=WAIT) if several() else "auto",
        max_epochs=training.recipe.epochs,
        gradient_clip_val=training.recipe.clip or None,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[Progress()],
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        runner.fit(training, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:  # which would end the process as if all were well
        raise KeyboardInterrupt from None
    except SystemExit as end:  # Lightning's answer to Ctrl-C, to which it then is deaf
        if not isinstance(end.__context__, KeyboardInterrupt):  # a cluster's to its time limit: it starts the job again
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
    except torch.OutOfMemoryError as error:
        raise BitfrontError(f"the GPU's memory is full ({error}); lower train.batch_size") from None
