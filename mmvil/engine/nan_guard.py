# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Stop at a non-finite loss and report the images of its batch."""

from collections import deque

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from .layer_decay import plain_name


@HOOKS.register_module()
class NaNGuardHook(Hook):
    """Stop at a non-finite loss, before it reaches a checkpoint.

    The error names the iteration, and the files of its batch and of the previous batch, which
    updated the weights. Non-finite weights are not saved either. With loss scaling (float16),
    occasional overflows of gradients are normal: PyTorch skips the step and halves the scale. Each
    skip is logged as a warning and counted in ``amp_skips``, next to ``amp_scale``.

    Args:
        interval (int): Unused, for configs that set it. Every loss is checked: mmengine's log
            synchronizes with the GPU in each iteration in any case.

    Raises:
        FloatingPointError: During training, if the loss or the weights are not finite.
    """

    priority = 'HIGHEST'  # check the loss of this process, before AverageLogHook averages

    def __init__(self, interval: int = 1) -> None:
        self._batches = deque(maxlen=2)  # files of the last two, newest first

    def before_train(self, runner) -> None:
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self._scaler is not None:
            self._scale = scaler.get_scale()
            skips = runner.message_hub.log_scalars.get('train/amp_skips')
            self._skips = 0 if skips is None else int(skips.current())

    def after_train_iter(
        self, runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Check the loss."""
        if self._scaler is not None:
            self._watch_scale(runner)
        self._batches.appendleft(file_names(data_batch))
        loss = (outputs or {}).get('loss')
        if loss is not None and not torch.as_tensor(loss).isfinite().all():
            self._stop(runner, f'the loss is {loss} in iteration {runner.iter + 1}')

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Stop before non-finite weights are saved."""
        params = dict(runner.model.named_parameters())
        finite = [torch.isfinite(param.detach()).all() for param in params.values()]
        if finite and not torch.stack(finite).all():
            broken = [name for name, is_finite in zip(params, finite) if not is_finite]
            self._stop(
                runner,
                f'{len(broken)} of {len(params)} weights are not finite after iteration '
                f'{runner.iter + 1} ({plain_name(broken[0])}, …)',
            )

    def _stop(self, runner, what: str) -> None:
        message = f'{what}. Training stops; earlier checkpoints are good.'
        for when, files in zip(('Files of its batch', 'of the batch before'), self._batches):
            message += f' {when}: {", ".join(files) or "unknown"}.'
        message += (
            ' Check these files (tools/check_dataset.py). A lower learning rate may help, or '
            'optim_wrapper.clip_grad, or bfloat16 instead of float16.'
        )
        runner.logger.error(message)  # on every rank
        raise FloatingPointError(message)

    def _watch_scale(self, runner) -> None:
        scale = self._scaler.get_scale()
        if scale < self._scale:
            self._skips += 1
            runner.logger.warning(
                f'Iteration {runner.iter + 1}: gradients overflowed and the step was skipped; the '
                f'loss scale falls from {self._scale:g} to {scale:g} (skips so far: {self._skips}).'
            )
        self._scale = scale
        runner.message_hub.update_scalar('train/amp_scale', scale)
        runner.message_hub.update_scalar('train/amp_skips', self._skips)


def file_names(data_batch) -> list[str]:
    """List the image files of a batch that its data samples name."""
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    samples = samples if isinstance(samples, (list, tuple)) else ()
    return [str(sample.img_path) for sample in samples if getattr(sample, 'img_path', None)]
