# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Run a model on an image, a folder of images, a video or a webcam, and draw the predictions.

python tools/demo.py street.jpg configs/upernet_vil_t_ade20k.py checkpoint.pth --out-dir pictures
python tools/demo.py drive.mp4 configs/upernet_vil_t_ade20k.py checkpoint.pth --every 5
python tools/demo.py 0 configs/upernet_vil_t_ade20k.py checkpoint.pth --show
"""

import itertools
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
from mmengine.device import get_device

from mmvil.cli.config import load_config
from mmvil.cli.drawing import make_artist
from mmvil.cli.errors import UserError
from mmvil.cli.inference import ImageReader, build_model, find_images
from mmvil.cli.main import add_config_arguments, at_least, device, make_parser, parse_args, run

VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.gif')


def main():
    args = parse_args(make_demo_parser())
    if Path(args.out_dir).is_file():
        raise UserError(f'--out-dir must be a folder, but {args.out_dir} is a file')
    cfg = load_config(args.config, args.cfg_options)
    path = Path(args.input)
    is_webcam = args.input.isdigit() and not path.exists()
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    if is_video and not path.is_file():
        raise UserError(f'video not found: {path.absolute()}')
    images = None if is_webcam or is_video else find_images(path)
    reader = ImageReader(cfg)
    model = build_model(cfg, args.checkpoint, args.device or get_device())
    if model.dataset_meta['classes'] is None:
        raise UserError(
            f'neither {args.checkpoint} nor the test_dataloader of the config names classes'
        )
    draw = make_artist(model, reader, args.opacity, legend=not args.no_legend)

    out_dir = Path(args.out_dir)
    if images is not None:
        draw_images(images, reader.load, draw, out_dir)
        return
    out_file = out_dir / (f'webcam{path}.mp4' if is_webcam else f'{path.stem}.mp4')
    check_not_input(path, out_file)
    source = int(args.input) if is_webcam else args.input
    draw_video(source, draw, out_file, args.every, args.max_frames, args.show)


def make_demo_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('input', help='image, folder of images, video, or number of a webcam')
    add_config_arguments(parser, 'config file that the checkpoint was trained with')
    add('checkpoint', help='checkpoint file')
    add('--out-dir', default='pictures', help='folder for pictures (PNG) or the video (MP4)')
    opacity = 'opacity of the class colors, 0 to 1'
    add('--opacity', type=at_least(0, float, 1), default=0.5, help=opacity)
    add('--no-legend', action='store_true', help='do not write class names')
    add('--every', type=at_least(1), default=1, metavar='N', help='use every Nth frame of a video')
    add('--max-frames', type=at_least(1), help='stop a video or webcam after this many frames')
    add('--show', action='store_true', help='also show video or webcam in a window; q stops')
    add('--device', type=device, help='cuda, cuda:1, cpu (default: a GPU if there is one)')
    return parser


def check_not_input(path, out_file):
    if out_file.resolve() == path.resolve():
        raise UserError(f'{out_file} is the input; choose another --out-dir')


def draw_images(images, load, draw, out_dir):
    """Draw every image to a PNG with the same name."""
    stems = Counter(image.stem for image in images)
    names = [image.stem if stems[image.stem] == 1 else image.name for image in images]
    out_files = [out_dir / f'{name}.png' for name in names]
    for image, out_file in zip(images, out_files):
        check_not_input(image, out_file)
    start = time.perf_counter()
    for image, out_file in zip(images, out_files):
        drawn, found = draw(load(image))
        out_dir.mkdir(parents=True, exist_ok=True)
        cv2.imencode('.png', drawn)[1].tofile(out_file)
        print(f'{image} -> {out_file}: {found}')
    if len(images) > 1:
        seconds = time.perf_counter() - start
        print(f'{len(images)} images, {len(images) / seconds:.1f} per second')


def draw_video(source, draw, out_file, every=1, max_frames=None, show=False):
    """Draw every Nth frame of a video, or of a webcam given by its number, to a video."""
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        kind = 'webcam' if isinstance(source, int) else 'video'
        raise UserError(f'cannot open the {kind} {source}')
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if 0 < fps < 1000 else 25  # unknown for webcams and some files
    total = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))) // every
    if max_frames:
        total = min(total, max_frames) or max_frames
    of = f' of {total}' if total else ''
    writer, done, last = None, 0, 0.0
    start = time.perf_counter()
    try:
        for position in itertools.count():
            if done == max_frames or not capture.grab():
                break
            if position % every:
                continue
            drawn, found = draw(capture.retrieve()[1])
            if writer is None:
                writer = open_writer(out_file, fps / every, drawn.shape[:2])
            writer.write(drawn)
            done += 1
            seconds = time.perf_counter() - start
            if seconds - last >= (1 if sys.stdout.isatty() else 10):
                last = seconds
                print(f'frame {done}{of}, {done / seconds:.1f} per second: {found}', flush=True)
            if show:
                cv2.imshow(str(source), drawn)
                if cv2.waitKey(1) & 0xFF == ord('q'):
                    break
    except KeyboardInterrupt:
        print()  # the usual way to stop a webcam
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if not done:
        raise UserError(f'no frames in {source}')
    rate = done / (time.perf_counter() - start)
    print(f'{source} -> {out_file}: {done} frames, {rate:.1f} per second')


def open_writer(out_file, fps, size):
    out_file.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(out_file), cv2.VideoWriter_fourcc(*'mp4v'), fps, size[::-1])
    if not writer.isOpened():
        raise UserError(f'OpenCV cannot write the video {out_file}')
    return writer


if __name__ == '__main__':
    run(main)
