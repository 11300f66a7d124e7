"""Segmentation with a linear decoder on a ViT: train, evaluate, predict (Segmenter, Strudel et al. 2021).

`python finetune_seg.py` fine-tunes on drawn scenes; `--data NAME:DIR` takes a data set in its public layout,
`--data folder:DIR` anybody's images/{train,val} and masks/{train,val}; `--init FILE` the weights to start
from. Label 255 is ignored everywhere. Every random draw is a function of the seed and of the step, epoch or
image it is for, so a resumed run goes on as if it had never stopped.
"""

import argparse
import contextlib
import glob
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as colour_functions

import loca
import train
from train import REQUEUE, Problem, autocast, check_batch, check_numbers, feed, first_line, require, set_seed

IGNORED, ILLEGAL = 255, 254  # labels: counts nowhere; stands for no class of the data set


# ------------------------------------------------------------------------------------------- data sets


def bit_palette(count, first=1):
    """Colours of `count` classes as Pascal VOC numbers them, from colour `first` on; colour 0 is black."""

    def channel(c, k):
        return sum((c >> (3 * i + k) & 1) << (7 - i) for i in range(8))

    return tuple(tuple(channel(c, k) for k in range(3)) for c in range(first, first + count))


def named(text):
    """Class names out of a text that separates them with ', ' or ',' and a line break."""
    return tuple(text.replace("\n", " ").split(", "))


def shifted(count):
    """Mask values 1..count are the classes 0..count-1 and 0 is ignored."""
    return {0: IGNORED, **{k + 1: k for k in range(count)}}


@dataclass(frozen=True)
class DataSet:
    """One data set: where its files are, how a mask becomes class indices, and the protocol's defaults.

    layouts: patterns of the images, of their masks and of a list of names (or None), tried in turn below each
    of `roots`; an image and a mask belong together where their stars stand for the same; an end in '.*' is
    any image extension. splits: what {split} stands for. held_out: every so many-th image in the order of
    names is the validation part of a data set that has none. values: class of each value of an integer mask;
    None where the value is the class. colours: class of each RGB colour; rounded: channels are rounded to 0
    or 255.
    """

    classes: tuple
    layouts: tuple
    palette: tuple = ()
    splits: dict = field(default_factory=lambda: {"train": "train", "val": "val"})
    roots: tuple = ("",)
    held_out: int = 0
    integers: bool = True
    values: dict | None = None
    colours: dict | None = None
    rounded: bool = False
    base_size: int = 512
    crop: int = 512
    stride: int = 512
    batch: int = 8
    lr: float = 0.001
    epochs: int = 64


# fmt: off
ADE20K = named("""wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box,
column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand,
path, stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee
table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair,
boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet,
poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel,
basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot,
animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag""")
VOC = named("""background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table,
dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor""")
CONTEXT = named("""aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse,
motorbike, person, pottedplant, sheep, sofa, train, tvmonitor, bag, bed, bench, book, building, cabinet,
ceiling, cloth, computer, cup, door, fence, floor, flower, food, grass, ground, keyboard, light, mountain,
mouse, curtain, platform, sign, plate, road, rock, shelves, sidewalk, sky, snow, bedclothes, track, tree,
truck, wall, water, window, wood""")
CITYSCAPES = named("""road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation,
terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle""")
CITYSCAPES_PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)
CITYSCAPES_IDS = dict.fromkeys(range(34), IGNORED) | {
    i: k for k, i in enumerate((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))
}
CAMVID = named("sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist")
CAMVID_COLOURS = {  # the 32 colours of the original, grouped as SegNet did; the first of a class paints it
    0: [(128, 128, 128)],
    1: [(128, 0, 0), (0, 128, 64), (192, 0, 128), (64, 192, 0), (64, 0, 64)],  # building, bridge, archway, wall, tunnel
    2: [(192, 192, 128), (0, 0, 64)],  # pole, traffic cone
    3: [(128, 64, 128), (128, 0, 192), (192, 0, 64)],  # road, lane markings that are and are not for driving
    4: [(0, 0, 192), (64, 192, 128), (128, 128, 192)],  # sidewalk, parking block, road shoulder
    5: [(128, 128, 0), (192, 192, 0)],  # tree, other vegetation
    6: [(192, 128, 128), (128, 128, 64), (0, 64, 64)],  # sign, text, traffic light
    7: [(64, 64, 128)],
    8: [(64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)],  # car, SUV, truck, train, other
    9: [(64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)],  # pedestrian, child, cart, animal
    10: [(0, 128, 192), (192, 0, 192)],  # bicyclist, motorcycle
    IGNORED: [(0, 0, 0)],
}
IDD = named("""road, parking or drivable fallback, sidewalk, rail track or non-drivable fallback, person or
animal, rider, motorcycle, bicycle, autorickshaw, car, truck, bus, vehicle fallback, curb, wall, fence, guard
rail, billboard, traffic sign, traffic light, pole, obstacle fallback, building, bridge or tunnel, vegetation,
sky or background""")
IDD_PALETTE = (
    (128, 64, 128), (250, 170, 160), (244, 35, 232), (230, 150, 140), (220, 20, 60), (255, 0, 0), (0, 0, 230), (119, 11, 32),
    (255, 204, 54), (0, 0, 142), (0, 0, 70), (0, 60, 100), (136, 143, 153), (220, 190, 40), (102, 102, 156), (190, 153, 153),
    (180, 165, 180), (174, 64, 67), (220, 220, 0), (250, 170, 30), (153, 153, 153), (169, 187, 214), (70, 70, 70),
    (150, 100, 100), (107, 142, 35), (70, 130, 180),
)
SUN = named("""wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter,
blinds, desk, shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refrigerator,
television, paper, towel, shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub,
bag""")
ISPRS = named("impervious surface, building, low vegetation, tree, car, clutter")
ISPRS_PALETTE = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
SUIM = named("water, diver, plants, wreck, robot, reef, fish, sea floor")
SUIM_PALETTE = tuple(itertools.product((0, 255), repeat=3))

