"""Segmentation with a linear decoder on a ViT: train, evaluate, predict (Segmenter, Strudel et al. 2021).

`python finetune_seg.py` fine-tunes on drawn scenes; `--data NAME:DIR` takes a data set in its public layout,
and `--data folder:DIR` takes your own images and masks; `--init FILE` gives the initial weights. Label 255 is
ignored everywhere. Every random draw depends only on the seed and on its step or image, so a resumed run
continues as if it had never stopped.
"""

import argparse
import contextlib
import functools
import glob
import itertools
import math
import os
import re
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.datasets import Cityscapes

import loca
import train
from train import below_1, fail, float_or_0, int_or_0, positive_float, positive_int, say, up_to_1

IGNORED, ILLEGAL = 255, 254  # labels: 255 is excluded everywhere; 254 marks a value that is no class
SPLITS = {"train": "train|training", "val": "val|valid|validation", "test": "test|testing"}  # for {split}
HELD_OUT = 5  # every fifth image is held out if a data set has no validation split
MOST_IGNORED = 0.05  # largest share of a mask's pixels with colors that are not listed
MOST_INFERRED = 64  # largest number of classes that is taken from the values in the masks
LIST_THEM = "for folder:DIR, write DIR/classes.txt, one class per line: NAME GRAY or NAME R G B: 'object 255'"
VAL_SCENES = 50  # number of drawn scenes for validation


# ------------------------------------------------------------------------------------------------ data sets


@dataclass(frozen=True)
class DataSet:
    """One data set: where its files are, how a mask becomes class indices, and the protocol's defaults.

    layouts: patterns of the images and of their masks, optionally that of a list of names, and optionally an
    offset of the mask numbers in the training split. The first one that fits is used for all splits; it is
    searched in the folder, in `roots` below it, and in a single folder that wraps everything. An image and a
    mask belong together if their stars match the same text, or their '#' the same number; '|' separates
    alternatives, '.*' at the end matches any image extension. Without {split}, every fifth image is held out.
    splits: the values of {split}, in any capitalization; train, val and test stand for all names in SPLITS.
    values: class of each value of an integer mask; None if the value is the class. colors: class of each RGB
    color in masks of `color_modes`; a color within `tolerance` of it in every channel counts as that color.
    """

    classes: tuple
    layouts: tuple
    splits: tuple = ("train", "val")
    roots: tuple = ()
    values: dict | None = None
    colors: dict | None = None
    color_modes: tuple = ("RGB", "RGBA")  # Pillow's; other masks hold class indices
    tolerance: int = 40
    crop_masks: int = 0  # rows and columns by which masks may exceed their images at the bottom and right
    base_size: int = 512  # 0: each image's own size
    crop: int = 512
    stride: int = 512
    batch: int = 8
    lr: float = 0.001
    epochs: int = 64


def names_of(text):
    """Class names from comma-separated text."""
    return tuple(" ".join(name.split()) for name in text.split(","))


def colors_of(text):
    """RGB colors from hexadecimal words separated by spaces."""
    return tuple(tuple(bytes.fromhex(word)) for word in text.split())


def shifted(classes):
    """Mask values 1..classes map to classes 0..classes-1, and 0 is ignored."""
    return {0: IGNORED, **{k + 1: k for k in range(classes)}}


def voc_palette(classes):
    """The colors of Pascal VOC's masks for `classes` classes: bits of the index, spread over the channels."""
    index = np.arange(classes, dtype=np.uint8)[:, None]
    bits = np.unpackbits(index, axis=1, count=9, bitorder="little").reshape(classes, 3, 3)
    # Bit 3 * b + channel of the index is bit 7 - b of that channel.
    return tuple(map(tuple, (np.array([128, 64, 32]) @ bits).tolist()))


# fmt: off
ADE20K = names_of("""wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror,
rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case,
pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole,
land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank,
trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic
light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag""")
VOC = names_of("""background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog,
horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor""")
CONTEXT = names_of("""background, aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building,
bus, cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food,
grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock,
sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window,
wood""")
CITYSCAPES_LIST = [x for x in Cityscapes.classes if 0 <= x.train_id < 19]  # in the order of train_id
CITYSCAPES = tuple(x.name for x in CITYSCAPES_LIST)
CITYSCAPES_COLORS = {x.color: x.train_id for x in CITYSCAPES_LIST}
CITYSCAPES_IDS = dict.fromkeys(range(34), IGNORED) | {x.id: x.train_id for x in CITYSCAPES_LIST}
CAMVID = names_of("sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist")
CAMVID_COLORS = {  # the 32 original colors, grouped as in SegNet
    0: colors_of("808080"),
    1: colors_of("800000 008040 c00080 40c000 400040"),  # building, bridge, archway, wall, tunnel
    2: colors_of("c0c080 000040"),  # pole, traffic cone
    3: colors_of("804080 8000c0 c00040"),  # road, lane markings for and not for driving
    4: colors_of("0000c0 40c080 8080c0"),  # sidewalk, parking block, road shoulder
    5: colors_of("808000 c0c000"),  # tree, other vegetation
    6: colors_of("c08080 808040 004040"),  # sign, text, traffic light
    7: colors_of("404080"),
    8: colors_of("400080 4080c0 c080c0 c04080 804040"),  # car, SUV, truck, train, other
    9: colors_of("404000 c08040 4000c0 408040"),  # pedestrian, child, cart, animal
    10: colors_of("0080c0 c000c0"),  # bicyclist, motorcycle
    IGNORED: colors_of("000000"),
}
IDD = names_of("""road, parking or drivable fallback, sidewalk, rail track or non-drivable fallback, person or animal,
rider, motorcycle, bicycle, autorickshaw, car, truck, bus, vehicle fallback, curb, wall, fence, guard rail, billboard,
traffic sign, traffic light, pole, obstacle fallback, building, bridge or tunnel, vegetation, sky or background""")
SUN = names_of("""wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds,
desk, shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refrigerator, television, paper,
towel, shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub, bag""")
ISPRS = names_of("impervious surface, building, low vegetation, tree, car, clutter")
ISPRS_COLORS = colors_of("ffffff 0000ff 00ffff 00ff00 ffff00 ff0000")
SUIM = names_of("water, diver, plants, wreck, robot, reef, fish, sea floor")
SUIM_COLORS = tuple(itertools.product((0, 255), repeat=3))

