# Fine-tuning of a classifier on one GPU: 30 epochs, batch 64, float16.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        layer_decay_rate=0.65,
        flat_decay_mult=0.0,
        custom_keys={'pos_embed': dict(decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=1.0),
)
epochs = dict(by_epoch=True, convert_to_iter_based=True)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=3, **epochs),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, begin=3, end=30, **epochs),
]

train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(enable=False, base_batch_size=64)
