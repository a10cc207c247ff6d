# Your own images and masks: docs/own_data.md. Classes come from classes.txt or classes.yaml in
# data_root, or from metainfo in your config.
_base_ = './ade20k.py'

dataset_type = 'BaseSegDataset'
data_root = 'data/own'
classes_from_data_root = True

train_pipeline = [
    *_base_.train_pipeline[:5],
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
# The short side is resized to 512 pixels; predictions are resized back to the mask.
test_pipeline = _base_.test_pipeline
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [test_pipeline[1]],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]

train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/train', seg_map_path='masks/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/val', seg_map_path='masks/val'),
    ),
)
test_dataloader = val_dataloader
