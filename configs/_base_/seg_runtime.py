# What every segmentation config shares: scope, logging, processes.
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
# Stochastic depth and mixup repeat when a run is resumed.
custom_hooks = [dict(type='mmvil.IterationSeedHook')]
log_level = 'INFO'
load_from = None
resume = False
