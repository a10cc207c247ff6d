# Output of tools/dataset_converters/make_demo_dataset.py: 10 classes in ADE20K's layout, 256x192.
dataset_type = 'BaseSegDataset'
data_root = 'data/demo'
metainfo = dict(
    classes=(
        'sky',
        'brick',
        'grass',
        'gravel',
        'astronaut',
        'cat',
        'coffee',
        'flower',
        'motorcycle',
        'coin',
    ),
    palette=[
        [44, 84, 196],
        [168, 72, 52],
        [64, 160, 64],
        [150, 150, 142],
        [255, 128, 0],
        [232, 200, 120],
        [124, 44, 148],
        [255, 120, 184],
        [224, 16, 32],
        [248, 236, 32],
    ],
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(144, 192), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]

# No worker processes: on two cores they would slow training down.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
