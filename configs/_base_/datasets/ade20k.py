# ADE20K (SceneParse150): 512x512 crops for training, whole images for testing.
dataset_type = 'ADE20KDataset'
data_root = 'data/ade/ADEChallengeData2016'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    # Pillow, like the authors: its bicubic filter is antialiased, OpenCV's is not.
    dict(
        type='RandomResize',
        scale=(2048, 512),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
        interpolation='bicubic',
        backend='pillow',
    ),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    # mmpretrain's transform, as in the recipe. mmseg's PhotoMetricDistortion differs: each step is
    # skipped half of the time, brightness is shifted instead of scaled, and hue by at most 0.1
    # turns.
    dict(type='mmpretrain.ColorJitter', brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='Resize',
        scale=(2048, 512),
        keep_ratio=True,
        interpolation='bicubic',
        backend='pillow',
    ),
    # After Resize, so that predictions are compared at the original size of the annotation.
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]

# Multi-scale and flip for `tools/test.py --tta`: the test size times 0.75, 1, 1.25, 1.5, 1.75.
tta_resize = dict(type='Resize', keep_ratio=True, interpolation='bicubic', backend='pillow')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(scale=(1536, 384), **tta_resize),
                dict(scale=(2048, 512), **tta_resize),
                dict(scale=(2560, 640), **tta_resize),
                dict(scale=(3072, 768), **tta_resize),
                dict(scale=(3584, 896), **tta_resize),
            ],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
tta_model = dict(type='SegTTAModel')

train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
