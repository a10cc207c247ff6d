# VTAB-1K: fine-tuning on 1000 images of one of 19 datasets; the recipe of one run. This trains on
# train800 and evaluates on val200, as in the learning rate search. tools/vtab1k.py runs the
# whole protocol. A single run:
#   python tools/train.py configs/vtab1k/cifar.py --data-root data/vtab-1k/cifar \
#       --cfg-options model.backbone.init_cfg.type=Pretrained \
#       model.backbone.init_cfg.checkpoint=vil2_tiny16_e800_in1k.th
_base_ = ['./models/vil_classifier.py', './cls_runtime.py']

model = dict(
    head=dict(loss=dict(use_soft=False)),
    train_cfg=None,  # no mixup, no cutmix
)

# No augmentation, not even in training.
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(224, 224), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
dataset = dict(type='CustomDataset', data_root='data/vtab-1k', pipeline=pipeline)
workers = dict(
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
)
train_dataloader = dict(
    batch_size=64,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(ann_file='train800.txt', **dataset),
    **workers,
)
val_dataloader = dict(
    batch_size=256,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(ann_file='val200.txt', **dataset),
    **workers,
)
val_evaluator = dict(type='Accuracy', topk=(1,))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    # One of 1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4, selected by the accuracy on val200.
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.65, flat_decay_mult=0.0),
)
# 10% warm-up, then cosine to 0. The first of the 60 warm-up iterations trains, too.
epochs = dict(by_epoch=True, convert_to_iter_based=True)
param_scheduler = [
    dict(type='LinearLR', start_factor=1 / 60, begin=0, end=5, **epochs),
    dict(type='CosineAnnealingLR', eta_min=0.0, begin=5, end=50, **epochs),
]

# Only the model after the last epoch is evaluated.
train_cfg = dict(by_epoch=True, max_epochs=50, val_interval=50)
val_cfg = dict()
default_hooks = dict(
    logger=dict(interval=5),
    checkpoint=dict(_delete_=True, type='CheckpointHook', interval=50, max_keep_ckpts=1),
)
auto_scale_lr = dict(enable=False, base_batch_size=64)