# Crop, stride, batch, rate and epochs of ade20k, context and cityscapes are Segmenter's; the others follow the nearest of these.
DATASETS = {
    "ade20k": DataSet(ADE20K, (("images/{split}/*.jpg", "annotations/{split}/*.png", None),), roots=("", "ADEChallengeData2016"),
                      splits={"train": "training", "val": "validation"}, values=shifted(150)),
    "voc2012": DataSet(VOC, (("JPEGImages/*.jpg", "SegmentationClass/*.png", "ImageSets/Segmentation/{split}.txt"),),
                       bit_palette(21, 0), roots=("", "VOC2012", "VOCdevkit/VOC2012"), crop=480, stride=320, batch=16),
    "context": DataSet(CONTEXT, (("JPEGImages/*.jpg", "SegmentationClassContext/*.png",
                                  "ImageSets/SegmentationContext/{split}.txt"),), roots=("", "VOC2010", "VOCdevkit/VOC2010"),
                       values=shifted(59), base_size=520, crop=480, stride=320, batch=16, epochs=256),
    "cityscapes": DataSet(CITYSCAPES, (("leftImg8bit/{split}/*/*_leftImg8bit.png", "gtFine/{split}/*/*_gtFine_labelIds.png",
                                        None),), CITYSCAPES_PALETTE, values=CITYSCAPES_IDS, base_size=1024, crop=768, lr=0.01,
                          epochs=216),
    "bdd100k": DataSet(CITYSCAPES, (("images/10k/{split}/*.jpg", "labels/sem_seg/masks/{split}/*.png", None),),
                       CITYSCAPES_PALETTE, roots=("", "bdd100k"), base_size=720, crop=640, lr=0.01, epochs=108),
    "camvid": DataSet(CAMVID, (("{split}/*.*", "{split}annot/*.png", None), ("{split}/*.*", "{split}_labels/*_L.png", None),
                               ("701_StillsRaw_full/*.png", "LabeledApproved_full/*_L.png", "{split}.txt")),
                      tuple(CAMVID_COLOURS[k][0] for k in range(11)), splits={k: k for k in ("train", "val", "test")},
                      values={k: k for k in range(11)} | {11: IGNORED},
                      colours={colour: k for k, colours in CAMVID_COLOURS.items() for colour in colours},
                      base_size=360, crop=320, stride=160, lr=0.01, epochs=216),
    "idd": DataSet(IDD, (("leftImg8bit/{split}/*/*_leftImg8bit.*", "gtFine/{split}/*/*_gtFine_labellevel3Ids.png", None),),
                   IDD_PALETTE, base_size=720, crop=640, lr=0.01, epochs=108),
    "kitti": DataSet(CITYSCAPES, (("training/image_2/*.png", "training/semantic/*.png", None),), CITYSCAPES_PALETTE,
                     held_out=5, values=CITYSCAPES_IDS, base_size=368, crop=368, stride=256, lr=0.01, epochs=216),
    "sunrgbd": DataSet(SUN, (("image/{split}/img-*.jpg", "label37/{split}/img37labels-*.png", None),),
                       splits={"train": "train", "val": "test"}, values=shifted(37), base_size=480, crop=480, stride=320),
    "isprs": DataSet(ISPRS, (("img_dir/{split}/*.*", "ann_dir/{split}/*.*", None), ("images/{split}/*.*", "masks/{split}/*.*", None)),
                     ISPRS_PALETTE, values=shifted(6),
                     colours={(0, 0, 0): IGNORED, **{colour: k for k, colour in enumerate(ISPRS_PALETTE)}}),
    "suim": DataSet(SUIM, (("{split}/images/*.*", "{split}/masks/*.*", None),), SUIM_PALETTE, roots=("", "SUIM"),
                    splits={"train": "train_val", "val": "TEST"}, integers=False,
                    colours={colour: k for k, colour in enumerate(SUIM_PALETTE)}, rounded=True, base_size=480, crop=480, stride=320),
    "folder": DataSet((), (("images/{split}/*.*", "masks/{split}/*.*", None),),
                      splits={k: k for k in ("train", "val", "test")}),
}
# fmt: on


def find_files(root, pattern):
    """Files below `root` that fit a pattern, by what its stars stand for; a last '.*' is any extension."""
    regex = re.compile("([^/]*)".join(map(re.escape, pattern.split("*"))), re.DOTALL)
    found = {}
    for path in glob.glob(pattern, root_dir=root):
        key = regex.fullmatch(path.replace(os.sep, "/")).groups()
        if pattern.endswith(".*"):
            if f".{key[-1].lower()}" not in train.EXTENSIONS:
                continue
            key = key[:-1]
        file = os.path.join(root, path)
        require(key not in found, f"{file} and {found.get(key)}: one image twice; take one out")
        found[key] = file
    return found


def find_pairs(name, folder, split):
    """(image file, mask file) of a split, in the order of names. Raises Problem where one is not there."""
    data, flag = DATASETS[name], f"--data {name}:{folder}"
    layouts = [[p and p.format(split=data.splits[split]) for p in patterns] for patterns in data.layouts]
    for part, (images, masks, listing) in itertools.product(data.roots, layouts):
        root = os.path.join(folder, part)
        images, masks = find_files(root, images), find_files(root, masks)
        if not images or not masks or (listing and not os.path.exists(os.path.join(root, listing))):
            continue
        wanted = sorted(images)
        if listing:  # names, or paths of images, one a line; what follows on the line is not looked at
            lines = Path(root, listing).read_text().splitlines()
            wanted = sorted({(Path(line.split()[0]).stem,) for line in lines if line.strip()})
        if data.held_out:
            held_out = set(wanted[data.held_out - 1 :: data.held_out])
            wanted = [key for key in wanted if (key in held_out) == (split == "val")]
        require(
            wanted,
            f"{flag}: none of its {len(images)} images is of the {split} part ({listing or 'too few'})",
        )
        for files, kind in ((images, "image"), (masks, "mask")):
            missing = ["/".join(key) for key in wanted if key not in files]
            if missing:
                more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
                raise Problem(
                    f"{flag}: {len(missing)} of {len(wanted)} {split} names have no {kind}: "
                    f"{', '.join(map(repr, missing[:4]))}{more}; add the files or take the names out"
                )
        return [(images[key], masks[key]) for key in wanted]
    looked = "; ".join(" with ".join(filter(None, patterns)) for patterns in layouts)
    raise Problem(f"{flag}: no {split} images with masks; looked for {looked}")


class Labelled:
    """Images with masks on disk, by number: image uint8 [3, H, W] and labels uint8 [H, W], 255 ignored."""

    def __init__(self, data, pairs, count):
        self.pairs, self.rounded = pairs, data.rounded
        self.integers = self.colours = None
        if data.integers:
            self.integers = np.full(2**16, ILLEGAL, np.uint8)
            values = {k: k for k in range(count)} if data.values is None else data.values
            self.integers[[*values, IGNORED]] = [*values.values(), IGNORED]
        if data.colours is not None:
            self.colours = np.full((256, 256, 256), ILLEGAL, np.uint8)
            for colour, label in data.colours.items():
                self.colours[colour] = label

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return self.pairs[i][0]

    def labels(self, i):
        """Class indices of a mask. Raises ValueError for what stands for no class."""
        with Image.open(self.pairs[i][1]) as mask:
            coloured = mask.mode in ("RGB", "RGBA") or (mask.mode == "P" and self.integers is None)
            raw = np.asarray(mask.convert("RGB") if coloured else mask)
        if coloured and self.colours is None:
            raise ValueError("it holds RGB colours, the data set's masks hold class indices")
        if coloured:
            raw = (raw >= 128) * np.uint8(255) if self.rounded else raw
            labels = self.colours[raw[..., 0], raw[..., 1], raw[..., 2]]
        elif self.integers is None or raw.ndim != 2 or raw.dtype.kind == "f":
            expected = "RGB colours" if self.integers is None else "class indices"
            raise ValueError(f"it is of mode {mask.mode}, the data set's masks hold {expected}")
        else:  # what is negative or too large falls on the last entry, which is illegal
            labels = self.integers.take(raw.astype(np.uint32), mode="clip")
        wrong = labels == ILLEGAL
        if wrong.any():
            value = raw[wrong][0].tolist()
            raise ValueError(f"the value {value} in {wrong.sum()} pixels stands for no class")
        return labels

    def check(self, i):
        """The largest class in a mask, 0 where there is none. Raises ValueError, OSError."""
        labels = self.labels(i)
        try:
            with Image.open(self.name(i)) as image:  # the header alone; a PNG's EXIF needs all of it
                width, height = image.size
                if image.format != "PNG" and image.getexif().get(0x0112, 1) > 4:  # lies on its side
                    width, height = height, width
        except OSError as error:
            raise ValueError(f"its image {self.name(i)} cannot be read: {error}") from error
        if labels.shape != (height, width):
            rows, columns = labels.shape
            raise ValueError(f"it is {columns}x{rows} (width x height), its image {width}x{height}")
        return int(labels.max(where=labels != IGNORED, initial=0))

    def read(self, i):
        image, labels = train.read_image(self.pairs[i][0]), self.labels(i)
        if image.shape[1:] != labels.shape:
            raise ValueError(f"image {tuple(image.shape[1:])} and mask {labels.shape} differ in size")
        return image, torch.from_numpy(labels)


