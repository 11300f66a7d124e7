"""Pretrain LOCA: photo -> crops and boxes (workers) -> colours (device, whole batch) -> loca.LOCA -> loop.

`python train.py` draws its own scenes and needs nothing else; `--data DIR` takes any folder of images;
`torchrun --nproc_per_node=N train.py` is the same script on N devices. Every random draw is a function of the
seed and of the step, epoch or image it is for, so a resumed run goes on as if it had never stopped.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import io
import itertools
import json
import math
import multiprocessing.connection
import os
import resource
import signal
import sys
import threading
import time
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import loca

try:
    from torchvision.io import ImageReadMode, decode_image
except (ImportError, RuntimeError):  # a later torchvision without it, or one built for another torch
    decode_image = None  # Pillow reads the same images, more slowly

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in 0..1
REQUEUE = 75  # exit code of a run that was told to stop and has saved (EX_TEMPFAIL)


def first_line(error):
    """What an exception says in its first line, or its kind where it says nothing."""
    return str(error).split("\n")[0] or type(error).__name__


class Problem(Exception):
    """Something that the person at the keyboard can mend, in one line: what, where, what to do."""


def require(good, text):
    """Raise Problem with this text unless `good`."""
    if not good:
        raise Problem(text)


# ---------------------------------------------------------------------------------------------- images

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Files:
    """A list of file names in two arrays, bytes and end offsets: small, and soon sent to a worker process."""

    def __init__(self, names):
        self.text = np.frombuffer(b"".join(names), np.uint8)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        begin = self.ends[i - 1] if i else 0
        return os.fsdecode(self.text[begin : self.ends[i]].tobytes())

    def select(self, indices):
        """The files at `indices`, as a list of the same kind."""
        return Files([os.fsencode(self[i]) for i in indices])


def find_images(folder, cache=None, named="--data"):
    """Names, relative to `folder`, of all images below it, sorted; links are followed once. `cache`: a file
    that keeps the list. Raises Problem for a folder that is missing or has no images, with the flag that
    `named` it."""
    if cache and Path(cache).exists():
        files = Files([])
        try:
            with np.load(cache) as saved:
                files.text, files.ends = saved["text"], saved["ends"]
        except Exception as error:  # numpy, zipfile and zlib each have their own for a damaged file
            raise Problem(f"--cache-list {cache}: not a list of ours, or damaged; delete it") from error
        print(f"{len(files)} image names from {cache} (delete it to list {folder} anew)")
        return files
    root, seen, names = os.fsencode(folder), set(), []
    require(os.path.isdir(root), f"{named} {folder}: there is no such folder")
    for parent, folders, entries in os.walk(root, followlinks=True):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        names += [
            os.path.relpath(os.path.join(parent, name), root)
            for name in sorted(entries)
            if os.fsdecode(name).lower().endswith(EXTENSIONS)
        ]
    require(names, f"{named} {folder}: no images below it (looked for {', '.join(EXTENSIONS)})")
    files = Files(names)
    if cache:
        write_file(cache, lambda file: np.savez(file, text=files.text, ends=files.ends))
    return files


def read_image(path):
    """Decode any image file as upright RGB: uint8 [3, H, W]. Raises what Pillow or the file system raises."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        image = Image.open(io.BytesIO(data))  # reads the header alone, and refuses decompression bombs
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or damaged") from error
    with image:
        if decode_image and image.format == "JPEG" and image.mode in ("RGB", "L"):
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_image(buffer, ImageReadMode.RGB, apply_exif_orientation=True)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: Pillow would clip, not scale
            values = np.asarray(image, np.float32)
            values = values / (65535 if image.mode.startswith("I") else max(values.max(), 1e-6)) * 255
            image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        pixels = np.array(image.convert("RGBA" if "transparency" in image.info else "RGB"))[..., :3]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


class Folder:
    """Images of a folder by number, each uint8 [3, H, W]."""

    def __init__(self, folder, files):
        self.folder, self.files = folder, files

    def __len__(self):
        return len(self.files)

    def name(self, i):
        return os.path.join(self.folder, self.files[i])

    def image(self, i):
        return read_image(self.name(i))


# ---------------------------------------------------------------------------------------- drawn scenes

SCENE_CLASSES = ("sky", "hill", "grass", "road", "house", "tree", "car", "person", "fence", "lamp")
SCENE_PALETTE = (
    (120, 180, 230), (140, 120, 160), (90, 170, 60), (110, 110, 110), (190, 90, 60),
    (20, 100, 40), (40, 60, 200), (240, 180, 40), (150, 110, 60), (230, 60, 180),
)  # fmt: skip
_GRAIN = (6, 14, 40, 16, 22, 48, 5, 8, 18, 4)  # strength of the texture on each class, in grey levels


class _Canvas:
    """Draws every part twice, at twice the size: its colour on the picture, its class on the label map."""

    def __init__(self, width, height):
        self.pictures = [Image.new("RGB", (2 * width, 2 * height)), Image.new("L", (2 * width, 2 * height))]
        self.pens = [ImageDraw.Draw(picture) for picture in self.pictures]

    def part(self, shape, points, colour, label):
        points = [round(2 * x) for x in points]
        for pen, fill in zip(self.pens, (tuple(colour), SCENE_CLASSES.index(label))):
            getattr(pen, shape)(points, fill=fill)

    def box(self, x, y, width, height, colour, label, shape="rectangle"):
        self.part(shape, (x, y, x + max(width, 0.5), y + max(height, 0.5)), colour, label)


def _shade(colour, factor):
    return tuple(min(255, int(c * factor)) for c in colour)


# fmt: off
def _house(canvas, r, x, y, s):
    wall, roof = r.randint(120, 250, 3), (r.randint(90, 190), r.randint(40, 90), r.randint(30, 80))
    width, height = s * r.uniform(0.9, 1.5), s * r.uniform(0.6, 1.0)
    canvas.box(x + 0.7 * width, y - height - 0.45 * s, 0.1 * s, 0.4 * s, _shade(roof, 0.6), "house")  # chimney
    canvas.box(x, y - height, width, height, wall, "house")
    peak = (x + width / 2, y - height - s * r.uniform(0.35, 0.6))
    eaves = (x - 0.08 * s, y - height, *peak, x + width + 0.08 * s, y - height)
    canvas.part("polygon", eaves, roof, "house")
    canvas.box(x + 0.42 * width, y - 0.4 * s, 0.18 * s, 0.4 * s, _shade(roof, 0.8), "house")  # door
    for column in (0.1, 0.72):
        at, top, tall = x + column * width, y - 0.8 * height, 0.3 * height
        canvas.box(at, top, 0.18 * width, tall, (60, 80, 110), "house")
        canvas.box(x + (column + 0.08) * width, top, 0.02 * width, tall, (235,) * 3, "house")


def _tree(canvas, r, x, y, s):
    green = (r.randint(20, 90), r.randint(80, 160), r.randint(20, 60))
    canvas.box(x - 0.07 * s, y - 0.6 * s, 0.14 * s, 0.6 * s, (96, 66, 40), "tree")
    if r.rand() < 0.4:  # a fir
        for i in range(3):
            half, top = (0.42 - 0.1 * i) * s, y - (0.9 + 0.3 * i) * s
            points = (x - half, top + 0.5 * s, x, top, x + half, top + 0.5 * s)
            canvas.part("polygon", points, _shade(green, 0.7 + 0.1 * i), "tree")
        return
    for _ in range(7):
        radius = s * r.uniform(0.18, 0.34)
        cx, cy = x + s * r.uniform(-0.3, 0.3), y - s * r.uniform(0.7, 1.3)
        leaf = _shade(green, r.uniform(0.7, 1.2))
        canvas.box(cx - radius, cy - radius, 2 * radius, 2 * radius, leaf, "tree", "ellipse")


def _car(canvas, r, x, y, s):
    paint, facing = r.randint(20, 240, 3), r.choice([-1, 1])
    canvas.box(x - 0.5 * s, y - 0.34 * s, s, 0.24 * s, paint, "car")
    cabin = ((-0.3, -0.34), (-0.2, -0.56), (0.14, -0.56), (0.3, -0.34))
    outline = [v for a, b in cabin for v in (x + facing * a * s, y + b * s)]
    canvas.part("polygon", outline, _shade(paint, 0.9), "car")
    for a in (-0.17, 0.01):
        canvas.box(x + a * s, y - 0.52 * s, 0.14 * s, 0.15 * s, (170, 205, 225), "car")
    for a in (-0.28, 0.28):
        canvas.box(x + (a - 0.11) * s, y - 0.22 * s, 0.22 * s, 0.22 * s, (25, 25, 28), "car", "ellipse")
        canvas.box(x + (a - 0.05) * s, y - 0.16 * s, 0.1 * s, 0.1 * s, (170,) * 3, "car", "ellipse")
    canvas.box(x + facing * 0.46 * s - 0.03 * s, y - 0.3 * s, 0.06 * s, 0.08 * s, (255, 240, 150), "car")


def _person(canvas, r, x, y, s):
    skin, shirt = (r.randint(120, 240), r.randint(90, 180), r.randint(70, 140)), r.randint(30, 250, 3)
    stride, sleeve = s * r.uniform(0.02, 0.1), _shade(shirt, 0.85)
    for side in (-1, 1):
        canvas.box(x + side * stride - 0.05 * s, y - 0.48 * s, 0.09 * s, 0.48 * s, (45, 50, 80), "person")
        canvas.box(x + side * 0.15 * s - 0.03 * s, y - 0.8 * s, 0.07 * s, 0.36 * s, sleeve, "person")
    canvas.box(x - 0.13 * s, y - 0.84 * s, 0.26 * s, 0.4 * s, shirt, "person")
    canvas.box(x - 0.08 * s, y - s, 0.16 * s, 0.17 * s, skin, "person", "ellipse")
    canvas.box(x - 0.085 * s, y - 1.01 * s, 0.17 * s, 0.07 * s, _shade(skin, 0.35), "person", "ellipse")


