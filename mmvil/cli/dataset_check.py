# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Check every file of a dataset."""


def check(split, dataset, pipeline, cfg, jobs):
    """Look at all files of a data set, and print what was found.

    Args:
        split (str): Its name.
        dataset: Of :func:`build`.
        pipeline (list[dict]): What the config does with its images.
        cfg (Config): With the model.
        jobs (int): Processes.

    Returns:
        list[tuple[str, str]]: What is wrong, and with which file.
    """
    classes = (dataset.metainfo or {}).get('classes') or ()
    samples = [dataset.get_data_info(i) for i in range(len(dataset))]
    print(f'{split}: {len(samples)} images, {len(classes)} classes')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    look = functools.partial(
        look_at,
        classes=len(classes),
        ignore=getattr(dataset, 'ignore_index', 255),
        load=special_loader(pipeline),
    )
    results = list(each(look, samples, jobs))
    found = [complaint for complaints, _, _ in results for complaint in complaints]
    found += without_partner(dataset)
    sound = [(sample, loaded) for sample, (bad, _, loaded) in zip(samples, results) if not bad]
    found += channel_misfits(sound, pipeline, cfg)
    found += [(what, f'the model of {cfg.filename}') for what in misfits(classes, cfg.model)]
    report(found)
    report_classes(classes, [counts for _, counts, _ in results if counts is not None])
    return found


def each(function, items, jobs):
    """Results of a function in several processes, with a progress bar for who sits there."""
    bar = ProgressBar(len(items), file=sys.stderr) if sys.stderr.isatty() else None
    with multiprocessing.Pool(jobs) as pool:
        for result in pool.imap(function, items, chunksize=8):
            yield result
            if bar is not None:
                bar.update()
    if bar is not None:
        print(file=sys.stderr)


def look_at(sample, classes, ignore, load=None):
    """Look at an image and its label or annotation.

    Returns:
        tuple: list of (what is wrong, file); of each class the number of pixels, or None; and the
        number of channels where ``load`` has read the image, else None.
    """
    complaints, image, counts, channels = [], None, None, None
    try:
        image, channels = read_size(sample, load)
    except ValueError as error:
        complaints.append((f'image {error}', sample['img_path']))

    path, label = sample.get('seg_map_path'), sample.get('gt_label')
    if path is not None:
        try:
            labels = read_annotation(path, image)
            counts = count(labels, sample, classes, ignore)
        except ValueError as error:
            complaints.append((f'annotation {error}', path))
    elif label is not None:
        label = np.atleast_1d(np.asarray(label))
        if classes and not 0 <= label.min() <= label.max() < classes:
            complaints.append((f'label beyond the {classes} classes', sample['img_path']))
        else:
            counts = np.bincount(label, minlength=classes)
    return complaints, counts, channels


def special_loader(pipeline):
    """The part of a pipeline that loads images, or None if it is the usual one of photographs.

    A photograph is checked faster, and more strictly, by Pillow; it has three channels or one.
    """
    steps = [step for step in pipeline if loads(step)]
    usual = dict(imdecode_backend=('cv2', 'pillow', 'turbojpeg'), color_type=('color', 'grayscale'))
    if not steps or all(
        step['type'].endswith('LoadImageFromFile')
        and all(step.get(key, values[0]) in values for key, values in usual.items())
        for step in steps
    ):
        return None
    return build_pipeline(steps)


