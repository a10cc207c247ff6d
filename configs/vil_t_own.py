# ViL-T on your own images, one folder per class, from ImageNet weights: docs/own_data.md.
#   python tools/train.py configs/vil_t_own.py --data-root my_data
_base_ = [
    './_base_/models/vil_classifier.py',
    './_base_/datasets/own_classification.py',
    './_base_/schedules/own_30e.py',
    './_base_/cls_runtime.py',
]

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mmvil://vil2_tiny16')),
    head=dict(loss=dict(_delete_=True, type='LabelSmoothLoss', label_smooth_val=0.1)),
    train_cfg=None,  # no mixup, no cutmix
)
# Log validation by iteration, to plot it with the training loss.
default_hooks = dict(logger=dict(interval=10, log_metric_by_epoch=False))
custom_hooks = [
    *_base_.custom_hooks,
    # Evaluate and save weights averaged over about the last tenth of the iterations.
    dict(type='mmengine.EMAHook', ema_type='MomentumAnnealingEMA', gamma=10, update_buffers=True),
]