def _fence(canvas, r, x, y, s):
    wood = (r.randint(110, 200), r.randint(90, 150), r.randint(60, 110))
    for rail in (0.15, 0.32):
        canvas.box(x, y - rail * s, 1.6 * s, 0.05 * s, _shade(wood, 0.8), "fence")
    for i in range(9):
        canvas.box(x + i * 0.19 * s, y - 0.42 * s, 0.09 * s, 0.42 * s, wood, "fence")


def _lamp(canvas, r, x, y, s):
    arm, steel = r.choice([-1, 1]) * 0.25 * s, (70, 75, 80)
    canvas.box(x - 0.025 * s, y - 1.5 * s, 0.05 * s, 1.5 * s, steel, "lamp")
    canvas.box(min(x, x + arm), y - 1.5 * s, abs(arm), 0.04 * s, steel, "lamp")
    canvas.box(x + arm - 0.07 * s, y - 1.5 * s, 0.14 * s, 0.1 * s, (250, 235, 170), "lamp", "ellipse")


def _backdrop(canvas, r, width, height, horizon):
    """Sky with clouds, hills, grass and a road -> where cars drive."""
    sky = (r.randint(90, 190), r.randint(140, 210), r.randint(190, 250))
    for i in range(12):
        colour = _shade(sky, 0.75 + 0.45 * i / 12)
        canvas.box(0, horizon * i / 10, width, horizon / 10 + 1, colour, "sky")
    for _ in range(r.randint(0, 5)):
        x, y, s = r.uniform(0, width), r.uniform(0, 0.7 * horizon), height * r.uniform(0.04, 0.1)
        for k in range(4):
            white = (r.randint(225, 256),) * 3
            canvas.box(x + k * s * 0.7, y - k % 2 * s * 0.3, 1.5 * s, s, white, "sky", "ellipse")
    hill = (r.randint(70, 140), r.randint(90, 140), r.randint(90, 150))
    for _ in range(r.randint(1, 4)):
        x, half, top = r.uniform(0, width), width * r.uniform(0.2, 0.5), height * r.uniform(0.08, 0.25)
        foot = horizon + 2
        points = (x - half, foot, x - 0.3 * half, horizon - 0.8 * top, x, horizon - top, x + half, foot)
        canvas.part("polygon", points, _shade(hill, r.uniform(0.8, 1.2)), "hill")
    green = (r.randint(70, 130), r.randint(120, 170), r.randint(40, 80))
    canvas.box(0, horizon, width, height, green, "grass")
    grey, white = (r.randint(80, 140),) * 3, (225, 225, 210)
    if r.rand() < 0.6:  # a road across
        top, depth = horizon + (height - horizon) * r.uniform(0.3, 0.6), height * r.uniform(0.13, 0.22)
        canvas.box(0, top, width, depth, grey, "road")
        for k in range(8):
            canvas.box(k * width / 7, top + 0.47 * depth, width / 14, depth * 0.06, white, "road")
        return top + 0.9 * depth
    x, near = width * r.uniform(0.3, 0.7), width * r.uniform(0.2, 0.4)  # a road to the horizon
    for far, close, colour in ((width * 0.03, near, grey), (1, 4, white)):
        edges = (x - far, horizon, x + far, horizon, x + close, height, x - close, height)
        canvas.part("polygon", edges, colour, "road")
    return horizon + (height - horizon) * r.uniform(0.4, 0.9)


_THINGS = ((_house, 0.34, 3), (_tree, 0.3, 6), (_fence, 0.18, 2), (_lamp, 0.26, 2), (_person, 0.2, 4), (_car, 0.3, 3))
# fmt: on


def _noise(r, width, height, cell):
    grid = r.randint(0, 256, (height // cell + 2, width // cell + 2)).astype(np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC), np.int32) - 128


def draw_scene(seed, width=256, height=192):
    """A street scene of parts: image uint8 [H, W, 3] and labels uint8 [H, W], indices into SCENE_CLASSES.

    The same seed draws the same scene on every machine: an RNG whose stream is frozen, and integer pixels.
    """
    r = np.random.RandomState(seed)
    canvas = _Canvas(width, height)
    horizon = height * r.uniform(0.3, 0.55)
    ground = height - horizon
    lane, placed = _backdrop(canvas, r, width, height, horizon), []
    for draw, size, most in _THINGS:
        for _ in range(r.randint(0, most + 1)):
            depth = r.uniform(0.08, 1)
            y = lane if draw is _car and r.rand() < 0.7 else horizon + ground * depth
            placed.append((y, draw, r.uniform(0, width), size))
    for y, draw, x, size in sorted(placed, key=lambda thing: thing[0]):  # far things first
        draw(canvas, r, x, y, height * size * (0.35 + 0.9 * (y - horizon) / ground))
    picture, labels = canvas.pictures
    image = np.asarray(picture.reduce(2), np.int32)
    labels = np.asarray(labels.resize((width, height), Image.NEAREST))
    grain = sum(_noise(r, width, height, cell) for cell in (1, 3, 12)) // 2
    grain = grain[..., None] * np.array(_GRAIN)[labels][..., None] // 100
    image = (image + grain) * r.randint(70, 116) // 100
    return image.clip(0, 255).astype(np.uint8), labels


class Scenes:
    """Drawn scenes by number, each uint8 [3, H, W]; `first` is the seed of number 0."""

    def __init__(self, count, first=0):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def name(self, i):
        return f"scene {self.first + i}"

    def image(self, i):
        return torch.from_numpy(draw_scene(self.first + i)[0]).permute(2, 0, 1)


# ----------------------------------------------------------------------------------------------- views


def random_box(height, width, area, rng):
    """A random crop of an image, (top, left, height, width): its share of the image's area drawn from `area`,
    its aspect ratio from 0.75..1.33; the whole image after 100 tries (released pipeline)."""
    for _ in range(100):
        pixels, ratio = rng.uniform(*area) * height * width, rng.uniform(0.75, 1.33)
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, height, width


def read_or_next(source, number, read):
    """`read` the image of that number, or the next one that can be read -> what it gives, and '' or what was
    wrong with the first. Raises Problem after 100 in a row."""
    wrong, most = "", min(len(source), 100)
    for i in range(most):
        try:
            return read((number + i) % len(source)), wrong
        except Exception as error:  # a damaged file can make a decoder say anything
            wrong = wrong or f"{source.name(number)!r}: {first_line(error)}"
    raise Problem(f"{most} images in a row cannot be read, the first is {wrong}")


class Views(Dataset):
    """One image -> uint8 crops of one reference, one random query and the focal queries, all from one decode.

    Keys are (epoch, number): both seed the crops, so a key always gives the same views. Items: reference and
    query [3, S, S], focal [F, 3, s, s], boxes [2 + F, 4], flips [2 + F], unreadable: '' or what was wrong
    with a file that another one stands in for.
    """

    def __init__(self, source, settings):
        self.source, self.s = source, settings

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        s, rng = self.s, np.random.default_rng((self.s["seed"], *key))
        image, wrong = read_or_next(self.source, key[1], self.source.image)
        areas = [s["large_area"]] * 2 + [s["focal_area"]] * s["focal"]
        boxes = [random_box(*image.shape[1:], area, rng) for area in areas]
        flips = rng.random(len(boxes)) < 0.5
        flips[0] = False  # the reference is never mirrored
        sizes = [s["image_size"]] * 2 + [s["focal_size"]] * s["focal"]
        views = [crop(image, *view) for view in zip(boxes, sizes, flips)]
        none = image.new_zeros(0, 3, s["focal_size"], s["focal_size"])
        return {
            "reference": views[0],
            "query": views[1],
            "focal": torch.stack(views[2:]) if s["focal"] else none,
            "boxes": torch.tensor(boxes),
            "flips": torch.from_numpy(flips),
            "unreadable": wrong,
        }


def crop(image, box, size, flip):
    """Cut `box` out of uint8 [3, H, W] and resize it, bilinear with antialiasing -> uint8 [3, size, size]."""
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width]
    view = F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]
    return view.flip(-1) if flip else view


def order(images, batch, seed, first, last, rank=0, world=1, accumulate=1):
    """Batches of keys (epoch, number) for the steps first..last-1: a new permutation each epoch, cut to whole
    batches. Each step's images are the same however many processes and micro-batches share them."""
    steps, shuffled = images // batch, None
    for step in range(first, last):
        epoch, i = divmod(step, steps)
        if shuffled is None or i == 0:
            shuffled = np.random.default_rng((seed, epoch)).permutation(images)
        numbers = shuffled[i * batch : (i + 1) * batch]
        for part in numbers.reshape(accumulate, world, -1)[:, rank]:
            yield [(epoch, int(number)) for number in part]


def ignore_signals():
    """A stop is the main process's to handle, though schedulers and terminals send it to the whole group."""
    return [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)]


def start_worker(worker):
    """A worker ends with the process that it reads for, also where that one is killed."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    ignore_signals()
    threading.Thread(target=end_with_parent, daemon=True).start()


@functools.cache
def worker_server():
    """Worker processes are forked from a small server process, not from this one: a fork of a process with
    communication threads can come up with a lock that nobody holds any more, and hang (Python 3.11)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision"] if decode_image else ["torch"])
    handlers = ignore_signals()  # the server inherits it
    forkserver.ensure_running()
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
        signal.signal(number, handler)
    return context


