"""Pretrain LOCA: photo -> crops and boxes (workers) -> colors (device, whole batch) -> loca.LOCA -> loop.

`python train.py` draws its own scenes and needs nothing else; `--data DIR` takes any folder of images;
`torchrun --nproc_per_node=N train.py` runs the same script on N devices. Every random draw depends only on
the seed and on its step or image, so a resumed run continues as if it had never stopped.
"""

import argparse
import atexit
import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from datetime import timedelta
from multiprocessing import parent_process, resource_tracker
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision.transforms.v2.functional import pil_to_tensor

import loca

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in 0..1
EXIT_STOPPED = 75  # exit code (EX_TEMPFAIL) of a run that was asked to stop and has saved: it can be requeued


def fail(text, together=False):
    """Exit with code 1 and one line on stderr. together: all processes call this; only the first prints."""
    if together and dist.is_initialized():
        say(f"error: {text}", sys.stderr)
        end_processes()  # wait for all: when one exits with an error, torchrun ends the others
        sys.exit(1)
    sys.exit(f"error: {text}")


# ----------------------------------------------------------------------------------------------------- images

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MASKS = r"(.*[_-])?(masks?|annotations?|labels?|semantic)|(ground_?truth|gt|segm|5_labels|ann_).*|.*annot"
PHOTOS = r"(.*[_-])?(images?|imgs?|photos?|rgb)|jpegimages|leftimg8bit|img_dir|image_2|top|train|val|test"