# Crop, stride, batch, rate and epochs of ade20k, context and cityscapes are Segmenter's; the others follow
# the nearest of these. The README's table lists the expected files.
VOC_ROOTS = ("VOC2012", "VOC2010", "VOCdevkit/VOC2012", "VOCdevkit/VOC2010")
CONTEXT_FILES = (("JPEGImages/*.jpg", "SegmentationClassContext/*.png", "ImageSets/SegmentationContext/{split}.txt"),)
DATASETS = {
    "ade20k": DataSet(
        ADE20K, (("images/{split}/*.jpg", "annotations/{split}/*.png"),),
        roots=("ADEChallengeData2016",), values=shifted(150)),
    "voc2012": DataSet(
        VOC, (("JPEGImages/*.jpg", "SegmentationClass/*.png|SegmentationClassAug/*.png",
               "ImageSets/Segmentation/{split}aug.txt|ImageSets/Segmentation/{split}.txt"),),
        roots=VOC_ROOTS, crop=480, stride=320, batch=16),
    "context": DataSet(
        CONTEXT, CONTEXT_FILES, roots=VOC_ROOTS, base_size=520, crop=480, stride=320, batch=16, epochs=256),
    "context59": DataSet(
        CONTEXT[1:], CONTEXT_FILES, roots=VOC_ROOTS, values=shifted(59), base_size=520, crop=480, stride=320, batch=16,
        epochs=256),
    "cityscapes": DataSet(
        CITYSCAPES, (("leftImg8bit/{split}/*/*_leftImg8bit.png", "gtFine/{split}/*/*_gtFine_labelIds.png"),),
        values=CITYSCAPES_IDS, colors=CITYSCAPES_COLORS, base_size=1024, crop=768, lr=0.01, epochs=216),
    "bdd100k": DataSet(
        CITYSCAPES, (("images/10k/{split}/*.jpg", "labels/sem_seg/masks/{split}/*.png"),
                     ("seg/images/{split}/*.jpg", "seg/labels/{split}/*_train_id.png")),
        roots=("bdd100k",), colors=CITYSCAPES_COLORS, base_size=720, crop=640, lr=0.01, epochs=108),
    "camvid": DataSet(
        CAMVID, (("{split}/*.*", "{split}annot/*.png"), ("{split}/*.*", "{split}_labels/*_L.png"),
                 ("701_StillsRaw_full/*.png", "LabeledApproved_full/*_L.png", "{split}.txt")),
        tuple(SPLITS), values={k: k for k in range(11)} | {11: IGNORED},
        colors={color: k for k, colors in CAMVID_COLORS.items() for color in colors}, base_size=360, crop=320, stride=160,
        lr=0.01, epochs=216),
    "idd": DataSet(
        IDD, (("leftImg8bit/{split}/*/*_leftImg8bit.*", "gtFine/{split}/*/*_gtFine_labellevel3Ids.png"),),
        base_size=720, crop=640, lr=0.01, epochs=108),
    "kitti": DataSet(
        CITYSCAPES, (("training/image_2/*.png", "training/semantic/*.png"),),
        values=CITYSCAPES_IDS, colors=CITYSCAPES_COLORS, base_size=368, crop=368, stride=256, lr=0.01, epochs=216),
    "sunrgbd": DataSet(
        SUN, (("image/{split}/img-#.jpg", "label37/{split}/#.png"),
              *((images, masks, None, 5050) for images in ("image/{split}/img-#.jpg", "SUNRGBD-{split}_images/img-#.jpg")
                for masks in ("label37/{split}/img-#.png", "label37/img-#.png", "sunrgbd_train_test_labels/img-#.png"))),
        splits=("train", "test"), values=shifted(37), base_size=480, crop=480, stride=320),
    "isprs": DataSet(
        ISPRS, tuple(
            (f"{images}/{image}", "|".join(f"{masks}/{mask}" for mask in these))
            for images, masks in (("img_dir/{split}", "ann_dir/{split}"), ("images/{split}", "masks/{split}"),
                                  ("2_Ortho_RGB", "5_Labels_all"), ("2_Ortho_RGB", "5_Labels_all_noBoundary"),
                                  ("top", "gts_for_participants"), ("top", "gts_eroded_for_participants"),
                                  ("images", "masks"))
            for image, these in (("*_RGB.tif", ("*_label.tif", "*_label_noBoundary.tif")),
                                 ("*.tif", ("*.tif", "*_noBoundary.tif")), ("*.*", ("*.*",)))),
        tuple(SPLITS), values=shifted(6),
        colors={(0, 0, 0): IGNORED, **dict(zip(ISPRS_COLORS, range(6)))}, base_size=0),
    "suim": DataSet(
        SUIM, (("{split}/images/*.*", "{split}/masks/*.*"),), ("train_val", "TEST"), ("SUIM",),
        values={}, colors=dict(zip(SUIM_COLORS, range(8))), color_modes=("P", "RGB", "RGBA"), tolerance=127, crop_masks=64,
        base_size=480, crop=480, stride=320),
    "folder": DataSet((), (
        ("images/{split}/*.*", "masks/{split}/*.*|masks/{split}/*_mask.*"),
        ("{split}/images/*.*", "{split}/masks/*.*|{split}/masks/*_mask.*"),
        ("JPEGImages/*.*", "SegmentationClass/*.*", "ImageSets/Segmentation/{split}.txt"),
        ("JPEGImages/*.*", "SegmentationClass/*.*"), ("images/*.*", "masks/*.*|masks/*_mask.*")), splits=tuple(SPLITS)),
}
# fmt: on


def find_files(root, patterns, split):
    """Files below `root` that match one of the patterns, keyed by the text that stars and '#' match. `split`
    is a regular expression for the place of {split}."""
    found, any_image = {}, "|".join(map(re.escape, Image.registered_extensions()))
    for pattern in reversed(patterns.split("|")):  # the first alternative wins
        regex = re.escape(pattern.removesuffix(".*")).replace(r"\*", "([^/]*)").replace(r"\#", "0*([0-9]+)")
        regex = regex.replace(r"\{split\}", f"(?i:{split})")
        regex += f"(?i:{any_image})" if pattern.endswith(".*") else ""
        wide, files = glob.escape(pattern).replace("[*]", "*").replace("#", "*").replace("{split}", "*"), {}
        for name in glob.glob(wide, root_dir=root):  # never finds hidden files
            path, match = os.path.join(root, name), re.fullmatch(regex, name.replace(os.sep, "/"), re.DOTALL)
            if match and match.groups() in files:
                fail(f"{path} and {files[match.groups()]} have the same name; remove one")
            if match:
                files[match.groups()] = path
        found |= files
    return found


def find_split(root, layout, data, split):
    """Images and masks of a split by key, and the sorted keys of the images that belong to it."""
    images, masks, listing, offset = (*layout, None, None)[:4]
    part = dict(zip(SPLITS, data.splits)).get(split, split)
    part = SPLITS.get(part, part)
    images, masks, lists = (find_files(root, patterns or "", part) for patterns in (images, masks, listing))
    if offset and split == "train":
        masks = {(str(int(n) - offset),): file for (n,), file in masks.items()}
    # If masks lie beside the photos, the pattern of the photos may match them too.
    used = {masks[key] for key in images.keys() & masks.keys()}
    images = {key: file for key, file in images.items() if file not in used}
    if not listing:
        return images, masks, sorted(images)
    lines = "".join(Path(file).read_text() for file in lists.values()).splitlines()
    # A line is a name or the path of an image; names can have spaces, but some lists have a second column.
    readings = [(x, Path(x).stem, Path(x.split()[0]).stem) for x in map(str.strip, lines) if x]
    return images, masks, sorted({(next((n for n in x if (n,) in images), x[-1]),) for x in readings})


def places(data, folder):
    """Where to look for layouts: the folder, the data set's roots, and a single folder that wraps all."""
    inside = [x.path for x in os.scandir(folder) if x.is_dir() and not x.name.startswith((".", "__"))]
    return [folder, *(os.path.join(folder, root) for root in data.roots), *inside[: len(inside) == 1]]


def find_pairs(name, folder, split, patterns=None):
    """(image file, mask file) pairs of a split, in name order; `patterns` of --pairs replace the layouts.
    Exits with an error if files are missing."""
    data, layouts = DATASETS[name], [patterns] if patterns else DATASETS[name].layouts

    def refuse(text):
        fail(f"--data {name}:{folder}: {text}; {what_is_there(folder)}")

    # One layout serves all splits: the first one with files of any of them.
    for root, layout in itertools.product(places(data, folder), layouts):
        found = {x: find_split(root, layout, data, x) for x in list(SPLITS)[: len(data.splits)]}
        if any(masks and wanted for _, masks, wanted in found.values()):
            break
    else:
        looked = ", ".join(dict.fromkeys(f"{x[0]} with {x[1].split('|')[0]}" for x in layouts))
        refuse(f"no images with masks; looked for {looked}")
    if "{split}" not in str(layout):
        found = {"train": found["train"]}
    held_out = split != "test" and (len(found) == 1 or (name == "folder" and not found["val"][2]))
    images, masks, wanted = found.get("train" if held_out else split, ({}, {}, []))
    lacking = [key for key in wanted if key not in images or key not in masks]
    if lacking:
        key = lacking[0]
        first = f"{images[key]} has no mask" if key in images else f"{'/'.join(key)!r} has no image"
        refuse(f"the {split} split lacks {len(lacking)} files: {first}; looked for {layout[1]}")
    pairs = [(images[key], masks[key]) for key in wanted]
    if held_out:
        train.warn_once(f"--data {name}:{folder}: no validation split, so every fifth image is held out")
        pairs = [pair for i, pair in enumerate(pairs) if (i % HELD_OUT == HELD_OUT - 1) == (split == "val")]
    if not pairs:
        refuse(f"no images for the {split} split")
    return pairs


def what_is_there(folder):
    """For messages: the folders that hold files, and a --pairs that fits, if any: two groups of files whose
    names differ only at the start and the end. A group has one extension and one folder, or one per split."""
    holds, groups, alike = [], {}, {}
    for parent, _, files in sorted(os.walk(folder)):
        place = os.path.relpath(parent, folder)
        if files and "/." not in f"/{place}".removesuffix("/."):
            holds.append(f"{place}/ holds {len(files)} files such as {min(files)}")
        place = re.sub(f"(?i)(?<![^/])(?:{'|'.join(SPLITS.values())})(?![^/])", "{split}", place)
        for stem, suffix in map(os.path.splitext, sorted(files)):
            if suffix.lower() in Image.registered_extensions():
                groups.setdefault((place, suffix), []).append(stem)
    for (place, suffix), names in groups.items():
        start = os.path.commonprefix(names).rstrip("0123456789")
        names = [name.removeprefix(start) for name in names]
        end = os.path.commonprefix([name[::-1] for name in names])[::-1].lstrip("0123456789")
        pattern = os.path.normpath(f"{place}/{start}*{end}{suffix}")
        alike.setdefault(tuple(name.removesuffix(end) for name in names), []).append(pattern)
    pairs = [pair for names, pair in alike.items() if len(pair) == 2 and len(names) > 1]
    for pair in pairs[:1]:  # the pattern with a typical word for masks comes second
        pair.sort(key=lambda pattern: bool(re.search("(?i)mask|label|annot|manual|truth|gt|seg", pattern)))
    hints = ["..."] * (len(holds) > 6) + [f"try --pairs {shlex.join(pair)}" for pair in pairs[:1]]
    return "; ".join(holds[:6] + hints) or "it holds no files"