def read_batches(dataset, workers, device, **sampling):
    """Yield what worker processes read from `dataset`, `sampling` being a batch_sampler, or sampler and
    batch_size. Raises Problem where one of them died."""
    loader = DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker,
        multiprocessing_context=worker_server() if workers else None,
        **sampling,
    )
    others = multiprocessing.active_children()
    batches = iter(loader)  # starts them
    workers = {w.sentinel: w for w in multiprocessing.active_children() if w not in others}
    try:
        yield from batches
    except Problem as problem:  # a worker's comes wrapped in its traceback
        raise Problem(str(problem).rpartition("Problem: ")[2].strip()) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        dead = [str(workers[end].pid) for end in multiprocessing.connection.wait(workers, timeout=1)]
        if not dead:
            raise
        raise Problem(
            f"loader worker {', '.join(dead)} died, most likely because memory ran out: try fewer --workers, in a "
            "container more shared memory (/dev/shm); the same command goes on from the last checkpoint"
        ) from error
    finally:
        del batches  # they are told to end
        for worker in workers.values():
            worker.kill()  # one that has not, as it ignores what this process would end it with


def feed(dataset, workers, device, **sampling):
    """Yield the batches on `device`; on CUDA the next one is copied while the current step runs."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ready = None
    for batch in read_batches(dataset, workers, device, **sampling):
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            moved = {
                k: v.to(device, non_blocking=stream is not None) if torch.is_tensor(v) else v
                for k, v in batch.items()
            }
        if ready is not None:
            yield ready
        if stream:
            torch.cuda.current_stream(device).wait_stream(stream)
            for value in moved.values():
                if torch.is_tensor(value):
                    value.record_stream(torch.cuda.current_stream(device))
        ready = moved
    if ready is not None:
        yield ready


# --------------------------------------------------------------------------------------------- colours

GREY = (0.2989, 0.587, 0.114)
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
TO_RGB = tuple(map(tuple, np.linalg.inv(YIQ).tolist()))


@functools.cache
def constant(values, device):
    """Numbers as a float32 tensor on the device, made once: every such copy to a GPU makes the host wait."""
    return torch.tensor(values, device=device)


def draw_jitter(count, device):
    """Draw colour jitter for `count` views: four operations each, in an order of its own, as x -> M x + b + c
    mean(x).

    Returns M [V, 4, 3, 3], b [V, 4, 3, 1], c [V, 4, 1, 1]. Brightness adds u(-0.4, 0.4); contrast about the
    channel's mean by u(0.6, 1.4); saturation by u(0.8, 1.2); hue turned by u(-0.1, 0.1) of the circle.
    Saturation and hue are linear in YIQ. One view in five is left as it is.
    """

    def uniform(low, high):
        return torch.empty(count, device=device).uniform_(low, high)

    eye, grey = torch.eye(3, device=device), constant(GREY, device).expand(3, 3)
    contrast, saturation, angle = uniform(0.6, 1.4), uniform(0.8, 1.2), uniform(-0.1, 0.1) * 2 * math.pi
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=-1).view(-1, 3, 3)
    matrix = torch.stack(
        [
            eye.expand(count, 3, 3),
            contrast[:, None, None] * eye,
            saturation[:, None, None] * eye + (1 - saturation)[:, None, None] * grey,
            constant(TO_RGB, device) @ turn @ constant(YIQ, device),
        ],
        dim=1,
    )  # V,4,3,3
    shift = torch.stack([uniform(-0.4, 0.4), zero, zero, zero], dim=1)  # V,4
    of_mean = torch.stack([zero, 1 - contrast, zero, zero], dim=1)  # V,4
    order = torch.rand(count, 4, device=device).argsort(1)
    matrix, shift, of_mean = (loca.take(x, order) for x in (matrix, shift, of_mean))
    jitter = torch.rand(count, 1, device=device) < 0.8
    matrix = torch.where(jitter[..., None, None], matrix, eye)
    shift, of_mean = shift * jitter, of_mean * jitter
    return matrix, shift[..., None, None].expand(-1, -1, 3, -1), of_mean[..., None, None]


def draw_blur(count, side, probability, device):
    """Kernels [V, k] of a Gaussian blur for some of `count` views: sigma u(0.1, 2), k a tenth of the side; the
    others' leave a view as it is."""
    radius = side // 10 // 2
    sigma = torch.empty(count, 1, device=device).uniform_(0.1, 2.0)
    taps = torch.arange(-radius, radius + 1, device=device)
    chosen = torch.rand(count, 1, device=device) < probability
    return torch.where(chosen, (-(taps**2) / (2 * sigma**2)).softmax(-1), (taps == 0).float())


def blur(x, kernels):
    """Blur each of the views [V, 3, s, s] with its own kernel of [V, k], along rows and columns."""
    kernels = kernels.repeat_interleave(3, 0)  # 3V,k
    radius = kernels.shape[1] // 2
    flat = F.pad(x.flatten(0, 1)[None], (radius,) * 4, mode="reflect")  # 1,3V,s+2r,s+2r
    flat = F.conv2d(flat, kernels[:, None, :, None], groups=len(kernels))
    return F.conv2d(flat, kernels[:, None, None, :], groups=len(kernels)).view_as(x)


