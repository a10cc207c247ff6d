# Objects in COCO format from tools/dataset_converters/make_demo_dataset.py, with its 256x192 images
# reduced to 192x144.
_base_ = './coco_instance.py'

data_root = 'data/demo'
metainfo = dict(
    classes=('astronaut', 'cat', 'coffee', 'flower', 'motorcycle', 'coin'),
    palette=[
        (255, 128, 0),
        (232, 200, 120),
        (124, 44, 148),
        (255, 120, 184),
        (224, 16, 32),
        (248, 236, 32),
    ],
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(192, 144)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 144)),
    *_base_.test_pipeline[-2:],
]

# No worker processes: on two cores they would slow training down.
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_training.json',
        data_prefix=dict(img='images/training'),
        filter_cfg=None,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_validation.json',
        data_prefix=dict(img='images/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(ann_file='data/demo/annotations/instances_validation.json')
test_evaluator = val_evaluator