def read_class_list(folders):
    """Classes of a folder from the first list found -> a DataSet with its names, values and colors, or None.

    classes.txt and labelme's class_names.txt have a line per class: 'NAME', 'NAME GRAY' or 'NAME R G B';
    labelmap.txt is CVAT's: 'NAME:R,G,B::'. The name 'ignore' stands for ignored pixels.
    """
    files = ("classes.txt", "class_names.txt", "labelmap.txt")
    path = next((p for p in (Path(x, file) for x in folders for file in files) if p.exists()), None)
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {error}; save it as UTF-8 text")
    # The value of labelme's __ignore__ is always 255, so its line does not count.
    names, colors = [line for line in lines if line and line[0] != "#" and line != "__ignore__"], []
    number = r"[\s:,;]+(\d+)"
    entries = [re.fullmatch(f"(.+?){number}(?:{number * 2})?(?::.*)?", line) for line in names]
    # "lane 1" and "lane 2" are two names, not one class with two gray values.
    numbered = [entry[1] for entry in entries if entry]
    differ = 1 < len(numbered) == len(set(numbered))
    if differ or any(entry and entry[3] for entry in entries):  # all lines need a gray value or a color
        for line, entry in zip(names, entries):
            if not entry or max(map(int, entry.groups("0")[1:])) > 255:
                fail(f"{path}: cannot read {line!r}; write NAME R G B or NAME GRAY, 0 to 255, in every line")
        names = [entry[1] for entry in entries]
        colors = [tuple(map(int, entry.groups(entry[2])[1:])) for entry in entries]
    classes = tuple(name for name in names if name.lower().strip("_") != "ignore")
    once = len(set(classes)) == len(classes) and len(set(colors)) == len(colors)
    if not (once and 2 <= len(classes) < ILLEGAL):
        fail(f"{path}: {len(classes)} classes; list 2 to {ILLEGAL - 1}, and no name or color twice")
    labels = [classes.index(name) if name in classes else IGNORED for name in names]
    of_color, modes = dict(zip(colors, labels)), ("P", "RGB", "RGBA")
    if colors and all(len(set(color)) == 1 for color in colors):  # gray values in masks of any mode
        of_color = {(255, 255, 255): IGNORED, **of_color}
        return DataSet(classes, (), values={}, colors=of_color, color_modes=("1", "L", "LA", *modes))
    return DataSet(classes, (), values=dict(enumerate(labels)), colors=of_color, color_modes=modes)


