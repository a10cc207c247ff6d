# ViL-T pre-trained on CamVid's training images without their labels, small enough for a CPU.
_base_ = './simmim_vil_t_pretrain192.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    # Object sizes as in upernet_vil_t_camvid.py.
    dict(type='RandomResizedCrop', scale=192, crop_ratio_range=(0.1, 1.0)),
    *_base_.train_pipeline[2:],
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root='data/camvid', data_prefix='images/training', pipeline=train_pipeline),
)

optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1, **_base_.epochs),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=1, end=4, **_base_.epochs),
]
train_cfg = dict(max_epochs=4)
default_hooks = dict(logger=dict(interval=10))
auto_scale_lr = dict(base_batch_size=8)
