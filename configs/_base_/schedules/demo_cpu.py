# From scratch, less than ten minutes on two CPU cores.
_base_ = './camvid_cpu.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=False, begin=30, end=300),
]

train_cfg = dict(max_iters=300, val_interval=60)
default_hooks = dict(checkpoint=dict(interval=60, save_best=None))
auto_scale_lr = dict(base_batch_size=8)