class DrawnScenes(Labelled):
    """Drawn scenes by number with their labels; in the place of pairs of files their seeds."""

    def __init__(self, seeds):
        self.pairs = seeds

    def name(self, i):
        return f"scene {self.pairs[i]}"

    def read(self, i):
        image, labels = (torch.from_numpy(x.copy()) for x in train.draw_scene(self.pairs[i]))
        return image.permute(2, 0, 1), labels


def check_masks(parts, processes):
    """Read all masks once, shared out -> the largest class. Raises Problem on all: it names wrong files."""
    jobs = [(part, i) for part in parts for i in range(len(part))][processes.rank :: processes.world]

    def check(job):
        part, i = job
        try:
            return part.check(i), None
        except Exception as error:  # a damaged file can make a decoder say anything
            return 0, f"{part.pairs[i][1]}: {error}"

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(check, jobs))
    wrong = [text for _, text in results if text]
    found = processes.sum([float(len(wrong))])[0]
    require(not found, f"{found:.0f} masks are wrong; {'; '.join(wrong[:3]) or 'another process names them'}")
    counts = torch.zeros(2**8)
    counts[max((label for label, _ in results), default=0)] = 1.0
    return int(np.flatnonzero(processes.sum(counts))[-1])


def open_data(s, processes, splits, classes=None):
    """The named splits of the settings' data set, masks checked, the class names and the palette. classes:
    names that a checkpoint carries; the data set is to have as many.
    """
    name, folder = s["name"], s["folder"]
    if name == "scenes":
        seeds = {"train": range(s["scenes"]), "val": range(10**6, 10**6 + VAL_SCENES)}
        parts = [DrawnScenes(seeds[split]) for split in splits]
        return parts, list(train.SCENE_CLASSES), list(train.SCENE_PALETTE)
    data = DATASETS[name]
    names = list(data.classes)
    if name == "folder":
        names = list(classes or (f"class {k}" for k in range(s["classes"] or ILLEGAL)))
    if classes and len(names) != len(classes):
        raise Problem(f"the checkpoint knows {len(classes)} classes, {name} has {len(names)}")
    parts = [Labelled(data, find_pairs(name, folder, split), len(names)) for split in splits]
    begin, masks = time.perf_counter(), sum(map(len, parts))
    largest = check_masks(parts, processes)
    processes.say(f"{masks} masks checked in {time.perf_counter() - begin:.1f} s")
    if len(names) == ILLEGAL:
        names = names[: largest + 1]
    return parts, names, list(data.palette or bit_palette(len(names)))


def choose_subset(count, fraction, seed):
    """Numbers of a share of `count` images, sorted; of one seed the smaller lies inside the larger."""
    return np.sort(np.random.default_rng(seed).permutation(count)[: max(1, round(count * fraction))])


# ---------------------------------------------------------------------------------------- augmentation


