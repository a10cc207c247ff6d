# Fine-tuning at 224x224: 20 epochs, batch 1024, bfloat16, no clipping.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-5, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys={'pos_embed': dict(decay_mult=0.0)}),
)
epochs = dict(by_epoch=True, convert_to_iter_based=True)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=5, **epochs),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=5, end=20, **epochs),
]

train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# 8 GPUs x 128 images.
auto_scale_lr = dict(enable=False, base_batch_size=1024)
