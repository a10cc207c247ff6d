# Mask2Former's 160k iterations, batch 16, float32. A learning rate decay of 0.65 per pair of blocks
# replaces the published factor of 0.1 on the whole backbone.
_base_ = './ade20k_160k.py'

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(lr=1e-4),
    clip_grad=dict(max_norm=0.01),
)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0, by_epoch=False, begin=0, end=160000)]
