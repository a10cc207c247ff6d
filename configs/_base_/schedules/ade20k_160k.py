# 160k iterations, batch 16, float16, learning rate decayed by 0.65 per pair of blocks.
optim_wrapper = dict(
    # Defaults: float16 and dynamic loss scaling.
    type='AmpOptimWrapper',
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        layer_decay_rate=0.65,
        flat_decay_mult=0.0,
        custom_keys={'pos_embed': dict(decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    # Down to 1e-6, and in layers with decay to the same fraction of their learning rate.
    dict(type='CosineAnnealingLR', eta_min_ratio=0.002, by_epoch=False, begin=1500, end=160000),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=16000,
        max_keep_ckpts=2,
        save_best='mIoU',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)

# 8 GPUs x 2 images. For other batch sizes, `tools/train.py --auto-scale-lr` scales lr in
# proportion.
auto_scale_lr = dict(enable=False, base_batch_size=16)