def find_images(folder, flag="--data", skip=None):
    """Names, relative to `folder`, of all images at any depth: a sorted numpy array of bytes. Skips hidden
    files and folders, and the folder `skip`, which holds results; follows links. Exits with an error if a
    folder is missing or cannot be read, if there are no images, or if there are masks among them."""
    names, errors, seen = [], [], {os.path.realpath(skip)} - {os.path.realpath(folder)} if skip else set()
    for parent, folders, files in os.walk(folder, onerror=errors.append, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link back to a folder already visited, or `skip`
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [f for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
        below = f"{os.path.relpath(parent, folder)}/".removeprefix("./")
        names += [os.fsencode(below + name) for name in images]
    if errors:
        fail(f"{flag} {folder}: cannot read {errors[0].filename}: {errors[0].strerror}")
    if not names:
        fail(f"{flag} {folder}: no images found ({', '.join(EXTENSIONS)})")
    refuse_masks(folder, flag, names)
    return np.sort(np.array(names))


def refuse_masks(folder, flag, names):
    """Exit with an error if there are masks among the images: a folder such as masks/ beside one such as
    images/, or NAME_mask.png beside NAME.jpg."""
    masks = {os.path.splitext(name)[0] + b"_mask.png" for name in names}.intersection(names)
    if masks:
        fail(f"{flag} {folder}: {os.fsdecode(min(masks))} is a mask; move masks to another folder")
    places = {Path(os.fsdecode(place)) for place in {os.path.dirname(name) for name in names}}
    places = sorted(places.union(*(place.parents for place in places)))  # all folders that hold images
    masks, photos = ([x for x in places if re.fullmatch(kind, x.name, re.I)] for kind in (MASKS, PHOTOS))
    for mask, beside in itertools.product(masks, photos):
        if mask.parent == beside.parent and mask != beside:
            fail(f"{flag} {folder}: {mask}/ next to {beside}/ holds masks; use {flag} {folder}/{beside}")


@functools.cache
def warn_once(text):
    """Print a warning on stderr once; among several loader workers, only the first one prints it."""
    if get_worker_info() is None or get_worker_info().id == 0:
        show(f"warning: {text}", sys.stderr)


def read_image(path, decode_size=0):
    """Decode any image file as upright RGB: uint8 [3, H, W]. With a decode_size, a JPEG is decoded at a half,
    quarter or eighth of its size, which is faster, if its short side stays at `decode_size` or more. Raises
    ValueError for more than 8 bits per channel, and any error of Pillow for a damaged file."""
    with Image.open(path) as image:  # reads the header only, and refuses decompression bombs
        # Pillow reads 16-bit RGB as 8-bit RGB; a PNG's raw mode and a TIFF's BitsPerSample show the depth.
        raw = str(image.tile[0][3]) if image.format == "PNG" and image.tile else ""
        bits = image.tag_v2.get(258, 1) if image.format == "TIFF" else 1
        if image.mode[0] in "IF" or raw.endswith(";16B") or np.max(bits) > 8:
            raise ValueError("more than 8 bits per channel; convert all images to 8 bits with one range")
        if image.format == "TIFF" and image.n_frames > 1:
            warn_once(f"TIFF files with {image.n_frames} pages: only the first page is read")
        if decode_size and min(image.size) >= 2 * decode_size:
            image.draft(None, (decode_size, decode_size))  # for JPEGs alone; for others it does nothing
        with contextlib.suppress(Exception):  # a garbled EXIF block can make Pillow raise anything
            image = ImageOps.exif_transpose(image)
        # Pillow warns when it converts a transparent palette directly to RGB.
        return pil_to_tensor(image.convert("RGBA" if "transparency" in image.info else "RGB"))[:3]


class Images:
    """Images of a folder by index, each uint8 [3, H, W]. Any class with __len__, image(i) and name(i) can
    replace it; name(i) appears in messages, and a resumed run must find the same names. names: numpy array of
    bytes, relative to the folder; it is copied to memory that all loader workers share."""

    def __init__(self, folder, names, decode_size=0):
        self.folder, self.decode_size = folder, decode_size
        rows = np.ascontiguousarray(names).view(np.uint8).reshape(len(names), names.itemsize)
        self.names = torch.from_numpy(rows).share_memory_()

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return os.path.join(self.folder, os.fsdecode(self.names[i].numpy().tobytes().rstrip(b"\0")))

    def image(self, i):
        return read_image(self.name(i), self.decode_size)


def identify(images, held_out):
    """The number of training images and a hash of their names, as text. A resumed run must find the same; the
    folder may move. Exits with an error if processes see different images."""
    found = []
    for source in (images, held_out):
        if isinstance(source, Images):
            names = source.names.numpy()
        else:
            names = os.fsencode("/".join(os.path.basename(source.name(i)) for i in range(len(source))))
        found.append(f"{len(source)} images, names {hashlib.sha256(names).hexdigest()[:8]}")
    seen = {" + ".join(pair) for pair in gather(found)}
    if len(seen) > 1:
        text = f"the processes see different images (training + held out): {'; '.join(sorted(seen))}"
        fail(f"{text}; all machines need the same files under the same names", together=True)
    return found[0]


# ----------------------------------------------------------------------------------------------- drawn scenes

SCENE_CLASSES = ("sky", "hill", "grass", "road", "house", "tree", "car", "person", "fence", "lamp")
SCENE_PALETTE = (
    (120, 180, 230), (140, 120, 160), (90, 170, 60), (110, 110, 110), (190, 90, 60),
    (20, 100, 40), (40, 60, 200), (240, 180, 40), (150, 110, 60), (230, 60, 180),
)  # fmt: skip
GRAIN = (6, 14, 40, 16, 22, 48, 5, 8, 18, 4)  # texture strength of each class, in gray levels
# fmt: off
THINGS = {  # height, maximum per scene, parts: shape, corners from the foot (unit: height), shade
    "house": (0.34, 3, [
        ("rectangle", (0.25, 0.7, 0.4, 1.3), 0.6), ("rectangle", (-0.6, 0, 0.6, 0.8), 1.2),
        ("polygon", (-0.7, 0.8, 0, 1.3, 0.7, 0.8), 0.7), ("rectangle", (-0.1, 0, 0.12, 0.42), 0.4),
        ("rectangle", (-0.48, 0.35, -0.22, 0.65), 0.3), ("rectangle", (0.25, 0.35, 0.5, 0.65), 0.3)]),
    "tree": (0.3, 6, [
        ("rectangle", (-0.07, 0, 0.07, 0.6), 0.8), ("ellipse", (-0.5, 0.4, 0.1, 1.0), 0.8),
        ("ellipse", (-0.1, 0.45, 0.5, 1.05), 1.1), ("ellipse", (-0.35, 0.75, 0.3, 1.4), 1.0)]),
    "fence": (0.18, 2, [("rectangle", (-0.9, h, 0.9, h + 0.06), 0.8) for h in (0.12, 0.3)] + [
        ("rectangle", (i / 5, 0, i / 5 + 0.09, 0.45), 1.1) for i in range(-4, 5)]),
    "lamp": (0.26, 2, [
        ("rectangle", (-0.03, 0, 0.03, 1.5), 0.4), ("rectangle", (0, 1.46, 0.3, 1.5), 0.4),
        ("ellipse", (0.2, 1.34, 0.38, 1.47), 1.6)]),
    "person": (0.2, 4, [
        ("rectangle", (-0.12, 0, -0.02, 0.48), 0.4), ("rectangle", (0.03, 0, 0.13, 0.48), 0.4),
        ("rectangle", (-0.15, 0.44, 0.15, 0.84), 1.0), ("ellipse", (-0.09, 0.83, 0.09, 1.02), 1.4)]),
    "car": (0.3, 3, [
        ("rectangle", (-0.5, 0.1, 0.5, 0.34), 1.0), ("polygon", (-0.3, 0.34, -0.2, 0.56, 0.14, 0.56, 0.3, 0.34), 0.8),
        ("rectangle", (-0.17, 0.37, 0.12, 0.52), 1.8), ("ellipse", (-0.39, 0, -0.17, 0.22), 0.2),
        ("ellipse", (0.17, 0, 0.39, 0.22), 0.2), ("rectangle", (0.43, 0.22, 0.5, 0.3), 2.0)]),
}
# fmt: on


def draw_scene(seed, width=240, height=192):
    """A street scene: image uint8 [H, W, 3] and labels uint8 [H, W], indices into SCENE_CLASSES. A seed gives
    the same scene on every machine, because RandomState's stream is frozen and pixels are integers."""
    r = np.random.RandomState(seed)
    pictures = Image.new("RGB", (width, height)), Image.new("L", (width, height))
    pens = [ImageDraw.Draw(picture) for picture in pictures]

    def part(label, shape, points, color):
        points = [round(p) for p in points]
        getattr(pens[0], shape)(points, fill=tuple(min(255, int(c)) for c in color))
        getattr(pens[1], shape)(points, fill=SCENE_CLASSES.index(label))

    colors = {k: np.array(c) * r.uniform(0.7, 1.3, 3) for k, c in zip(SCENE_CLASSES, SCENE_PALETTE)}
    horizon, sky = height * r.uniform(0.3, 0.55), colors["sky"]
    ground = height - horizon
    for i in range(12):  # the sky grows lighter toward the horizon
        part("sky", "rectangle", (0, horizon * i / 12, width, horizon), sky * (0.75 + 0.4 * i / 12))
    for x, y, s in zip(*(r.uniform(0, end, 4) for end in (width, 0.7 * horizon, 0.2 * width))):  # clouds
        part("sky", "ellipse", (x, y, x + s, y + 0.4 * s), sky * 0.4 + 150)
    for x, half, top in zip(*(r.uniform(0.1, end, 3) * width for end in (1, 0.5, 0.2))):
        corners = (x - half, horizon, x, horizon - top, x + half, horizon)
        part("hill", "polygon", corners, colors["hill"] * r.uniform(0.8, 1.2))
    part("grass", "rectangle", (0, horizon, width, height), colors["grass"])
    lane = horizon + ground * r.uniform(0.4, 0.9)  # where cars drive
    if r.rand() < 0.6:  # a road across the picture, or one to the horizon
        part("road", "rectangle", (0, lane - 0.3 * ground, width, lane), colors["road"])
    else:
        x, near = width * r.uniform(0.3, 0.7), width * r.uniform(0.2, 0.4)
        corners = (x - 5, horizon, x + 5, horizon, x + near, height, x - near, height)
        part("road", "polygon", corners, colors["road"])

    names = [name for name in THINGS for _ in range(r.randint(0, THINGS[name][1] + 1))]
    feet = [lane if k == "car" and r.rand() < 0.7 else horizon + ground * r.uniform(0.08, 1) for k in names]
    for y, name in sorted(zip(feet, names)):  # farthest first
        size, _, parts = THINGS[name]
        size *= height * (0.35 + 0.9 * (y - horizon) / ground)
        x, facing, color = r.uniform(0, width), r.choice([-1, 1]), colors[name] * r.uniform(0.6, 1.2, 3)
        for shape, corners, shade in parts:
            xs, ys = x + facing * size * np.array(corners[::2]), y - size * np.array(corners[1::2])
            if shape != "polygon":
                xs, ys = np.sort(xs), np.sort(ys)
            part(name, shape, np.stack([xs, ys], 1).ravel(), color * shade)
    image, labels = (np.asarray(picture) for picture in pictures)
    noise = np.zeros((height, width), np.int32)
    for cell in (1, 4, 12):  # texture at three scales
        coarse = r.randint(-64, 64, (-(-height // cell), -(-width // cell))).astype(np.int32)
        noise += coarse.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    image = image + (noise * np.array(GRAIN, np.int32)[labels] >> 7)[..., None]
    return (image * r.randint(90, 150) >> 7).clip(0, 255).astype(np.uint8), labels


class Scenes:
    """Drawn scenes by index, each uint8 [3, H, W]; `first` is the seed of index 0."""

    def __init__(self, count, first=0):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def name(self, i):
        return f"scene {self.first + i}"

    def image(self, i):
        return torch.from_numpy(draw_scene(self.first + i)[0]).permute(2, 0, 1)


def open_images(args):
    """Training and held-out images that the flags select."""
    if args.data is None:
        return Scenes(args.scenes), Scenes(args.val_images, first=10**6)
    names = find_images(args.data, skip=args.out)
    held_out = find_images(args.val, "--val", skip=args.out) if args.val else names
    count = args.val_images if args.val else min(args.val_images, len(names) // 10)
    order = np.random.default_rng(args.seed).permutation(len(held_out))
    if not args.val:
        names = names[np.sort(order[count:])]
    val_images = Images(args.val or args.data, held_out[np.sort(order[:count])], args.decode_size)
    return Images(args.data, names, args.decode_size), val_images


# --------------------------------------------------------------------------------- views, in worker processes


def random_box(height, width, area, rng):
    """A random crop of an image, (top, left, height, width): its share of the area is drawn from `area`, its
    aspect ratio from 0.75..1.33; the whole image after 100 failed tries (released pipeline)."""
    for _ in range(100):
        pixels, ratio = rng.uniform(*area) * height * width, rng.uniform(0.75, 1.33)
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, height, width


def crop(image, box, size, flip):
    """Cut `box` out of uint8 [3, H, W] and resize it, bilinear with antialiasing -> uint8 [3, size, size]."""
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width]
    view = F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]
    return view.flip(-1) if flip else view


def read_or_next(source, index, read):
    """Read the image at `index`, or the next readable one -> the result of `read`, and what was wrong with
    the image at `index` ('' if nothing). Raises ValueError after 100 unreadable images in a row."""
    wrong, most = "", min(len(source), 100)
    for i in range(most):
        try:
            return read((index + i) % len(source)), wrong
        except Exception as error:  # a damaged file can make a decoder raise anything
            wrong = wrong or f"{source.name(index)}: {(str(error) or repr(error)).splitlines()[0]}"
    raise ValueError(f"{most} images in a row cannot be read; the first is {wrong}")


class Views(Dataset):
    """One image -> uint8 crops of one reference, one random query and the focal queries. Keys are (epoch,
    index) and seed the crops, so a key always gives the same views. Items: reference and query [3, S, S],
    focal [F, 3, s, s], boxes [2 + F, 4], flips [2 + F], and unreadable: '' or what was wrong with a file that
    was replaced by another one."""

    def __init__(self, source, args):
        self.source, self.args = source, args

    def __getitem__(self, key):
        args, rng = self.args, np.random.default_rng((self.args.seed, *key))
        image, wrong = read_or_next(self.source, key[1], self.source.image)
        assert image.dtype == torch.uint8 and len(image) == 3, "image(i) must return a uint8 tensor [3, H, W]"
        areas = [args.large_area] * 2 + [args.focal_area] * args.focal
        boxes = [random_box(*image.shape[1:], area, rng) for area in areas]
        flips = rng.random(len(boxes)) < 0.5
        flips[0] = False  # the reference is never mirrored
        sizes = [args.image_size] * 2 + [args.focal_size] * args.focal
        views = [crop(image, *view) for view in zip(boxes, sizes, flips)]
        none = image.new_zeros(0, 3, args.focal_size, args.focal_size)
        return {
            "reference": views[0],
            "query": views[1],
            "focal": torch.stack(views[2:]) if args.focal else none,
            "boxes": torch.tensor(boxes),
            "flips": torch.from_numpy(flips),
            "unreadable": wrong,
        }


def step_keys(images, batch, seed, first, last, rank=0, world_size=1, accumulate=1):
    """Yield the keys (epoch, index) of each micro-batch of the steps first..last-1: a new permutation in each
    epoch, truncated to whole batches. Which images a step sees depends on (seed, step) alone, not on the
    number of processes and micro-batches that share them."""
    steps, order = images // batch, None
    for step in range(first, last):
        epoch, i = divmod(step, steps)
        if order is None or i == 0:
            order = np.random.default_rng((seed, epoch)).permutation(images)
        indices = order[i * batch : (i + 1) * batch]
        for part in indices.reshape(accumulate, world_size, -1)[:, rank]:
            yield [(epoch, int(index)) for index in part]


def init_worker(_):
    """Make a loader worker end quietly, with the main process at the latest."""
    atexit.register(os._exit, 0)  # Python's cleanup can abort it while a thread still sends tensors
    if not parent_process().is_alive():  # PyTorch watches the main process only from now on
        os._exit(1)


def read_batches(dataset, workers, device, **sampling):
    """Yield what worker processes read from `dataset`; `sampling` is a batch_sampler, or a sampler and
    batch_size. The workers live until the generator is closed. Exits with an error if one of them fails."""
    spawn = "spawn" if workers else None  # forking with running threads can hang
    kind = {"num_workers": workers, "multiprocessing_context": spawn, "worker_init_fn": init_worker}
    # Terminals and schedulers send these signals to all processes, but only the main process handles them.
    # Workers inherit the mask that blocks them, so the generator must be closed, which shuts them down.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    resource_tracker.ensure_running()  # inherits the mask as well, but unblocks two of the signals here
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    iterator = iter(DataLoader(dataset, **kind, pin_memory=device.type == "cuda", **sampling))
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise a worker's failure anywhere in main
    try:
        yield from iterator
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        if not re.search(r"in a row cannot|shared memory|resize file|\(pid|EOFError|Connection", repr(error)):
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[-1]  # what the worker said
        remedy = "; if memory or /dev/shm is full, use fewer --workers or, in Docker, --ipc=host"
        fail(f"cannot read the images: {reason}{'' if isinstance(error, ValueError) else remedy}")
    finally:
        if workers:
            iterator._shutdown_workers()


def to_device(batch, device):
    """A collated batch with its tensors on the device. The host does not wait for copies of pinned memory."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# -------------------------------------------------------------------------- colors, on the device, in batches

YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
CONSTANTS = {
    "mean": MEAN,
    "std": STD,
    "same": np.eye(3),
    "gray": ((0.2989, 0.587, 0.114),) * 3,
    "yiq": YIQ,
    "to_rgb": np.linalg.inv(YIQ),
    # The first matrix + cos of an angle times the second + sin times the third rotates I and Q.
    "rotation": (np.diag((1, 0, 0)), np.diag((0, 1, 1)), ((0, 0, 0), (0, 0, -1), (0, 1, 0))),
    # The ranges of what is drawn for each view: contrast, saturation, hue, brightness, four numbers for their
    # order, whether they are applied, whether the view becomes gray, sigma of the blur.
    "low": (0.6, 0.8, -0.1, -0.4, 0, 0, 0, 0, 0, 0, 0.1),
    "high": (1.4, 1.2, 0.1, 0.4, 1, 1, 1, 1, 1, 1, 2.0),
}


@functools.cache
def constants(device):
    """CONSTANTS as cached float32 tensors: each new copy would make the host wait for a GPU."""
    return {name: torch.tensor(np.array(x, np.float32), device=device) for name, x in CONSTANTS.items()}


def jitter_steps(draws, c):
    """The color jitter from what was drawn for V views [11, V] and the constants: four operations
    x -> M x + b + f mean(x), in a different order for each view. Brightness is added, contrast scales about
    the channel mean, saturation scales about gray, and hue rotates by a part of the circle in YIQ. One view
    in five is not jittered. Returns M [V, 4, 3, 3], b [V, 4, 1, 1], f [V, 4, 1, 1]."""
    contrast, saturation, hue, brightness = draws[:4, :, None, None]  # V,1,1
    angle, (fixed, turned, across) = hue * 2 * math.pi, c["rotation"]
    matrices = {  # of the operations that are not the identity, V,3,3
        1: contrast * c["same"],
        2: saturation * c["same"] + (1 - saturation) * c["gray"],
        3: c["to_rgb"] @ (fixed + angle.cos() * turned + angle.sin() * across) @ c["yiq"],
    }
    order = draws[4:8].reshape(-1, 4).argsort(1)  # V,4: 0 is brightness
    order = torch.where(draws[8, :, None] < 0.8, order, -1)[..., None, None]  # -1: nothing is changed
    matrix = c["same"]
    for k, changed in matrices.items():
        matrix = torch.where(order == k, changed[:, None], matrix)
    return matrix, (order == 0) * brightness[:, None], (order == 1) * (1 - contrast[:, None])


def blur(x, chosen, sigma):
    """Blur with a Gaussian kernel, about a tenth of the side wide, along rows and columns."""
    radius = x.shape[-1] // 10 // 2
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernels = torch.where(chosen, (-(taps**2) / (2 * sigma**2)).softmax(-1), (taps == 0).float())  # V,k
    kernels = kernels.repeat_interleave(3, 0)  # 3V,k
    flat = F.pad(x.flatten(0, 1)[None], (radius,) * 4, mode="reflect")  # 1,3V,s+2r,s+2r
    flat = F.conv2d(flat, kernels[:, None, :, None], groups=len(kernels))
    return F.conv2d(flat, kernels[:, None, None, :], groups=len(kernels)).view_as(x)


def solarize(x, chosen, _):
    """Invert values above 0.5 in the chosen views."""
    top = 2 - chosen.float()[..., None, None]  # 2 changes nothing
    return torch.minimum(x, top - x)


# The operations after jitter and grayscale: name -> function of the views [V, 3, s, s] in 0..1, a mask of
# the views that it must change [V, 1], and a random sigma for each view [V, 1].
OPERATIONS = {"blur": blur, "solarize": solarize}
COLORS = {  # their order and probabilities; the blur needs --blur, because the released code never blurs
    "reference": {"blur": 1.0},
    "query": {"blur": 0.1, "solarize": 0.2},
    "focal": {"blur": 0.5},
}


def normalize(views):
    """uint8 or float [..., 3, s, s] in 0..255 -> float32, normalized with ImageNet's mean and std."""
    mean, std = (constants(views.device)[name][:, None, None] for name in ("mean", "std"))
    return (views / 255 - mean) / std


def augment(views, draws=None, **probabilities):
    """Random colors for a batch of views, each with its own parameters: uint8 [V, 3, s, s] -> normalized
    float32. Color jitter with values clipped to 0..1 after each operation, grayscale with probability 0.2,
    then OPERATIONS with the given probabilities (released pipeline). draws: the random numbers in 0..1
    for all of this [11 + operations, V]; drawn here if None. No value goes back to the host."""
    c = constants(views.device)
    if draws is None:
        draws = torch.rand(len(c["low"]) + len(OPERATIONS), len(views), device=views.device)
    draws, choices = draws.split((len(c["low"]), len(OPERATIONS)))
    draws = torch.addcmul(c["low"][:, None], draws, (c["high"] - c["low"])[:, None])
    matrix, shift, of_mean = jitter_steps(draws, c)
    # Pixels are flattened: every operation is a 3x3 matrix product over the colors of all pixels of a view.
    x = views.flatten(2).float().div_(255)  # V,3,ss
    for k in range(4):
        bias = shift[:, k] + of_mean[:, k] * x.mean(-1, keepdim=True)  # V,3,1
        x = (matrix[:, k] @ x).add_(bias).clamp_(0, 1)
    x = (torch.where(draws[9, :, None, None] < 0.2, c["gray"], c["same"]) @ x).view(views.shape)
    choices = dict(zip(OPERATIONS, choices[..., None]))  # V,1
    for name, probability in probabilities.items():
        x = OPERATIONS[name](x, choices[name] < probability, draws[10, :, None])
    return x.sub_(c["mean"][:, None, None]).div_(c["std"][:, None, None])


def to_views(batch, args, random_colors=True):
    """A collated batch of Views on the device -> the views of loca.LOCA.forward: colors and targets."""
    views = {}
    for kind, chances in COLORS.items():
        x = batch[kind]  # B,3,s,s; the focal queries: B,F,3,s,s
        chances = {k: p for k, p in chances.items() if args.blur or k != "blur"}
        colored = augment(x.flatten(0, -4), **chances) if random_colors and x.numel() else normalize(x)
        views[kind] = colored.view(x.shape)
    # The crop boxes determine where each query patch lies in the reference: the targets of the position loss.
    boxes, flips = batch["boxes"], batch["flips"]  # reference, query, then the focal queries
    side, grid = args.image_size, args.image_size // args.patch_size
    targets = loca.patch_targets(boxes[:, 0], boxes[:, 1], flips[:, 1], side, grid, grid)  # B,N
    side, small = args.focal_size, args.focal_size // args.patch_size
    focal_targets = loca.patch_targets(boxes[:, :1], boxes[:, 2:], flips[:, 2:], side, small, grid)  # B,F,n
    return {**views, "query_targets": targets, "focal_targets": focal_targets}


# --------------------------------------------------------------------- model, optimizer, schedules, precision


def build_encoder(args, image_size, **more):
    """The encoder that the settings of either script describe. `more` are further arguments of ViT. Raises
    ValueError if sizes do not fit together. Pretraining needs patch_size, grid, dim, heads, mlp_dim,
    forward(images, keep, position); fine-tuning needs patch_size, dim, forward(images)."""
    sizes = {name: getattr(args, name) for name in loca.SIZES["B/16"]}
    encoder = loca.ViT(image_size, **sizes, drop_path=args.drop_path, **more)  # or another backbone
    if encoder.patch_size != args.patch_size:
        raise ValueError(f"the encoder has patches of {encoder.patch_size} pixels, not {args.patch_size}")
    return encoder


def build_model(args):
    """The LOCA that the settings describe, on the CPU. Raises ValueError if sizes do not fit together."""
    encoder = build_encoder(args, args.image_size)
    encoder.grad_checkpoint = args.grad_checkpoint
    if args.position_std and hasattr(encoder, "pos_embed"):
        nn.init.normal_(encoder.pos_embed, std=args.position_std)
    # The settings of LOCA are the flags of the same names.
    names = [name for name in inspect.signature(loca.LOCA).parameters if hasattr(args, name)]
    return loca.LOCA(encoder, **{name: getattr(args, name) for name in names})


def init_encoder(encoder, path, branch):
    """Load a branch's encoder from the file of --init -> the file's state dict. Exits if it does not fit."""
    try:
        weights = loca.load_weights(path, branch)
        loca.load_encoder(encoder, weights)
    except (OSError, ValueError, ImportError) as error:
        fail(f"--init {path}: {error}")
    prefix = weights.prefix.rstrip(".") or "the only branch"
    assumed = f"; heads assumed: {encoder.heads}; set --heads to change it" if weights.heads_assumed else ""
    say(f"--init {path}: {branch} ({prefix}); {len(encoder.state_dict())} tensors loaded{assumed}")
    return weights


def init_head(head, weights, prefix):
    """Load the projection head or the predictor if the weights hold all of it -> a message for the user."""
    own = head.state_dict()
    found = ((name, weights.get(prefix + name)) for name in own)
    fits = {name: x for name, x in found if x is not None and x.shape == own[name].shape}
    # The authors' files may lack the predictor's last norm. In loca_vbase_imnet1k, the weights of the head
    # have shrunk to about 1e-30, so the head would never learn again.
    complete = all(name in fits or name.startswith("norm.") for name in own)
    if not complete or any(x.abs().max() < 1e-12 for x in fits.values() if x.ndim > 1):
        return "starts from scratch: in the file it is incomplete, has other shapes, or is all but zero"
    head.load_state_dict({**own, **fits})
    return f"loaded, {len(fits)} of {len(own)} tensors"


def init_from(path, networks):
    """Initialize the model, and the teacher if there is one, from the file's student and teacher, and print
    what was loaded. The whole encoder must fit; heads are loaded if they are complete and fit."""
    for name, module in networks.items():
        branch = "student" if name == "model" else "teacher"
        weights = init_encoder(module.encoder, path, branch)
        for part, head in module.named_children():
            if part != "encoder":
                say(f"--init {path}: {branch}'s {part} {init_head(head, weights, f'{part}.')}")


def weight_decay_groups(model, weight_decay, spared=()):
    """Parameter groups. Tensors of one dimension or with names that end in `spared` have no weight decay."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.endswith(spared)
            groups.setdefault(0.0 if free else weight_decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


# (parameter groups, learning rate) -> optimizer. --optimizer offers every entry, in both scripts.
OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),  # as in Segmenter
}


def learning_rate(step, steps, warmup, peak):
    """Linear from 0 over `warmup` steps, then a cosine that would reach 1% of the peak at step `steps`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def teacher_momentum(step, steps, start):
    """Cosine schedule from `start` to 1 over all steps."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


def default_precision(device):
    """'bf16' where it is fast, else 'float32'."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"


def autocast(precision, device):
    """The precision context: bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def seed_all(*parts):
    """Seed torch on all devices from several numbers, without waiting for any device."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1)


# -------------------------------------------------------------------------------------- processes and signals

# A stop is requested by schedulers (SIGTERM; SIGUSR1 with SLURM's --signal), Ctrl-C, or a closed terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def init_distributed(name=None):
    """Join the processes that torchrun started, or run alone -> rank, number of processes, device. `name`:
    cuda, mps or cpu; the first one available if None."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    launchers = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of srun and of mpirun
    if "RANK" not in os.environ and any(int(os.environ.get(variable, "1")) > 1 for variable in launchers):
        fail("srun or mpirun alone is not enough: use srun --ntasks-per-node=1 torchrun ..., see README")
    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
        (torch.ones(1, device=device) + 1).item()  # fails if this PyTorch has no kernels for the card
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    if world_size > 1 and not dist.is_initialized():
        backend = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**backend, timeout=timedelta(minutes=10))
    return rank, world_size, device


def show(text, stream=None):
    """Print a line at once, with escapes for what the stream cannot encode. If its reader is gone (`| head`,
    a closed terminal), nothing more is printed, and the run goes on."""
    stream = stream or sys.stdout or open(os.devnull, "w")  # a closed stream is None
    coding = stream.encoding or "utf-8"
    try:
        print(text.encode(coding, "backslashreplace").decode(coding), file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text, stream=None):
    """Print in the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        show(text, stream)


@contextlib.contextmanager
def explain_out_of_memory(remedies):
    """Within the context, exit with one line that names `remedies` if memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):  # GPU, CPU, cuBLAS
            raise
        fail(f"out of memory; the last checkpoint is intact: rerun with {remedies}")


def end_processes():
    """Wait for all processes, then leave their group: torchrun ends all when one exits with an error."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather(value):
    """The value of each process: a list in the order of the ranks."""
    values = [value] * loca.world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def catch_signals():
    """Within the context, stop signals are appended to a list, which it yields; the loop saves and exits.
    Ignored signals (nohup) stay ignored. Repeating one has no effect; Ctrl-\\ (SIGQUIT) ends the process."""
    stop = []
    caught = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda number, _: stop.append(number)) for number in caught}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if stop else handler)  # after a stop, the process exits


# ---------------------------------------------------------------------------------------- log and checkpoints


class Meter:
    """Means of named scalars, and the speed, since the meter was made. Only `read` waits for the device."""

    def __init__(self):
        self.names, self.sums, self.count = (), 0, 0
        self.start, self.waited = time.perf_counter(), 0.0

    def next_batch(self, batches):
        """The next batch. Measures the time spent waiting for it, and names each unreadable file once."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        for wrong in filter(None, batch["unreadable"]):
            warn_once(f"cannot read {wrong}; using another image")
        return batch

    def add(self, values):
        """Add a micro-batch's dict of scalars."""
        self.names, self.count = tuple(values), self.count + 1
        self.sums = self.sums + torch.stack([value.detach() for value in values.values()])

    def read(self, micro_batch):
        """Means over processes and micro-batches (of the given size), images per second, share of waiting."""
        means = loca.sum_over_processes(self.sums / (self.count * loca.world_size())).tolist()
        seconds = time.perf_counter() - self.start
        speed, waiting = self.count * micro_batch / seconds, self.waited / seconds
        return dict(zip(self.names, means)) | {"images_per_second": speed, "waiting": waiting}


def check_finite(record, done):
    """Exit in all processes, before anything is saved, if the loss or its gradient was not finite."""
    if not math.isfinite(record["gradient_norm"]):
        values = ", ".join(f"{name} {value:.4g}" for name, value in record.items())
        text = f"the loss or its gradient was not finite in the steps up to {done} ({values})"
        fail(f"{text}; the last checkpoint is intact: lower --lr or use --precision float32", together=True)


class Log:
    """metrics.jsonl, one record per line. Drops records after `step`, left by a run that died after its last
    checkpoint, and damaged lines, left by a power cut."""

    def __init__(self, folder, step):
        self.path, kept = folder / "metrics.jsonl", []
        for line in self.path.read_bytes().splitlines() if os.path.exists(self.path) else ():
            try:
                kept += [line + b"\n"] if json.loads(line)["step"] <= step else []
            except (ValueError, KeyError, TypeError):
                warn_once(f"{self.path}: damaged lines are dropped")
        write_file(self.path, b"".join(kept))

    def write(self, record):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            fail(f"cannot write {self.path}: {error}; earlier files are intact")


def write_file(path, content):
    """Write `content` to a temporary file, then rename that to `path`, so that the file at `path` is always
    complete. content: bytes, a dict (written as JSON), or a function that writes to a file."""
    partial = Path(f"{path}.partial")
    content = json.dumps(content, indent=1).encode() if isinstance(content, dict) else content
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a file system error into a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        fail(f"cannot write {path}: {reason}; earlier files are intact")


def save_checkpoint(path, args, step, modules, **more):
    """Write the states of `modules` (by name), the settings and the step."""
    state = {name: module.state_dict() for name, module in modules.items()}
    write_file(path, lambda file: torch.save({**state, "settings": vars(args), "step": step, **more}, file))


def load_checkpoint(path, args, may_change, defaults, images, modules):
    """Load the states of `modules` from a checkpoint -> its contents, or None if there is no such file. Exits
    with an error if it is damaged or of another run. may_change: flags that may differ from the checkpoint's.
    defaults: of all flags, for those that the checkpoint lacks. images: the result of `identify`."""
    saved = None
    if os.path.exists(path):
        try:
            saved = loca.read_torch_file(path)
            old, new = {**defaults, **saved["settings"]}, vars(args)
        except (ValueError, KeyError, TypeError) as error:
            reason = error if isinstance(error, ValueError) else "it is not a checkpoint of this script"
            fail(f"cannot resume from {path}: {reason}; remove it, or use another --out")
        # Some flags may change; changing the others would make it a different run.
        changed = {key: f"--{key.replace('_', '-')}" for key in sorted(defaults) if old[key] != new[key]}
        wrong = [f"{changed[key]} {old[key]}, not {new[key]}" for key in changed if key not in may_change]
        if saved.get("images", images) != images:
            wrong.append(f"{saved['images']}, not {images}")
        if wrong:
            fail(f"{path} was saved with {wrong[0]}; change it back or use a new --out")
        for key, flag in changed.items():
            say(f"resuming with {flag} {new[key]} (was {old[key]})")
        try:
            for name, module in modules.items():
                module.load_state_dict(saved.pop(name))  # frees the memory
        except (KeyError, RuntimeError, ValueError) as error:  # the code has changed
            fail(f"{path} does not fit this model: {' '.join(str(error).split())[:300]}")
        say(f"resuming from {path} at step {saved['step']}")
    if len(set(gather(saved and saved["step"]))) > 1:
        fail(f"--out {path.parent}: processes see different checkpoints; they must share it", together=True)
    return saved


# ------------------------------------------------------------------------------- held-out metrics and picture


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # do not compile again for the shapes of held-out batches
def evaluate(model, teacher, read, args, device, indices):
    """Means over held-out images of what LOCA returns -> dict of floats. Networks are in evaluation mode.
    read: returns an item of Views by index. indices: this process's images, equally many in each process."""
    sums = 0.0
    for start in range(0, len(indices), 32):
        seed_all(args.seed, start)  # the same masks at each evaluation
        batch = to_device(default_collate([read(i) for i in indices[start : start + 32]]), device)
        views = to_views(batch, args, random_colors=False)
        with autocast(args.precision, device):
            losses = model(views, teacher)
        sums = sums + len(views["focal"]) * torch.stack([value.float() for value in losses.values()])
    means = loca.sum_over_processes(sums / (len(indices) * loca.world_size())).tolist()
    return dict(zip(losses, means))


def with_chance(values, model, chances):
    """What LOCA returns, as text, with known chance levels. Losses of weight 0 are left out."""
    chances = {name: f" (chance {level:.3g})" for name, level in chances.items()}
    values = {k: x for k, x in values.items() if getattr(model, k.replace("_loss", "_weight"), 1)}
    return " | ".join(f"{name} {value:.3g}{chances.get(name, '')}" for name, value in values.items())


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def draw_predictions(model, teacher, read, args, device, indices, side=160):
    """Draw held-out images as puzzles, one per row: the reference with the query's outline, the query, the
    query where it belongs on the dimmed reference, and its patches there as the model places them."""
    seed_all(args.seed, 0)
    batch = default_collate([read(i) for i in indices])
    views = to_views(to_device(batch, device), args, random_colors=False)
    tokens = teacher.encoder(views["reference"]) if model.needs_teacher else None  # B,N,D
    visible = loca.MASKING[model.masking](*model.encoder.grid, model.visible_tokens, device)
    context = model.encode_context(views["reference"], tokens, visible)
    views["focal"] = views["focal"][:, :0]
    queries, targets = model.encode_queries(views, torch.arange(model.positions, device=device))
    predicted = model.predictor(queries, context).argmax(-1)  # B,N

    grid, cell, header = args.image_size // args.patch_size, side + 6, 18
    sheet = Image.new("RGB", (4 * cell, header + len(indices) * cell), "white")
    for k, title in enumerate(("reference (red: query)", "query", "true placement", "predicted placement")):
        ImageDraw.Draw(sheet).text((k * cell + 2, 0), title, fill="black", font=ImageFont.load_default(13))
    for i, boxes in enumerate(batch["boxes"][:, :2].tolist()):
        crops = (batch[name][i].permute(1, 2, 0).numpy() for name in ("reference", "query"))
        reference, query = (Image.fromarray(x).resize((side, side), Image.BICUBIC) for x in crops)
        # The query's box, in pixels of the drawn reference.
        (top, left, height, width), (y, x, h, w) = boxes
        x, w = round((x - left) * side / width), max(1, round(w * side / width))
        y, h = round((y - top) * side / height), max(1, round(h * side / height))
        true = Image.blend(reference, Image.new("RGB", (side, side), "white"), 0.75)
        placed, mirrored = true.copy(), bool(batch["flips"][i, 1])
        ImageDraw.Draw(reference).rectangle((x, y, x + w - 1, y + h - 1), outline="red", width=3)
        small = (ImageOps.mirror(query) if mirrored else query).resize((w, h), Image.BICUBIC)
        true.paste(small, (x, y))
        for k, (target, position) in enumerate(zip(targets[i].tolist(), predicted[i].tolist())):
            row, column = divmod(k, grid)
            column = grid - 1 - column if mirrored else column
            part = [column * w // grid, row * h // grid, (column + 1) * w // grid, (row + 1) * h // grid]
            # Each patch is drawn at its true place, shifted by the prediction error.
            right, down = position % grid - target % grid, position // grid - target // grid
            if target >= 0:
                place = (x + part[0] + right * side // grid, y + part[1] + down * side // grid)
                placed.paste(small.crop(part), place)
        for k, picture in enumerate((reference, query, true, placed)):
            sheet.paste(picture, (k * cell, header + i * cell))
    return sheet


# ------------------------------------------------------------------------------------------------------- main

MAY_CHANGE = {  # flags that a resumed run may change
    "data", "val", "out", "workers", "device", "precision", "compile", "grad_checkpoint", "log_every", "save_minutes",
    "keep", "val_every", "accumulate", "epochs", "steps", "lr", "warmup_epochs", "clip",
}  # fmt: skip


def main(args, images=None):
    """Pretrain with the given settings, from the last checkpoint in --out if there is one. images: your own
    training and held-out images, instead of those of the flags, as picklable objects like Images."""
    # ---- processes: torchrun's environment, or a single one ----
    rank, world_size, device = init_distributed(args.device)
    args.precision = args.precision or default_precision(device)
    out = Path(args.out)

    # ---- data: which images a step sees depends on (seed, step) alone ----
    train_images, val_images = images or open_images(args)
    identity = identify(train_images, val_images)
    steps_per_epoch = len(train_images) // args.batch
    if steps_per_epoch == 0:
        fail(f"{len(train_images)} training images are too few: use --batch {len(train_images)} or less")
    # The learning rate scales linearly with the batch, from the published 0.001 at 1024.
    total_steps = args.steps or args.epochs * steps_per_epoch
    warmup_steps = min(round(args.warmup_epochs * steps_per_epoch), total_steps // 2)
    peak_lr = args.lr * args.batch / 1024

    # ---- student, teacher, optimizer ----
    seed_all(args.seed)
    with explain_out_of_memory("a smaller --model, or free memory on the device"):
        model = build_model(args).to(device)
        teacher = loca.make_teacher(model) if model.needs_teacher else None
    networks = nn.ModuleDict({"model": model} if teacher is None else {"model": model, "teacher": teacher})
    if args.init and not os.path.exists(out / "last.pt"):
        init_from(args.init, networks)
    optimizer = OPTIMIZERS[args.optimizer](weight_decay_groups(model, args.weight_decay), lr=peak_lr)

    # ---- resume: the same command continues the run in --out ----
    modules = {**networks, "optimizer": optimizer}
    defaults = vars(make_parser().parse_args([])) | {"decode_size": 0}  # as in versions without this flag
    saved = load_checkpoint(out / "last.pt", args, MAY_CHANGE, defaults, identity, modules)
    start_step = saved["step"] if saved else 0
    if start_step >= total_steps:
        say("note: this run is already finished; use a new --out for a new run")
    if args.compile:  # only parts of the model: all blocks share one graph per number of tokens
        torch._dynamo.config.optimize_ddp = False  # do not split blocks at the boundaries of DDP's buckets
        for name, module in networks.named_modules():
            if re.fullmatch(r"(model|teacher)\.encoder\.blocks\.\d+|model\.predictor", name):
                module.compile(dynamic=False)
        # Compiling fuses the operations on the large arrays of the feature loss.
        model.assign_clusters = torch.compile(model.assign_clusters, dynamic=False)
        model.compare_clusters = torch.compile(model.compare_clusters, dynamic=False)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model

    # ---- log ----
    meter, log = Meter(), Log(out, start_step) if rank == 0 else None
    if rank == 0:
        write_file(out / "settings.json", vars(args))
    per_device = args.batch // world_size // args.accumulate
    say(
        f"{world_size} x {device.type}, {args.precision}; batch {args.batch} = {per_device} images per "
        f"device x {world_size} x {args.accumulate} accumulated\n{len(train_images)} images, "
        f"{steps_per_epoch} steps per epoch, {len(val_images)} held out; {total_steps} steps; in {out}; "
        f"encoder of {sum(p.numel() for p in model.encoder.parameters()) / 1e6:.1f} M parameters"
    )
    if (args.data or images) and len(train_images) < 20000 and not (args.small or args.init):
        say("note: with few images, --small or --init FILE (such as the published weights) works better")
    cells = torch.cartesian_prod(*(torch.arange(float(side)) for side in model.encoder.grid))
    chances = {  # what LOCA returns for a model that has learned nothing
        "position_loss": math.log(model.positions),
        "position_accuracy": 1 / model.positions,
        "position_distance": torch.cdist(cells, cells).mean().item(),
        "cross_entropy": math.log(args.prototypes),
    }
    saved_at, figures = time.monotonic(), {}
    held_out = functools.lru_cache(500)(lambda i: Views(val_images, args)[2**31, i])  # no epoch is 2**31
    mine = range(len(val_images))[rank::world_size][: len(val_images) // world_size]  # for this process

    # ---- loop ----
    shares = (rank, world_size, args.accumulate)
    keys = step_keys(len(train_images), args.batch, args.seed, start_step, total_steps, *shares)
    batches = read_batches(Views(train_images, args), args.workers, device, batch_sampler=keys)
    remedies = f"--accumulate {8 * args.accumulate} or --grad-checkpoint (now {per_device} images per device)"
    with catch_signals() as stop, explain_out_of_memory(remedies), contextlib.closing(batches):
        for step in range(start_step, total_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, warmup_steps, peak_lr)

            # ---- forward and backward ----
            for micro in range(args.accumulate):
                batch = to_device(meter.next_batch(batches), device)
                seed_all(args.seed, step, rank, micro)  # color jitter, masks, stochastic depth
                views = to_views(batch, args)
                last = micro == args.accumulate - 1  # gradients are averaged over the devices once per step
                with contextlib.nullcontext() if last or world_size == 1 else net.no_sync():
                    with autocast(args.precision, device):
                        losses = net(views, teacher)
                    (losses["loss"] / args.accumulate).backward()
                meter.add(losses)

            # ---- optimizer and teacher ----
            # The norm is a tensor on the device: clipping does not make the host wait.
            gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            if teacher is not None:
                loca.update_teacher(teacher, model, teacher_momentum(step, total_steps, args.momentum))

            # ---- log, evaluate, save: the only place where the host waits for the device ----
            done = step + 1
            epoch, into_epoch = divmod(done, steps_per_epoch)
            evaluate_now = done == total_steps or (into_epoch == 0 and epoch % args.val_every == 0)
            keep_now = args.keep and into_epoch == 0 and epoch % args.keep == 0
            alone = stop and world_size == 1  # several processes agree only at log lines
            if not (evaluate_now or keep_now or alone or done % args.log_every == 0):
                continue
            record = {"gradient_norm": gradient_norm.item(), **meter.read(args.batch / args.accumulate)}
            check_finite(record, done)
            record |= {"lr": group["lr"], "memory_gib": torch.cuda.max_memory_allocated() / 2**30}
            stopping = done < total_steps and any(gather(bool(stop)))
            seconds_left = (total_steps - done) * args.batch / record["images_per_second"]
            measured = with_chance({name: record[name] for name in losses}, model, chances)
            say(
                f"step {done}/{total_steps} epoch {done / steps_per_epoch:.1f} | {measured} | "
                f"lr {record['lr']:.1e} | {record['images_per_second']:.1f} img/s | waiting for data "
                f"{record['waiting']:.0%} | CUDA memory {record['memory_gib']:.1f} GiB | "
                f"{timedelta(seconds=round(seconds_left))} left"
            )
            if evaluate_now and mine and not stopping:
                networks.eval()  # without stochastic depth
                figures = evaluate(model, teacher, held_out, args, device, mine)
                networks.train()
                record |= {f"val_{name}": value for name, value in figures.items()}
                say(f"held out | {with_chance(figures, model, chances)}")
            if rank == 0:
                log.write({"step": done, "epoch": done / steps_per_epoch, **record})
                if keep_now:
                    save_checkpoint(out / f"epoch_{epoch:04d}.pt", args, done, modules, images=identity)
                if stopping or done == total_steps or time.monotonic() - saved_at > 60 * args.save_minutes:
                    save_checkpoint(out / "last.pt", args, done, modules, images=identity)
                    encoder = (model if teacher is None else teacher).encoder.state_dict()
                    write_file(out / "encoder.pt", lambda file: torch.save(encoder, file))
                    saved_at = time.monotonic()
            if stopping:
                say(f"stopped: saved at step {done}; run the same command to resume")
                end_processes()  # waits until the first one has saved
                sys.exit(EXIT_STOPPED)
            meter = Meter()  # start anew: evaluating and saving do not count as training time

    # ---- end ----
    end_processes()
    if rank == 0 and len(val_images) and not args.single_image:
        shown = np.unique(np.linspace(0, len(val_images) - 1, 5).astype(int)).tolist()  # evenly spaced
        networks.eval()
        picture = draw_predictions(model, teacher, held_out, args, device, shown)
        write_file(out / "predictions.png", lambda file: picture.save(file, "PNG"))
    if figures:
        accuracy = figures["position_accuracy"]
        say(f"held-out position accuracy {accuracy:.2%}, {accuracy * model.positions:.1f} times chance")
    say(f"{out}: {', '.join(sorted(os.listdir(out)))}")
    flags = f"{' --data NAME:DIR' if args.data or images else ''} --init {out}/last.pt"
    say(f"next: python finetune_seg.py{flags}{' --small' if args.small else ''}")


# ----------------------------------------------------------------------------------------------- command line

SMALL_PRESET = {  # for hundreds to thousands of images on a CPU; .github/EXPERIMENTS.md lists what was tried
    "patch_size": 8, "dim": 192, "depth": 6, "heads": 3, "mlp_dim": 768, "image_size": 64, "focal_size": 32, "focal": 4,
    "prototypes": 512, "head_hidden": 384, "bottleneck": 64, "batch": 32, "steps": 3600, "warmup_epochs": 3.0, "lr": 0.032,
    "momentum": 0.99, "teacher_temperature": 0.025, "val_every": 10, "log_every": 25, "out": "runs/small",
}  # fmt: skip
SCENES_PRESET = {
    "patch_size": 8, "dim": 128, "depth": 4, "heads": 2, "mlp_dim": 512, "image_size": 64, "focal_size": 32, "focal": 3,
    "prototypes": 256, "head_hidden": 256, "bottleneck": 64, "batch": 32, "epochs": 7, "warmup_epochs": 1.0, "lr": 0.06,
    "momentum": 0.99, "position_std": 1.0, "out": "runs/scenes", "val_images": 64, "log_every": 10,
}  # fmt: skip


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that shows the default after each text, unless there is none."""

    def _get_help_string(self, action):
        shown = action.default not in (None, argparse.SUPPRESS) and action.default is not False
        return f"{action.help} (%(default)s)" if shown else action.help


# Both scripts pass this to argparse. The usage is printed with every error, so keep it short.
PARSER = {"usage": "%(prog)s [flags]   (--help lists them)", "formatter_class": Help}


def number(kind, valid, rule):
    """An argparse type: a number of `kind` for which `valid` holds; `rule` describes valid values."""

    def parse(text):
        value = kind(text)
        if not valid(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


positive_int = number(int, lambda n: n > 0, "positive")
int_or_0 = number(int, lambda n: n >= 0, "0 or more")
positive_float = number(float, lambda x: 0 < x < math.inf, "positive")
float_or_0 = number(float, lambda x: 0 <= x < math.inf, "0 or more")
up_to_1 = number(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
below_1 = number(float, lambda x: 0 <= x < 1, "at least 0 and below 1")


def add_run_flags(parser):
    """The flags shared by both scripts."""
    # fmt: off
    g = parser.add_argument_group("run")
    g.add_argument("--device", help="cuda, mps or cpu; default: the first one available")
    g.add_argument("--precision", choices=["bf16", "float32"], help="default: bf16 where it is fast")
    g.add_argument("--workers", type=int_or_0, help="loader processes per device; default: its share of the cores, at most 12")
    g.add_argument("--log-every", type=positive_int, default=20, help="steps between log lines; a multi-process run can be stopped only at a log line")
    g.add_argument("--save-minutes", type=float_or_0, default=10.0, help="minutes between checkpoints")
    g.add_argument("--seed", type=int_or_0, default=0, help="seed of everything random")
    # fmt: on
    return g


def make_parser():
    """The command line; the defaults are the released recipe."""
    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    yes_no = {"action": argparse.BooleanOptionalAction, "default": False}
    # fmt: off
    g = parser.add_argument_group("data")
    g.add_argument("--data", metavar="DIR", help="folder of images, at any depth; default: drawn scenes and a tiny model")
    g.add_argument("--val", metavar="DIR", help="folder of held-out images; default: part of --data")
    g.add_argument("--val-images", type=int_or_0, default=500, help="maximum number of held-out images; without --val, also at most a tenth of --data")
    g.add_argument("--val-every", type=positive_int, default=1, metavar="E", help="epochs between held-out evaluations; raise it for few images")
    g.add_argument("--scenes", type=positive_int, default=1280, help="number of drawn scenes to train on, without --data")
    g.add_argument("--small", **yes_no, help="preset for hundreds of images on a CPU: small model, views and batch; half an hour on two cores")
    g = parser.add_argument_group("views")
    g.add_argument("--image-size", type=positive_int, default=224, help="side of the reference and the random query, pixels")
    g.add_argument("--focal-size", type=positive_int, default=96, help="side of the focal queries, pixels")
    g.add_argument("--focal", type=int_or_0, default=9, help="focal queries per image; fewer is faster")
    g.add_argument("--decode-size", type=int_or_0, default=512, metavar="N", help="decode JPEGs at 1/2, 1/4 or 1/8 size if the short side stays at N pixels or more; faster; raise it with --image-size; 0: off")
    g.add_argument("--query-tokens", type=positive_int, help="tokens of the random query that are encoded; default: 5/14 of them")
    g.add_argument("--large-area", type=up_to_1, nargs=2, default=[0.32, 1.0], help="smallest and largest fraction of the image area covered by the reference and random query")
    g.add_argument("--focal-area", type=up_to_1, nargs=2, default=[0.05, 0.32], help="smallest and largest fraction of the image area covered by a focal query")
    g.add_argument("--blur", **yes_no, help="blur views as the paper intends; the released code never blurs")
    g = parser.add_argument_group("method")
    g.add_argument("--init", metavar="FILE", help="initial weights: published (flax), from an earlier run, or from any ViT")
    g.add_argument("--model", choices=list(loca.SIZES), help="model size; default: from --init or the preset, else B/16; the next five flags override parts of it")
    g.add_argument("--patch-size", type=positive_int, help="side of a patch, pixels; smaller for small images")
    g.add_argument("--dim", type=positive_int, help="width")
    g.add_argument("--depth", type=positive_int, help="number of blocks")
    g.add_argument("--heads", type=positive_int, help="attention heads")
    g.add_argument("--mlp-dim", type=positive_int, help="hidden width of a block's MLP")
    g.add_argument("--position-std", type=positive_float, help="standard deviation of the initial position embedding; default: width ** -0.5; 1 learns positions sooner")
    g.add_argument("--drop-path", type=below_1, default=0.1, help="stochastic depth rate of the last block")
    g.add_argument("--prototypes", type=positive_int, default=4096, help="clusters of the feature loss; fewer for small data")
    g.add_argument("--head-hidden", type=positive_int, default=2048, help="hidden width of the projection head")
    g.add_argument("--bottleneck", type=positive_int, default=256, help="width of the features that are compared with prototypes")
    g.add_argument("--masking-ratio", type=below_1, default=0.8, help="eta, the share of reference tokens that are hidden from the queries")
    g.add_argument("--masking", default="consecutive", choices=list(loca.MASKING), help="which reference tokens stay visible")
    g.add_argument("--student-temperature", type=positive_float, default=0.1, help="temperature of the student's cluster prediction")
    g.add_argument("--teacher-temperature", type=positive_float, default=0.05, help="temperature of the targets; raise it if they collapse")
    g.add_argument("--position-weight", type=float_or_0, default=1.0, help="weight of the position loss; 0: feature loss alone")
    g.add_argument("--feature-weight", type=float_or_0, default=1.0, help="weight of the feature loss; 0: position loss alone, no teacher")
    g.add_argument("--single-image", **yes_no, help="baseline without a reference: a view predicts its own positions")
    g = parser.add_argument_group("training")
    g.add_argument("--epochs", type=positive_int, default=100, help="passes over the images")
    g.add_argument("--steps", type=positive_int, help="optimizer steps, instead of --epochs")
    g.add_argument("--batch", type=positive_int, default=1024, help="images per step, over all devices and micro-batches")
    g.add_argument("--accumulate", type=positive_int, default=1, help="micro-batches per step, to save memory; Sinkhorn sees one at a time")
    g.add_argument("--lr", type=positive_float, default=0.001, help="peak learning rate at batch 1024; scaled by batch / 1024")
    g.add_argument("--warmup-epochs", type=float_or_0, default=15.0, help="epochs of linear warm-up, at most half the run")
    g.add_argument("--optimizer", default="adamw", choices=list(OPTIMIZERS), help="adamw is as published; sgd needs its own --lr")
    g.add_argument("--weight-decay", type=float_or_0, default=0.1, help="weight decay; tensors of one dimension have none")
    g.add_argument("--clip", type=float_or_0, default=1.0, help="maximum gradient norm; 0: no clipping")
    g.add_argument("--momentum", "--teacher-momentum", type=below_1, default=0.996, help="momentum of the teacher, rising to 1; lower it for short runs")
    g = add_run_flags(parser)
    g.add_argument("--out", metavar="DIR", default="runs/pretrain", help="run folder; a run found there is resumed")
    g.add_argument("--compile", **yes_no, help="torch.compile the blocks, the predictor and the feature loss: slow start, faster on GPUs; needs a C++ compiler and, on GPUs, Triton")
    g.add_argument("--grad-checkpoint", type=int_or_0, nargs="?", default=0, const=1000, metavar="N", help="recompute the first N blocks, or all of them, in the backward pass: less memory, slower")
    g.add_argument("--keep", type=int_or_0, default=0, metavar="E", help="keep a checkpoint every E epochs; 0: only the last one")
    # fmt: on
    return parser


def settle_batch(args, parser):
    """Check that the batch can be divided among processes and micro-batches, and choose --workers."""
    shares = int(os.environ.get("WORLD_SIZE", "1")) * args.accumulate
    if args.batch % shares:
        parser.error(f"--batch {args.batch}: use multiples of processes x --accumulate, {shares}")
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = max(1, min(12, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def parse_args(arguments=None, own_images=False):
    """The command line -> settings, checked before any data is read. Any preset value can be overridden.
    own_images: main gets images of your own, so without --data the preset is not that of the drawn scenes."""
    parser = make_parser()
    given = parser.parse_args(arguments, argparse.Namespace(epochs=None))  # None unless --epochs is given
    scenes = given.data is None and not own_images
    preset = loca.SIZES["B/16"] | (SMALL_PRESET if given.small else SCENES_PRESET if scenes else {})
    if given.epochs:  # it overrides the steps of a preset
        preset["steps"] = None
    if given.init:  # its sizes are the defaults
        try:
            sizes = loca.load_weights(given.init).sizes
        except (OSError, ValueError, ImportError) as error:
            parser.error(f"--init {given.init}: {error}")
        preset |= {key: sizes[key] for key in loca.SIZES["B/16"]}
    preset |= loca.SIZES.get(given.model, {})
    args = parser.parse_args(arguments, argparse.Namespace(**preset))  # flags override these values
    if args.val and not args.data:
        parser.error("--val needs --data")
    settle_batch(args, parser)
    if args.focal_size % args.patch_size:
        parser.error(f"--focal-size {args.focal_size}: use multiples of the patch size, {args.patch_size}")
    args.large_area, args.focal_area = sorted(args.large_area), sorted(args.focal_area)
    if not args.position_weight and (args.single_image or not args.feature_weight):
        parser.error("--position-weight 0 without the feature loss leaves no loss to train")
    try:
        with torch.device("meta"):
            encoder = build_model(args).encoder
        # A backbone of your own has its own sizes: the checkpoint must record those.
        vars(args).update({name: getattr(encoder, name) for name in ("dim", "heads", "mlp_dim")})
    except ValueError as error:
        parser.error(f"{error}: see --image-size, --patch-size, --heads, --dim, --query-tokens")
    return args


if __name__ == "__main__":
    main(parse_args())
