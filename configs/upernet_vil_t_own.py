# ViL-T + UperNet on your own images and masks, from ImageNet weights: docs/own_data.md.
#   python tools/train.py configs/upernet_vil_t_own.py --data-root my_data
_base_ = [
    './_base_/models/upernet_vil.py',
    './_base_/datasets/own_segmentation.py',
    './_base_/schedules/own_4k.py',
    './_base_/seg_runtime.py',
]

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mmvil://vil2_tiny16')),
)
custom_hooks = [
    *_base_.custom_hooks,
    # Evaluate and save weights averaged over about the last tenth of the iterations.
    dict(type='EMAHook', ema_type='MomentumAnnealingEMA', gamma=10, update_buffers=True),
]
