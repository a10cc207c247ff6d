# Shared by all classification configs: scope, logging, processes.
default_scope = 'mmpretrain'
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook',
        interval=1,
        max_keep_ckpts=3,
        save_best='auto',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
custom_hooks = [
    # Make augmentation, stochastic depth and mixup reproducible in resumed runs.
    dict(type='mmvil.IterationSeedHook'),
    # Stop on a non-finite loss and report the images.
    dict(type='mmvil.engine.NaNGuardHook'),
    # Log the loss of the whole batch, not that of the first process.
    dict(type='mmvil.engine.AverageLogHook'),
]
log_level = 'INFO'
load_from = None
resume = False
