# Shared by all segmentation configs: scope, logging, processes.
default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer'
)
log_processor = dict(by_epoch=False)
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