def scaled_size(height, width, short):
    """(height, width) of the same aspect, the short side `short`, the long one at most 4 times it."""
    scale = min(short / min(height, width), 4 * short / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def choose_crop(labels, crop, rng, most=0.75, redraws=10):
    """(top, left, height, width) of a random crop of labels uint8 [H, W], no larger than they are.

    One whose labels are to more than `most` of a single class is drawn again, up to `redraws` times
    (Segmenter's 75 % rule). Ignored pixels do not count; without any other, the crop is drawn again too.
    """
    height, width = min(crop[0], labels.shape[0]), min(crop[1], labels.shape[1])
    for _ in range(redraws + 1):
        top = int(rng.integers(labels.shape[0] - height + 1))
        left = int(rng.integers(labels.shape[1] - width + 1))
        counts = np.bincount(labels[top : top + height, left : left + width].ravel(), minlength=256)[:IGNORED]
        if 0 < counts.max() <= most * counts.sum():
            break
    return top, left, height, width


def distort(image, rng):
    """Photometric distortion of uint8 [3, h, w], each part with probability 0.5: brightness +-32, contrast
    0.5..1.5 before or after saturation 0.5..1.5 and hue +-36 degrees."""
    if rng.random() < 0.5:
        image = (image.float() + rng.uniform(-32, 32)).clamp(0, 255).to(torch.uint8)
    late = rng.random() < 0.5
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0  # times the value, not about the mean
    if not late:
        image = colour_functions.adjust_brightness(image, contrast)
    if rng.random() < 0.5:
        image = colour_functions.adjust_saturation(image, rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:
        image = colour_functions.adjust_hue(image, rng.uniform(-0.1, 0.1))
    return colour_functions.adjust_brightness(image, contrast) if late else image


def augment(image, labels, crop, base_size, rng):
    """Random scale, crop, flip, distortion, padding: uint8 [3, H, W], [H, W] -> [3, *crop], [*crop]."""
    size = scaled_size(*labels.shape, base_size * rng.uniform(0.5, 2.0))
    labels = F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0]
    top, left, height, width = choose_crop(labels.numpy(), crop, rng)
    image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    image, labels = (x[..., top : top + height, left : left + width] for x in (image, labels))
    if rng.random() < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    mean = torch.tensor([round(255 * m) for m in train.MEAN], dtype=torch.uint8)  # 0 after normalisation
    padded = mean[:, None, None].repeat(1, *crop)
    padded[:, :height, :width] = distort(image, rng)
    return padded, F.pad(labels, (0, crop[1] - width, 0, crop[0] - height), value=IGNORED)


class Crops(Dataset):
    """Training crops by (epoch, number), which seed them; a number beyond the images counts round again.

    Items: image uint8 [3, *crop], labels uint8 [*crop], unreadable: '' or what was wrong with a file that
    another one stands in for.
    """

    def __init__(self, source, s):
        self.source, self.s = source, s

    def __getitem__(self, key):
        s, rng, number = self.s, np.random.default_rng((self.s["seed"], *key)), key[1] % len(self.source)
        (image, labels), wrong = train.read_or_next(self.source, number, self.source.read)
        image, labels = augment(image, labels, s["crop"], s["base_size"], rng)
        return {"image": image, "labels": labels, "unreadable": wrong}


class Whole(Dataset):
    """Whole images by number, for evaluation; an unreadable one is named and has no pixels."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        try:
            image, labels = self.source.read(i)
            return {"image": image, "labels": labels, "number": i, "unreadable": ""}
        except Exception as error:
            return {"number": i, "unreadable": f"{self.source.name(i)!r}: {first_line(error)}"}


# ----------------------------------------------------------------------------------------------- model


class Segmenter(nn.Module):
    """A ViT and a linear layer on its patch tokens: images [B, 3, H, W] -> class logits float32 [B, C, H, W].

    frozen: the encoder stays as it is, in evaluation mode and without gradient (linear probe).
    """

    def __init__(self, encoder, classes, frozen=False):
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        self.decoder = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.decoder.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)
        encoder.requires_grad_(not frozen)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images):
        tokens = self.encoder(images)  # B,N,D
        grid = [side // self.encoder.patch_size for side in images.shape[-2:]]
        logits = self.decoder(tokens).float().transpose(1, 2).unflatten(2, grid)  # B,C,rows,columns
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")


SIZES = ("patch_size", "dim", "depth", "heads", "mlp_dim")


def build(s, classes):
    """The Segmenter that settings describe, on the CPU. Raises ValueError for sizes that do not fit."""
    sizes = [s[name] for name in SIZES]
    encoder = loca.ViT(tuple(s["crop"]), *sizes, drop_path=s["drop_path"], class_token=s["class_token"])
    return Segmenter(encoder, classes, s["freeze"])


def read_weights(path, branch):
    """Weights to start from and the encoder's sizes as the file tells them: its settings, or its tensors'
    shapes, with the heads of the published size of that width, else 64 wide. Raises Problem."""
    try:
        state = loca.load_weights(path, branch)
    except (OSError, ValueError, ImportError) as error:
        raise Problem(f"--init {path}: {error}") from error
    settings = {}
    with contextlib.suppress(Problem, KeyError, TypeError):  # not a checkpoint of ours
        settings = train.load_file(path)["settings"]
    kernel, hidden = state["encoder.patch_embed.proj.weight"], state.get("encoder.blocks.0.mlp.fc1.weight")
    blocks = [key for key in state if re.fullmatch(r"encoder\.blocks\.\d+\.norm1\.weight", key)]
    require(kernel.ndim == 4 and hidden is not None, f"--init {path}: its entries are not those of a ViT")
    known = {size["dim"]: size["heads"] for size in loca.SIZES.values()}  # those of H/16 are 80 wide
    heads = known.get(len(kernel), max(1, len(kernel) // 64))
    shapes = (kernel.shape[-1], len(kernel), len(blocks), heads, len(hidden))
    return state, {name: settings.get(name, value) for name, value in zip(SIZES, shapes)}


def parameter_groups(model, weight_decay, layer_decay):
    """Parameters by learning-rate scale and weight decay: the decoder and the last norm at scale 1, each
    block below at `layer_decay` times the one above it; decay on tensors of two and more dimensions alone."""
    depth, groups = len(model.encoder.blocks), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = re.match(r"encoder\.blocks\.(\d+)\.", name)
            last = name.startswith(("decoder.", "encoder.norm."))
            layer = depth + 1 if last else int(block[1]) + 1 if block else 0
            key = layer_decay ** (depth + 1 - layer), weight_decay * (parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return [{"params": p, "scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]


def make_optimizer(model, s, device):
    """SGD with Segmenter's momentum, or AdamW, with a "scale" of the learning rate in every group."""
    groups = parameter_groups(model, s["weight_decay"], s["layer_decay"])
    fused = device.type in ("cuda", "cpu")
    if s["optimizer"] == "sgd":
        return torch.optim.SGD(groups, s["lr"], momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, s["lr"], fused=fused)


def learning_rate(step, steps, peak):
    """Polynomial decay to 0, power 0.9."""
    return peak * (1 - step / steps) ** 0.9


# ------------------------------------------------------------------------------------------ evaluation

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
LARGEST = 2**28  # probabilities that a prediction holds at a time, 1 GiB


def window_starts(length, window, stride):
    """First pixels of the windows along one axis; the last one is flush with the border."""
    return [*range(0, length - window, stride), length - window]


def sliding_window(model, image, window, stride, batch):
    """Logits of an image of any size: float [3, H, W] -> float32 [C, H, W], the mean where windows overlap.

    window, stride: (height, width); the model sees `batch` windows at a time. An image smaller than the
    window is padded with 0.
    """
    height, width = image.shape[-2:]
    image = F.pad(image, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    rows, columns = (window_starts(n, w, d) for n, w, d in zip(image.shape[-2:], window, stride))
    corners = [(top, left) for top in rows for left in columns]
    total, count = 0.0, image.new_zeros(image.shape[-2:], dtype=torch.float32)
    for begin in range(0, len(corners), batch):
        part = corners[begin : begin + batch]
        logits = model(torch.stack([image[:, y : y + window[0], x : x + window[1]] for y, x in part])).float()
        if begin == 0:
            total = logits.new_zeros(logits.shape[1], *image.shape[-2:])  # C,H,W
        for (y, x), values in zip(part, logits):
            total[:, y : y + window[0], x : x + window[1]] += values
            count[y : y + window[0], x : x + window[1]] += 1
    return (total / count)[:, :height, :width]


def class_probabilities(model, image, s, size=None):
    """Image uint8 [3, H, W] -> probabilities [C, *size], by default at its own size: logits brought back to
    it, softmax, with --multi-scale the mean over scales and flips."""
    size, pixels, total = size or image.shape[-2:], train.plain_colours(image), 0.0
    scales, flips = (SCALES, (False, True)) if s["multi_scale"] else ((1.0,), (False,))
    for scale in scales:
        scaled = scaled_size(*image.shape[-2:], s["base_size"] * scale)
        resized = F.interpolate(pixels[None], scaled, mode="bilinear", antialias=True)[0]
        for flip in flips:
            view = resized.flip(-1) if flip else resized
            with autocast(s["precision"], image.device):
                logits = sliding_window(model, view, s["window"], s["stride"], s["window_batch"])
            logits = logits.flip(-1) if flip else logits
            total = total + F.interpolate(logits[None], size, mode="bilinear")[0].softmax(0)
    return total / (len(scales) * len(flips))


def segment(model, image, s, classes):
    """Image uint8 [3, H, W] -> predicted classes, array uint8 [H, W]; a photo whose probabilities would not
    fit into memory is predicted at a smaller size."""
    size = image.shape[-2:]
    share = LARGEST / (classes * math.prod(size))
    small = size if share >= 1 else scaled_size(*size, math.sqrt(share) * min(size))
    labels = class_probabilities(model, image, s, small).argmax(0).to(torch.uint8).cpu()
    return F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0].numpy()


def confusion(truth, predicted, classes):
    """Pixels by true class (rows) and predicted class (columns), long [C, C]; truth 255 is left out."""
    counted = truth != IGNORED
    index = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(index, minlength=classes**2).view(classes, classes)


def scores(matrix):
    """Figures in 0..1 of a confusion matrix, array [C, C]: mIoU, pixel accuracy, mean accuracy and both by
    class, NaN where a class is in neither truth nor prediction; such classes are left out of the means."""
    matrix = np.asarray(matrix, np.float64)
    right, true, said = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):
        iou, accuracy = right / (true + said - right), right / true
    means = [float(np.nanmean(x)) if np.isfinite(x).any() else 0.0 for x in (iou, accuracy)]
    return {
        "miou": means[0], "pixel_accuracy": float(right.sum() / max(true.sum(), 1)), "mean_accuracy": means[1],
        "iou": iou, "accuracy": accuracy,
    }  # fmt: skip


