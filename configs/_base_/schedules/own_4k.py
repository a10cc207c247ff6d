# Fine-tuning of a segmentor on one GPU, like ADE20K but with 4000 iterations of 8 images.
_base_ = './ade20k_160k.py'

optim_wrapper = dict(optimizer=dict(lr=2.5e-4), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=200, end=4000),
]

train_cfg = dict(max_iters=4000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
auto_scale_lr = dict(base_batch_size=8)