def color_table(colors, tolerance):
    """Label of every RGB color, uint8 [256, 256, 256]: that of a listed color if each channel differs from it
    by at most `tolerance` and by less than half its distance to any other listed color; else ILLEGAL."""
    table = np.full((256, 256, 256), ILLEGAL, np.uint8)
    for color, label in colors.items():
        gaps = [max(abs(a - b) for a, b in zip(color, other)) for other in colors if other != color]
        reach = min(tolerance, *((gap - 1) // 2 for gap in gaps))
        table[tuple(slice(max(0, c - reach), c + reach + 1) for c in color)] = label
    return table


class Labeled:
    """Images with masks on disk, by index: image uint8 [3, H, W] and labels uint8 [H, W], 255 ignored.

    palettes: the color of each index in the masks read so far; a mask with another color is invalid. None:
    palettes are not compared. pixels: number of pixels by label [256] over all images, from check_masks.
    """

    def __init__(self, data, pairs, classes, palettes=None):
        self.data, self.pairs, self.palettes, self.pixels = data, pairs, palettes, None
        # Lookup tables turn whole masks into labels at once.
        values = {k: k for k in range(classes)} if data.values is None else data.values
        self.of_value = np.full(2**16, ILLEGAL, np.uint8)
        for value, label in {IGNORED: IGNORED, **values}.items():
            self.of_value[value] = label
        self.of_color = color_table(data.colors, data.tolerance) if data.colors else None

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return self.pairs[i][0]

    def labels(self, i, height, width):
        """Labels uint8 [height, width] of the mask of an image of this size; pixels of no class are ILLEGAL.
        Raises ValueError for an invalid mask, and any error of Pillow for a damaged one."""
        with Image.open(self.pairs[i][1]) as mask:
            colored = self.data.colors and mask.mode in self.data.color_modes
            raw, palette = np.asarray(mask.convert("RGB") if colored else mask), mask.getpalette()
        if max(raw.shape[0] - height, raw.shape[1] - width) <= self.data.crop_masks:
            raw = raw[:height, :width]
        if raw.shape[:2] != (height, width):
            size = f"it is {mask.width}x{mask.height} (width x height)"
            raise ValueError(f"{size}, but its image is {width}x{height}")
        if colored:
            labels = self.of_color[raw[..., 0], raw[..., 1], raw[..., 2]]
        elif raw.ndim != 2 or raw.dtype.kind == "f" or mask.format == "JPEG":
            raise ValueError(f"no class indices in a {mask.format} file of mode {mask.mode}; {LIST_THEM}")
        else:  # negative values and values that are too large take the last entry, which is illegal
            labels = self.of_value.take(raw.astype(np.uint32), mode="clip")
            compared = palette and self.palettes is not None
            for k in np.flatnonzero(np.bincount(raw.ravel())).tolist() if compared else ():
                color = palette[3 * k : 3 * k + 3]
                if self.palettes.setdefault(k, color) != color:  # an index of two colors is two classes
                    raise ValueError(f"the color of value {k} differs between palettes; {LIST_THEM}")
        wrong, most = labels == ILLEGAL, MOST_IGNORED if colored else 0
        if wrong.mean() > most:
            found = f"{wrong.sum()} pixels ({wrong.mean():.1%}, at most {most:.0%} are ignored)"
            raise ValueError(f"{found} belong to no class, such as {raw[wrong][0].tolist()}")
        return labels

    def check(self, i):
        """int [257] for check_masks: pixels by label, and the image's short side. Raises as `labels` does."""
        with Image.open(self.name(i)) as image:  # the header only: EXIF at the end of a PNG is not read
            (width, height), known = image.size, image.format != "PNG" or "exif" in image.info
            if known and image.getexif().get(0x0112, 1) > 4:  # rotated by 90 degrees
                width, height = height, width
        labels = self.labels(i, height, width)
        return np.array([*np.bincount(labels.ravel(), minlength=256), min(height, width)])

    def read(self, i):
        image = train.read_image(self.pairs[i][0])
        labels = self.labels(i, *image.shape[1:])
        return image, torch.from_numpy(np.where(labels == ILLEGAL, np.uint8(IGNORED), labels))


class DrawnScenes(Labeled):
    """Drawn scenes with their labels, by index; `pairs` holds seeds instead of pairs of files."""

    def __init__(self, seeds):
        self.pairs, self.pixels = seeds, None

    def name(self, i):
        return f"scene {self.pairs[i]}"

    def read(self, i):
        image, labels = (torch.from_numpy(x.copy()) for x in train.draw_scene(self.pairs[i]))
        return image.permute(2, 0, 1), labels


def check_masks(part, rank, world_size):
    """Check all masks, divided among the processes, and set part.pixels -> mean short side of images. Exits
    with an error that counts the invalid masks and names one."""
    wrong, nothing = [], np.zeros(256 + 1, np.int64)

    def check(i):
        try:
            return part.check(i)
        except Exception as error:  # a damaged file can make a decoder raise anything
            wrong.append(f"{part.pairs[i][1]}: {error} (image: {part.name(i)})")
            return nothing

    with ThreadPoolExecutor() as pool:
        counts = sum(pool.map(check, range(rank, len(part), world_size)), nothing)
    found = sum(train.gather(wrong), [])
    if found:
        fail(f"{len(found)} invalid masks, such as {min(found)}", together=True)
    colors = {(k, *rgb) for palettes in train.gather(part.palettes or {}) for k, rgb in palettes.items()}
    if len(colors) > len({color[0] for color in colors}):  # each process compared its own masks only
        fail(f"the palettes of the masks differ; {LIST_THEM}", together=True)
    *pixels, short = sum(train.gather(counts))
    part.pixels = np.array(pixels)
    return short / len(part)


def open_data(args, splits, rank, world_size, classes=None):
    """The given splits of --data with their masks checked, the class names, and the palette. classes: the
    class names in a checkpoint; the data set must have the same names in the same order."""
    if args.name == "scenes":
        counts, starts = {"train": args.scenes}, {"train": 0, "val": 10**6, "test": 2 * 10**6}
        seeds = [range(starts[x], starts[x] + counts.get(x, VAL_SCENES)) for x in splits]
        return [*map(DrawnScenes, seeds)], list(train.SCENE_CLASSES), list(train.SCENE_PALETTE)
    data, errors = DATASETS[args.name], []
    for _ in os.walk(args.folder, onerror=errors.append):  # glob skips folders that it cannot read
        pass
    if errors:
        fail(f"--data {args.data}: cannot read {errors[0].filename}: {errors[0].strerror}")
    if args.name == "folder":
        beside = [os.path.join(args.folder, os.path.dirname(args.pairs[1]))] if args.pairs else []
        data = read_class_list([*places(data, args.folder), *beside]) or data  # also beside the masks
    names = list(data.classes or classes or (f"class {k}" for k in range(args.classes or ILLEGAL)))
    if classes and names != list(classes):
        old, new = (f"{len(x)} classes, {', '.join(x[:30])}" for x in (classes, names))
        fail(f"the checkpoint has {old}; {args.data} has {new}; use the same names in the same order")
    parts, palettes = {}, {} if args.name == "folder" else None
    for split in splits:
        pairs = find_pairs(args.name, args.folder, split, args.pairs)
        say(f"{split}: {len(pairs)} images, such as {pairs[0][0]} with {pairs[0][1]}")
        parts[split] = part = Labeled(data, pairs, len(names), palettes)
        short = check_masks(part, rank, world_size)
        if ignored := part.pixels[ILLEGAL]:
            say(f"note: {ignored} pixels ({ignored / part.pixels.sum():.2%}) belong to no class (ignored)")
        if args.base_size and short > 2 * args.base_size:
            say(f"note: images are downscaled (short side {short:.0f} -> {args.base_size}), see --base-size")
    if args.name == "folder" and not data.colors:
        inferred = not (data.classes or classes or args.classes)
        used = check_values(parts, inferred)
        names = names[:used] if inferred else names
    # The palette: the first color that is listed for each class, unless there are only gray values.
    listed = {label: color for color, label in reversed((data.colors or {}).items())}
    colored = any(len(set(color)) > 1 for color in listed.values())
    palette = [listed[k] for k in range(len(names))] if colored else voc_palette(len(names))
    return list(parts.values()), names, list(palette)


def check_values(parts, inferred):
    """Number of values in the masks of a folder. Exits with an error if they do not seem to be class indices.
    parts: by split; inferred: the classes are the values."""
    pixels, problem = sum(part.pixels for part in parts.values()), None
    used = np.flatnonzero(pixels[:IGNORED]).tolist()
    run = used == [*range(len(used))] and 2 <= len(used) <= MOST_INFERRED
    if inferred and not (run and pixels[IGNORED] <= pixels.sum() / 4):
        problem = f"expected 0, 1, 2, ... up to {MOST_INFERRED - 1} without gaps, and 255 (ignored) rare"
    for split, part in parts.items():
        if part.pixels[IGNORED] and np.count_nonzero(part.pixels[:IGNORED]) < 2:
            problem = f"{split} has fewer than two classes (255 means ignored)"
    if problem:
        values = ", ".join(map(str, np.flatnonzero(pixels)[:20])) + ", ..." * (len(used) > 19)
        fail(f"the masks hold the values {values}: {problem}; {LIST_THEM}")
    return len(used)


def choose_subset(images, fraction, seed):
    """Sorted indices of a share of the images; for one seed, smaller subsets are part of larger ones."""
    return np.sort(np.random.default_rng(seed).permutation(images)[: max(1, round(images * fraction))])


# -------------------------------------------------------------------------- augmentation, in worker processes


def scaled_size(height, width, short):
    """(height, width) with the same aspect ratio, short side `short`, and long side at most 4 times that."""
    scale = min(short / min(height, width), 4 * short / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def choose_crop(labels, crop, rng, most=0.75, redraws=10):
    """(top, left, height, width) of a random crop of labels uint8 [H, W], no larger than the labels.
    A crop in which one class fills over `most` of the labeled pixels is drawn again, up to `redraws` times
    (Segmenter's 75% rule); so is a crop without labeled pixels.
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
    """Photometric distortion of uint8 [h, w, 3], each part with probability 0.5: brightness +-32, contrast
    0.5..1.5 before or after HSV's saturation 0.5..1.5, hue -36..34 degrees (mmsegmentation, Segmenter)."""
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    late = rng.random() < 0.5  # contrast comes after the changes in HSV
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    degrees = 2 * int(rng.integers(-18, 18)) if rng.random() < 0.5 else 0
    # A byte has 256 values, so each change is a table of its results, and Pillow looks them up.
    levels = np.arange(256)
    changes = (levels + brightness, levels * contrast, levels * saturation)
    brighter, contrasted, saturated = (x.clip(0, 255).astype(np.uint8) for x in changes)
    turned = (levels + round(degrees / 360 * 256)) % 256  # a full circle of hue is 256
    before, after = (brighter, contrasted) if late else (contrasted[brighter], levels)
    picture = Image.fromarray(image).point([*before] * 3)
    if saturation != 1 or degrees:
        picture = picture.convert("HSV").point([*turned, *saturated, *levels]).convert("RGB")
    return np.array(picture.point([*after] * 3))


def augment(image, labels, crop, base_size, rng):
    """Random scale, crop, flip, distortion and padding: uint8 [3, H, W] and [H, W] -> [3, *crop] and [*crop].

    The crop is cut before it is scaled, so the cost does not depend on the size of the image. base_size 0:
    the image's own size.
    """
    # The crop is chosen in pixels of the image, with the size that scaling turns into `crop`.
    base = base_size or min(labels.shape)
    size = scaled_size(*labels.shape, base * rng.uniform(0.5, 2.0))
    scale = [new / old for new, old in zip(size, labels.shape)]
    source = [max(1, round(side / s)) for side, s in zip(crop, scale)]
    top, left, height, width = choose_crop(labels.numpy(), source, rng)
    image, labels = (x[..., top : top + height, left : left + width] for x in (image, labels))
    new = [min(side, max(1, round(old * s))) for side, old, s in zip(crop, (height, width), scale)]
    image = F.interpolate(image[None], new, mode="bilinear", antialias=True)[0]
    labels = F.interpolate(labels[None, None], new, mode="nearest-exact")[0, 0]
    if rng.random() < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    pixels = distort(image.permute(1, 2, 0).contiguous().numpy(), rng)
    mean = torch.tensor([round(255 * m) for m in train.MEAN], dtype=torch.uint8)  # 0 after normalization
    padded = mean[:, None, None].repeat(1, *crop)  # 3,crop
    padded[:, : new[0], : new[1]] = torch.from_numpy(pixels).permute(2, 0, 1)
    return padded, F.pad(labels, (0, crop[1] - new[1], 0, crop[0] - new[0]), value=IGNORED)


class Samples(Dataset):
    """Images with labels by key: whole ones by index, and training crops by (epoch, index), which seed them;
    an index beyond the last image wraps around.

    Items: image uint8 [3, H, W], labels uint8 [H, W], index, and unreadable: '' or what was wrong with a file
    that was replaced by another one.
    """

    def __init__(self, source, args):
        self.source, self.args = source, args

    def __getitem__(self, key):
        epoch, index = (None, key) if isinstance(key, int) else (key[0], key[1] % len(self.source))
        (image, labels), wrong = train.read_or_next(self.source, index, self.source.read)
        if epoch is not None:
            rng = np.random.default_rng((self.args.seed, *key))
            image, labels = augment(image, labels, self.args.crop, self.args.base_size, rng)
        return {"image": image, "labels": labels, "index": index, "unreadable": wrong}


# --------------------------------------------------------------------------------------------------- model


def linear_decoder(dim, classes):
    """Segmenter's decoder: tokens [B, N, D] -> class logits [B, N, C]."""
    decoder = nn.Linear(dim, classes)
    nn.init.trunc_normal_(decoder.weight, std=0.02)
    nn.init.zeros_(decoder.bias)
    return decoder


# (width of the tokens, number of classes) -> module that maps tokens [B, N, D] to class logits [B, N, C].
# --decoder offers every entry.
DECODERS = {"linear": linear_decoder}


class Segmenter(nn.Module):
    """A ViT and a decoder on its patch tokens: images [B, 3, H, W] -> class logits float32 [B, C, H, W].

    encoder: loca.ViT, or any module with dim and patch_size that maps images to patch tokens. decoder: a key
    of DECODERS. frozen: train only the decoder (linear probe); the encoder stays in evaluation mode and gets
    no gradients. Otherwise, encoder parameters with requires_grad are trained too.
    """

    def __init__(self, encoder, classes, frozen=False, decoder="linear"):
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        self.decoder = DECODERS[decoder](encoder.dim, classes)
        if frozen:
            encoder.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images):
        tokens = self.encoder(images)  # B,N,D
        grid = [side // self.encoder.patch_size for side in images.shape[-2:]]
        logits = self.decoder(tokens).float().transpose(1, 2).contiguous()  # B,C,N
        logits = logits.unflatten(2, grid)  # B,C,rows,columns
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")  # B,C,H,W


def build_model(args, classes):
    """The Segmenter that the settings describe, on the CPU. Raises ValueError if sizes do not fit."""
    encoder = train.build_encoder(args, args.crop, class_token=args.class_token)
    return Segmenter(encoder, classes, args.freeze, args.decoder)


def learning_rate(step, steps, peak, floor=1e-5):
    """Polynomial decay of power 0.9 from `peak` to `floor` (Segmenter)."""
    floor = min(floor, peak)
    return (peak - floor) * (1 - step / steps) ** 0.9 + floor


def segmentation_loss(logits, labels):
    """Mean cross-entropy of logits [B, C, H, W] where labels uint8 [B, H, W] are not 255; 0 if all are."""
    labels = labels.long()
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------- evaluation

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
WINDOWS = 8  # windows at a time; changes memory and speed, not results
LARGEST = 2**28  # maximum number of probabilities for one predicted photo: 1 GiB


def sliding_window(model, image, window, stride, batch):
    """Logits of an image of any size: float [3, H, W] -> float32 [C, H', W'], the mean where windows overlap.

    window, stride: (height, width). The model sees `batch` windows at a time. An image smaller than the
    window is enlarged until it covers the window (Segmenter); H' and W' are its enlarged size, else H and W.
    """
    scale = max(w / side for w, side in zip(window, image.shape[-2:]))
    if scale > 1:
        size = [max(w, int(side * scale)) for w, side in zip(window, image.shape[-2:])]
        image = F.interpolate(image[None], size, mode="bilinear")[0]
    # Along each axis, the last window is flush with the border.
    starts = [[*range(0, n - w, d), n - w] for n, w, d in zip(image.shape[-2:], window, stride)]
    corners = list(itertools.product(*starts))  # top, left
    total, seen = 0.0, image.new_zeros(image.shape[-2:], dtype=torch.float32)
    for start in range(0, len(corners), batch):
        part = corners[start : start + batch]
        logits = model(torch.stack([image[:, y : y + window[0], x : x + window[1]] for y, x in part])).float()
        if start == 0:  # now the number of classes is known
            total = logits.new_zeros(logits.shape[1], *image.shape[-2:])  # C,H,W
        for (y, x), values in zip(part, logits):
            total[:, y : y + window[0], x : x + window[1]] += values
            seen[y : y + window[0], x : x + window[1]] += 1
    return total / seen


def class_probabilities(model, image, args, size=None):
    """Image uint8 [3, H, W] -> probabilities [C, *size], by default at the image's own size: the softmax of
    logits resized to it; with --multi-scale, the mean over scales and flips."""
    size, pixels, total = size or image.shape[-2:], train.normalize(image), 0.0
    views = [*itertools.product(SCALES, (False, True))] if args.multi_scale else [(1.0, False)]
    for scale, flip in views:
        # Windows slide over the scaled image; their logits return to the original size before the softmax.
        scaled = scaled_size(*image.shape[-2:], (args.base_size or min(image.shape[-2:])) * scale)
        view = F.interpolate(pixels[None], scaled, mode="bilinear", antialias=True)[0]
        view = view.flip(-1) if flip else view
        with train.autocast(args.precision, image.device):
            logits = sliding_window(model, view, args.window, args.stride, WINDOWS)
        logits = logits.flip(-1) if flip else logits
        total = total + F.interpolate(logits[None], size, mode="bilinear")[0].softmax(0)
    return total / len(views)


@torch.no_grad()
def segment(model, image, args, classes):
    """Image uint8 [3, H, W] -> predicted classes, array uint8 [H, W]."""
    # The probabilities of a large photo would not fit in memory: predict it at a smaller size.
    size = image.shape[-2:]
    fraction = LARGEST / (classes * math.prod(size))
    small = size if fraction >= 1 else scaled_size(*size, math.sqrt(fraction) * min(size))
    labels = class_probabilities(model, image, args, small).argmax(0).to(torch.uint8).cpu()
    return F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0].numpy()


def confusion(truth, predicted, classes):
    """Pixels by true class (rows) and predicted class (columns), long [C, C]; truth 255 is excluded."""
    counted = truth != IGNORED
    # Each pair of true and predicted class has its own number, and a histogram counts the pairs.
    index = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(index, minlength=classes**2).view(classes, classes)


def scores(matrix):
    """Metrics in 0..1 of a confusion matrix, array [C, C]: mIoU, pixel accuracy, mean accuracy, and per-class
    IoU (NaN for a class in neither truth nor prediction) and accuracy (NaN for a class not in the truth). The
    means exclude NaN."""
    matrix = np.asarray(matrix, np.float64)
    right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):
        iou, accuracy = right / (true + predicted - right), right / true
    miou, mean_accuracy = (float(np.nanmean(x)) if np.isfinite(x).any() else 0.0 for x in (iou, accuracy))
    pixel_accuracy = float(right.sum() / max(true.sum(), 1))
    means = {"miou": miou, "pixel_accuracy": pixel_accuracy, "mean_accuracy": mean_accuracy}
    return {**means, "iou": iou, "accuracy": accuracy}


def average_precision(confidence, present):
    """Mean of the precision at each positive: confidence float [n], present bool [n] -> 0..1."""
    # Precision is the share of positives among all that are at least as confident, ties included.
    return float(np.mean([present[confidence >= threshold].mean() for threshold in confidence[present]]))


@torch.no_grad()
def evaluate(model, source, args, split, names, rank, world_size, device):
    """Metrics over a set of images, each evaluated by one process; the same for any number of processes.

    Returns what results.json holds: protocol, METRICS in 0..1, `classes` with the IoU, accuracy and pixels of
    each (None where `scores` has NaN), and the confusion matrix. localization_miou: predictions are
    restricted to the classes in an image's truth. classification_map: the mean average precision of detecting
    which classes are in an image from the largest probability of any pixel. Exits with an error if an image
    cannot be read. The model must be in evaluation mode.
    """
    classes = len(names)
    matrices = torch.zeros(2, classes, classes, dtype=torch.long, device=device)
    confidence, present = torch.zeros(2, len(source), classes, device=device)
    indices = range(rank, len(source), world_size)
    workers = min(args.workers, len(indices), 4)
    items = train.read_batches(Samples(source, args), workers, device, batch_size=None, sampler=indices)
    with contextlib.closing(items):
        for item in items:
            if item["unreadable"]:
                fail(f"cannot evaluate: {item['unreadable']}; repair or remove the file")
            item, i = train.to_device(item, device), item["index"]
            truth, probabilities = item["labels"], class_probabilities(model, item["image"], args)
            confidence[i] = probabilities.amax((1, 2))
            present[i] = torch.bincount(truth.flatten().long(), minlength=256)[:classes] > 0
            matrices[0] += confusion(truth, probabilities.argmax(0), classes)
            # Localization alone: the classes in the image are given, and each pixel chooses among them.
            allowed = probabilities.masked_fill(present[i][:, None, None] == 0, -1.0)
            matrices[1] += confusion(truth, allowed.argmax(0), classes)
    sums = [loca.sum_over_processes(x).cpu().numpy() for x in (matrices, confidence, present)]
    matrices, confidence, present = sums[0], sums[1], sums[2] > 0
    precision = [average_precision(confidence[:, k], present[:, k]) for k in np.flatnonzero(present.any(0))]
    result = {**scores(matrices[0]), "pixels": matrices[0].sum(1)}
    columns = {x: np.where(np.isnan(result[x]), None, result.pop(x)) for x in ("iou", "accuracy", "pixels")}
    sides = [f"{key} {'x'.join(map(str, getattr(args, key)))}" for key in ("crop", "window", "stride")]
    base = f"base size {args.base_size or 'of each image'}"
    scales = "scales 0.5-1.75 with flips" if args.multi_scale else "single scale"
    measured = [f"{args.name} {split}, {len(source)} images, {classes} classes", base, *sides, scales]
    return {
        "protocol": ", ".join(measured),  # to be quoted with the metrics
        "images": len(source),
        **result,
        "localization_miou": scores(matrices[1])["miou"],
        "classification_map": float(np.mean(precision)) if precision else 0.0,
        "classes": [{"name": name, **{x: columns[x][k] for x in columns}} for k, name in enumerate(names)],
        "confusion": matrices[0].tolist(),
    }


METRICS = {
    "miou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy",
    "localization_miou": "localization mIoU", "classification_map": "classification mAP",
}  # fmt: skip


def report(result, table=True, training=None):
    """Print an evaluation; with `table`, also every class, and which classes are never predicted correctly,
    with their shares of the pixels. training: the training pixels by label; None: use those evaluated."""
    rows, total = result["classes"], max(1, sum(row["pixels"] for row in result["classes"]))
    if table:
        width = max(len(row["name"]) for row in rows)
        say(f"{'class':<{width}}    IoU  accuracy  share of pixels")
        for row in rows:
            iou, accuracy = ("-" if row[key] is None else f"{row[key]:.1%}" for key in ("iou", "accuracy"))
            say(f"{row['name']:<{width}}{iou:>7}{accuracy:>10}{row['pixels'] / total:16.2%}")
    figures = " | ".join(f"{title} {result[name]:.2%}" for name, title in METRICS.items())
    say(f"{result['protocol']}: {figures}")
    pixels = np.array([row["pixels"] for row in rows]) if training is None else training[: len(rows)]
    never = [k for k in np.argsort(-pixels, kind="stable") if rows[k]["accuracy"] == 0]
    if table and never:
        named = [f"{rows[k]['name']} {pixels[k] / pixels.sum():.1%}" for k in never]
        shown = ", ".join(named[:5] + ["..."] * (len(named) > 5))
        kind = "evaluated" if training is None else "training"
        say(f"note: never predicted correctly (share of the {kind} pixels): {shown}")


# ------------------------------------------------------------------------------------------------ pictures


def paint(labels, palette):
    """Labels [H, W] -> picture in the classes' colors; 255 is white."""
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(palette)] = palette
    return Image.fromarray(colors[np.asarray(labels)])