def average_precision(confidence, present):
    """Mean of the precisions at each positive: confidence float [n], present bool [n] -> 0..1. Among equal
    confidences all count."""
    order = np.argsort(-confidence, kind="stable")
    confidence, present = confidence[order], present[order]
    last = np.searchsorted(-confidence, -confidence, side="right")  # rank of the last of equals, from 1
    return float((present.cumsum()[last - 1] / last)[present].mean())


@torch.no_grad()
def evaluate(model, source, s, processes, classes):
    """Figures over a set of images, each counted once by one process, the same for any number of them.

    Returns the dict of `scores` with localisation_miou, the predictions restricted to the classes that are in
    the image's truth, and classification_map, the mean average precision of saying which classes are in an
    image by the largest probability of any pixel. Raises Problem for an image that cannot be read.
    """
    device, model = processes.device, model.eval()
    matrices = torch.zeros(2, classes, classes, dtype=torch.long, device=device)
    confidence, present = torch.zeros(2, len(source), classes, device=device)
    numbers = range(processes.rank, len(source), processes.world)
    workers = min(s["workers"], len(numbers))
    for item in feed(Whole(source), workers, device, batch_size=None, sampler=numbers):
        if item["unreadable"]:
            raise Problem(f"cannot evaluate: {item['unreadable']}; mend the file or take it out")
        truth, probabilities = item["labels"], class_probabilities(model, item["image"], s)
        i = item["number"]
        confidence[i] = probabilities.amax((1, 2))
        present[i] = torch.bincount(truth.flatten().long(), minlength=256)[:classes] > 0
        matrices[0] += confusion(truth, probabilities.argmax(0), classes)
        allowed = probabilities.masked_fill(present[i][:, None, None] == 0, -1.0)
        matrices[1] += confusion(truth, allowed.argmax(0), classes)
    model.train()
    matrices = np.array(processes.sum(matrices))
    confidence, present = np.array(processes.sum(confidence)), np.array(processes.sum(present)) > 0
    occurring = np.flatnonzero(present.any(0))
    precision = [average_precision(confidence[:, k], present[:, k]) for k in occurring]
    return {
        **scores(matrices[0]),
        "localisation_miou": scores(matrices[1])["miou"],
        "classification_map": float(np.mean(precision)) if precision else 0.0,
        "images": len(source), "pixels": matrices[0].sum(1), "confusion": matrices[0],
    }  # fmt: skip


FIGURES = {
    "miou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy",
    "localisation_miou": "localisation mIoU", "classification_map": "classification mAP",
}  # fmt: skip


def report(result, classes, processes, table=True):
    """Print the figures of an evaluation, with a table of the classes."""
    line = " | ".join(f"{title} {result[name]:.2%}" for name, title in FIGURES.items())
    if table:
        width = max(map(len, classes))
        processes.say(f"{'class':<{width}}    IoU  accuracy  share of pixels")
        shares = result["pixels"] / max(result["pixels"].sum(), 1)
        for name, iou, accuracy, share in zip(classes, result["iou"], result["accuracy"], shares):
            figures = f"{iou:7.1%}{accuracy:10.1%}".replace("nan%", "   -")
            processes.say(f"{name:<{width}}{figures}{share:16.2%}")
    processes.say(f"{result['images']} images: {line}")


def write_results(path, result, classes, **more):
    """Keep the figures of an evaluation as JSON."""
    by_class = [
        {"name": name, **{key: None if np.isnan(result[key][k]) else float(result[key][k]) for key in ("iou", "accuracy")},
         "pixels": int(result["pixels"][k])}
        for k, name in enumerate(classes)
    ]  # fmt: skip
    figures = {name: result[name] for name in FIGURES}
    content = {**more, "images": result["images"], **figures, "classes": by_class}
    content["confusion"] = result["confusion"].tolist()
    train.save_text(path, json.dumps(content, indent=1) + "\n")


# -------------------------------------------------------------------------------------------- pictures


def paint(labels, palette):
    """Labels [H, W] -> picture in the classes' colours; 255 is black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    return Image.fromarray(colours[np.asarray(labels)])


def legend(labels, classes, palette, height):
    """A column, `height` or more high: colour and name of every class in `labels`, most frequent first."""
    counts = np.bincount(np.asarray(labels).ravel(), minlength=256)[: len(classes)]
    shown = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
    font, row = ImageFont.load_default(13), 20
    width = 40 + max((int(font.getlength(classes[k])) for k in shown), default=0)
    column = Image.new("RGB", (width, max(height, row * len(shown) + 8)), "white")
    pen = ImageDraw.Draw(column)
    for i, k in enumerate(shown):
        y = 4 + i * row
        pen.rectangle((6, y + 2, 22, y + row - 4), fill=tuple(palette[k]), outline="black")
        pen.text((28, y + 1), classes[k], fill="black", font=font)
    return column


def beside(pictures, gap=4):
    """Pictures in a row."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    row, x = Image.new("RGB", (width, max(p.height for p in pictures)), "white"), 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + gap
    return row


@torch.no_grad()
def draw_sheet(model, source, s, device, classes, palette, count=4, height=200):
    """Some images of a set, evenly spread: photo, truth, prediction and legend in a row each."""
    model.eval()
    rows = []
    for i in np.unique(np.linspace(0, len(source) - 1, count).astype(int)):
        image, truth = source.read(i)
        predicted, truth = segment(model, image.to(device), s, len(classes)), truth.numpy()
        size = (max(1, min(4 * height, round(height * truth.shape[1] / truth.shape[0]))), height)
        maps = [paint(x, palette).resize(size, Image.NEAREST) for x in (truth, predicted)]
        entries = legend(np.concatenate([truth.ravel(), predicted.ravel()]), classes, palette, height)
        rows.append(beside([train.photo(image).resize(size, Image.BICUBIC), *maps, entries]))
    model.train()
    y = 18
    whole = (max(r.width for r in rows), sum(r.height + 4 for r in rows) + y)
    sheet = Image.new("RGB", whole, "white")
    ImageDraw.Draw(sheet).text((4, 3), "photo | truth (black: ignored) | prediction", fill="black")
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height + 4
    return sheet


