# Fully sharded data parallel: every GPU keeps a share of weights, gradients and optimizer state.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='mmvil.engine.fsdp.FSDPStrategy',
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        use_orig_params=True,
        # Blocks are gathered when they run; everything else, such as the heads, forms one more
        # unit.
        auto_wrap_policy=dict(type='mmvil.engine.fsdp.wrap_classes', names=('ViLBlock',)),
    ),
    # One file, as in ordinary training. 'sharded': a folder to which each process writes its share.
    state_dict_cfg='full',
)
