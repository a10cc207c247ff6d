# Fine-tuning of ViL-B at 224x224: 5 epochs, the first one warm-up.
_base_ = './imagenet_finetune_20e.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1, **_base_.epochs),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=1, end=5, **_base_.epochs),
]
train_cfg = dict(max_epochs=5)