def colours(views, solarize=0.0, blur_probability=0.0):
    """Random colours for a batch of views, each with its own parameters: uint8 [V, 3, s, s] -> normalised
    float32.

    Jitter with values clipped to 0..1 after each operation, greyscale with probability 0.2, blur and
    solarisation with the given ones (released pipeline). No value goes back to the host. On the CPU as
    many views at a time as its cache holds.
    """
    device, count, side = views.device, len(views), views.shape[-1]
    mean, std = (constant(values, device)[:, None] for values in (MEAN, STD))
    jitter = draw_jitter(count, device)
    grey, eye = torch.rand(count, 1, 1, device=device) < 0.2, torch.eye(3, device=device)
    mix = torch.where(grey, constant(GREY, device).expand(3, 3), eye)  # V,3,3
    kernels = draw_blur(count, side, blur_probability, device)
    top = 2 - (torch.rand(count, 1, 1, device=device) < solarize).float()  # V,1,1: 1 where solarised
    result = torch.empty(views.shape, device=device)

    fitting = max(1, 2**16 // side**2) if device.type == "cpu" else count
    parts = [x.split(fitting) for x in (views.flatten(2), result.flatten(2), *jitter, mix, kernels, top)]
    for x, out, matrix, shift, of_mean, mix, kernels, top in zip(*parts):
        x = x.float().mul_(1 / 255)  # V,3,ss
        spare = torch.empty_like(x)
        for k in range(4):
            bias = shift[:, k] + of_mean[:, k] * x.mean(-1, keepdim=True)  # V,3,1
            x, spare = torch.bmm(matrix[:, k], x, out=spare).add_(bias).clamp_(0, 1), x
        if blur_probability or solarize:
            x, mix = mix @ x, eye.expand_as(mix)
        if blur_probability:
            x = blur(x.unflatten(2, (side, side)), kernels).flatten(2)
        if solarize:  # 1 - x from 0.5 on; the other views, which 2 - x is never below, stay
            x = torch.minimum(x, top - x)
        torch.bmm(mix / std, x, out=out).sub_(mean / std)
    return result


def plain_colours(views):
    """Normalise without augmentation: uint8 [..., 3, s, s] -> float32."""
    mean, std = (constant(values, views.device)[:, None, None] for values in (MEAN, STD))
    return (views / 255 - mean) / std


def to_views(batch, s, augment=True):
    """A collated batch of Views on the device -> the views of loca.LOCA.forward, with colours and targets."""
    reference, query, focal = batch["reference"], batch["query"], batch["focal"]
    if augment:
        chances = (1.0, 0.1, 0.5) if s["blur"] else (0.0, 0.0, 0.0)  # reference, random query, focal queries
        reference = colours(reference, blur_probability=chances[0])
        query = colours(query, solarize=0.2, blur_probability=chances[1])
        if s["focal"]:
            focal = colours(focal.flatten(0, 1), blur_probability=chances[2]).view_as(focal)
    else:
        reference, query, focal = plain_colours(reference), plain_colours(query), plain_colours(focal)
    boxes, flips = batch["boxes"], batch["flips"]
    large, small = s["image_size"], s["focal_size"]
    grid, focal_grid = large // s["patch_size"], small // s["patch_size"]
    targets = loca.patch_targets(boxes[:, 0], boxes[:, 1], flips[:, 1], large, grid, grid)
    focal_targets = loca.patch_targets(boxes[:, :1], boxes[:, 2:], flips[:, 2:], small, focal_grid, grid)
    return {
        "reference": reference, "query": query, "query_targets": targets, "focal": focal, "focal_targets": focal_targets,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- schedules


def learning_rate(step, steps, warmup, peak):
    """Linear from 0 over `warmup` steps, then a cosine to 1 % of the peak at the last step."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def teacher_momentum(step, steps, start):
    """From `start` to 1 by a cosine over all steps."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


def parameter_groups(model, weight_decay):
    """Weight decay on tensors of two and more dimensions alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


# ------------------------------------------------------------------------------- processes, run folder


class Processes:
    """This process's device and its place among all (torchrun's environment); one alone without torchrun."""

    def __init__(self, device=None):
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.main = self.rank == 0
        if device is None:
            mps = torch.backends.mps.is_available()
            device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        try:
            self.device = torch.device(f"cuda:{self.local}" if device == "cuda" else device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise Problem(f"--device {device}: {first_line(error)}") from error
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
        if self.device.type == "cpu" and sys.platform == "linux":
            keep_freed_memory()
        if self.world > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            device_id = self.device if backend == "nccl" else None
            store = next(dist.rendezvous("env://", self.rank, self.world))[0]
            # after a restart by torchrun the store still has the dead processes' addresses
            self.store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            where = {"store": self.store, "rank": self.rank, "world_size": self.world, "device_id": device_id}
            dist.init_process_group(backend, timeout=timedelta(minutes=10), **where)
        self.stop = None  # the signal that asked this run to stop

    def say(self, *words):
        if self.main:
            print(*words, flush=True)

    def sum(self, values):
        """Sum a vector of numbers, a tensor or a list, over all processes -> list of floats."""
        total = torch.as_tensor(values, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def listen(self):
        """From now on SIGTERM and SIGINT ask for a stop after a save; one that comes over a second later ends
        the process at once. Until then it is the same one, which schedulers and torchrun both pass on."""

        def ask(number, frame):
            if self.stop is None:
                self.stop, self.asked = number, time.monotonic()
            elif time.monotonic() > self.asked + 1:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ask)

    def wrap(self, model, **options):
        """The model under DDP where there are several processes."""
        if self.world == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **options)


def keep_freed_memory():
    """Let glibc keep freed memory for the next step; it would give large arrays back and take them page by page."""
    for parameter, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: none apart; M_TRIM_THRESHOLD: none given back
        ctypes.CDLL(None).mallopt(parameter, value)


def autocast(precision, device):
    """The precision context: bf16 autocast or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def choose_precision(device, asked=None):
    """'bf16' where it is fast, else 'float32', unless one is asked for."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        fast = can.get("avx512_bf16", False) or can.get("amx_bf16", False)
    return asked or ("bf16" if fast else "float32")


def write_file(path, write):
    """Let `write` fill a file under a temporary name, then rename: a file of this name is always whole. Raises
    Problem where the disk is full or the folder cannot be written."""
    partial = Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save says in a RuntimeError what the file system said
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise Problem(f"cannot write {path}: {reason}; what was saved before is untouched") from error


def save_file(path, content):
    """Write a checkpoint."""
    write_file(path, lambda file: torch.save(content, file))


def save_picture(path, picture):
    """Write a PNG."""
    write_file(path, lambda file: picture.save(file, "PNG"))


def save_text(path, text):
    """Write a text file."""
    write_file(path, lambda file: file.write(text.encode()))


def load_file(path):
    """Read a checkpoint of ours. Raises Problem where it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception of its own for a damaged file
        raise Problem(f"cannot read the checkpoint {path}: {first_line(error)}") from error


def read_records(path):
    """The records of a metrics.jsonl; a last line that was only half written is left out."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]


class Log:
    """metrics.jsonl, one record a line; records from `step` on, of a run that went further, are cut off."""

    def __init__(self, folder, step, tensorboard=False):
        self.path = Path(folder) / "metrics.jsonl"
        records = read_records(self.path) if self.path.exists() else []
        kept = [json.dumps(record) for record in records if record["step"] < step]
        save_text(self.path, "".join(f"{line}\n" for line in kept))
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise Problem("--tensorboard needs a package: pip install tensorboard") from error
            self.board = SummaryWriter(folder, purge_step=step)

    def write(self, record):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise Problem(f"cannot write {self.path}: {error}; what was saved before is untouched") from error
        if self.board:
            for name, value in record.items():
                self.board.add_scalar(name, value, record["step"])
            self.board.flush()


def peak_memory(device):
    """Largest memory this process has held, in GiB: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def set_seed(*parts):
    """Seed torch on all devices from several numbers, without waiting for any."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1)


# ---------------------------------------------------------------------------------------------- model

RUN_ONLY = {
    "out", "workers", "device", "precision", "compile", "grad_checkpoint", "log_every", "save_minutes", "keep", "tensorboard",
    "cache_list", "val_every", "accumulate", "world", "small", "bench", "show", "curves", "eval_only", "checkpoint", "predict",
    "multi_scale", "window_batch", "split", "evaluations", "lr", "warmup_epochs", "clip",
}  # fmt: skip  # settings that a resumed run may change


def build(s):
    """The LOCA that settings describe, on the CPU."""
    encoder = loca.ViT(
        s["image_size"], s["patch_size"], s["dim"], s["depth"], s["heads"], s["mlp_dim"], s["drop_path"]
    )
    encoder.grad_checkpoint = s["grad_checkpoint"]
    if s["fixed_positions"]:
        positions = loca.sine_positions(encoder.grid, encoder.dim)
        encoder.pos_embed = nn.Parameter(positions, requires_grad=False)
    elif s["position_std"]:
        nn.init.normal_(encoder.pos_embed, std=s["position_std"])
    names = (
        "head_hidden", "bottleneck", "masking_ratio", "masking", "query_tokens", "student_temperature",
        "teacher_temperature", "position_weight", "feature_weight", "single_image",
    )  # fmt: skip
    prototypes = s["prototypes"] if s["feature_weight"] and not s["single_image"] else 0
    return loca.LOCA(encoder, prototypes, **{name: s[name] for name in names})


def open_data(s, processes):
    """Training and held-out images as the settings name them."""
    if s["data"] is None:
        return Scenes(s["scenes"]), Scenes(s["val_images"], first=10**6)
    if not processes.main and s["cache_list"]:  # the first process lists the folder, for hours if need be
        processes.store.wait(["listed"], timedelta(days=1))
    files = find_images(s["data"], s["cache_list"])
    if processes.main and processes.world > 1 and s["cache_list"]:
        processes.store.set("listed", "")
    if s["val"]:
        held_out = find_images(s["val"], named="--val")
        chosen = np.random.default_rng(s["seed"]).permutation(len(held_out))[: s["val_images"]]
        return Folder(s["data"], files), Folder(s["val"], held_out.select(np.sort(chosen)))
    count = min(s["val_images"], len(files) // 10)
    order = np.random.default_rng(s["seed"]).permutation(len(files))
    train = files.select(np.sort(order[count:])) if count else files
    return Folder(s["data"], train), Folder(s["data"], files.select(np.sort(order[:count])))


# ------------------------------------------------------------------------------------------------ loop


class Window:
    """Sums of named terms between two log lines, on the device: nothing waits for them until they are read."""

    def __init__(self, names, processes, images, saved=None):
        self.names, self.processes = names, processes
        self.share, self.seen, self.unreadable = images // processes.world, 0, set()
        # the first bad step and its terms
        self.failed = torch.full((1 + len(names),), -1.0, device=processes.device)
        self.clear()
        if saved is not None:
            self.sums, self.count = saved[1:].to(processes.device), int(saved[0])
            self.restored = self.count

    def clear(self):
        self.sums, self.count = torch.zeros(len(self.names), device=self.processes.device), 0
        self.restored = 0  # steps in it that an earlier process made
        self.begin, self.waited = time.perf_counter(), 0.0

    def state(self):
        """What a checkpoint keeps of the window under way."""
        return torch.cat([torch.tensor([float(self.count)]), self.sums.cpu()])

    def fetch(self, batches):
        """The next batch, its waiting time counted, its unreadable files named once each. Raises Problem where
        they are over 5 % of the images."""
        begin = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - begin
        for wrong in set(filter(None, batch["unreadable"])) - self.unreadable:
            self.unreadable.add(wrong)
            text = f"warning: unreadable image {wrong}; another one stands in for it"
            print(text, file=sys.stderr, flush=True)
        self.seen += len(batch["unreadable"])
        if len(self.unreadable) > 0.05 * min(self.share, max(self.seen, 400)):
            count = len(self.unreadable)
            raise Problem(
                f"{count} of the images read so far cannot be decoded, over 5 %: see the warnings above"
            )
        return batch

    def add(self, step, micro_losses, gradient_norm):
        """Add one step: the mean of its micro-batches' terms. The gradient norm, the last term, is the same on
        all ranks, and not finite on all where one rank's loss is not."""
        micro = len(micro_losses)
        means = [sum(losses[name].detach() for losses in micro_losses) / micro for name in self.names[:-1]]
        terms = torch.stack([value.float() for value in (*means, gradient_norm)])
        self.sums, self.count = self.sums + terms, self.count + 1
        first = (self.failed[0] < 0) & ~gradient_norm.isfinite()
        self.failed = torch.where(first, torch.cat([terms.new_full((1,), step), terms]), self.failed)

    def check(self):
        """Raise Problem, on all ranks alike, where a step's gradient was not finite."""
        step, *terms = self.failed.tolist()
        if step >= 0:
            values = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.names, terms))
            raise Problem(
                f"step {int(step)}: the loss or its gradient is not finite; rank {self.processes.rank} had {values}. "
                "The last checkpoint is untouched: the same command goes on from it, with a smaller --lr or in float32"
            )

    def read(self, batch):
        """Means over the window and all processes, images per second, share of waiting; then starts anew."""
        seconds = time.perf_counter() - self.begin
        record = dict(zip(self.names, self.processes.sum(self.sums / (self.count * self.processes.world))))
        speed, waiting = (self.count - self.restored) * batch / seconds, self.waited / seconds
        self.clear()
        return {**record, "images_per_second": speed, "waiting": waiting}


