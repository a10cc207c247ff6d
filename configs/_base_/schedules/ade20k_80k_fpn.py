# Semantic FPN as for PVT (arXiv 2102.12122): 80k iterations, batch 16, AdamW, polynomial decay.
_base_ = './ade20k_160k.py'

optim_wrapper = dict(
    _delete_=True,
    # Defaults: float16 and dynamic loss scaling.
    type='AmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4),
)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=80000),
]

train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
