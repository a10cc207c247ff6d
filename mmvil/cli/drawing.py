# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Draw predictions on images."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from torch import nn

from .inference import ImageReader, predict, random_palette

MIN_SCORE = 0.5  # for drawn detections


def make_artist(
    model: nn.Module, reader: ImageReader, opacity: float = 0.5, legend: bool = True
) -> Callable:
    """Build a function that runs the model on an image and draws the prediction.

    Args:
        model (nn.Module): Segmentor, classifier or detector from
            :func:`mmvil.cli.inference.build_model`.
        reader (ImageReader): Reads images like the test pipeline.
        opacity (float): Opacity of the class colors. Default: 0.5.
        legend (bool): Write the names of classes. Default: True.

    Returns:
        Callable: Takes a result of ``reader.load``, or a frame (H, W, 3) uint8 in BGR; returns the
        frame with the drawing in BGR, and a line on the predicted classes.
    """
    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    if palette is None:
        palette = random_palette(len(classes))
    colors = np.array(palette, np.float32)[:, ::-1]  # BGR

    def draw(loaded):
        is_frame = isinstance(loaded, np.ndarray)
        frame = loaded if is_frame else reader.picture(loaded['img'])[..., ::-1]
        result = predict(model, reader.prepare(loaded))
        if 'pred_instances' in result:
            found = result.pred_instances[result.pred_instances.scores >= MIN_SCORE].cpu().numpy()
            drawn = _draw_instances(frame, found, colors, opacity)
            present, counts = np.unique(found.labels, return_counts=True)
            texts = [f'{count} {classes[label]}' for label, count in zip(present, counts)]
        elif hasattr(model, 'decode_head'):
            labels = result.pred_sem_seg.data[0].cpu().numpy()
            drawn = overlay(frame, labels, colors, opacity)
            present, counts = np.unique(labels, return_counts=True)
            order = np.argsort(-counts)[:12]
            present, shares = present[order], counts[order] / labels.size
            texts = [f'{classes[label]} {share:.0%}' for label, share in zip(present[:5], shares)]
        else:
            score, label = result.pred_score.max(0)
            text = f'{classes[label]} {score:.1%}'
            return (write_legend(frame, [(text, None)]) if legend else frame), text
        if legend and len(present):
            drawn = write_legend(drawn, [(classes[label], colors[label]) for label in present])
        return drawn, ', '.join(texts) or 'nothing'

    return draw


def overlay(
    image: np.ndarray, labels: np.ndarray, colors: np.ndarray, opacity: float
) -> np.ndarray:
    """Overlay class colors (classes, 3) on an image (H, W, 3) uint8, where its labels (H, W) are
    those of classes.
    """
    known = labels < len(colors)
    drawn = image.astype(np.float32)
    drawn[known] = drawn[known] * (1 - opacity) + colors[labels[known]] * opacity
    return drawn.astype(np.uint8)


def _draw_instances(frame, instances, colors, opacity):
    """Draw boxes and, if there are any, masks of detections, given as arrays."""
    drawn = frame.copy()
    for label, mask in zip(instances.labels, instances.get('masks', ())):
        drawn[mask] = drawn[mask] * (1 - opacity) + colors[label] * opacity
    for label, box in zip(instances.labels, instances.bboxes.round().astype(int).tolist()):
        cv2.rectangle(drawn, box[:2], box[2:], color=colors[label].tolist(), thickness=2)
    return drawn


def write_legend(frame: np.ndarray, entries: list[tuple[str, Sequence[int] | None]]) -> np.ndarray:
    """Write names, each with a color patch, into the lower left corner.

    Args:
        frame (ndarray): (H, W, 3) uint8, BGR; not modified.
        entries (list[tuple]): Name and BGR color, or None for no patch. Entries that do not fit are
            omitted.

    Returns:
        ndarray: (H, W, 3) uint8.
    """
    frame = frame.copy()
    height, width = frame.shape[:2]
    scale = max(0.35, min(height, width) / 900)
    line = round(26 * scale) + 4
    entries = entries[: max(1, (height - 4) // line)]
    sizes = [cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] for name, _ in entries]
    patch = 0 if entries[0][1] is None else line
    top, right = height - line * len(entries) - 4, min(width, max(sizes) + patch + 10)
    frame[max(top, 0) :, :right] //= 3  # dark background
    for row, (name, color) in enumerate(entries):
        bottom = top + line * (row + 1)
        if color is not None:
            corners = (4, bottom - line + 4), (line - 2, bottom - 2)
            cv2.rectangle(frame, *corners, color=[int(x) for x in color], thickness=-1)
        place = (patch + 5, bottom - line // 4)
        white = (255, 255, 255)
        cv2.putText(frame, name, place, cv2.FONT_HERSHEY_SIMPLEX, scale, white, 1, cv2.LINE_AA)
    return frame