class Run:
    """What surrounds a training loop: the checkpoint at its start; log, evaluation and files on the way.

    A subclass sets images, epoch_images, steps, s, optimizer and parts (what a checkpoint holds, by name), calls
    begin, and gives evaluate_now, evaluate and save.
    """

    def __init__(self, s, processes):
        self.s, self.processes, self.out = s, processes, Path(s["out"])

    def begin(self, terms, title):
        """Go on from the run folder's last checkpoint if it has one; open the log; say what starts."""
        s, world = self.s, self.processes.world
        self.first, window = self.resume()
        if self.processes.sum([float(self.first)])[0] != self.first * world:
            raise Problem(
                f"--out {self.out}: not all processes see the same checkpoint; use a folder that all machines share"
            )
        self.window = Window(terms, self.processes, len(self.images), window)
        self.log = Log(self.out, self.first + 1, s.get("tensorboard")) if self.processes.main else None
        self.saved_at = time.monotonic()
        self.processes.say(
            f"{world} process{'es' * (world > 1)} on {self.processes.device.type}, {s['precision']}; "
            f"{s['batch'] // world // s['accumulate']} images per device x {world} x {s['accumulate']} accumulated = "
            f"batch {s['batch']}\n{title}; {self.steps} steps, from {self.first}; in {self.out}"
        )
        if self.processes.main:
            save_text(self.out / "settings.json", json.dumps(s, indent=1) + "\n")

    def resume(self):
        """Load the last checkpoint -> steps done and the sums of the window under way."""
        path = self.out / "last.pt"
        if not path.exists():
            return 0, None
        saved = load_file(path)
        check_same_run(path, saved["settings"], self.s, self.processes)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.best = saved["best"]
        self.processes.say(f"resuming {path} at step {saved['step']}")
        return saved["step"], saved["window"]

    def batches(self, dataset, count):
        """This process's micro-batches, of numbers below `count`, from the first step on."""
        s, p = self.s, self.processes
        steps = (self.first, self.steps)
        keys = order(count, s["batch"], s["seed"], *steps, p.rank, p.world, s["accumulate"])
        return feed(dataset, s["workers"], p.device, batch_sampler=keys)

    def after_step(self, done):
        """Log, evaluate and save where it is time to -> whether the run was asked to stop and has saved."""
        s, p = self.s, self.processes
        evaluate_now, stop = self.evaluate_now(done), p.stop is not None
        log_now = done % s["log_every"] == 0 or evaluate_now
        if log_now or p.device.type == "cpu":  # where reading the figures makes no device wait
            self.window.check()
        if log_now:
            stop = p.sum([float(stop)])[0] > 0
            self.report(done, self.window.read(s["batch"]))
        elif p.world > 1:
            return False  # all processes stop at the same step: the next log line
        if evaluate_now:
            self.evaluate(done)
            self.window.clear()  # the time of the evaluation is not the steps'
        late = log_now and time.monotonic() - self.saved_at > 60 * s["save_minutes"]
        if p.main and (stop or late or done == self.steps):
            self.save(done, "last.pt")
            self.saved_at = time.monotonic()
        if stop and done < self.steps:
            p.say(f"asked to stop: saved at step {done}; the same command goes on from there")
            return True
        return False

    def report(self, done, record):
        """One line on the screen, one record in the log."""
        s, epoch = self.s, done * self.s["batch"] / self.epoch_images
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        record = {"lr": rate, **record, "memory_gib": peak_memory(self.processes.device)}
        left = (self.steps - done) * s["batch"] / record["images_per_second"]
        self.processes.say(
            f"step {done}/{self.steps} epoch {epoch:.1f} | loss {record['loss']:.3f} | {self.describe(record)}lr "
            f"{rate:.1e} | {record['images_per_second']:.1f} img/s | waiting for data {record['waiting']:.0%} | "
            f"{record['memory_gib']:.1f} GiB | {timedelta(seconds=round(left))} left"
        )
        self.write(done, record)

    def describe(self, record):
        """What a subclass adds to the line on the screen."""
        return ""

    def write(self, done, record):
        """Add a record to the log."""
        if self.log:
            self.log.write({"step": done, "epoch": done * self.s["batch"] / self.epoch_images, **record})

    def write_checkpoint(self, done, name, parts, **more):
        """Write the state of some parts, the settings, and how far the run is."""
        self.window.check()
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"settings": self.s, "step": done, "best": self.best, "window": self.window.state()}
        save_file(self.out / name, {**state, **more})


TERMS = (
    "loss", "position_loss", "feature_loss", "position_accuracy", "cross_entropy", "prototype_perplexity",
    "target_entropy", "gradient_norm",
)  # fmt: skip


def pretrain(s, processes):
    """Run the settings from the run folder's last checkpoint, or from the start, to the end -> exit code."""
    run = Pretraining(s, processes)
    model, teacher, optimizer, device = run.model, run.teacher, run.optimizer, processes.device
    net = torch.compile(model) if s["compile"] else model
    net = processes.wrap(net, static_graph=s["accumulate"] == 1)
    peak = s["lr"] * s["batch"] / 1024
    processes.listen()

    # closing ends the workers, whatever happens
    with contextlib.closing(run.batches(Views(run.images, s), len(run.images))) as batches:
        for step in range(run.first, run.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, run.steps, run.warmup, peak)
            micro_losses = []
            for micro in range(s["accumulate"]):
                batch = run.window.fetch(batches)
                set_seed(s["seed"], step, processes.rank, micro)
                last = micro == s["accumulate"] - 1
                with contextlib.nullcontext() if last or processes.world == 1 else net.no_sync():
                    views = to_views(batch, s)
                    with autocast(s["precision"], device):
                        losses = net(views, teacher)
                    (losses["loss"] / s["accumulate"]).backward()
                micro_losses.append(losses)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["clip"] or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            if teacher is not None:
                loca.update_teacher(teacher, model, teacher_momentum(step, run.steps, s["momentum"]))
            run.window.add(step, micro_losses, norm)
            if run.after_step(step + 1):
                return REQUEUE
    run.finish()
    return 0


