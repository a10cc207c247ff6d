# DeepSpeed ZeRO, stage 2: gradients and optimizer state are partitioned over the GPUs. Stage 3 also
# partitions the weights.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='DeepSpeedStrategy',
    # The model computes in bfloat16; the optimizer stores float32 weights.
    bf16=dict(enabled=True),
    inputs_to_half=['inputs'],
    zero_optimization=dict(stage=2, overlap_comm=True),
)
