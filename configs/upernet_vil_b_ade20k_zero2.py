# ViL-B + UperNet on ADE20K with DeepSpeed ZeRO. Same recipe in bfloat16, see docs/scaling.md.
_base_ = ['./upernet_vil_b_ade20k.py', './_base_/strategies/zero2.py']

# Precision, clipping and accumulation are set in the strategy.
optim_wrapper = dict(
    _delete_=True,
    type='DeepSpeedOptimWrapper',
    constructor=_base_.optim_wrapper.constructor,
    optimizer=_base_.optim_wrapper.optimizer,
    paramwise_cfg=_base_.optim_wrapper.paramwise_cfg,
)