class Pretraining(Run):
    """Data, model and teacher of a pretraining run; held-out figures, warnings and pictures on the way."""

    best = None  # held-out position accuracy

    def __init__(self, s, processes):
        super().__init__(s, processes)
        self.images, self.val_images = open_data(s, processes)
        self.s = s = {**s, "images": len(self.images)}
        count = len(self.images)
        require(count >= s["batch"], f"{count} images are fewer than one batch: give --batch {count} or less")
        self.epoch_steps = len(self.images) // s["batch"]
        self.epoch_images = self.epoch_steps * s["batch"]
        self.steps = s["steps"] or s["epochs"] * self.epoch_steps
        self.warmup = min(round(s["warmup_epochs"] * self.epoch_steps), self.steps // 2)
        set_seed(s["seed"])
        self.model = build(s).to(processes.device)
        self.teacher = loca.make_teacher(self.model) if self.model.head else None
        groups = parameter_groups(self.model, s["weight_decay"])
        self.optimizer = torch.optim.AdamW(groups, fused=processes.device.type in ("cuda", "cpu"))
        self.parts = {"model": self.model, "optimizer": self.optimizer}
        self.parts |= {"teacher": self.teacher} if self.teacher else {}
        self.warned = set()
        cluster = math.log(s["prototypes"]) if self.teacher else 0.0
        self.chances = {"position_loss": math.log(self.model.positions), "cross_entropy": cluster}
        size = sum(x.numel() for x in self.model.encoder.parameters()) / 1e6
        self.begin(
            TERMS,
            f"{len(self.images)} images, {self.epoch_steps} steps an epoch, {len(self.val_images)} held out; "
            f"encoder of {size:.1f} M parameters",
        )

    def evaluate_now(self, done):
        epoch, into_epoch = divmod(done, self.epoch_steps)
        due = (every and epoch % every == 0 for every in (self.s["val_every"], self.s["keep"]))
        return done == self.steps or (into_epoch == 0 and any(due))

    def describe(self, record):
        """The losses beside their chance level, for the line on the screen."""
        titles = (("position", "position_loss"), ("cluster", "cross_entropy"))
        losses = (
            f"{t} {record[k]:.3f} (chance {self.chances[k]:.2f}) | " for t, k in titles if self.chances[k]
        )
        return f"{''.join(losses)}accuracy {record['position_accuracy']:.1%} | "

    def report(self, done, record):
        """As every run; and warn where something does not learn."""
        super().report(done, record)
        s, weights = self.s, {"position_loss": "position_weight", "cross_entropy": "feature_weight"}
        if done > max(200, self.steps // 4):
            for name, chance in self.chances.items():
                if s[weights[name]] and chance and record[name] > 0.99 * chance:
                    self.warn(f"a quarter of the steps is done and {name} is still at chance", "is at chance")
        used = record["prototype_perplexity"]
        if self.teacher and done > 200 and used < 0.02 * s["prototypes"]:
            self.warn(f"the predictions use {used:.0f} of {s['prototypes']} prototypes", "collapse")

    def warn(self, text, kind):
        if kind not in self.warned:
            self.warned.add(kind)
            self.processes.say(f"warning: {text}; see the README's questions")

    def evaluate(self, done):
        """Held-out figures on the screen and in the log; keep a checkpoint of the epoch where asked to."""
        epoch, into_epoch = divmod(done, self.epoch_steps)
        if len(self.val_images) >= self.processes.world:
            record, s = evaluate(self.model, self.teacher, self.val_images, self.s, self.processes), self.s
            self.best = record["val_position_accuracy"]
            clusters = (
                f" | {record['val_prototype_perplexity']:.0f} of {s['prototypes']} prototypes in use, target entropy "
                f"{record['val_target_entropy']:.2f} of {self.chances['cross_entropy']:.2f}"
            )
            self.processes.say(
                f"epoch {done / self.epoch_steps:.0f} held out: position accuracy {self.best:.2%} (chance "
                f"{1 / self.model.positions:.2%}), loss {record['val_position_loss']:.3f} | features: spread "
                f"{record['feature_std']:.2f} of 1, effective rank {record['effective_rank']:.0f} of {s['dim']}"
                f"{clusters if self.teacher else ''}"
            )
            if record["feature_std"] < 0.05 or record["effective_rank"] < 2:
                self.warn("the features are nearly the same everywhere", "collapse")
            self.write(done, record)
        if self.processes.main and self.s["keep"] and into_epoch == 0 and epoch % self.s["keep"] == 0:
            self.save(done, f"epoch_{epoch:04d}.pt")

    def save(self, done, name):
        """Write a checkpoint; with the last one also the encoder alone and the pictures."""
        self.write_checkpoint(done, name, self.parts)
        if name == "last.pt":
            save_file(self.out / "encoder.pt", (self.teacher or self.model).encoder.state_dict())
            if len(self.val_images) and not self.s["single_image"]:
                device = self.processes.device
                picture = draw_predictions(self.model, self.teacher, self.val_images, self.s, device)
                save_picture(self.out / "predictions.png", picture)
            save_picture(self.out / "curves.png", draw_curves([self.out]))

    def finish(self):
        """Say what the run made and what to do next."""
        say, s = self.processes.say, self.s
        if self.best is not None:
            times = self.best * self.model.positions
            say(f"held-out position accuracy {self.best:.2%}, {times:.1f} times chance")
        say(f"{self.out}: last.pt, encoder.pt (timm's names), predictions.png, curves.png, metrics.jsonl")
        flags = f" --init {self.out}/last.pt{' --small' if s['small'] else ''}"
        say(f"next: python finetune_seg.py{' --data NAME:DIR' if s['data'] else ''}{flags}")


def check_same_run(path, old, new, processes):
    """Raise Problem where a checkpoint's settings make another run than this one; say what else changed."""
    no_flags = {"world": "processes:", "images": "training images:"}
    for key in sorted(old.keys() & new.keys() - {"out"}):
        name, was, now = no_flags.get(key, flag(key)), old[key], new[key]
        if was != now:
            text = f"{path} was made with {name} {was}, not {now}: give another --out, or {was} to resume"
            require(key in RUN_ONLY, text)
            processes.say(f"resuming with {name} {now}, before it was {was}")


@torch.no_grad()
def evaluate(model, teacher, images, s, processes):
    """Held-out position accuracy and loss, and how spread the features are -> dict. Views and masks are the
    same each time; stochastic depth is off."""
    both = nn.ModuleList(filter(None, (model, teacher))).eval()
    each = math.ceil(len(images) / 32 / processes.world)  # batches of every process, of at most 32 images
    size = len(images) // (each * processes.world)
    first = processes.rank * each
    keys = [[(2**31, i * size + k) for k in range(size)] for i in range(first, first + each)]
    batches = feed(Views(images, s), min(s["workers"], 2), processes.device, batch_sampler=keys)
    names = ["position_accuracy", "position_loss", "prototype_perplexity", "target_entropy"]
    sums, tokens = torch.zeros(len(names), device=processes.device), []
    for number, batch in enumerate(batches):
        set_seed(s["seed"], number)
        views = to_views(batch, s, augment=False)
        with autocast(s["precision"], processes.device):
            losses = model(views, teacher)
            tokens.append(model.encoder(views["reference"])[:, ::4].flatten(0, 1).float())
        sums += torch.stack([losses[name].float() for name in names])
    both.train()
    means = processes.sum(sums / (each * processes.world))
    spread, rank = feature_spread(torch.cat(tokens))
    record = {f"val_{name}": mean for name, mean in zip(names, means)}
    return {**record, "feature_std": spread, "effective_rank": rank}


def feature_spread(tokens):
    """Tokens [M, D] -> standard deviation of the unit vectors, 1 where they fill all directions and 0 where
    they are all the same, and the effective rank, 1..D: exp of the entropy of the normalised singular values
    (Roy and Vetterli 2007)."""
    unit = F.normalize(tokens, dim=-1)
    centred = (tokens - tokens.mean(0)).cpu()
    values = torch.linalg.svdvals(centred.T @ centred).sqrt()
    share = values / values.sum().clamp_min(1e-12)
    return float(unit.std(0).norm()), float(torch.special.entr(share).sum().exp())


# -------------------------------------------------------------------------------------------- pictures


def position_colours(grid):
    """A colour for every position of a grid: uint8 [grid * grid, 3], near positions alike."""
    corners = torch.tensor([[[255.0, 255], [60, 40]], [[60, 225], [40, 225]], [[40, 60], [200, 160]]])  # RGB
    colours = F.interpolate(corners[None], (grid, grid), mode="bilinear", align_corners=True)[0]
    return colours.flatten(1).T.byte().numpy()


def photo(view):
    """uint8 [3, H, W] -> picture."""
    return Image.fromarray(view.permute(1, 2, 0).cpu().numpy())


def _paint(view, positions, palette, correct=None):
    """A view under patches in the colours of `positions` [n]; -1 stays grey, a wrong one shrinks to a dot."""
    grid = math.isqrt(len(positions))
    picture = ImageOps.grayscale(view).point(lambda v: v // 3 + 20).convert("RGB")
    pen, step = ImageDraw.Draw(picture), view.width / grid
    for i, position in enumerate(positions):
        if position >= 0:
            inset = 0 if correct is None or correct[i] else 0.32 * step
            x, y, size = i % grid * step + inset, i // grid * step + inset, step - 2 * inset - 1
            pen.rectangle((x, y, x + size, y + size), fill=tuple(palette[position].tolist()))
    return picture


@torch.no_grad()
def draw_predictions(model, teacher, images, s, device, count=6, focal=3):
    """A picture of where the model puts the patches of held-out queries. A row an image: the reference, its
    positions in colour, and for the random query and some focal queries the crop, the true positions and the
    predicted ones; a correct patch is filled, a wrong one a dot of the predicted colour."""
    both = nn.ModuleList(filter(None, (model, teacher))).eval()
    dataset, focal = Views(images, s), min(focal, s["focal"])
    batch = torch.utils.data.default_collate([dataset[2**31, i] for i in range(min(count, len(images)))])
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    set_seed(s["seed"])
    everything = torch.arange(model.positions, device=device)
    views = to_views(batch, s, augment=False)
    context, _ = model.encode_reference(views, teacher)
    queries, targets = model.encode_queries(views, everything, position=teacher is not None)
    predicted, targets = model.predictor(queries, context).argmax(-1).cpu().numpy(), targets.cpu().numpy()
    both.train()

    side, gap, n = 112, 4, (s["focal_size"] // s["patch_size"]) ** 2
    palette, blocks = position_colours(s["image_size"] // s["patch_size"]), 1 + focal
    ends = model.positions + n * np.arange(s["focal"])  # of the queries' patches, the last one's left out
    width, height = 2 * side + gap + blocks * (3 * side + 4 * gap), 24 + len(predicted) * (side + gap)
    sheet = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(sheet).text(
        (4, 6), "reference, its positions | each query: crop, true positions, predicted positions (filled: right, dot: wrong, "
        "grey: outside the reference)", fill="black",
    )  # fmt: skip
    for i in range(len(predicted)):
        views = [batch["reference"][i], batch["query"][i], *batch["focal"][i, :focal]]
        reference, *views = (photo(view).resize((side, side)) for view in views)
        y = 24 + i * (side + gap)
        sheet.paste(reference, (0, y))
        coloured = _paint(reference, np.arange(model.positions), palette)
        sheet.paste(Image.blend(reference, coloured, 0.6), (side, y))
        parts = zip(views, np.split(targets[i], ends), np.split(predicted[i], ends))
        for k, (view, true, said) in enumerate(parts):
            said = np.where(true < 0, -1, said)
            x = 2 * side + 4 * gap + k * (3 * side + 4 * gap)
            sheet.paste(view, (x, y))
            sheet.paste(_paint(view, true, palette), (x + side, y))
            sheet.paste(_paint(view, said, palette, said == true), (x + 2 * side, y))
    return sheet


def draw_curves(folders):
    """Losses, held-out figures and learning rate of one or more run folders, all of train.py or all of
    finetune_seg.py, over their epochs, laid over each other: lines in training, dots held out, dashes the chance
    level. Raises Problem for a folder without a log."""
    runs = []
    for folder in folders:
        for name in ("metrics.jsonl", "settings.json"):
            require(Path(folder, name).exists(), f"--curves {folder}: there is no {name} in it")
        runs.append((str(folder), read_records(Path(folder, "metrics.jsonl"))))
    s = json.loads(Path(folders[0], "settings.json").read_text())
    if "prototypes" in s:
        positions = (s["image_size"] // s["patch_size"]) ** 2
        panels = [
            ("position loss", "position_loss", "val_position_loss", math.log(positions)),
            ("cluster loss", "cross_entropy", None, math.log(max(s["prototypes"], 1))),
            ("position accuracy", "position_accuracy", "val_position_accuracy", 1 / positions),
        ]
    else:
        panels = [
            ("loss", "loss", None, None),
            ("mIoU", "val_miou", "val_miou", None),
            ("pixel accuracy", "val_pixel_accuracy", "val_pixel_accuracy", None),
        ]
    panels.append(("learning rate", "lr", None, None))
    inks = ((30, 90, 200), (220, 90, 30), (30, 150, 70), (160, 60, 170), (120, 110, 20), (90, 90, 90))
    width, height, margin = 380, 220, 46
    sheet = Image.new("RGB", (2 * width, 2 * height + 16 * len(runs)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, _) in enumerate(runs):
        pen.text((margin, 2 * height + 16 * i), name, fill=inks[i % len(inks)])
    for k, (title, line, dots, chance) in enumerate(panels):
        left, top = k % 2 * width + margin, k // 2 * height + 22
        right, bottom = left + width - margin - 12, top + height - 48
        values = [r[name] for _, records in runs for r in records for name in (line, dots) if name in r]
        values += [chance] if chance is not None else []
        low, high = min(values, default=0), max(values, default=1)
        last = max((r["epoch"] for _, records in runs for r in records), default=1)
        pen.rectangle((left, top, right, bottom), outline=(200, 200, 200))
        pen.text((left, top - 14), title, fill="black")
        for value, y in ((high, top), (low, bottom - 10)):
            pen.text((left - 42, y), f"{value:.3g}", fill=(90, 90, 90))
        pen.text((right - 60, bottom + 3), f"epoch {last:.0f}", fill=(90, 90, 90))

        def at(epoch, value):
            share = (value - low) / max(high - low, 1e-12)
            return left + (right - left) * epoch / last, bottom - (bottom - top) * share

        if chance is not None:
            y = at(0, chance)[1]
            for x in range(left, right, 10):
                pen.line((x, y, x + 5, y), fill=(150, 150, 150))
        for i, (_, records) in enumerate(runs):
            ink = inks[i % len(inks)]
            pen.line([at(r["epoch"], r[line]) for r in records if line in r], fill=ink)
            for x, y in (at(r["epoch"], r[dots]) for r in records if dots in r):
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=ink)
    return sheet


@torch.no_grad()
def feature_colours(encoder, image, side, device):
    """The three main components of an encoder's patch features of one uint8 image [3, H, W], as colours."""
    rows, columns = (round(16 * n / min(image.shape[1:])) for n in image.shape[1:])
    size = (rows * encoder.patch_size, columns * encoder.patch_size)
    view = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True).to(device)
    tokens = encoder.eval()(plain_colours(view))[0].float().cpu()
    tokens = tokens - tokens.mean(0)
    parts = tokens @ torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T  # n,3
    parts = parts * parts.pow(3).sum(0).sign()  # a component's sign means nothing: fix it
    low, high = parts.quantile(0.02, 0), parts.quantile(0.98, 0)
    parts = ((parts - low) / (high - low)).clamp(0, 1).mul(255).byte()
    grid = Image.fromarray(parts.view(rows, columns, 3).numpy())
    return grid.resize((side * columns // rows, side), Image.NEAREST)


def show(checkpoint, names, processes):
    """Predicted positions of any images' patches, and their features in false colours (the checkpoint's
    encoder beside one of random weights), as one picture in --out."""
    require(Path(checkpoint).is_file(), f"--show {checkpoint}: there is no such checkpoint")
    saved = load_file(checkpoint)
    ours = isinstance(saved, dict) and "masking_ratio" in saved.get("settings", {})
    require(ours, f"--show {checkpoint}: it is not a checkpoint of train.py; give a run's last.pt")
    trained = {"fixed_positions": False, **saved["settings"], "grad_checkpoint": 0}
    set_seed(trained["seed"])
    model = build(trained).to(processes.device)
    scratch = copy.deepcopy(model.encoder)
    model.load_state_dict(saved["model"])
    teacher = loca.make_teacher(model) if "teacher" in saved else None
    if teacher is not None:
        teacher.load_state_dict(saved["teacher"])
    images = Folder("", names) if names else Scenes(6, first=10**6)
    try:
        pixels = [images.image(i) for i in range(len(images))]
    except Exception as error:  # a damaged file can make a decoder say anything
        raise Problem(f"--show: cannot read an image: {first_line(error)}") from error
    sheet = Image.new("RGB", (0, 0))  # a single-image run has no reference to show positions in
    if not trained["single_image"]:
        sheet = draw_predictions(model, teacher, images, trained, processes.device, count=len(images))
    encoders, rows = (scratch, (teacher or model).encoder), []
    for image in pixels:
        features = [feature_colours(encoder, image, 112, processes.device) for encoder in encoders]
        rows.append([photo(image).resize(features[0].size, Image.BICUBIC), *features])
    widths = [len(row) * (row[0].width + 4) for row in rows]
    whole = Image.new("RGB", (max(sheet.width, *widths), sheet.height + 20 + 116 * len(rows)), "white")
    whole.paste(sheet)
    text = "photograph | features in false colours: random weights | this checkpoint"
    ImageDraw.Draw(whole).text((4, sheet.height + 4), text, fill="black")
    for i, row in enumerate(rows):
        for k, picture in enumerate(row):
            whole.paste(picture, (k * (picture.width + 4), sheet.height + 20 + 116 * i))
    return whole


# ----------------------------------------------------------------------------------------------- bench


def clock(function, device, seconds=2.0, least=2):
    """Seconds that one call takes: the median of calls for about `seconds`, after one that is not counted."""
    times = []
    while len(times) <= least or sum(times) < seconds:
        begin = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


def bench_input(s, images, count):
    """Seconds an image for decoding and crops, and for colours, on one core; a collated batch of `count`."""
    threads, numbers, dataset = torch.get_num_threads(), itertools.count(), Views(images, s)
    torch.set_num_threads(1)  # as in a worker
    cpu = torch.device("cpu")
    cropping = clock(lambda: dataset[0, next(numbers) % len(images)], cpu, 6.0, 20)
    batch = torch.utils.data.default_collate([dataset[0, i % len(images)] for i in range(count)])
    few = {name: value[:8] for name, value in batch.items()}
    colouring = clock(lambda: to_views(few, s), cpu) / len(few["reference"])
    torch.set_num_threads(threads)
    return cropping, colouring, batch


def bench_step(s, batch, device):
    """Seconds of a whole step and of its parts, its operations, and the peak memory in GiB."""
    set_seed(s["seed"])
    model = build(s).to(device)
    teacher = loca.make_teacher(model) if model.head else None
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type in ("cuda", "cpu"))
    net = torch.compile(model) if s["compile"] else model
    views = to_views({k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}, s)

    def forward():
        with autocast(s["precision"], device):
            return net(views, teacher)["loss"]

    def teach():
        with torch.no_grad(), autocast(s["precision"], device):
            model.assign_clusters(teacher.encoder(views["reference"]), teacher)

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), s["clip"] or math.inf)
        optimizer.step()
        if teacher is not None:
            loca.update_teacher(teacher, model, 0.99)

    def step():
        forward().backward()
        update()
        optimizer.zero_grad()

    whole = clock(step, device, 10.0)
    memory = peak_memory(device)
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    parts = {"teacher forward": clock(teach, device, 0.5) if teacher is not None else 0.0}
    parts["student forward"] = clock(forward, device, 2.0) - parts["teacher forward"]
    parts["optimiser and teacher update"] = clock(update, device, 0.5)
    parts["backward"] = whole - sum(parts.values())
    return whole, parts, counter.get_total_flops(), memory


def bench(s, processes):
    """Measure the input pipeline and the training step at these settings, and say which of them limits."""
    alone = "--bench measures one device: run it without torchrun, --batch being its share"
    require(processes.world == 1, alone)
    device, (images, _) = processes.device, open_data({**s, "val_images": 0}, processes)
    count = s["batch"] // s["accumulate"]
    cropping, colouring, batch = bench_input(s, images, count)
    seconds, parts, operations, memory = bench_step(s, batch, device)
    side = 2048 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device)
    a = a.bfloat16() if s["precision"] == "bf16" else a
    rate = 2 * side**3 / clock(lambda: a @ a, device, 1.0, 5)  # of this machine, operations a second
    speed, feeding = count / seconds, s["workers"] / (cropping + colouring * (device.type == "cpu"))
    limit = "step" if feeding > speed else "data"
    needed = math.ceil(speed * cropping)
    rows = [
        ("decode and crops, one core", f"{1 / cropping:.0f} images/s"),
        ("colours, one core", f"{1 / colouring:.0f} images/s"),
        ("both, one core", f"{1 / (cropping + colouring):.0f} images/s"),
        (f"step, batch {count}, {s['precision']}, {device.type}", f"{speed:.2f} images/s"),
        *((f"  {name}", f"{part / seconds:.0%} of the step") for name, part in parts.items()),
        ("matrix products in a step", f"{operations / count / 1e9:.1f} GFLOP an image"),
        (f"rate of this machine, product of {side} x {side}", f"{rate / 1e9:.0f} GFLOP/s"),
        ("share of that rate in the step (MFU)", f"{operations / seconds / rate:.0%}"),
        ("peak memory", f"{memory:.2f} GiB"),
        ("workers that feed one device", f"{needed} (of {s['workers']}: the {limit} limits)"),
    ]
    for name, value in rows:
        processes.say(f"{name:<48} {value}")
    return 0


# ------------------------------------------------------------------------------------------------ main

SMALL_PRESET = {  # what made LOCA strong in half an hour of two cores; the README tells what was tried
    "patch_size": 8, "dim": 192, "depth": 6, "heads": 3, "mlp_dim": 768, "image_size": 64, "focal_size": 32, "focal": 4,
    "prototypes": 512, "head_hidden": 384, "bottleneck": 64, "batch": 32, "steps": 3600, "warmup_epochs": 3.0, "lr": 0.032,
    "momentum": 0.99, "teacher_temperature": 0.025, "val_every": 10, "log_every": 25, "out": "runs/small",
}  # fmt: skip
SCENES_PRESET = {
    "patch_size": 8, "dim": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "image_size": 64, "focal_size": 32, "focal": 3,
    "prototypes": 256, "head_hidden": 256, "bottleneck": 64, "batch": 32, "epochs": 6, "warmup_epochs": 1.0, "lr": 0.04,
    "momentum": 0.99, "position_std": 1.0, "out": "runs/scenes", "val_images": 64, "log_every": 10,
}  # fmt: skip


class Help(argparse.RawDescriptionHelpFormatter):
    """Help with the default behind each text that does not tell it."""

    def _get_help_string(self, action):
        told = any(action.default is x for x in (None, False, argparse.SUPPRESS))  # not 0, which equals False
        return action.help if told else f"{action.help} (%(default)s)"


def make_parser():
    """The command line; defaults are the released recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    yes_no = {"action": argparse.BooleanOptionalAction, "default": False}
    # fmt: off
    g = parser.add_argument_group("data")
    g.add_argument("--data", metavar="DIR", help="folder of images, at any depth; default: drawn scenes, a tiny model")
    g.add_argument("--val", metavar="DIR", help="folder of held-out images; default: a part of --data")
    g.add_argument("--val-images", type=int, default=500, help="held-out images, at most a tenth of --data")
    g.add_argument("--val-every", type=int, default=1, metavar="E", help="epochs between held-out figures; raise it for few images")
    g.add_argument("--scenes", type=int, default=1280, help="drawn scenes to train on, without --data")
    g.add_argument("--small", **yes_no, help="half an hour on two cores for a folder of hundreds of images: small model, views, batch")
    g.add_argument("--cache-list", metavar="FILE", help="keep the list of images here: for folders of millions")
    g.add_argument("--workers", type=int, help="loader processes per device; default: its share of the cores")
    g = parser.add_argument_group("views")
    g.add_argument("--image-size", type=int, default=224, help="side of the reference and the random query, pixels")
    g.add_argument("--focal-size", type=int, default=96, help="side of the focal queries, pixels")
    g.add_argument("--focal", type=int, default=9, help="focal queries per image; fewer is faster")
    g.add_argument("--query-tokens", type=int, help="encoded tokens of the random query; default: 5 of 14")
    g.add_argument("--large-area", type=float, nargs=2, default=[0.32, 1.0], help="reference's share of the image")
    g.add_argument("--focal-area", type=float, nargs=2, default=[0.05, 0.32], help="focal query's share of the image")
    g.add_argument("--blur", **yes_no, help="blur as the paper means it; the released code never blurs")
    g = parser.add_argument_group("method")
    g.add_argument("--model", default="B/16", choices=list(loca.SIZES), help="size; the next flags change parts of it")
    g.add_argument("--patch-size", type=int, help="side of a patch, pixels; smaller for small images")
    g.add_argument("--dim", type=int, help="width")
    g.add_argument("--depth", type=int, help="blocks")
    g.add_argument("--heads", type=int, help="attention heads")
    g.add_argument("--mlp-dim", type=int, help="hidden width of a block's MLP")
    g.add_argument("--position-std", type=float, help="initial position embedding; default: width ** -0.5; 1 learns positions sooner")
    g.add_argument("--fixed-positions", **yes_no, help="sines and cosines instead of a learned position embedding; positions are found sooner")
    g.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth of the last block")
    g.add_argument("--prototypes", type=int, default=4096, help="clusters of the feature loss; fewer for small data")
    g.add_argument("--head-hidden", type=int, default=2048, help="hidden width of the projection head")
    g.add_argument("--bottleneck", type=int, default=256, help="width in which features meet prototypes")
    g.add_argument("--masking-ratio", type=float, default=0.8, help="eta, share of reference tokens that are hidden")
    g.add_argument("--masking", default="consecutive", choices=["consecutive", "first", "unstructured"], help="which tokens stay: a run of neighbours, the first, or any")
    g.add_argument("--student-temperature", type=float, default=0.1, help="of the student's cluster prediction")
    g.add_argument("--teacher-temperature", type=float, default=0.05, help="of the targets; higher if they collapse")
    g.add_argument("--position-weight", type=float, default=1.0, help="0: feature loss alone")
    g.add_argument("--feature-weight", type=float, default=1.0, help="0: position loss alone, without a teacher")
    g.add_argument("--single-image", **yes_no, help="for comparison: a view predicts its own positions, no reference")
    g = parser.add_argument_group("training")
    g.add_argument("--epochs", type=int, default=100, help="passes over the images")
    g.add_argument("--steps", type=int, help="optimiser steps, instead of --epochs")
    g.add_argument("--batch", type=int, default=1024, help="images per step, over all devices and micro-batches")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches a step, to save memory; Sinkhorn sees one")
    g.add_argument("--lr", type=float, default=0.001, help="peak learning rate at batch 1024; scaled by batch / 1024")
    g.add_argument("--warmup-epochs", type=float, default=15.0, help="epochs of linear warm-up, half the run at most")
    g.add_argument("--weight-decay", type=float, default=0.1, help="AdamW's, on matrices alone")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    g.add_argument("--momentum", type=float, default=0.996, help="the teacher's, rising to 1; lower for short runs")
    g.add_argument("--seed", type=int, default=0, help="of everything random")
    g = parser.add_argument_group("run")
    g.add_argument("--out", metavar="DIR", default="runs/pretrain", help="run folder; a run that is in it goes on")
    g.add_argument("--device", help="cuda, mps or cpu; default: the first of these that is there")
    g.add_argument("--precision", choices=["bf16", "float32"], help="default: bf16 where it is fast")
    g.add_argument("--compile", **yes_no, help="torch.compile the step: slow start, faster on GPUs")
    g.add_argument("--grad-checkpoint", type=int, nargs="?", default=0, const=1000, metavar="N", help="recompute the first N blocks, or all, in the backward pass: less memory, slower")
    g.add_argument("--log-every", type=int, default=20, help="steps between log lines; processes agree to stop there")
    g.add_argument("--save-minutes", type=float, default=10.0, help="minutes between checkpoints")
    g.add_argument("--keep", type=int, default=0, metavar="E", help="keep a checkpoint every E epochs; 0: the last alone")
    g.add_argument("--tensorboard", **yes_no, help="also write TensorBoard's log (pip install tensorboard)")
    g.add_argument("--bench", **yes_no, help="measure the input pipeline and the step at these settings, then stop")
    g = parser.add_argument_group("pictures, instead of training; written to --out FILE.png")
    g.add_argument("--show", nargs="+", metavar="FILE", help="CHECKPOINT IMAGE...: predicted positions, features in false colours")
    g.add_argument("--curves", nargs="+", metavar="RUN", help="losses and accuracy of run folders, laid over each other")
    # fmt: on
    return parser


def flag(name):
    """The command-line flag of a setting."""
    return f"--{name.replace('_', '-')}"


def check_numbers(s, above, from_0):
    """Settings that are to be above 0, or not below it; None is one that is not given. Raises Problem."""
    for name in above:
        require(s[name] is None or s[name] > 0, f"{flag(name)} {s[name]}: it is to be above 0")
    for name in from_0:
        require(s[name] is None or s[name] >= 0, f"{flag(name)} {s[name]}: it is not to be below 0")


def check_batch(s):
    """Raise Problem unless the batch can be divided among the processes and micro-batches."""
    shares = s["world"] * s["accumulate"]
    require(
        s["accumulate"] > 0 and s["batch"] > 0 and s["batch"] % shares == 0,
        f"--batch {s['batch']} is not a multiple of {s['world']} processes x --accumulate {s['accumulate']}: "
        f"try {max(1, round(s['batch'] / max(shares, 1))) * shares}",
    )


def read_settings(arguments, world):
    """Command line -> settings, checked before any data is read. Raises Problem for what cannot work."""
    parser = make_parser()
    told = parser.parse_args(arguments, argparse.Namespace(epochs=None))  # None: not told
    parser.set_defaults(**(SMALL_PRESET if told.small else SCENES_PRESET if told.data is None else {}))
    if told.epochs is not None:
        parser.set_defaults(steps=None)
    s = vars(parser.parse_args(arguments))
    s.update({k: v for k, v in loca.SIZES[s["model"]].items() if s[k] is None})
    s["world"] = world
    s["mean"], s["std"] = list(MEAN), list(STD)

    above = "epochs steps val_every log_every student_temperature teacher_temperature lr scenes head_hidden bottleneck position_std"
    from_0 = "focal prototypes val_images keep position_weight feature_weight warmup_epochs clip weight_decay seed workers"
    check_numbers(s, (*loca.SIZES["B/16"], *above.split()), (*from_0.split(), "save_minutes"))
    for name in ("image_size", "focal_size"):
        nearest = max(1, round(s[name] / s["patch_size"])) * s["patch_size"]
        require(
            s[name] > 0 and s[name] % s["patch_size"] == 0,
            f"{flag(name)} {s[name]} is not a multiple of the patch, {s['patch_size']}: try {nearest}",
        )
    check_batch(s)
    for name in ("large_area", "focal_area"):
        low, high = s[name]
        text = f"{flag(name)} {low} {high}: give two shares of the image, 0 < low <= high <= 1"
        require(0 < low <= high <= 1, text)
    require(0 <= s["momentum"] <= 1, f"--momentum {s['momentum']}: it is to lie in 0..1")
    require(0 <= s["drop_path"] < 1, f"--drop-path {s['drop_path']}: it is to lie in 0..1, below 1")
    one_loss = s["single_image"] or not s["feature_weight"]
    text = "--position-weight 0 with --feature-weight 0 or --single-image: nothing is left to learn from"
    require(s["position_weight"] or not one_loss, text)
    require(
        s["prototypes"] or not s["feature_weight"],
        "--prototypes 0: the feature loss needs some; for the position loss alone give --feature-weight 0",
    )
    try:
        with torch.device("meta"):
            build(s)
    except ValueError as error:
        hint = "see --patch-size, --heads, --dim, --masking-ratio, --query-tokens"
        raise Problem(f"{error}: {hint}") from error
    return s


def launch(script, read, run, arguments=None):
    """What both scripts do: settings from `read`, processes, `run` -> exit code; 2 and one line on stderr for a
    Problem."""
    try:
        s, *more = read(arguments, int(os.environ.get("WORLD_SIZE", "1")))
        processes = Processes(s["device"])
        s["precision"] = choose_precision(processes.device, s["precision"])
        if s["workers"] is None:
            own = hasattr(os, "sched_getaffinity")  # not on macOS
            cores = len(os.sched_getaffinity(0)) if own else os.cpu_count() or 1
            s["workers"] = max(1, min(12, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        code = run(s, *more, processes)
    except Problem as problem:
        print(f"{script}: {problem}", file=sys.stderr, flush=True)
        return 2  # without a goodbye to the other processes, which may not come to theirs: torchrun ends them
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return code


def dispatch(s, processes):
    """What the settings ask for -> exit code; --show and --curves write their picture to --out."""
    if not (s["show"] or s["curves"]):
        return bench(s, processes) if s["bench"] else pretrain(s, processes)
    text = f"--out {s['out']}: give the name of a .png file for the picture"
    require(s["out"].lower().endswith(".png"), text)
    picture = show(s["show"][0], s["show"][1:], processes) if s["show"] else draw_curves(s["curves"])
    save_picture(s["out"], picture)
    print(f"{s['out']}: {picture.width} x {picture.height} pixels")
    return 0


def main(arguments=None):
    """Run the command line -> exit code."""
    return launch("train.py", lambda *given: (read_settings(*given),), dispatch, arguments)


if __name__ == "__main__":
    sys.exit(main())