@torch.no_grad()
def predict(s, saved, model, processes):
    """Segment images: NAME_mask.png in colours, NAME_overlay.png with a legend, NAME_labels.png with class
    indices -> exit code."""
    source, out, device = Path(s["predict"]), Path(s["out"]), processes.device
    files, root = [source], source.parent
    if source.is_dir():
        files, root = [source / name for name in train.find_images(source, named="--predict")], source
    classes, palette = saved["classes"], saved["palette"]
    stems = Counter(path.relative_to(root).with_suffix("") for path in files)
    failed = 0
    for path in files[processes.rank :: processes.world]:
        try:
            image = train.read_image(path)
        except Exception as error:  # a damaged file can make a decoder say anything
            failed += 1
            print(f"warning: {str(path)!r} cannot be read: {error}", file=sys.stderr, flush=True)
            continue
        labels = segment(model.eval(), image.to(device), s, len(classes))
        stem = path.relative_to(root).with_suffix("")
        name = out / (stem if stems[stem] == 1 else path.relative_to(root))
        picture, mask = train.photo(image), paint(labels, palette)
        train.save_picture(f"{name}_mask.png", mask)
        train.save_picture(f"{name}_labels.png", Image.fromarray(labels))
        overlay = Image.blend(picture, mask, 0.55)
        overlay = beside([overlay, legend(labels, classes, palette, overlay.height)])
        train.save_picture(f"{name}_overlay.png", overlay)
        print(f"{path} -> {name}_mask.png, _overlay.png, _labels.png", flush=True)
    if processes.sum([float(failed)])[0] == len(files):
        raise Problem(f"--predict {source}: none of the images can be read")
    return 0


# ------------------------------------------------------------------------------------------------ loop


