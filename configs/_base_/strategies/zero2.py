# DeepSpeed ZeRO, stage 2: gradients and optimizer state are shared out over the GPUs. Stage 3
# shares out the weights, too.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='DeepSpeedStrategy',
    # The model computes in bfloat16; the optimizer keeps weights in float32.
    bf16=dict(enabled=True),
    inputs_to_half=['inputs'],
    zero_optimization=dict(stage=2, overlap_comm=True),
)