def add_legend(picture, labels, classes, palette):
    """The picture with a legend: color, number and name of each class in `labels`, most frequent first."""
    counts = np.bincount(labels.ravel(), minlength=256)[: len(classes)]
    order, font = np.argsort(-counts, kind="stable"), ImageFont.load_default(13)
    row, left = 20, picture.width + 10
    texts = {k: f"{k} {classes[k]}" for k in order if counts[k]}  # the font lacks many scripts, but no digit
    right = left + 30 + max((int(font.getlength(text)) for text in texts.values()), default=0)
    sheet = Image.new("RGB", (right, max(picture.height, row * len(texts) + 8)), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for y, (k, text) in zip(itertools.count(4, row), texts.items()):
        pen.rectangle((left, y + 2, left + 16, y + row - 4), fill=tuple(palette[k]), outline="black")
        pen.text((left + 22, y + 1), text, fill="black", font=font)
    return sheet


def draw_sheet(path, model, source, args, device, classes, palette, rows=4, size=(260, 200)):
    """Write a picture of evenly spaced images of a set, one row each: photo, truth and prediction."""
    title, font = Image.new("RGB", (3 * size[0], 22), "white"), ImageFont.load_default(14)
    for column, text in enumerate(("photo", "truth (white: ignored)", "prediction")):
        ImageDraw.Draw(title).text((column * size[0] + 4, 3), text, fill="black", font=font)
    sheet, shown = [np.asarray(title)], []
    for i in np.unique(np.linspace(0, len(source) - 1, rows).astype(int)):
        image, truth = source.read(i)
        predicted = segment(model, image.to(device), args, len(classes))
        photo = Image.fromarray(image.permute(1, 2, 0).numpy())
        masks = [ImageOps.pad(paint(x, palette), size, Image.NEAREST, "white") for x in (truth, predicted)]
        sheet.append(np.hstack([ImageOps.pad(photo, size, color="white"), *masks]))
        shown += [truth.numpy().ravel(), predicted.ravel()]
    picture = add_legend(Image.fromarray(np.vstack(sheet)), np.concatenate(shown), classes, palette)
    train.write_file(path, functools.partial(picture.save, format="PNG"))


# -------------------------------------------------------------------------------------- evaluate and predict


def load_segmenter(args, device):
    """The model in --checkpoint, in evaluation mode, and the contents of the file."""
    content = loca.read_torch_file(args.checkpoint)
    model = build_model(args, len(content["classes"]))
    model.load_state_dict(content["model"])
    return model.to(device).eval(), content


def evaluate_only(args):
    """Evaluate a checkpoint on a split; write results.json and predictions.png."""
    rank, world_size, device = train.init_distributed(args.device)
    args.precision = args.precision or train.default_precision(device)
    model, content = load_segmenter(args, device)
    classes, palette, out = content["classes"], content["palette"], Path(args.out)
    (source,), _, _ = open_data(args, (args.split,), rank, world_size, classes)
    result = evaluate(model, source, args, args.split, classes, rank, world_size, device)
    report(result)
    say(f"writing {out}/results.json and predictions.png")
    if rank == 0:
        origin = {"checkpoint": args.checkpoint, "step": content["step"]}
        train.write_file(out / "results.json", {**origin, **result})
        draw_sheet(out / "predictions.png", model, source, args, device, classes, palette)
    train.end_processes()


def predict(args):
    """Segment images into --out: NAME_mask.png (colors), NAME_overlay.png (with a legend) and NAME_labels.png
    (indices), in the same subfolders as the photos, and classes.txt, which makes them masks for --pairs.
    Exits with an error if a result exists already, or a classes.txt with other contents."""
    rank, world_size, device = train.init_distributed(args.device)
    args.precision = args.precision or train.default_precision(device)
    model, content = load_segmenter(args, device)
    classes, palette, out = content["classes"], content["palette"], Path(args.out)
    photos, failed = {}, 0  # by path of the results, without ending
    for path in map(Path, args.predict):
        found = train.find_images(path, "--predict", skip=out) if path.is_dir() else [os.fsencode(path.name)]
        for name in map(os.fsdecode, found):
            photo = (path if path.is_dir() else path.parent) / name
            if photos.setdefault((out / name).with_suffix(""), photo) != photo:
                fail(f"--predict: {photo} and another photo have the same name; use an --out for each")
    lines = "".join("{} {} {} {}\n".format(name, *color) for name, color in zip(classes, palette)).encode()
    listing, kinds = out / "classes.txt", ("mask", "labels", "overlay")
    taken = [path for result in photos for kind in kinds if os.path.exists(path := f"{result}_{kind}.png")]
    if taken or (os.path.exists(listing) and listing.read_bytes() != lines):
        fail(f"--out {out}: {taken[0] if taken else listing} already exists; give another --out")
    train.gather(None)  # no process writes before all have looked
    if rank == 0:
        train.write_file(listing, lines)
    say(f"{out}/classes.txt: the checkpoint's classes; NAME_labels.png holds their numbers, from 0")
    for result, photo in [*photos.items()][rank::world_size]:
        try:
            image = train.read_image(photo)
        except Exception as error:  # a damaged file can make a decoder raise anything
            failed += 1
            train.warn_once(f"cannot read {photo}: {error}")
            continue
        labels = segment(model, image.to(device), args, len(classes))
        mask = paint(labels, palette)
        overlay = Image.blend(Image.fromarray(image.permute(1, 2, 0).numpy()), mask, 0.55)
        overlay = add_legend(overlay, labels, classes, palette)
        for kind, picture in zip(kinds, (mask, Image.fromarray(labels), overlay)):
            train.write_file(f"{result}_{kind}.png", functools.partial(picture.save, format="PNG"))
        train.show(f"{photo} -> {result}_mask.png, _overlay.png, _labels.png")
    if sum(train.gather(failed)) == len(photos):
        fail("--predict: none of the images could be read")
    train.end_processes()


# ---------------------------------------------------------------------------------------------------- main

MAY_CHANGE = {  # flags that a resumed run may change
    "data", "classes", "out", "workers", "device", "precision", "log_every", "save_minutes", "accumulate", "epochs", "steps",
    "lr", "clip", "evaluations", "window", "stride", "multi_scale",
}  # fmt: skip


def main(args):
    """Fine-tune with these settings, resuming from the last checkpoint in --out if there is one."""
    # ---- processes: torchrun's environment, or a single one ----
    rank, world_size, device = train.init_distributed(args.device)
    args.precision = args.precision or train.default_precision(device)
    out = Path(args.out)

    # ---- data ----
    (images, val_images), classes, palette = open_data(args, ("train", "val"), rank, world_size)
    # --fraction keeps part of the training images; their names identify that part for a later resume.
    whole = len(images)
    images.pairs = [images.pairs[i] for i in choose_subset(whole, args.fraction, args.seed)]
    pixels = images.pixels if args.fraction == 1 else None  # by label, of all training images
    identity = train.identify(images, val_images)
    total_steps = args.steps or max(1, round(args.epochs * len(images) / args.batch))

    # ---- model and optimizer ----
    train.seed_all(args.seed)
    try:
        model = build_model(args, len(classes))
    except ValueError as error:
        fail(f"{error}: see --patch-size, --heads, --dim")
    # A resumed run takes its weights from the checkpoint.
    if args.init != "none" and not os.path.exists(out / "last.pt"):
        train.init_encoder(model.encoder, args.init, args.branch)
    model.to(device).train()
    groups = train.weight_decay_groups(model, args.weight_decay, spared=("pos_embed", "cls_token"))
    optimizer = train.OPTIMIZERS[args.optimizer](groups, lr=args.lr)

    # ---- resume: the same command continues the run in --out ----
    modules = {"model": model, "optimizer": optimizer}
    defaults = vars(make_parser().parse_args([]))
    saved = train.load_checkpoint(out / "last.pt", args, MAY_CHANGE, defaults, identity, modules)
    start_step, best = (saved["step"], saved["best"]) if saved else (0, None)  # best: mIoU
    if saved and (saved["settings"]["name"], saved["classes"]) != (args.name, classes):
        fail(f"{out}/last.pt is of another data set or has other class names; use a new --out")
    if start_step >= total_steps:
        say(f"note: this run is already finished; use a new --out, or --eval-only --checkpoint {out}/last.pt")
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model

    # ---- log ----
    meter, log = train.Meter(), train.Log(out, start_step) if rank == 0 else None
    if rank == 0:
        train.write_file(out / "settings.json", vars(args))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    say(
        f"{world_size} x {device.type}, {args.precision}; batch {args.batch}; {len(images)} of {whole} images, "
        f"{len(val_images)} for validation, {len(classes)} classes\n{args.optimizer}, {trained:.2f} M trained "
        f"parameters; {total_steps} steps; start: {args.init}; in {out}"
    )
    more, saved_at = {"classes": classes, "palette": palette, "images": identity}, time.monotonic()

    # ---- loop ----
    epoch = math.ceil(args.batch / len(images)) * len(images)  # a large batch repeats images
    steps, parts = (start_step, total_steps), (rank, world_size, args.accumulate)
    keys = train.step_keys(epoch, args.batch, args.seed, *steps, *parts)
    batches = train.read_batches(Samples(images, args), args.workers, device, batch_sampler=keys)
    remedies = f"--accumulate {2 * args.accumulate} or, if it was evaluating, a smaller --window"
    with train.catch_signals() as stop, train.explain_out_of_memory(remedies), contextlib.closing(batches):
        for step in range(start_step, total_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, args.lr)

            # ---- forward and backward ----
            for micro in range(args.accumulate):
                batch = train.to_device(meter.next_batch(batches), device)
                train.seed_all(args.seed, step, rank, micro)  # stochastic depth
                last = micro == args.accumulate - 1  # gradients are averaged over the devices once per step
                with contextlib.nullcontext() if last or world_size == 1 else net.no_sync():
                    with train.autocast(args.precision, device):
                        loss = segmentation_loss(net(train.normalize(batch["image"])), batch["labels"])
                    (loss / args.accumulate).backward()
                meter.add({"loss": loss})

            # ---- optimizer ----
            gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()

            # ---- log, evaluate, save: the only place where the host waits for the device ----
            done = step + 1
            evaluate_now = done * args.evaluations // total_steps > step * args.evaluations // total_steps
            alone = stop and world_size == 1  # several processes agree only at log lines
            if not (evaluate_now or alone or done % args.log_every == 0):
                continue
            record = {"gradient_norm": gradient_norm.item(), **meter.read(args.batch / args.accumulate)}
            train.check_finite(record, done)
            stopping = done < total_steps and any(train.gather(bool(stop)))
            record |= {"lr": group["lr"], "memory_gib": torch.cuda.max_memory_allocated() / 2**30}
            say(
                f"step {done}/{total_steps} epoch {done * args.batch / len(images):.1f} | loss "
                f"{record['loss']:.3f} | lr {group['lr']:.1e} | {record['images_per_second']:.1f} img/s | waiting for "
                f"data {record['waiting']:.0%} | CUDA memory {record['memory_gib']:.1f} GiB"
            )
            if evaluate_now and not stopping:
                if rank == 0:  # an evaluation can fail, for example on a damaged photo
                    train.save_checkpoint(out / "last.pt", args, done, modules, best=best, **more)
                model.eval()  # without stochastic depth
                result = evaluate(model, val_images, args, "val", classes, rank, world_size, device)
                report(result, done == total_steps, pixels)
                record |= {f"val_{name}": result[name] for name in METRICS}
                better = best is None or result["miou"] > best
                best = max(result["miou"], best or 0.0)
                if rank == 0 and better:
                    train.save_checkpoint(out / "best.pt", args, done, {"model": model}, best=best, **more)
                if rank == 0:
                    train.write_file(out / "results.json", {"step": done, "best": best, **result})
                    draw_sheet(out / "predictions.png", model, val_images, args, device, classes, palette)
                model.train()
            if rank == 0:
                log.write({"step": done, "epoch": done * args.batch / len(images), **record})
                if stopping or evaluate_now or time.monotonic() - saved_at > 60 * args.save_minutes:
                    train.save_checkpoint(out / "last.pt", args, done, modules, best=best, **more)
                    saved_at = time.monotonic()
            if stopping:
                say(f"stopped: saved at step {done}; run the same command to resume")
                train.end_processes()  # waits until the first one has saved
                sys.exit(train.EXIT_STOPPED)
            meter = train.Meter()  # start anew: evaluating and saving do not count as training time

    # ---- end ----
    train.end_processes()
    if best is not None:
        say(f"best mIoU {best:.2%}")
    say(f"{out}: {', '.join(sorted(os.listdir(out)))}")
    say(f"on your images: python finetune_seg.py --predict IMAGES --checkpoint {out}/best.pt --out DIR")


# --------------------------------------------------------------------------------------------- command line

SIZE_KEYS = tuple(loca.SIZES["B/16"])  # patch_size, dim, depth, heads, mlp_dim
SCENES_RUN = "runs/scenes/last.pt"  # where train.py without --data saves its checkpoint
TINY = {"stride": 64, "batch": 16, "optimizer": "adamw", "lr": 0.001, "evaluations": 2}
SCENES_PRESET = TINY | {name: train.SCENES_PRESET[name] for name in SIZE_KEYS}
SCENES_PRESET |= {"base_size": 128, "crop": 96, "steps": 400}
SMALL_PRESET = TINY | {name: train.SMALL_PRESET[name] for name in SIZE_KEYS}  # goes with train.py --small
SMALL_PRESET |= {"base_size": 192, "crop": 128, "steps": 1100}
ADAMW = {"lr": 0.0001, "weight_decay": 0.05}
PROTOCOL = ("base_size", "crop", "stride", "batch", "lr", "epochs")  # what a data set decides
OF_MODEL = ("decoder", "crop", "class_token", *SIZE_KEYS)  # what a checkpoint decides
existing = train.number(str, os.path.exists, "an existing file or folder")
number_of_classes = train.number(int, lambda n: 1 < n < ILLEGAL, f"from 2 to {ILLEGAL - 1}")


def share(text):
    """argparse type of a share, such as 1/32 or 0.25."""
    part, _, whole = text.partition("/")
    return up_to_1(float(part) / positive_int(whole or 1))


def make_parser():
    """The command line; None as a default means the value of the data set, the weights or the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, **train.PARSER)
    yes_no = {"action": argparse.BooleanOptionalAction, "default": False}
    # fmt: off
    g = parser.add_argument_group("data")
    g.add_argument("--data", metavar="NAME:DIR", help=f"data set and its folder; NAME: {', '.join(DATASETS)}; default: drawn scenes")
    g.add_argument("--pairs", metavar=("IMAGES", "MASKS"), nargs=2, help="images and masks instead of the known layouts: quoted patterns relative to DIR with * for the shared name, and {split} if there are splits, such as 'image/{split}/*.png' 'label/{split}/*_seg.png'")
    g.add_argument("--classes", type=number_of_classes, help="number of classes of folder:DIR; default: from classes.txt, or the values in the masks")
    g.add_argument("--fraction", type=share, default=1.0, help="share of the training images, such as 1/32; smaller subsets are part of larger ones")
    g.add_argument("--small", **yes_no, help="a preset that matches train.py --small: small images and model, a quarter of an hour on one core")
    g.add_argument("--scenes", type=positive_int, default=400, help="number of drawn scenes to train on, without --data")
    g = parser.add_argument_group("weights and model")
    g.add_argument("--init", metavar="FILE", help="initial weights: from train.py, published (flax), or a ViT with the names of timm, DINO, iBOT, MAE, MoCo v3, I-JEPA or Hugging Face; none: from scratch; default: none, or without --data runs/scenes/last.pt if it exists")
    g.add_argument("--branch", default="teacher", choices=["teacher", "student"], help="which encoder to load if --init holds both")
    g.add_argument("--decoder", default="linear", choices=list(DECODERS), help="what maps patch tokens to class logits")
    g.add_argument("--freeze", **yes_no, help="train only the decoder (linear probe); needs a larger --lr")
    g.add_argument("--model", choices=list(loca.SIZES), help="model size; default: from --init or the preset, else B/16; the next five flags override parts of it")
    g.add_argument("--patch-size", type=positive_int, help="side of a patch, pixels")
    g.add_argument("--dim", type=positive_int, help="width")
    g.add_argument("--depth", type=positive_int, help="number of blocks")
    g.add_argument("--heads", type=positive_int, help="attention heads, if the file does not specify them")
    g.add_argument("--mlp-dim", type=positive_int, help="hidden width of a block's MLP")
    g.add_argument("--drop-path", type=below_1, default=0.1, help="stochastic depth rate of the last block")
    g = parser.add_argument_group("sizes (default: the data set's)")
    g.add_argument("--base-size", type=int_or_0, help="resize the short side of images to this many pixels; training scales it by 0.5-2; 0: keep the size")
    g.add_argument("--crop", type=positive_int, nargs="+", metavar="N", help="training crop, pixels: side, or height and width")
    g.add_argument("--window", type=positive_int, nargs="+", metavar="N", help="window of the evaluation; default: the crop")
    g.add_argument("--stride", type=positive_int, nargs="+", metavar="N", help="step between windows; smaller is slower and smoother")
    g = parser.add_argument_group("training (default: the data set's)")
    g.add_argument("--epochs", type=positive_int, help="passes over the images")
    g.add_argument("--steps", type=positive_int, help="optimizer steps, instead of --epochs")
    g.add_argument("--batch", type=positive_int, help="images per step, over all devices and micro-batches")
    g.add_argument("--accumulate", type=positive_int, default=1, help="micro-batches per step, to save memory")
    g.add_argument("--optimizer", choices=list(train.OPTIMIZERS), help="default: adamw in presets, else sgd, as in Segmenter; adamw is easier to tune on small data")
    g.add_argument("--lr", type=positive_float, help=f"peak learning rate; default: that of the preset, of the data set for sgd, else {ADAMW['lr']}")
    g.add_argument("--weight-decay", type=float_or_0, help=f"tensors of one dimension, position embedding and class token have none; default: 0 for sgd, else {ADAMW['weight_decay']}")
    g.add_argument("--clip", type=float_or_0, default=0.0, help="maximum gradient norm; 0: no clipping, as in Segmenter")
    g = parser.add_argument_group("evaluation and prediction")
    g.add_argument("--eval-only", **yes_no, help="evaluate --checkpoint on --split and stop")
    g.add_argument("--checkpoint", metavar="FILE", help="for --eval-only and --predict; default with --eval-only: best.pt in --out")
    g.add_argument("--split", default="val", choices=["val", "test"], help="split to evaluate with --eval-only")
    g.add_argument("--multi-scale", **yes_no, help="mean over six scales and flips: slower, a little better")
    g.add_argument("--evaluations", type=positive_int, default=10, help="evenly spaced evaluations per run, the last one at the end; 2 in presets")
    g.add_argument("--predict", nargs="+", metavar="PATH", type=existing, help="images or folders to segment with --checkpoint, into --out")
    g = train.add_run_flags(parser)
    g.add_argument("--out", metavar="DIR", help="run folder; a run found there is resumed; default: runs/finetune_NAME; with --eval-only, that of --checkpoint; with --predict, predictions")
    # fmt: on
    return parser


def choose_preset(given):
    """The defaults of a run: those of the data set, of the drawn scenes or of --small."""
    name = (given.data or "scenes").partition(":")[0]
    data = DATASETS.get(name)
    init = SCENES_RUN if data is None and os.path.exists(SCENES_RUN) else "none"
    preset = {"out": f"runs/finetune_{name}", "init": init, "optimizer": "sgd", "class_token": False}
    preset |= loca.SIZES["B/16"]
    preset |= {key: getattr(data, key) for key in PROTOCOL} if data else SCENES_PRESET
    preset |= SMALL_PRESET if given.small else {}
    preset |= {"crop": [preset["crop"]], "stride": [preset["stride"]]}
    # A preset's learning rate belongs to its optimizer.
    optimizer = given.optimizer or preset["optimizer"]
    if optimizer != preset["optimizer"]:
        preset["lr"] = (data or DataSet).lr if optimizer == "sgd" else ADAMW["lr"]
    preset["weight_decay"] = 0.0 if optimizer == "sgd" else ADAMW["weight_decay"]
    if given.epochs:
        preset["steps"] = None
    return preset


def settings_of_checkpoint(path, given, parser):
    """The settings that --eval-only and --predict take from a checkpoint: the model, the data set if no other
    is given, and for the same data set the protocol of the evaluation."""
    if not path or not os.path.isfile(path):
        parser.error(f"--checkpoint {path or 'FILE'}: no such file; give the best.pt of a run")
    try:
        content = loca.read_torch_file(path)
    except ValueError as error:
        parser.error(f"--checkpoint {path}: {error}")
    if not isinstance(content, dict) or "classes" not in content:
        parser.error(f"--checkpoint {path}: it is not a checkpoint of this script")
    saved = vars(parser.parse_args([])) | content["settings"]  # unknown settings had their default
    if saved["decoder"] not in DECODERS:
        parser.error(f"--checkpoint {path}: its decoder {saved['decoder']} is not in DECODERS")
    keys = [*OF_MODEL] if given.data else [*OF_MODEL, "data", "pairs"]
    if not given.data or given.data.startswith(f"{saved['name']}:"):
        keys += ["base_size", "window", "stride"]
    out = "predictions" if given.predict else str(Path(path).parent)
    return {**{key: saved[key] for key in keys}, "checkpoint": path, "out": out, "workers": 2}


def settle_sizes(args, given, parser):
    """Turn crop, window and stride into [height, width], and check them. Without a flag, the crop is rounded
    up to whole patches, and the stride is at most the window."""
    patch = args.patch_size
    if not given.crop:
        args.crop = [math.ceil(side / patch) * patch for side in args.crop]
    args.window = args.window or args.crop
    for key in ("crop", "window", "stride"):
        sides = getattr(args, key)
        if len(sides) > 2:
            parser.error(f"--{key} {' '.join(map(str, sides))}: give a side, or height and width")
        setattr(args, key, (sides * 2)[:2])
        if key != "stride" and any(side % patch for side in sides):
            parser.error(f"--{key} {' '.join(map(str, sides))}: use multiples of the patch size, {patch}")
    if not given.stride:
        args.stride = [min(sides) for sides in zip(args.stride, args.window)]
    if any(step > side for step, side in zip(args.stride, args.window)):
        parser.error("--stride {} {} must not exceed the window {} {}".format(*args.stride, *args.window))
    args.image_size = args.crop  # loca.load_vit finds it in the settings of a checkpoint


def parse_args(arguments=None):
    """The command line -> settings, complete and checked. Flags override what comes from the checkpoint or
    the weights, and that overrides the preset of the data set or of --small."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    preset, training = choose_preset(given), not (given.eval_only or given.predict)
    if training and (given.checkpoint or given.split == "test"):
        parser.error("--checkpoint and --split test need --eval-only or --predict; to train, use --init")
    if training:
        init = given.init or preset["init"]
        try:
            # If the weights have a class token, the encoder keeps it; the decoder never sees it.
            found = {} if init == "none" else loca.load_weights(init, given.branch).sizes
        except (OSError, ValueError, ImportError) as error:
            parser.error(f"--init {init}: {error}")
    else:
        best = str(Path(given.out or preset["out"], "best.pt")) if given.eval_only else None
        found = settings_of_checkpoint(given.checkpoint or best, given, parser)
    sources = {**preset, **found, **loca.SIZES.get(given.model, {})}
    args = parser.parse_args(arguments, argparse.Namespace(**sources))  # flags override these values
    args.name, _, args.folder = (args.data or "scenes:").partition(":")
    if (args.data or args.pairs) and not (args.name in DATASETS and args.folder):
        parser.error(f"--data must be NAME:DIR with NAME in {', '.join(DATASETS)}; got {args.data!r}")
    if args.classes and args.name != "folder":
        parser.error("--classes works only with --data folder:DIR")
    settle_sizes(args, given, parser)
    for key in () if training else OF_MODEL:
        if getattr(args, key) != found[key]:
            parser.error(f"--{key.replace('_', '-')} (or --model): the checkpoint decides the model; drop it")
    if training:
        train.settle_batch(args, parser)
    return args


if __name__ == "__main__":
    settings = parse_args()
    run = predict if settings.predict else evaluate_only if settings.eval_only else main
    with train.explain_out_of_memory("a smaller --window, or to train, a smaller --model"):
        run(settings)
