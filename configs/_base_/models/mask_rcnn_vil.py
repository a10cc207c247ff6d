# Mask R-CNN on ViL-T, like ViTDet on plain ViTs (Li et al., ECCV 2022, arXiv 2203.16527): all
# levels come from the last map; two convolutions in the RPN, four in the box head; layer norm. No
# windows, because the cost of ViL is linear in the number of tokens.
norm_cfg = dict(type='mmpretrain.LN2d')
box_coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4)
roi_extractor = dict(
    type='SingleRoIExtractor', out_channels=256, featmap_strides=[4, 8, 16, 32]
)  # stride 64 is used by the RPN only
nms = dict(type='nms', iou_threshold=0.7)

model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor=1024,  # to 1024x1024; boxes are clipped to the image, without padding
    ),
    backbone=dict(
        type='mmvil.VisionLSTM',
        arch='tiny',
        img_size=1024,
        pyramid=dict(strides=(4, 8, 16, 32, 64), out_channels=256, norm_cfg=norm_cfg),
        drop_path_rate=0.0,
        drop_path_mode='linear',
    ),
    neck=dict(
        type='ChannelMapper',
        in_channels=[256] * 5,
        out_channels=256,
        kernel_size=3,
        norm_cfg=norm_cfg,
        act_cfg=None,
    ),
    rpn_head=dict(
        type='RPNHead',
        in_channels=256,
        feat_channels=256,
        num_convs=2,
        anchor_generator=dict(
            type='AnchorGenerator',
            scales=[8],
            ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
        ),
        bbox_coder=dict(**box_coder, target_stds=[1.0] * 4),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss'),
    ),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            **roi_extractor,
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
        ),
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead',
            in_channels=256,
            conv_out_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            norm_cfg=norm_cfg,
            bbox_coder=dict(**box_coder, target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False),
            loss_bbox=dict(type='L1Loss'),
        ),
        mask_roi_extractor=dict(
            **roi_extractor,
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),
        ),
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=4,
            in_channels=256,
            conv_out_channels=256,
            num_classes=80,
            norm_cfg=norm_cfg,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(
                type='RandomSampler', num=256, pos_fraction=0.5, add_gt_as_proposals=False
            ),
            allowed_border=-1,
            pos_weight=-1,
        ),
        rpn_proposal=dict(nms_pre=2000, max_per_img=1000, nms=nms, min_bbox_size=0),
        rcnn=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
            sampler=dict(type='RandomSampler', num=512, pos_fraction=0.25),
            mask_size=28,
            pos_weight=-1,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000, nms=nms, min_bbox_size=0),
        rcnn=dict(
            score_thr=0.05,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=100,
            mask_thr_binary=0.5,
        ),
    ),
)
