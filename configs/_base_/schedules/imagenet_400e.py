# Pre-training: 400 epochs, batch 2048, bfloat16, gradients clipped at norm 1.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    # lr = 1e-3 x batch / 1024
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys={'pos_embed': dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=1.0),
)
epochs = dict(by_epoch=True, convert_to_iter_based=True)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=5, **epochs),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=5, end=400, **epochs),
]

train_cfg = dict(by_epoch=True, max_epochs=400, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# 8 GPUs x 256 images.
auto_scale_lr = dict(enable=False, base_batch_size=2048)
