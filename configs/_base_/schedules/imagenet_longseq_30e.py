# Fine-tuning at stride 8: 30 epochs, 5 of them warm-up, then a constant learning rate; batch 1024,
# bfloat16, no clipping.
_base_ = './imagenet_finetune_20e.py'

optim_wrapper = dict(optimizer=dict(weight_decay=1e-8))
param_scheduler = [_base_.param_scheduler[0]]
train_cfg = dict(max_epochs=30)
