# Your own images, one folder per class: docs/own_data.md. The classes are the folders.
_base_ = './imagenet_224.py'

dataset_type = 'CustomDataset'
data_root = 'data/own'
classes_from_data_root = True

train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root,
        data_prefix='train',
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=4,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root,
        data_prefix='val',
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader

# The last one reports precision, recall and F1 score of each class.
val_evaluator = [
    dict(type='Accuracy', topk=(1,)),
    dict(type='SingleLabelMetric', average=None),
]
test_evaluator = val_evaluator
