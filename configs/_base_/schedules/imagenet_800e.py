# Pre-training of ViL-T: 800 epochs.
_base_ = './imagenet_400e.py'

param_scheduler = [
    _base_.param_scheduler[0],
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=5, end=800, **_base_.epochs),
]
train_cfg = dict(max_epochs=800)
