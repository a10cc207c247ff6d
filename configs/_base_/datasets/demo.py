# Output of tools/dataset_converters/make_demo_dataset.py: 10 classes in ADE20K's layout, 256x192.
_base_ = './camvid.py'

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

# No worker processes: on two cores they would slow training down.
train_dataloader = dict(
    batch_size=8,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
