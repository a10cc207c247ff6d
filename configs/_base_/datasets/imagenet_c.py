# ImageNet-C: the validation images of ImageNet-1K with each of 15 corruptions at 5 severities.
# data_root contains CORRUPTION/SEVERITY/CLASS/IMAGE, like the archives of the dataset.
_base_ = './imagenet_sketch.py'

# Mean error of AlexNet in percent, which normalizes the mean corruption error (Hendrycks and
# Dietterich, ICLR 2019).
reference_errors = dict(
    gaussian_noise=88.6428,
    shot_noise=89.4468,
    impulse_noise=92.2640,
    defocus_blur=81.9880,
    glass_blur=82.6268,
    motion_blur=78.5948,
    zoom_blur=79.8360,
    snow=86.6816,
    frost=82.6572,
    fog=81.9324,
    brightness=56.4592,
    contrast=85.3204,
    elastic_transform=64.6056,
    pixelate=71.7840,
    jpeg_compression=60.6500,
)
test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                type='ImageNet',
                data_root='data/imagenet-c',
                data_prefix=f'{corruption}/{severity}',
                pipeline=_base_.test_pipeline,
            )
            for corruption in reference_errors
            for severity in (1, 2, 3, 4, 5)
        ],
    )
)
test_evaluator = dict(
    _delete_=True, type='mmvil.engine.MeanCorruptionError', reference_errors=reference_errors
)