def read_size(sample, load):
    """Size (width, height) of an image and, where ``load`` reads it, its number of channels.

    Raises:
        ValueError: If it cannot be read.
    """
    path = sample['img_path']
    if load is None:
        with opened(path) as file:
            # What a loader shows: some cameras note down how to turn the picture.
            size = ImageOps.exif_transpose(file).size if file.getexif() else file.size
            file.draft('RGB', (file.width // 8, file.height // 8))  # to the end, but quickly
            file.load()
        return size, None
    check_is_there(path)
    try:
        image = load(dict(sample))['img']
    except Exception as error:
        raise ValueError(f'cannot be read by the config: {one_line(error)}') from error
    if not np.isfinite(image).all():
        raise ValueError('has values that are not finite')
    return image.shape[1::-1], image.shape[2] if image.ndim == 3 else 1


def check_is_there(path):
    """Make sure that a file exists and is not empty.

    Raises:
        ValueError: If it is not so.
    """
    if not os.path.exists(path):
        raise ValueError('missing')
    if os.path.getsize(path) == 0:
        raise ValueError('empty')


class opened:
    """An image file; what is wrong with it becomes a ``ValueError``, here or within the block."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        check_is_there(self.path)
        try:
            self.file = Image.open(self.path)
        except OSError as error:
            raise ValueError('damaged: no image format is recognized') from error
        return self.file

    def __exit__(self, kind, error, trace):
        self.file.close()
        if isinstance(error, (OSError, SyntaxError, EOFError)):
            cut = 'cut off' if 'truncated' in str(error) else f'damaged: {error}'
            raise ValueError(cut) from error


def read_annotation(path, image):
    """Labels of the pixels.

    Raises:
        ValueError: If they cannot be read, or cannot be labels of an image of that size.
    """
    with opened(path) as file:
        if file.mode not in ('L', 'P', '1', 'I', 'I;16'):
            raise ValueError(f'has colors (mode {file.mode}), not one label per pixel')
        labels = np.asarray(file)
        if image is not None and file.size != image:
            raise ValueError('has another size than its image')
    if labels.max() > 255:
        raise ValueError('has labels beyond 255, which the loading cuts off')
    return labels.astype(np.int64)


def count(labels, sample, classes, ignore):
    """Pixels per class, as the loading maps the labels.

    Raises:
        ValueError: If there are labels that belong to no class.
    """
    raw = np.bincount(labels.ravel(), minlength=256)
    counts = np.zeros(256, int)
    label_map = sample.get('label_map') or {}
    unknown = []
    for value in raw.nonzero()[0]:
        label = int(value)
        if sample.get('reduce_zero_label'):
            label = 255 if label in (0, 255) else label - 1
        label = label_map.get(label, label)
        if label == ignore or label == 255:
            continue
        if classes and not 0 <= label < classes:
            unknown.append(int(value))
        else:
            counts[label] += raw[value]
    if unknown:
        less = ' less 1 (reduce_zero_label)' if sample.get('reduce_zero_label') else ''
        raise ValueError(f'has labels that{less} are none of the {classes} classes: {unknown}')
    return counts[: classes or None]


def without_partner(dataset):
    """Annotations without an image, as after half a download."""
    prefix = getattr(dataset, 'data_prefix', {})
    images, maps = prefix.get('img_path'), prefix.get('seg_map_path')
    if not images or not maps or dataset.ann_file:
        return []
    suffix = dataset.seg_map_suffix
    alone = sorted(stems(maps, suffix) - stems(images, dataset.img_suffix))
    return [('annotation without an image', os.path.join(maps, name + suffix)) for name in alone]


def channel_misfits(samples, pipeline, cfg):
    """Images whose channels do not fit the model: one image for each number of channels that the
    loader has found goes through the whole pipeline.

    Args:
        samples (list[tuple[dict, int | None]]): Sound samples, and their channels as loaded.
        pipeline (list[dict]): The pipeline.
        cfg (Config): With the model.

    Yields:
        tuple[str, str]: What is wrong, and with which file.
    """
    kinds = defaultdict(list)
    for sample, loaded in samples:
        kinds[loaded].append(sample)
    for same in kinds.values() if pipeline else ():
        sample = same[0]
        file = sample['img_path']
        if len(same) > 1:
            file += f' and {len(same) - 1} of as many channels'
        try:
            inputs = build_pipeline(pipeline)(copy.deepcopy(sample))['inputs']
        except Exception as error:
            yield f'image cannot pass the pipeline of the config: {one_line(error)}', file
            continue
        channels = inputs.shape[-3]
        for name, expected in expected_channels(cfg):
            if channels != expected:
                yield f'image has {channels} channels after the pipeline, but {name}', file


def expected_channels(cfg):
    """For how many channels a model is made.

    Yields:
        tuple[str, int]: What the config says, and the channels that it means.
    """
    backbone = cfg.model.get('backbone') or {}
    if 'in_channels' in backbone or str(backbone.get('type')).endswith('VisionLSTM'):
        channels = backbone.get('in_channels', 3)
        yield f'the backbone has in_channels={channels}', channels
    for name in ('mean', 'std'):
        values = data_preprocessor(cfg).get(name)
        if values is not None and len(values) != 1:  # one is for all channels
            yield f'{name} of the data_preprocessor has {len(values)} values', len(values)


def misfits(classes, model):
    """Heads of a model that predict another number of classes than the data set has."""
    for name in ('decode_head', 'auxiliary_head', 'head'):
        head = model.get(name)
        number = head.get('num_classes') if isinstance(head, dict) else None
        if classes and number is not None and number != len(classes):
            yield f'num_classes={number} in {head.type}, but the data set has {len(classes)}'
