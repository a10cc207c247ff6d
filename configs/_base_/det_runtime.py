# Shared by all detection configs: scope, logging, processes.
default_scope = 'mmdet'
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(
    type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer'
)
custom_hooks = [
    # Augmentation, stochastic depth and mixup repeat when a run is resumed.
    dict(type='mmvil.IterationSeedHook'),
    # Stop on a non-finite loss and report the images.
    dict(type='mmvil.engine.NaNGuardHook'),
    # The log shows the loss of the whole batch, not that of the first process.
    dict(type='mmvil.engine.AverageLogHook'),
]
log_level = 'INFO'
load_from = None
resume = False
