# SimMIM pre-training of ViL-T on unlabelled images at 192x192: 60% of each image is masked in
# squares of 32x32, and a linear layer predicts its pixels. 100 epochs, batch 2048, bfloat16.
_base_ = './cls_runtime.py'

model = dict(
    type='SimMIM',
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(type='mmvil.MaskedVisionLSTM', arch='tiny', img_size=192),
    neck=dict(type='SimMIMLinearDecoder', in_channels=192, encoder_stride=16),
    head=dict(
        type='SimMIMHead',
        patch_size=16,
        loss=dict(type='PixelReconstructionLoss', criterion='L1', channel=3),
    ),
)

# A folder of images with any subfolders.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=192, crop_ratio_range=(0.67, 1.0)),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='SimMIMMaskGenerator',
        input_size=192,
        mask_patch_size=32,
        model_patch_size=16,
        mask_ratio=0.6,
    ),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='CustomDataset',
        data_root='data/imagenet/train',
        with_label=False,
        pipeline=train_pipeline,
    ),
)

optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    # lr = 2e-4 x batch / 512
    optimizer=dict(type='AdamW', lr=8e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={'pos_embed': dict(decay_mult=0.0), 'mask_token': dict(decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=5.0),
)
epochs = dict(by_epoch=True, convert_to_iter_based=True)
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-3, begin=0, end=10, **epochs),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.05, begin=10, end=100, **epochs),
]

train_cfg = dict(by_epoch=True, max_epochs=100)

# There is no validation to select a best checkpoint.
default_hooks = dict(checkpoint=dict(interval=10, save_best=None))

# 8 GPUs x 256 images.
auto_scale_lr = dict(enable=False, base_batch_size=2048)
