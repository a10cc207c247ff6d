# ViL-T, version 2, as an ImageNet classifier: first and last token, concatenated.
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor',
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(type='mmvil.VisionLSTM', arch='tiny', img_size=224, out_type='bilateral_concat'),
    neck=None,
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=384,
        loss=dict(type='CrossEntropyLoss', use_soft=True),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=2e-5),
    ),
    # One of the two for each batch, with equal probability.
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