def finetune(s, weights, processes):
    """Train from the run folder's last checkpoint, or from the start, to the end -> exit code."""
    run = Finetuning(s, weights, processes)
    model, optimizer, device = run.model, run.optimizer, processes.device
    net = processes.wrap(model)
    processes.listen()

    # closing ends the workers, whatever happens
    with contextlib.closing(run.batches(Crops(run.images, s), run.count)) as batches:
        for step in range(run.first, run.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, run.steps, s["lr"]) * group["scale"]
            micro_losses = []
            for micro in range(s["accumulate"]):
                batch = run.window.fetch(batches)
                set_seed(s["seed"], step, processes.rank, micro)
                last = micro == s["accumulate"] - 1
                with contextlib.nullcontext() if last or processes.world == 1 else net.no_sync():
                    with autocast(s["precision"], device):
                        logits = net(train.plain_colours(batch["image"]))
                    loss = segmentation_loss(logits, batch["labels"])
                    (loss / s["accumulate"]).backward()
                micro_losses.append({"loss": loss})
            norm = nn.utils.clip_grad_norm_(model.parameters(), s["clip"] or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            run.window.add(step, micro_losses, norm)
            if run.after_step(step + 1):
                return REQUEUE
    run.finish()
    return 0


def segmentation_loss(logits, labels):
    """Mean cross-entropy of logits [B, C, H, W] where the label uint8 [B, H, W] is not 255; 0 without any."""
    labels = labels.long()
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


class Finetuning(train.Run):
    """Data, model and initial weights of a fine-tuning run; evaluations and the best checkpoint on the way."""

    best = None  # mIoU

    def __init__(self, s, weights, processes):
        super().__init__(s, processes)
        (self.images, self.val), self.classes, self.palette = open_data(s, processes, ("train", "val"))
        whole = len(self.images)
        chosen = choose_subset(whole, s["fraction"], s["seed"])
        self.images.pairs = [self.images.pairs[i] for i in chosen]
        self.epoch_images = len(self.images)
        self.count = self.epoch_images * math.ceil(s["batch"] / self.epoch_images)  # few images go round
        counted = whole if s["schedule_in"] == "steps" else self.epoch_images
        self.steps = s["steps"] or max(1, round(s["epochs"] * counted / s["batch"]))
        self.s = s = {**s, "images": self.epoch_images, "classes": len(self.classes)}
        set_seed(s["seed"])
        self.model = build(s, len(self.classes))
        if weights is not None:
            try:
                processes.say(f"{s['init']}: {loca.load_encoder(self.model.encoder, weights)}")
            except ValueError as error:
                raise Problem(f"--init {s['init']}: {error}") from error
        self.model.to(processes.device).train()
        self.optimizer = make_optimizer(self.model, s, processes.device)
        self.parts = {"model": self.model, "optimizer": self.optimizer}
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        self.begin(
            ("loss", "gradient_norm"),
            f"{self.epoch_images} of {whole} images, {len(self.val)} for validation, {len(self.classes)} classes; "
            f"{s['optimizer']}, {trained:.2f} M parameters trained; start: {s['init']}",
        )

    def evaluate_now(self, done):
        parts = max(1, self.s["evaluations"])
        return done * parts // self.steps > (done - 1) * parts // self.steps

    def evaluate(self, done):
        """Validation figures on the screen, in the log and results.json; sheet; best checkpoint."""
        result = evaluate(self.model, self.val, self.s, self.processes, len(self.classes))
        report(result, self.classes, self.processes, table=done == self.steps)
        better = self.best is None or result["miou"] > self.best
        self.best = result["miou"] if better else self.best
        self.write(done, {f"val_{name}": result[name] for name in FIGURES})
        if self.processes.main:
            path = self.out / "results.json"
            write_results(path, result, self.classes, step=done, split="val", best=self.best)
            if better:
                self.save(done, "best.pt")
            device = self.processes.device
            sheet = draw_sheet(self.model, self.val, self.s, device, self.classes, self.palette)
            train.save_picture(self.out / "predictions.png", sheet)
            train.save_picture(self.out / "curves.png", train.draw_curves([self.out]))

    def save(self, done, name):
        """Write a checkpoint; it rebuilds the model alone."""
        parts = self.parts if name == "last.pt" else {"model": self.model}
        self.write_checkpoint(done, name, parts, classes=self.classes, palette=self.palette)

    def finish(self):
        """Say what the run made and what to do next."""
        say, s, out = self.processes.say, self.s, self.out
        say(f"best mIoU {self.best:.2%}")
        files = "last.pt, best.pt, results.json, predictions.png, curves.png, metrics.jsonl, settings.json"
        script = "python finetune_seg.py"
        say(f"{out}: {files}")
        say(f"on your images: {script} --predict IMAGES --checkpoint {out}/best.pt --out DIR")
        if s["name"] == "scenes" and s["init"] != "none":
            sizes = "".join(f" {train.flag(k)} {s[k]}" for k in SIZES if s[k] != SCENES_PRESET[k])
            say(f"the same from scratch: {script} --init none --out {out}_scratch{sizes}")
        elif s["name"] == "scenes":
            say(f"from pretrained weights: python train.py, then {script} --out {out}_pretrained")


def evaluate_only(s, saved, model, processes):
    """Evaluate a checkpoint on a split -> exit code."""
    classes, palette = saved["classes"], saved["palette"]
    (source,), _, _ = open_data(s, processes, (s["split"],), classes)
    result = evaluate(model, source, s, processes, len(classes))
    report(result, classes, processes)
    if processes.main:
        out = Path(s["out"])
        how = {"checkpoint": str(s["checkpoint"]), "split": s["split"], "multi_scale": s["multi_scale"]}
        write_results(out / "results.json", result, classes, step=saved["step"], **how)
        sheet = draw_sheet(model, source, s, processes.device, classes, palette)
        train.save_picture(out / "predictions.png", sheet)
        processes.say(f"{out}: results.json, predictions.png")
    return 0


# ------------------------------------------------------------------------------------------------ main

VAL_SCENES = 50
SCENES_RUN = "runs/scenes/last.pt"  # where train.py without --data leaves its checkpoint
SCENES_PRESET = {
    "patch_size": 8, "dim": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "base_size": 128, "crop": [96, 96], "stride": [64, 64],
    "batch": 16, "steps": 400, "optimizer": "adamw", "lr": 0.001, "evaluations": 2,
}  # fmt: skip
SMALL_PRESET = {  # goes with train.py --small
    **{name: train.SMALL_PRESET[name] for name in SIZES}, "base_size": 192, "crop": 128, "stride": 64, "batch": 16,
    "steps": 1100, "optimizer": "adamw", "lr": 0.001, "evaluations": 2,
}  # fmt: skip
PROTOCOL = ("base_size", "crop", "stride", "batch", "lr", "epochs")  # what a data set's entry tells
ADAMW_RATE = 0.0001


def make_parser():
    """The command line; a default of None is found in the data set's entry, the weights or the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=train.Help)
    yes_no = {"action": argparse.BooleanOptionalAction, "default": False}
    # fmt: off
    g = parser.add_argument_group("data")
    g.add_argument("--data", metavar="NAME:DIR", help=f"data set and its folder; NAME: {', '.join(DATASETS)}; default: drawn scenes")
    g.add_argument("--classes", type=int, help="classes of folder:DIR; default: one more than the largest mask value")
    g.add_argument("--fraction", default="1", help="share of the training images, as 1/32; of one seed the smaller lies in the larger")
    g.add_argument("--schedule-in", default="epochs", choices=["epochs", "steps"], help="with --fraction: train for --epochs of the fewer images, or for as many steps as with all")
    g.add_argument("--small", **yes_no, help="small images, a small model, a quarter of an hour on two cores; goes with train.py --small")
    g.add_argument("--scenes", type=int, default=400, help="drawn scenes to train on, without --data")
    g.add_argument("--workers", type=int, help="loader processes per device; default: its share of the cores")
    g = parser.add_argument_group("weights and model")
    g.add_argument("--init", metavar="FILE", help="weights to start from: of train.py, published (flax), or a ViT as timm, DINO, iBOT, MAE name it; none: from scratch")
    g.add_argument("--branch", default="teacher", choices=["teacher", "student"], help="which encoder, where --init holds both")
    g.add_argument("--class-token", **yes_no, help="keep the class token of weights that have one")
    g.add_argument("--freeze", **yes_no, help="train the decoder alone (linear probe); wants a larger --lr")
    g.add_argument("--model", choices=list(loca.SIZES), help="size; default: that of --init, else B/16; the next flags change parts of it")
    g.add_argument("--patch-size", type=int, help="side of a patch, pixels")
    g.add_argument("--dim", type=int, help="width")
    g.add_argument("--depth", type=int, help="blocks")
    g.add_argument("--heads", type=int, help="attention heads; where the file does not tell: as in LOCA's size of that width, else 64 wide each")
    g.add_argument("--mlp-dim", type=int, help="hidden width of a block's MLP")
    g.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth of the last block")
    g = parser.add_argument_group("sizes; defaults: the data set's")
    g.add_argument("--base-size", type=int, help="short side to which images are brought, pixels; training scales it by 0.5-2")
    g.add_argument("--crop", type=int, nargs="+", metavar="N", help="training crop, pixels: side, or height and width")
    g.add_argument("--window", type=int, nargs="+", metavar="N", help="window of evaluation; default: the crop")
    g.add_argument("--stride", type=int, nargs="+", metavar="N", help="step between windows; smaller is slower and smoother")
    g = parser.add_argument_group("training; defaults: the data set's")
    g.add_argument("--epochs", type=int, help="passes over the images")
    g.add_argument("--steps", type=int, help="optimiser steps, instead of --epochs")
    g.add_argument("--batch", type=int, help="images per step, over all devices and micro-batches")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches a step, to save memory")
    g.add_argument("--optimizer", choices=["sgd", "adamw"], help="default: sgd, as in Segmenter; adamw is easier on small data")
    g.add_argument("--lr", type=float, help=f"peak learning rate; default: the data set's for sgd, {ADAMW_RATE} for adamw")
    g.add_argument("--weight-decay", type=float, help="on matrices alone; default: 0 for sgd, 0.05 for adamw")
    g.add_argument("--layer-decay", type=float, default=1.0, help="learning rate of each block over that of the next; 0.65-0.9 keeps pretrained features")
    g.add_argument("--clip", type=float, default=0.0, help="largest gradient norm; 0: no clipping, as in Segmenter")
    g.add_argument("--seed", type=int, default=0, help="of everything random")
    g = parser.add_argument_group("evaluation and prediction")
    g.add_argument("--eval-only", **yes_no, help="evaluate --checkpoint on --split and stop")
    g.add_argument("--checkpoint", metavar="FILE", help="for --eval-only and --predict; default with --eval-only: best.pt in --out")
    g.add_argument("--split", default="val", help="part to evaluate with --eval-only: val, or test where the data set has it")
    g.add_argument("--multi-scale", **yes_no, help="mean over six scales and flips: slower, a little better")
    g.add_argument("--window-batch", type=int, default=8, help="windows at a time; changes memory and speed, not results")
    g.add_argument("--evaluations", type=int, default=10, help="evaluations in a run, evenly spread; the last is always made")
    g.add_argument("--predict", metavar="PATH", help="an image or a folder to segment with --checkpoint, into --out")
    g = parser.add_argument_group("run")
    g.add_argument("--out", metavar="DIR", help="run folder; a run that is in it goes on; default: runs/finetune_NAME")
    g.add_argument("--device", help="cuda, mps or cpu; default: the first of these that is there")
    g.add_argument("--precision", choices=["bf16", "float32"], help="default: bf16 where it is fast")
    g.add_argument("--log-every", type=int, default=20, help="steps between log lines; processes agree to stop there")
    g.add_argument("--save-minutes", type=float, default=10.0, help="minutes between checkpoints")
    # fmt: on
    return parser


def read_settings(arguments, world):
    """Command line -> settings and what they start from: a checkpoint (--eval-only, --predict), the initial
    weights, or None. Raises Problem for what cannot work, before any data is read."""
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    not_told = argparse.Namespace(**dict.fromkeys(defaults))  # None everywhere: what differs was told
    told = {k: v for k, v in vars(parser.parse_args(arguments, not_told)).items() if v is not None}
    s = {**defaults, **told}
    looking = s["eval_only"] or s["predict"]
    if looking:
        if s["eval_only"]:
            told.setdefault("checkpoint", f"{s['out'] or 'runs/finetune_' + split_data(s)[0]}/best.pt")
        content = read_checkpoint(told.get("checkpoint"))
        preset = content["settings"]
        s = {**defaults, **{k: v for k, v in preset.items() if k not in train.RUN_ONLY}, **told}
        s["out"] = s["out"] or ("predictions" if s["predict"] else str(Path(s["checkpoint"]).parent))
    name, folder = split_data(s)
    if not looking:
        data = DATASETS.get(name)
        preset = {key: getattr(data, key) for key in PROTOCOL} if data else SCENES_PRESET
        preset = {**preset, **SMALL_PRESET} if s["small"] else preset
        s = {**s, "optimizer": "sgd", "init": "none", **preset, **told}
        if data is None and "init" not in told and os.path.exists(SCENES_RUN):
            s["init"] = SCENES_RUN
        if s["optimizer"] != preset.get("optimizer", "sgd"):
            s["lr"] = told.get("lr", ADAMW_RATE if s["optimizer"] == "adamw" else (data or DataSet).lr)
        if s["weight_decay"] is None:
            s["weight_decay"] = 0.05 if s["optimizer"] == "adamw" else 0.0
        if "epochs" in told and "steps" not in told:
            s["steps"] = None
        s["out"] = s["out"] or f"runs/finetune_{name}"
        content, sizes = starting_weights(s)
        s = {**s, **sizes, **loca.SIZES.get(s["model"], {}), **{k: told[k] for k in SIZES if k in told}}
    usual = sides(s | preset, "window" if looking else "crop")  # what the stride of the preset is for
    s.update({key: sides(s, key) for key in ("crop", "window", "stride")})
    if "stride" not in told:
        s["stride"] = [max(1, step * new // old) for step, new, old in zip(s["stride"], s["window"], usual)]
    s.update(name=name, folder=folder, world=world)
    check_settings(s)
    return s, content


def sides(s, key):
    """The setting `key` as [height, width]; the crop where it is not given."""
    given = [s[key]] if isinstance(s[key], int) else list(s[key] or sides(s, "crop"))
    require(len(given) < 3, f"--{key} {' '.join(map(str, given))}: give a side, or height and width")
    return given * (3 - len(given))


def read_checkpoint(path):
    """The checkpoint that --eval-only or --predict starts from. Raises Problem."""
    require(path is not None, "--checkpoint FILE is missing: the best.pt of a run")
    require(os.path.isfile(path), f"--checkpoint {path}: there is no such file")
    content = train.load_file(path)
    if not isinstance(content, dict) or not {"model", "settings", "classes", "palette"} <= content.keys():
        raise Problem(f"--checkpoint {path}: it is not a checkpoint of this script")
    return content


def split_data(s):
    """--data NAME:DIR -> (NAME, DIR); ('scenes', None) without it. Raises Problem for what is not there."""
    if s["data"] is None:
        return "scenes", None
    name, _, folder = s["data"].partition(":")
    if name not in DATASETS or not folder:
        raise Problem(f"--data {s['data']}: give NAME:DIR with a NAME of {', '.join(DATASETS)}")
    require(os.path.isdir(folder) or s["predict"], f"--data {s['data']}: there is no folder {folder}")
    return name, folder


def starting_weights(s):
    """Initial weights, None from scratch or where the run folder's own take over, and the encoder's sizes."""
    last = Path(s["out"], "last.pt")
    if last.exists():
        saved = train.load_file(last)
        require("classes" in saved, f"{last} is of another script: give another --out")
        return None, {name: saved["settings"][name] for name in SIZES}
    if s["init"] == "none":
        return None, {name: s[name] or loca.SIZES["B/16"][name] for name in SIZES}
    require(os.path.isfile(s["init"]), f"--init {s['init']}: there is no such file; none starts from scratch")
    return read_weights(s["init"], s["branch"])


def check_settings(s):
    """Raise Problem, in one line with the remedy, for settings that cannot work; settle the fraction."""
    try:
        s["fraction"] = float(Fraction(s["fraction"]))
    except (ValueError, ZeroDivisionError) as error:
        raise Problem(f"--fraction {s['fraction']}: give a share as 1/32 or 0.25") from error
    require(0 < s["fraction"] <= 1, f"--fraction {s['fraction']}: it is to lie above 0 and not above 1")
    above = "base_size lr log_every window_batch scenes layer_decay steps epochs classes".split()
    from_0 = "weight_decay clip seed evaluations workers save_minutes".split()
    check_numbers(s, (*SIZES, *above), from_0)
    for name in ("crop", "window"):
        nearest = [max(1, round(side / s["patch_size"])) * s["patch_size"] for side in s[name]]
        given, better = (" ".join(map(str, x)) for x in (s[name], nearest))
        text = f"--{name} {given} is not a multiple of the patch, {s['patch_size']}: try --{name} {better}"
        require(s[name] == nearest, text)
    for side, step in zip(s["window"], s["stride"]):
        require(0 < step <= side, f"--stride {step}: it is to be above 0 and not above the window, {side}")
    if not (s["eval_only"] or s["predict"]):
        check_batch(s)
    require((s["classes"] or 0) < ILLEGAL, f"--classes {s['classes']}: {ILLEGAL - 1} at most")
    require(0 <= s["drop_path"] < 1, f"--drop-path {s['drop_path']}: it is to lie in 0..1, below 1")
    splits = DATASETS[s["name"]].splits if s["name"] in DATASETS else {"train": "", "val": ""}
    require(s["split"] in splits, f"--split {s['split']}: {s['name']} has {', '.join(splits)}")
    on_val = f"--split {s['split']}: runs are judged on val; add --eval-only"
    require(s["split"] == "val" or s["eval_only"], on_val)
    there = not s["predict"] or os.path.exists(s["predict"])
    require(there, f"--predict {s['predict']}: there is no such file")
    try:
        with torch.device("meta"):
            build(s, 2)
    except ValueError as error:
        raise Problem(f"{error}: see --patch-size, --heads, --dim") from error


def dispatch(s, content, processes):
    """What the settings ask for -> exit code."""
    if not (s["predict"] or s["eval_only"]):
        return finetune(s, content, processes)
    model = build(s, len(content["classes"]))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:  # it lists all that does not fit
        sizes = "--crop, --model or a size that was given"
        raise Problem(f"--checkpoint {s['checkpoint']}: its weights do not fit; leave out {sizes}") from error
    look = predict if s["predict"] else evaluate_only
    return look(s, content, model.to(processes.device), processes)


def main(arguments=None):
    """Run the command line -> exit code."""
    return train.launch("finetune_seg.py", read_settings, dispatch, arguments)


if __name__ == "__main__":
    sys.exit(main())
