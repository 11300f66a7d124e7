"""Tests: against recordings of the released JAX code, slow plain versions, and invariants.

They need no network and no GPU. Where there is a GPU, the tests with a device run on it too.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from colorsys import hsv_to_rgb, rgb_to_hsv
from fractions import Fraction
from multiprocessing.util import Finalize
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import default_collate
from torchvision.transforms import v2

import finetune_seg
import loca
import train

HERE = Path(train.__file__).resolve().parent
# Tensors are tiny: one thread each. Another number of threads would also round differently.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = str(HERE)  # for started processes


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Each device in turn, with float32 products in full precision."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(request.param)


# ---------------------------------------------------------------- recordings of the released training step
# The inputs are drawn with numpy's frozen RandomState, in the order of the recordings. The losses of each
# device and the gradient norms, by published name in alphabetical order, are the released code's (float32).

RECORDED = {
    "one device": {"seed": 0, "loss": [8.9151993],
        "position_loss": [5.4645753], "feature_loss": [3.450624], "gradient_norms": """
        .11261 .72259 .020608 .0011787 .0010575 .01257 .0027024 .0070585 .0095996 .015847 .10237 .031203 .099687 0 .0087053 .033182 .042061 .0019321
        .0095213 .022166 .034636 .32253 .091281 .026087 .0026153 .02716 .0070503 .048294 .10815 .11593 .16597 0 .0082562 .11473 .087987 .0023851
        .0063446 .055537 .03601 .044275 .0044123 .026989 .012129 .044462 .10286 .11462 .1611 0 .0088223 .11388 .0733 .005366 .0083731 .067473 .045188
        .038036 .068838 .063479 .38752 .62299 1.053 2.0774 1.9918 5.9151 2.4108 8.4718"""},
    "two devices": {"seed": 1, "loss": [8.5139561, 8.4798126],
        "position_loss": [5.4372711, 5.4171219], "feature_loss": [3.076685, 3.0626907], "gradient_norms": """
        .18298 .72847 .024181 .0012787 .00069772 .0097353 .0024815 .0069686 .0073922 .012305 .070786 .027606 .07146 0 .0073858 .028257 .031129
        .0019359 .0075145 .016323 .022233 .4689 .23525 .063513 .0051355 .041764 .016445 .072614 .12405 .18613 .22275 0 .014812 .18768 .14205 .0068293
        .010298 .12269 .082426 .044287 .0041931 .049844 .015625 .07755 .13225 .17601 .19753 0 .0099899 .18084 .11025 .0053197 .0078641 .080279 .053801
        .028083 .058171 .04779 .27501 .92402 1.3713 2.7067 2.3538 9.3373 3.4316 6.5268"""},
    "position loss only": {"seed": 2, "loss": [5.4141612],
        "position_loss": [5.4141612], "feature_loss": [0], "gradient_norms": """
        .013293 .37713 .0007871 .00080318 .00082601 .011613 .0021184 .011003 .0097346 .02069 .10558 .037603 .10492 0 .0097202 .040478 .03406 .0016153
        .010406 .022919 .025852 .039125 .04023 .0050425 .0011661 .0037618 .0048692 .0076413 .042 .013118 .038341 0 .0037485 .012968 .010819 .00084141
        .0035788 .009299 .0090892 .0036812 .0010297 .0040866 .0044254 .0067597 .038035 .013033 .037561 0 .0036585 .013037 .013591 .00048347 .004168
        .0062417 .0086884 .037647 .061141 .069909 .38516"""},
}  # fmt: skip


def published_shapes(feature=True):
    """Shapes of the recorded model's parameters by published name."""
    layers = {"ToTokenSequence_0/embedding": (16, 16, 3, 32), "position_predictor": (32, 196)}
    norms, head = ["encoder_norm", "final_norm"], "projection_head_for_clustering_prediction"
    for block, count in (("encoderblock_0", 2), ("encoderblock_1", 2), ("cross_attention_block", 3)):
        norms += [f"{block}/LayerNorm_{i}" for i in range(count)]
        attention = f"{block}/MultiHeadDotProductAttention_0"
        layers |= {f"{attention}/{part}": (32, 4, 8) for part in ("query", "key", "value")}
        layers |= {f"{attention}/out": (4, 8, 32)}
        layers |= {f"{block}/MlpBlock_0/Dense_0": (32, 64), f"{block}/MlpBlock_0/Dense_1": (64, 32)}
    if feature:
        layers |= {f"{head}/Dense_{i}": shape for i, shape in enumerate([(32, 40), (40, 40), (40, 16)])}
    shapes = {f"{name}/kernel": shape for name, shape in layers.items()}
    shapes |= {f"{name}/bias": x[1:] if x == (32, 4, 8) else x[-1:] for name, x in layers.items()}
    shapes |= {f"{name}/{part}": (32,) for name in norms for part in ("scale", "bias")}
    shapes |= {f"{head}/prototypes/kernel": (16, 48)} if feature else {}
    return shapes | {"ToTokenSequence_0/posembed_input": (1, 14, 14, 32)}


def draw_published(r, shapes):
    normal = {name: r.standard_normal(shapes[name]).astype(np.float32) for name in sorted(shapes)}
    return {name: x * np.float32(0.1) + np.float32(name.endswith("scale")) for name, x in normal.items()}


def check_recorded(name, rank=0, device="cpu"):
    record = RECORDED[name]
    r, devices, sides = np.random.RandomState(record["seed"]), len(record["loss"]), (224, 224, 96, 96)
    feature = name != "position loss only"
    student, ema = (draw_published(r, published_shapes(feature)) for _ in range(2))
    images = [r.standard_normal((devices, 2, s, s, 3)).astype(np.float32)[rank] for s in sides]
    maps = [r.randint(-60, 196, (devices, 2, s // 16, s // 16)).clip(-1)[rank] for s in sides[1:]]
    visible = r.randint(0, 196 - 39 + 1) + torch.arange(39, device=device)
    keep = torch.from_numpy(r.permutation(196)[:70]).to(device)
    reference, query, *focal = (torch.from_numpy(x).permute(0, 3, 1, 2).to(device) for x in images)
    query_targets, *focal_targets = (torch.from_numpy(x).flatten(1).to(device) for x in maps)
    views = {"reference": reference, "query": query, "query_targets": query_targets}
    views |= {"focal": torch.stack(focal, 1), "focal_targets": torch.stack(focal_targets, 1)}

    models = [loca.LOCA(loca.ViT(224, 16, 32, 2, 4, 64, 0.0), 48 * feature, 40, 16) for _ in range(2)]
    for model, parameters in zip(models, (student, ema)):
        model.load_state_dict(loca.published_to_state_dict(parameters))
    model, teacher = models[0].to(device), loca.make_teacher(models[1].to(device)) if feature else None
    net = nn.parallel.DistributedDataParallel(model) if devices > 1 else model
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        losses = net(views, teacher, visible, keep)
    # Between devices: the sums of three Sinkhorn rounds and the mean prediction.
    assert all_reduce.call_count == (4 if devices > 1 else 0)
    losses["loss"].backward()
    for key in ("loss", "position_loss", "feature_loss"):
        assert losses[key].item() == pytest.approx(record[key][rank], rel=2e-6), key

    # To find each gradient's published name, the names' numbers are converted as the parameters were.
    numbers = {name: np.full(x.shape, i, np.float32) for i, (name, x) in enumerate(student.items())}
    number, squares = loca.published_to_state_dict(numbers), torch.zeros(len(numbers), dtype=torch.float64)
    for name, p in model.named_parameters():
        squares.index_add_(0, number[name].flatten().long(), p.grad.cpu().double().flatten() ** 2)
    norms = torch.tensor([float(x) for x in record["gradient_norms"].split()], dtype=torch.float64)
    # A key's bias moves all scores of a query alike, so its gradient is nothing but rounding: the atol.
    torch.testing.assert_close(squares.sqrt(), norms, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["one device", "position loss only"])
def test_recorded_step(name, device):
    check_recorded(name, device=device)


def recorded_worker(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    check_recorded("two devices", rank)
    dist.destroy_process_group()


def test_recorded_step_of_two_devices(tmp_path):
    torch.multiprocessing.spawn(recorded_worker, (tmp_path / "rendezvous",), nprocs=2)


@pytest.mark.parametrize(
    "reference, query, first_row, first_column",
    [
        ([39, 0, 536, 669], [70, 88, 299, 300], [21, 20, 19, 18, 17, 16], [21, 35, 63, 77, 91, 119]),
        ([6, 2, 178, 228], [140, 62, 60, 71], [147, 146, 146, 145, 144, 144], [147, 161, 175, 189, -1, -1]),
        ([1, 344, 242, 317], [37, 263, 133, 175], [31, 30, 28, -1, -1, -1], [31, 59, 73, 87, 101, 129]),
        ([57, 0, 85, 74], [50, 20, 56, 49], [-1] * 6, [-1, 26, 40, 68, 82, 110]),
    ],
)
def test_recorded_correspondences(reference, query, first_row, first_column):
    """Maps of the released pipeline for mirrored queries."""
    targets = loca.patch_targets(*map(torch.tensor, (reference, query, True)), 96, 6, 14).view(6, 6)
    assert targets[0].tolist() == first_row and targets[:, 0].tolist() == first_column


# ---------------------------------------------------------------------------------------------- the method


def tiny(drop_path=0.1, prototypes=20, **changes):
    """A LOCA with 16 positions, seeded."""
    torch.manual_seed(0)
    return loca.LOCA(loca.ViT(32, 8, 24, 2, 3, 48, drop_path=drop_path), prototypes, 32, 8, **changes)


def tiny_views(batch=2, focal=3):
    g = torch.Generator().manual_seed(1)
    return {
        "reference": torch.randn(batch, 3, 32, 32, generator=g),
        "query": torch.randn(batch, 3, 32, 32, generator=g),
        "query_targets": torch.randint(-5, 16, (batch, 16), generator=g).clamp(min=-1),
        "focal": torch.randn(batch, focal, 3, 16, 16, generator=g),
        "focal_targets": torch.randint(-5, 16, (batch, focal, 4), generator=g).clamp(min=-1),
    }


def plain_scores(head, tokens, temperature):
    """Cosine of projected tokens and prototypes [..., P], sharpened."""
    x = F.gelu(head.fc2(F.gelu(head.fc1(tokens), approximate="tanh")), approximate="tanh")
    return F.normalize(head.fc3(x), dim=-1) @ F.normalize(head.prototypes.weight, dim=-1).T / temperature


def plain_step(model, views, teacher, visible, keep):
    """The published step, with the matched patches picked out by their indices. Without a teacher, the
    student encodes the reference, and queries get no position embedding."""
    encode = functools.partial(model.encoder, position=teacher is not None)
    reference = (teacher or model).encoder(views["reference"], keep=None if teacher else visible)
    context = reference.detach()[:, visible] if teacher else reference
    tokens = [encode(views["query"], keep=keep), *map(encode, views["focal"].unbind(1))]
    targets = [views["query_targets"][:, keep], *views["focal_targets"].unbind(1)]
    tokens, targets = torch.cat(tokens, 1), torch.cat(targets, 1)
    image, patch = (targets >= 0).nonzero(as_tuple=True)
    target = targets[image, patch]
    logits = model.predictor(tokens, context)[image, patch]
    position, predicted = F.cross_entropy(logits, target), logits.argmax(-1)
    off = [math.dist(divmod(a, 4), divmod(b, 4)) for a, b in zip(predicted.tolist(), target.tolist())]
    losses = {
        "loss": model.position_weight * position,
        "position_loss": position,
        "feature_loss": torch.tensor(0.0),
        "position_accuracy": (predicted == target).float().mean(),
        "position_distance": torch.tensor(off).mean(),
    }
    if model.head is None:
        return losses
    assigned = plain_scores(teacher.head, reference, model.teacher_temperature).softmax(-1).detach()
    for _ in range(3):  # Sinkhorn: over samples, then over prototypes
        assigned = assigned / assigned.sum((0, 1), keepdim=True)
        assigned = assigned / assigned.sum(-1, keepdim=True)
    log_p = plain_scores(model.head, tokens, model.student_temperature).log_softmax(-1)
    cross_entropy = -(assigned[image, target] * log_p[image, patch]).sum(-1).mean()
    mean = log_p.exp().mean((0, 1))
    entropy = -(mean * mean.log()).sum()
    feature = cross_entropy - entropy
    return losses | {
        "loss": losses["loss"] + model.feature_weight * feature,
        "feature_loss": feature,
        "cross_entropy": cross_entropy,
        "prototype_perplexity": entropy.exp(),
        "target_entropy": -(assigned * assigned.log())[:, ::5].sum(-1).mean(),
    }


WEIGHTED, ALONE = {"position_weight": 0.5, "feature_weight": 2}, {"feature_weight": 0}
WITH_TEACHER = {**ALONE, "reference_encoder": "teacher", "query_position": True}


@pytest.mark.parametrize("focal, settings", [(3, {}), (0, {}), (3, WEIGHTED), (3, ALONE), (3, WITH_TEACHER)])
def test_step_equals_the_plain_one(focal, settings):
    model = tiny(0.0, student_temperature=0.2, teacher_temperature=0.08, **settings)
    assert model.needs_teacher == (settings != ALONE)
    teacher = loca.make_teacher(tiny(0.0)) if model.needs_teacher else None
    given = (tiny_views(focal=focal), teacher, torch.tensor([3, 4, 5]), torch.tensor([9, 2, 14, 7, 0]))
    results = [model(*given), plain_step(model, *given)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(losses["loss"], list(model.parameters())) for losses in results]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("position", [True, False])
def test_vit_equals_the_plain_one_on_rectangles(position):
    """With kept tokens, a resized position embedding, and stochastic depth; the stream stays float32."""
    torch.manual_seed(0)
    vit, images, seen = loca.ViT((32, 48), 8, 24, 2, 3, 48), torch.randn(3, 3, 64, 40), []
    grid = vit.pos_embed.view(1, 4, 6, 24).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (8, 5), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    patches = vit.patch_embed(images).flatten(2).transpose(1, 2) + (resized if position else 0)
    keep = torch.tensor([[3, 39, 7], [1, 2, 0], [5, 6, 7]])
    x = torch.stack([patch[index] for patch, index in zip(patches, keep)])
    scale = torch.tensor([[[0.0, 2, 2], [1, 1, 1]], [[0, 0, 2], [0, 2, 0]]]).view(2, 2, 3, 1, 1)
    for block, (of_attention, of_mlp) in zip(vit.blocks, scale):
        x = x + of_attention * block.attn(block.norm1(x))
        x = x + of_mlp * block.mlp(block.norm2(x))
    with mock.patch.object(vit, "draw_branch_scale", return_value=scale):
        torch.testing.assert_close(vit(images, keep=keep, position=position), vit.norm(x))
    vit, everything = vit.eval(), torch.arange(40)
    torch.testing.assert_close(vit(images, keep=everything, attend=everything), vit(images))
    assert not torch.allclose(vit(images, attend=everything[1:]), vit(images))
    own = loca.ViT(32, 8, 24, 2, 3, 48, class_token=True).eval()  # attended as well, and not counted
    torch.testing.assert_close(own(images, attend=everything), own(images))
    vit.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):  # the convolution's layout and precision must not carry over
        vit(images, position=position)
    assert seen[0].is_contiguous() and seen[0].dtype == torch.float32


def test_stochastic_depth():
    """It drops samples and branches independently, more often in later blocks, and keeps the mean."""
    torch.manual_seed(0)
    vit = loca.ViT(32, 8, 24, 3, 3, 48, drop_path=0.5)
    scale = vit.draw_branch_scale(4000, "cpu")
    assert torch.equal(scale[0], torch.ones(2, 4000, 1, 1))
    for of_block, keep in zip(scale[1:], (0.75, 0.5), strict=True):
        assert of_block.unique().tolist() == pytest.approx([0, 1 / keep])
        assert of_block.flatten(1).mean(1).tolist() == pytest.approx([1, 1], abs=0.06)
        assert float((of_block > 0).all(0).float().mean()) == pytest.approx(keep**2, abs=0.03)
    assert vit.eval().draw_branch_scale(2, "cpu") is None


def test_attention_in_bf16_equals_float32():
    results = []
    for dtype in (torch.bfloat16, torch.float32):  # on a CPU, bf16 does not go through PyTorch's kernel
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, n, 24).bfloat16().to(dtype).requires_grad_() for n in (5, 7, 7))
        out = loca.multi_head(q, k, v, heads=3)
        results.append([out, *torch.autograd.grad((out * out.detach()).sum(), (q, k, v))])
        assert all(x.dtype == dtype for x in results[-1])
    torch.testing.assert_close([x.float() for x in results[0]], results[1], rtol=0.02, atol=0.02)


@torch.no_grad()
def test_timm_loads_the_weights_and_agrees():
    timm, images = pytest.importorskip("timm"), torch.randn(2, 3, 32, 48)
    own = loca.vit("Ti/16", image_size=(32, 48), class_token=True).eval()
    own.load_state_dict({name: x + 0.01 * torch.randn_like(x) for name, x in own.state_dict().items()})
    settings = {"img_size": (32, 48), "global_pool": "", "num_classes": 0, "act_layer": "gelu_tanh"}
    theirs = timm.create_model("vit_tiny_patch16_224", **settings).eval()
    theirs.load_state_dict(own.state_dict(), strict=True)
    torch.testing.assert_close(own(images), theirs(images)[:, 1:], rtol=1e-4, atol=1e-5)


def test_initialization():
    torch.manual_seed(0)
    vit = loca.vit("Ti/16", depth=1)
    model, block = loca.LOCA(vit, 512, 64, 32), vit.blocks[0]
    bound = math.sqrt(6 / (192 + 192))  # query, key and value are each Xavier-uniform
    assert bound * 0.98 < float(block.attn.qkv.weight.abs().max()) <= bound and not block.attn.qkv.bias.any()
    assert 0 < float(block.mlp.fc1.bias.abs().max()) < 1e-5
    patches, logits = vit.patch_embed.proj.weight, model.predictor.logits.weight
    for weight, inputs in ((vit.pos_embed, 192), (patches, 768), (logits, 192)):
        assert float(weight.std()) == pytest.approx(inputs**-0.5, rel=0.05)
    torch.testing.assert_close(model.head.prototypes.weight.norm(dim=1), torch.ones(512))
    assert block.mlp.fc1.out_features == 768 and model.query_tokens == 70  # as published


@pytest.mark.parametrize("kind", ["consecutive", "first", "unstructured"])
def test_masking(kind):
    torch.manual_seed(0)
    draws = torch.stack([loca.MASKING[kind](2, 5, 4, "cpu") for _ in range(300)])
    assert draws.min() == 0 and draws.max() == (3 if kind == "first" else 9)
    assert all(len(set(row)) == 4 for row in draws.tolist())
    assert bool((draws.diff(dim=1) == 1).all()) == (kind != "unstructured")
    distinct = len(draws.unique(dim=0))
    assert distinct > 100 if kind == "unstructured" else distinct == {"consecutive": 7, "first": 1}[kind]
    ratios = {0: 100, 0.1: 90, 0.5: 50, 0.9: 10, 0.95: 5, 0.999: 1}
    assert {eta: loca.visible_count(100, eta) for eta in ratios} == ratios


def slow_target(reference, query, flip, view, grid, reference_grid):
    """One query patch at a time, the three nearest-neighbor samplings in exact fractions."""
    half = Fraction(1, 2)

    def along(i, axis):
        pixel = math.floor((i + half) * view / grid)
        y = query[axis] + min(math.floor((pixel + half) * query[axis + 2] / view), query[axis + 2] - 1)
        inside = y - reference[axis]
        outside = not 0 <= inside < reference[axis + 2]
        return -1 if outside else math.floor((inside + half) * reference_grid / reference[axis + 2])

    rows, columns = ([along(i, axis) for i in range(grid)] for axis in (0, 1))
    columns = columns[::-1] if flip else columns
    return [-1 if r < 0 or c < 0 else r * reference_grid + c for r in rows for c in columns]


@pytest.mark.parametrize("view, grid, reference_grid, every", [(96, 6, 14, 7), (48, 6, 12, 7), (33, 5, 7, 1)])
def test_correspondence_equals_the_slow_one(view, grid, reference_grid, every):
    r = np.random.RandomState(0)
    boxes = np.concatenate([r.randint(0, 200, (2, 2000, 2)), r.randint(1, 200, (2, 2000, 2))], 2)
    reference, query, flip = *torch.from_numpy(boxes), torch.from_numpy(r.rand(2000) < 0.5)
    maps = loca.patch_targets(reference, query, flip, view, grid, reference_grid)
    assert maps.dtype == torch.long
    for i in range(0, 2000, every):
        plain = slow_target(reference[i].tolist(), query[i].tolist(), flip[i], view, grid, reference_grid)
        assert maps[i].tolist() == plain


@pytest.mark.parametrize("scale, matched", [*itertools.product([0.0, 1.0, 1e4, -1e4], [True, False])])
def test_losses_stay_finite(scale, matched):
    """Scores that are all equal, one-hot or far apart, and batches without any target."""
    features = (scale * torch.eye(8)[torch.arange(10) % 4]).view(2, 5, 8).requires_grad_()
    prototypes = torch.eye(8).repeat(2, 1).requires_grad_()
    targets = torch.randint(0, 4, (2, 5)) if matched else torch.full((2, 5), -1)
    assignments = loca.sinkhorn(scale * torch.eye(16)[:8])
    torch.testing.assert_close(assignments.sum(1), torch.ones(8))
    feature, *_ = loca.feature_loss(features, prototypes, assignments.view(2, 4, 16), targets)
    position, accuracy = loca.position_loss(features, targets)
    (feature + position).backward()
    assert feature.isfinite() and features.grad.isfinite().all() and prototypes.grad.isfinite().all()
    assert matched or position.detach() == accuracy == 0


def test_single_image():
    """A view predicts its own positions from its content and some of its tokens."""
    views, visible = tiny_views(), torch.tensor([0, 3, 9])
    model = tiny(prototypes=0, single_image=True, drop_path=0.0)
    loss = model(views, visible=visible)["loss"]
    tokens = model.encoder(views["reference"], position=False, attend=visible)
    logits = model.predictor(tokens, tokens[:, visible]).flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(16).repeat(2)))
    loss.backward()
    # DDP would wait for the gradient of an unused parameter: the position embedding is not trained.
    assert all(p.requires_grad == (p.grad is not None) for p in model.parameters())


def test_teacher_follows_the_student():
    model = tiny()
    teacher, own = loca.make_teacher(model), dict(model.named_parameters())
    assert teacher.training and teacher.encoder.drop_path == 0.1  # as released
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    assert before.keys() == {name for name in own if not name.startswith("predictor.")}
    for p in own.values():
        p.data += torch.randn_like(p)
    loca.update_teacher(teacher, model, 0.9)
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * own[name].detach())
        assert not p.requires_grad and own[name].requires_grad


@pytest.mark.parametrize("variant", [{}, {"prototypes": 0}, WITH_TEACHER, {"single_image": True}])
def test_no_shape_depends_on_the_data(variant):
    """The meta device holds no values: .item(), boolean indexing and branches on values fail there."""
    model = tiny(**variant).to("meta")
    boxes = torch.zeros(2, 4, 4, dtype=torch.long, device="meta")  # reference boxes, boxes of focal queries
    targets = loca.patch_targets(boxes[:, :1], boxes, boxes[..., 0] > 0, 16, 2, 4)
    views = {name: view.to("meta") for name, view in tiny_views(focal=4).items()} | {"focal_targets": targets}
    teacher = loca.make_teacher(model) if model.needs_teacher else None
    losses = model(views, teacher)
    losses["loss"].backward()
    assert all(value.shape == () for value in losses.values())


# -------------------------------------------------------------------------------------- weights in and out


OFFERED = {"encoder_norm": "final_encoder_norm", "cross_attention_block": "localizer_block_0",
    "position_predictor": "pos_predictor", "projection_head_for_clustering_prediction": "output_projection"}  # fmt: skip
HEADS = ("cross_attention", "final_norm", "position_predictor", "projection_head")


def write_flax(path, offered=False, change=dict):
    """Write a train state as flax does, in the names of the released code or of the files that authors offer
    -> its parameters by branch, after `change`, in the released names. Arrays are msgpack's extension 1."""
    msgpack, r = pytest.importorskip("msgpack"), np.random.RandomState(0)

    def array(x, code=1):
        return msgpack.ExtType(code, msgpack.packb((list(x.shape), str(x.dtype), x.tobytes())))

    step = array(np.array(7, np.int32), 3)
    state = {"global_step": step, "rng": None, "metadata": {}, "optimizer": {"state": {"step": step}}}
    flat = {branch: change(draw_published(r, published_shapes())) for branch in ("student", "teacher")}
    trees = ("student_weights", "teacher_weights") if offered else ("params", "ema_params")
    zeros = {name: 0 * x for name, x in flat["teacher"].items()}
    moments = {"optimizer/target": zeros} if offered else {}  # under the names of the weights
    for tree, parameters in {**dict(zip(trees, flat.values())), **moments}.items():
        for name, value in parameters.items():
            top, _, rest = name.partition("/")
            *parents, leaf = f"{tree}/{OFFERED.get(top, top) if offered else top}/{rest}".split("/")
            node = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, state)
            node[leaf] = array(value)
    path.write_bytes(msgpack.packb(state))
    return flat


def without(*parts):
    """A change of parameters: those whose names hold one of the parts are left out."""
    return lambda flat: {name: x for name, x in flat.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize("change", [dict, without(*HEADS), without("final_norm")])
@pytest.mark.parametrize("prefixes", [("params.", "ema_params."), ("student_weights.", "teacher_weights.")])
def test_flax_files(prefixes, change, tmp_path):
    """Each array comes back, bit by bit, as the recordings convert it; the teacher is the default."""
    path = tmp_path / "checkpoint"
    parameters = write_flax(path, "student_weights." in prefixes, change)
    assert loca.load_weights(path).prefix == prefixes[1]
    for branch, prefix in zip(("student", "teacher"), prefixes):
        state, expected = loca.load_weights(path, branch), loca.published_to_state_dict(parameters[branch])
        assert (state.prefix, state.sizes["heads"], state.heads_assumed) == (prefix, 4, False)
        assert expected.keys() <= state.keys() and all(torch.equal(state[k], x) for k, x in expected.items())
        vit, images = loca.ViT(224, 16, 32, 2, 4, 64).eval(), torch.randn(1, 3, 224, 224)
        vit.load_state_dict({k[8:]: x for k, x in expected.items() if k.startswith("encoder.")})
        assert torch.equal(loca.load_vit(path, branch)(images), vit(images))


@pytest.mark.parametrize(
    "lost, named",
    [
        ("encoderblock_1/", "encoderblock_1.LayerNorm_0.bias"), ("encoder_norm/scale", "final_encoder_norm.scale"),
        ("MultiHeadDotProductAttention_0/key", "encoderblock_0.MultiHeadDotProductAttention_0.query, key, value"),
    ],
)  # fmt: skip
def test_what_an_encoder_lacks_is_named_as_in_the_file(lost, named, tmp_path):
    """Even a last block, because the other branch has it."""
    branches = iter((dict, without(lost)))
    write_flax(tmp_path / "checkpoint", True, lambda flat: next(branches)(flat))
    loca.load_weights(tmp_path / "checkpoint", "student")
    with pytest.raises(ValueError, match=f"not a complete plain ViT; missing: .*teacher_weights.{named}"):
        loca.load_weights(tmp_path / "checkpoint")


def foreign_vit(seed=0, image_size=32, dim=24, depth=2, heads=3, class_token=True):
    """A ViT with random weights everywhere, as others would train it."""
    torch.manual_seed(seed)
    vit = loca.ViT(image_size, 8, dim, depth, heads, 48, class_token=class_token).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit


def under(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def hugging_face(state, prefix=""):
    """The names of transformers' ViT, which keeps query, key and value apart."""
    names = {"blocks.": "encoder.layer.", "norm1": "layernorm_before", "norm2": "layernorm_after",
        "norm.": "layernorm.", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "attn.qkv": "qkv",
        "attn.proj": "attention.output.dense", "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings", "cls_token": "embeddings.cls_token"}  # fmt: skip
    for own, theirs in names.items():
        state = {name.replace(own, theirs): x for name, x in state.items()}
    for name in [name for name in state if "qkv" in name]:
        for part, x in zip(("query", "key", "value"), state.pop(name).chunk(3)):
            state[name.replace("qkv", f"attention.attention.{part}")] = x.clone()
    return under(prefix, state) | {"classifier.weight": FEW}


FEW, ARGS = torch.ones(2), {"args": argparse.Namespace(arch="vit"), "epoch": 9}
OUR_SETTINGS = {"settings": {"image_size": 32, "patch_size": 8, "heads": 3}}
WEIGHT_FILES = {  # of files that hold student s and teacher t
    "DINO": lambda s, t: {"student": under("module.backbone.", s) | {"module.head.mlp.0.weight": FEW},
        "teacher": under("backbone.", t) | {"head.mlp.0.weight": FEW}} | ARGS,
    "MoCo v3": lambda s, t: {"state_dict": {"module.predictor.0.weight": FEW}
        | under("module.base_encoder.", s) | under("module.momentum_encoder.", t)},
    "timm EMA": lambda s, t: {"state_dict_ema": t, "state_dict": s | {"head.weight": FEW}} | ARGS,
    "lightly": lambda s, t: {"state_dict": under("teacher_backbone.", t) | under("student_backbone.", s)},
    "I-JEPA": lambda s, t: {"encoder": under("module.", s), "target_encoder": under("module.", t)},
    "ours": lambda s, t: {"model": under("encoder.", s), "teacher": under("encoder.", t)} | OUR_SETTINGS,
    # files of one branch, which is read for either
    "MAE": lambda s, _: {"model": s | {"mask_token": FEW, "decoder_embed.weight": FEW}} | ARGS,
    "timm": lambda s, _: s | {"head.weight": FEW},
    "old format": lambda s, _: s,
    "safetensors, Hugging Face": lambda s, _: hugging_face(s),
    "Hugging Face, under vit": lambda s, _: hugging_face(s, "vit."),
}  # fmt: skip
ONE_BRANCH = list(WEIGHT_FILES)[-5:]
MISFITS = [  # width and depth of the ViT; what differs in the weights of one of width 24 and depth 2
    (24, 3, {}, r"missing: blocks\.2"), (24, 1, {}, r"blocks\.1\."), (48, 2, {}, "shape: .*blocks"), (24, 2, {"reg_token": FEW}, "reg_token"), (24, 2, {"blocks.0.ls1.gamma": FEW}, "blocks.0.ls1.gamma"),
    (24, 2, {"pos_embed": torch.ones(1, 15, 24)}, "15 .*not a square"), (24, 2, {"norm.weight": torch.full((24,), math.nan)}, "not finite numbers: norm.w"), (24, 2, {"norm.bias": torch.ones(24).long()}, "numbers: norm.b"),
]  # fmt: skip
UNREADABLE = [
    (nn.Linear(2, 2), "torch.nn.modules.linear.Linear object"), ([FEW], "it holds a list"), ({"epoch": 3, "net": {"stem": FEW}}, "it holds epoch, net"),
    ({"a.patch_embed.proj.weight": torch.ones(8, 3, 4, 4), "a.pos_embed": torch.ones(1, 7, 7, 8)}, "missing: a.blocks|missing: a.norm"),
    (foreign_vit().state_dict() | {"pos_embed": torch.ones(1, 1 + 16 + 4, 24)}, "20 .*register"), (b"no weights", "not weights"),
    (b"\x81\xa6params" + b"\x81\xa1a" * 4000, "not weights"), (b"PK\x03\x04" + bytes(40), "damaged"), (b"\x40" + bytes(7) + b'{"norm.weight"', ""),
]  # fmt: skip


@pytest.mark.parametrize("branch", ["student", "teacher"])
@pytest.mark.parametrize("layout", WEIGHT_FILES)
def test_the_branch_that_was_asked_for_is_read(layout, branch, tmp_path):
    vits, path = [foreign_vit(seed=0), foreign_vit(seed=1)], tmp_path / "vit"
    content = WEIGHT_FILES[layout](*(vit.state_dict() for vit in vits))
    if layout.startswith("safetensors"):
        pytest.importorskip("safetensors.torch").save_file(content, path, {"format": "pt"})
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout != "old format")
    encoder, prefix = loca.load_vit(path, branch, heads=3), loca.load_weights(path, branch).prefix
    vit, images = vits[branch == "teacher" and layout not in ONE_BRANCH], torch.randn(1, 3, 32, 48)
    assert torch.equal(encoder(images), vit(images)) and not encoder.training
    assert layout in ONE_BRANCH or bool(loca.TEACHER_NAME.search(prefix)) == (branch == "teacher")
    path.write_bytes(path.read_bytes()[:-999])  # a download that was cut off
    with pytest.raises(ValueError, match=f"cannot read weights from {path}: ") as error:
        loca.load_weights(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("crop", [[32, 64], [32, 128]], ids=str)  # 4x8; and 4x16, which could be 8x8
def test_positions_are_resized_by_their_true_grid_and_the_class_token_dropped_or_kept(crop, tmp_path):
    vit, path = foreign_vit(image_size=crop), tmp_path / "best.pt"
    state = under("encoder.", vit.state_dict() | {"fc.weight": FEW})
    torch.save({"model": state, "settings": {"image_size": crop, "patch_size": 8, "heads": 3}}, path)
    weights, images = loca.load_weights(path), torch.randn(1, 3, 64, 40)
    patches = vit.pos_embed[:, 1:].unflatten(1, (4, -1)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (8, 5), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    for kept in (False, True):
        own = loca.ViT((64, 40), 8, 24, 2, 3, 48, class_token=kept).eval()
        loca.load_encoder(own, weights)
        torch.testing.assert_close(own.pos_embed[:, -40:], patches)
        assert torch.allclose(own(images), vit(images), atol=1e-5) == kept


@pytest.mark.parametrize("dim, layout, heads", [(1280, "timm", 16), (384, "MoCo v3", 12), (384, "ours", 3)])
def test_heads_that_the_file_does_not_tell_are_assumed(dim, layout, heads, tmp_path):
    state = foreign_vit(dim=dim, depth=1, heads=1).state_dict()
    torch.save(WEIGHT_FILES[layout](state, state), tmp_path / "vit.pth")
    with contextlib.nullcontext() if layout != "timm" else pytest.warns(match=f"assuming {heads}"):
        assert loca.load_vit(tmp_path / "vit.pth").heads == heads


@pytest.mark.parametrize("dim, depth, change, named", MISFITS)
def test_weights_that_do_not_fit_change_nothing(dim, depth, change, named):
    own, state = loca.ViT(32, 8, dim, depth, 3, 2 * dim), foreign_vit(class_token=False).state_dict()
    before = {name: x.clone() for name, x in own.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        loca.load_encoder(own, under("encoder.", state | change))
    torch.testing.assert_close(dict(own.state_dict()), before)


@pytest.mark.parametrize("content, said", UNREADABLE, ids=range(len(UNREADABLE)))
def test_files_that_hold_no_vit_are_refused_in_one_line(content, said, tmp_path):
    pytest.importorskip("msgpack"), pytest.importorskip("safetensors")
    save(tmp_path / "bad", content) if isinstance(content, bytes) else torch.save(content, tmp_path / "bad")
    with pytest.raises(ValueError, match=f"cannot read weights from {tmp_path}/bad: .*{said}") as error:
        loca.load_weights(tmp_path / "bad")
    assert str(error.value).isprintable()  # one line, no color codes


def test_files_of_other_kinds_are_named_and_folders_hold_one_file(tmp_path, monkeypatch):
    np.savez(tmp_path / "augreg.npz", weight=np.ones(3))
    torch.jit.trace(nn.Linear(2, 2), torch.ones(2)).save(tmp_path / "program.pt")
    kinds = {"augreg.npz": "NumPy archive.*save the state dict", "program.pt": "TorchScript .*state dict"}
    for name, said in {**kinds, "": "it is a folder; give the weights file"}.items():
        with pytest.raises(ValueError, match=said):
            loca.load_weights(tmp_path / name)
    state = foreign_vit().state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert torch.equal(loca.load_weights(tmp_path)["encoder.norm.bias"], state["norm.bias"])
    for name, lines in {"": len(state), "augreg.npz": 0}.items():
        command = [sys.executable, loca.__file__, tmp_path / name]
        shown = subprocess.run(command, capture_output=True, text=True)
        assert len(shown.stdout.splitlines()) == lines and shown.stdout[:20] in ("", "cls_token (1, 1, 24)")
        said = "" if lines else "error: cannot read .*augreg.npz: it is a NumPy archive.*\n"
        assert re.fullmatch(said, shown.stderr)
    monkeypatch.setitem(sys.modules, "msgpack", None)  # a package that is not installed
    (tmp_path / "checkpoint").write_bytes(b"\x81\xa6params")
    with pytest.raises(ImportError, match="pip install msgpack"):
        loca.load_weights(tmp_path / "checkpoint")


# ---------------------------------------------------------------------------- running the scripts, tiny data

ALIKE = "--precision float32 --device cpu --workers 0"
TINY_TRAIN = f"""{ALIKE} --log-every 2
    --scenes 12 --val-images 4 --batch 4 --epochs 2 --image-size 32 --focal-size 16 --focal 2 --bottleneck 4
    --patch-size 8 --dim 16 --depth 2 --heads 2 --mlp-dim 16 --prototypes 8 --head-hidden 8
"""  # 6 steps, log lines at steps 2, 3, 4 and 6
SEG_FLAGS = f"--crop 16 --base-size 20 --batch 2 --steps 6 --log-every 2 --evaluations 2 {ALIKE}"
TINY_SEG = f"{SEG_FLAGS} --patch-size 8 --dim 24 --depth 2 --heads 3 --mlp-dim 48"  # the same steps and lines
EVALUATE = f"--eval-only {ALIKE} --checkpoint"
both_scripts = pytest.mark.parametrize("script", [train, finetune_seg], ids=lambda script: script.__name__)


def run(script, flags):
    args = script.parse_args(flags.split())
    other = next((name for name in ("predict", "eval_only") if getattr(args, name, None)), None)
    {"predict": finetune_seg.predict, "eval_only": finetune_seg.evaluate_only}.get(other, script.main)(args)


def train_args(*flags):
    return train.parse_args(" ".join(map(str, [TINY_TRAIN, *flags])).split())


def fails_to(call, *given, **more):
    """The one line with which the process ends."""
    with pytest.raises(SystemExit, match="^error: .*$") as error:
        call(*given, **more)
    return error.value.code


fails = functools.partial(fails_to, run)  # of a run of a script


def saved(out, name="last.pt"):
    path = Path(out) / name
    return json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=True)


def weights(out):
    content = saved(out)
    return {f"{k}.{i}": x for k in ("model", "teacher") for i, x in content.get(k, {}).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def records(out, key="loss"):
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[key] for record in lines if key in record}


def spy(monkeypatch, owner, name, note):
    """Keep what `note` says of the arguments of every call of owner.name from now on -> the list of it."""
    notes, call = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (notes.append(note(*a, **k)), call(*a, **k))[1])
    return notes


# A new Python would take seconds to start: processes are forked from a server that has imported everything.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "finetune_seg", "torch._dynamo", __name__])


def child(pipe, script, flags, environment, prepare):
    os.setsid()  # a process group of its own
    os.dup2(pipe.fileno(), 1)
    os.dup2(pipe.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    prepare()
    run(sys.modules[script], flags)


def start(script, flags, processes=1, prepare=tuple):
    """Run a script in processes that know of each other as from torchrun, after `prepare` -> exit codes and
    what they printed. Fails if a loader worker is alive 15 seconds after they have ended."""
    (reader, pipe), started = SERVER.Pipe(duplex=False), []
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for rank in map(str, range(processes)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), **group}
        given = (pipe, script.__name__, flags, place if processes > 1 else {}, prepare)
        started.append(SERVER.Process(target=child, args=given))
        started[-1].start()
    pipe.close()
    try:
        for process in started:
            process.join(120)
        text, until = b"", time.monotonic() + 15
        while reader.poll(max(0, until - time.monotonic())):  # until no process has the pipe open
            part = os.read(reader.fileno(), 2**16)
            if not part:
                return [process.exitcode for process in started], text.decode()
            text += part
        pytest.fail(f"still running: {text.decode()}")
    finally:
        for process in started:
            process.kill()


def compare(optimizer):
    total = sum(p.detach().double().sum() for group in optimizer.param_groups for p in group["params"])
    dist.all_gather(both := [total.clone(), total.clone()], total)
    assert both[0] == both[1]


hang_up = functools.partial(os.system, "kill -HUP 0")  # as a closed terminal, to the group
ACTIONS = {
    "terminate": lambda _: [signal.raise_signal(x) for x in (signal.SIGUSR1, signal.SIGTERM)],  # as SLURM
    "hang up": lambda _: (hang_up(), time.sleep(1), Finalize(None, hang_up, exitpriority=0)),
    "exhaust": mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")),
    "lose a worker": lambda _: (time.sleep(1), multiprocessing.active_children()[0].kill(), time.sleep(1)),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "spoil": lambda optimizer: optimizer.param_groups[0]["params"][0].data.fill_(math.nan),
    "compare": compare,
}


def at_step(number, action, rank=None):
    """Do an action right after the optimizer step of this number, from 1, in all processes or in one."""
    steps = itertools.count(1)

    def hook(optimizer, *_):
        if next(steps) == number and rank in (None, os.environ.get("RANK")):
            ACTIONS[action](optimizer)

    register_optimizer_step_post_hook(hook)


def save(path, content, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path, **options)


def gradient(height=40, width=60):
    """An image that says where each pixel is: red its row, green its column, blue flat."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 4, columns * 4, np.full_like(rows, 90)], -1).astype(np.uint8)


SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # the camera was held sideways


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with every kind of image that users have, at several depths."""
    root, plain = tmp_path_factory.mktemp("photos"), Image.fromarray(gradient())
    turned, moving = plain.transpose(Image.ROTATE_90), [plain.transpose(Image.ROTATE_180)]
    for name, image, options in [
        ("plain.png", plain, {}), ("a/photo.JPG", plain, {"quality": 95}), ("a/deep er/new\nline ü.bmp", plain, {}),
        ("a/gray.jpeg", plain.convert("L"), {"quality": 95}), ("a/cmyk.jpg", plain.convert("CMYK"), {"quality": 95}),
        ("palette.png", plain.quantize(64), {}), ("palette_clear.png", plain.quantize(64), {"transparency": 0}),
        ("alpha.webp", plain.convert("RGBA"), {"lossless": True}), ("notes.txt", b"not an image", {}),
        ("moving.webp", plain, {"lossless": True, "save_all": True, "append_images": moving}),
        ("exif.jpg", turned, {"quality": 95, "exif": SIDEWAYS}), ("exif.png", turned, {"exif": SIDEWAYS}),
        ("garbled_exif.jpg", plain, {"quality": 95, "exif": b"Exif\0\0garbled"}),
        ("one.png", plain.crop((0, 0, 1, 1)), {}), ("thin.png", np.tile(gradient(3), (1, 34, 1)), {}),
    ]:  # fmt: skip
        save(root / name, image, **options)
    return root


def small_folder(root):
    """images/{train,val} and masks/{train,val} of tiny pictures whose color tells the class."""
    r, colors = np.random.RandomState(0), np.array([[200, 40, 30], [40, 180, 60], [30, 60, 220]], np.uint8)
    for name in [f"train/{i}.png" for i in range(6)] + [f"val/{i}.png" for i in range(5)]:
        labels = np.zeros((20, 28), np.uint8)
        labels[r.randint(4, 16) :] = 1
        labels[:, r.randint(4, 24) :] += 1
        save(root / "images" / name, colors[labels])
        labels[0, 0] = 255
        save(root / "masks" / name, labels)


@pytest.fixture(scope="session")
def seg(tmp_path_factory):
    """Folder of a tiny data set, data/, and of a finished run of TINY_SEG on it, run/."""
    root = tmp_path_factory.mktemp("seg")
    small_folder(root / "data")
    run(finetune_seg, f"{TINY_SEG} --data folder:{root}/data --out {root}/run")
    return root


@pytest.fixture(scope="session")
def whole(seg, tmp_path_factory):
    """Per script: the flags of a tiny run, and the folder of a finished one that was never disturbed."""
    out = tmp_path_factory.mktemp("train") / "run"
    run(train, f"{TINY_TRAIN} --out {out}")
    return {train: (TINY_TRAIN, out), finetune_seg: (f"{TINY_SEG} --data folder:{seg}/data", seg / "run")}


# ------------------------------------------------------------------------- images, scenes, views and colors


def test_signals_that_are_ignored_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with train.catch_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert not stop and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_every_kind_of_image_is_read_as_upright_rgb(photos):
    names = [os.fsdecode(name) for name in train.find_images(photos)]
    assert len(names) == 14 and "notes.txt" not in names
    plain = torch.from_numpy(gradient()).permute(2, 0, 1).float()
    special = {"one.png": plain[:, :1, :1], "thin.png": plain[:, :3].repeat(1, 1, 34)}
    special["a/gray.jpeg"] = v2.functional.rgb_to_grayscale(plain, 3)
    for name in names:
        image, expected = train.read_image(photos / name).float(), special.get(name, plain)
        assert image.shape == expected.shape, name
        exact = not name.endswith("jpg") and "palette" not in name
        assert (image - expected).abs().mean() < (2.5 if exact else 6), name


def deep(kind):
    """An RGB file whose header says 16 bits per channel."""
    Image.new("RGB", (2, 2)).save(file := io.BytesIO(), kind)
    content = bytearray(file.getvalue())
    if kind == "tiff":
        return bytes(content.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16)))
    content[24] = 16
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.png", np.zeros((2, 2), np.uint16), "convert all images to 8 bits"), ("x.png", deep("png"), "convert all images to 8 bits"),
        ("x.tif", np.zeros((2, 2), np.float32), "convert all images to 8 bits"), ("x.tif", deep("tiff"), "convert all images to 8 bits"),
        ("x.jpg", b"text", "x.jpg"), ("x.tif", Image.new("RGB", (2, 2)), None), ("x.tif", Image.new("1", (2, 2)), None),
    ],
)  # fmt: skip
def test_images_that_are_refused(name, content, said, tmp_path):
    save(tmp_path / name, content)
    with pytest.raises((ValueError, OSError), match=said) if said else contextlib.nullcontext():
        assert train.read_image(tmp_path / name).shape == (3, 2, 2)


def test_pages_of_a_stack_are_counted_once(tmp_path, capsys):
    train.warn_once.cache_clear()
    pages = [Image.new("L", (4, 4), shade) for shade in (10, 20, 30)]
    save(tmp_path / "stack.tif", pages[0], save_all=True, append_images=pages[1:])
    assert [int(train.read_image(tmp_path / "stack.tif").max()) for _ in range(2)] == [10, 10]
    assert capsys.readouterr().err.count("3 pages: only the first page is read") == 1


@pytest.mark.parametrize("size, scale", [(0, 1), (101, 1), (100, 2), (51, 2), (50, 4), (20, 8)])
def test_large_jpegs_are_decoded_smaller(size, scale, tmp_path):
    plain = Image.fromarray(gradient(200, 300) // 4 * 4).resize((304, 200), Image.BICUBIC)
    save(tmp_path / "x.jpg", plain, quality=95)
    save(tmp_path / "turned.jpg", plain.transpose(Image.ROTATE_90), quality=95, exif=SIDEWAYS)
    for name in ("x.jpg", "turned.jpg"):
        image, full = train.read_image(tmp_path / name, size), train.read_image(tmp_path / name)
        assert image.shape == (3, 200 // scale, 304 // scale) and (scale > 1 or torch.equal(image, full))
        reduced = F.avg_pool2d(full.float(), scale)
        assert (image - reduced).abs().mean() < 4


def test_list_of_images(photos, tmp_path):
    (tmp_path / "loop").mkdir()
    for name, target in {"linked": photos / "a", "loop/back": tmp_path, "broken.png": "nowhere"}.items():
        os.symlink(target, tmp_path / name)
    for name in ("\udcff\udcfe.png", "._x.jpg", ".ipynb_checkpoints/x.png"):  # the first is not UTF-8
        save(tmp_path / name, (photos / "plain.png").read_bytes())
    found = train.find_images(tmp_path)
    linked = ["linked/cmyk.jpg", "linked/deep er/new\nline ü.bmp", "linked/gray.jpeg", "linked/photo.JPG"]
    assert list(found) == [b"broken.png", *map(os.fsencode, linked), b"\xff\xfe.png"]
    assert list(train.find_images(tmp_path, skip=photos / "a")) == [b"broken.png", b"\xff\xfe.png"]
    images = train.Images(str(tmp_path), found)
    for i in (0, 5):  # instead of the broken link, another one is read
        assert train.read_or_next(images, i, images.image)[0].shape == (3, 40, 60)


def test_folders_without_images_and_those_that_cannot_be_read_are_named(photos, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    said = fails(train, f"{TINY_TRAIN} --data {photos} --val {tmp_path}/empty")
    assert said.startswith(f"error: --val {tmp_path}/empty: no images")
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied", f"{tmp_path}/empty"))
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda x: (denied if str(x).endswith("empty") else scan)(x))
    for script, flags in ((train, f"{TINY_TRAIN} --data "), (finetune_seg, f"{TINY_SEG} --data folder:")):
        assert f"cannot read {tmp_path}/empty: Permission denied" in fails(script, f"{flags}{tmp_path}")


@pytest.mark.parametrize(
    "files, said",
    [
        ("images/a.jpg masks/a.png", "masks/ next to images/ holds masks; use --data DIR/images"), ("x/img/a.png x/gt_fine/b/a.png", "DIR/x/img"),
        ("s/JPEGImages/a.jpg s/SegmentationClass/a.png s/Annotations/a.xml", "use --data DIR/s/JPEGImages"), ("mask/a.jpg dog/a.jpg", None),
        ("train/a.png trainannot/a.png val/a.png valannot/a.png", "use --data DIR/train"), ("images/a.jpg labels/a.txt", None),
        ("x/a.jpg x/a_mask.png", "x/a_mask.png is a mask"), ("a_mask.png b.jpg", None), ("img_dir/a.png ann_dir/a.png", "DIR/img_dir"),
    ],
)  # fmt: skip
def test_masks_are_not_trained_on(files, said, tmp_path):
    for name in files.split():
        save(tmp_path / name, b"")
    if said:
        assert said.replace("DIR", str(tmp_path)) in fails_to(train.find_images, tmp_path)
    else:
        assert len(train.find_images(tmp_path)) == len(files.split()) - files.count(".txt")


def test_scenes_are_the_same_everywhere():
    images, labels = (np.stack(x) for x in zip(*map(train.draw_scene, range(40))))
    assert images.shape == (40, 192, 240, 3) and len({x.tobytes() for x in images}) == 40
    digests = [hashlib.sha256(x.tobytes()).hexdigest()[:8] for x in (images, labels)]
    assert digests == ["a2755cd2", "a47ef279"]


def test_views_show_what_their_boxes_say(photos):
    source, mode = train.Images(str(photos), train.find_images(photos)), v2.InterpolationMode.BILINEAR
    dataset, other = (train.Views(source, train_args(flag)) for flag in ("--focal 3", "--seed 1"))
    for i in range(len(source)):
        item, image = dataset[0, i], source.image(i)
        views = [item["reference"], item["query"], *item["focal"]]
        assert [view.shape[1:] for view in views] == [(32, 32)] * 2 + [(16, 16)] * 3
        assert not item["flips"][0] and item["unreadable"] == ""
        for view, box, flip in zip(views, item["boxes"].tolist(), item["flips"]):
            low, high = (0.05, 0.32) if view.shape[-1] == 16 else (0.32, 1)
            area = box[2] * box[3] / image[0].numel()
            assert min(image.shape[1:]) < 40 or low - 0.02 < area < high + 0.02  # a box is of whole pixels
            expected = v2.functional.resized_crop(image, *box, view.shape[1:], mode, antialias=True)
            assert (view.int() - (expected.flip(-1) if flip else expected).int()).abs().max() <= 1
    one, again = dataset[0, 3], dataset[0, 3]
    assert all(torch.equal(one[k], again[k]) for k in ("reference", "query", "focal", "boxes", "flips"))
    assert not any(torch.equal(one["boxes"][:2], x["boxes"][:2]) for x in (dataset[1, 3], other[0, 3]))
    flips = torch.stack([other[epoch, 3]["flips"][1:] for epoch in range(50)])
    assert 0.4 < flips.float().mean() < 0.6


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 3), (6, 1)])
def test_step_keys_cover_each_epoch_once_and_are_shared_out(processes, accumulate):
    steps = list(train.step_keys(50, 12, 3, 0, 8))
    for epoch in range(2):
        keys = sum(steps[4 * epoch : 4 * epoch + 4], [])
        assert len(keys) == len(set(keys)) == 48 and set(keys) <= {(epoch, i) for i in range(50)}
    assert [i for _, i in steps[0]] != [i for _, i in steps[4]]  # another order in each epoch
    assert steps != list(train.step_keys(50, 12, 4, 0, 8))
    assert list(train.step_keys(50, 12, 3, 5, 8)) == steps[5:]  # resumed in the middle of an epoch
    shares = [list(train.step_keys(50, 12, 3, 0, 8, r, processes, accumulate)) for r in range(processes)]
    assert {len(micro) for share in shares for micro in share} == {12 // processes // accumulate}
    for i, keys in enumerate(steps):
        parts = [share[i * accumulate : (i + 1) * accumulate] for share in shares]
        assert sorted(key for part in parts for micro in part for key in micro) == sorted(keys)


class Fragile(list):
    def __getitem__(self, i):  # Python's cleanup will abort the process, as it can while tensors are sent
        ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).abort)


def test_workers_end_without_pythons_cleanup():
    batches = train.read_batches(Fragile(), 1, torch.device("cpu"), batch_size=None, sampler=[0])
    assert next(batches) is None
    (worker,) = multiprocessing.active_children()
    batches.close()
    assert worker.exitcode == 0


def test_targets_follow_the_pixels():
    """Views of an image that says where each pixel is: matched patches show the same place."""
    args, source = train_args("--image-size 64 --focal-size 32 --focal 4"), train.Scenes(1)
    source.image = lambda i: torch.from_numpy(gradient(60, 60)).permute(2, 0, 1)
    batch = default_collate([train.Views(source, args)[epoch, 0] for epoch in range(16)])
    views = train.to_views(batch, args, random_colors=False)
    places = F.avg_pool2d(views["reference"][:, :2], 8).flatten(2)  # B,2,N
    focal = zip(views["focal"].unbind(1), views["focal_targets"].unbind(1))
    for images, targets in [(views["query"], views["query_targets"]), *focal]:
        shown = F.avg_pool2d(images[:, :2], 8).flatten(2)  # B,2,n
        matched = places.gather(2, targets.clamp(min=0)[:, None].expand(-1, 2, -1))  # B,2,n
        distance = (shown - matched).norm(dim=1)[targets >= 0]
        size = 4 * 60 / 8 / 255 / 0.229  # of a reference patch, in normalized values
        assert len(distance) > 50 and distance.median() < 0.6 * size and distance.max() < 1.6 * size


YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
LUMA = np.array([0.2989, 0.587, 0.114])


def plain_colors(x, contrast, saturation, hue, brightness, order, gray):
    """Color jitter of the pixels [n, 3] of a view, clipped to 0..1 after each operation, then gray."""
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = np.linalg.inv(YIQ) @ [[1, 0, 0], [0, cos, -sin], [0, sin, cos]] @ YIQ
    operations = (
        lambda x: x + brightness,
        lambda x: x.mean(0) + contrast * (x - x.mean(0)),
        lambda x: saturation * x + (1 - saturation) * (x @ LUMA)[:, None],
        lambda x: x @ turn.T,
    )
    for k in order:
        x = operations[k](x).clip(0, 1)
    return (x @ LUMA)[:, None].repeat(3, 1) if gray else x


def test_colors_equal_plain_ones(device):
    """Each view has its own parameters and its own order of operations; one in five is not jittered."""
    torch.manual_seed(0)
    views, draws = torch.randint(0, 256, (300, 3, 40, 40), dtype=torch.uint8), torch.rand(13, 300)
    colored = train.augment(views.to(device), draws.to(device), blur=0.3, solarize=0.4).cpu()
    low, high = np.array([[0.6, 0.8, -0.1, -0.4], [1.4, 1.2, 0.1, 0.4]])
    orders = draws[4:8].reshape(300, 4).argsort(1).tolist()
    for v, (jitter, gray, sigma, blur, solarize) in enumerate(draws[8:].T.tolist()):
        order = orders[v] if jitter < 0.8 else []
        pixels = views[v].flatten(1).T.double().numpy() / 255
        x = plain_colors(pixels, *(low + (high - low) * draws[:4, v].numpy()), order, gray < 0.2)
        x = torch.from_numpy(x.T).view(3, 40, 40).float()
        x = v2.functional.gaussian_blur(x, [5, 5], [0.1 + 1.9 * sigma] * 2) if blur < 0.3 else x
        x = torch.where(x > 0.5, 1 - x, x) if solarize < 0.4 else x
        expected = v2.functional.normalize(x, train.MEAN, train.STD)
        torch.testing.assert_close(colored[v], expected, atol=1e-4, rtol=1e-4)
    expected = v2.functional.normalize(views / 255, train.MEAN, train.STD)
    torch.testing.assert_close(train.normalize(views), expected)


def test_kinds_of_views_get_their_own_operations_without_a_look_at_the_values(monkeypatch):
    """The released code's and, with --blur, the paper's. The meta device holds no values."""
    given = spy(monkeypatch, train, "augment", lambda views, **more: more)
    batch = default_collate([train.Views(train.Scenes(1), train_args())[0, 0]])
    batch = {name: x.to("meta") for name, x in batch.items() if torch.is_tensor(x)}
    for flag in ("--no-blur", "--blur"):
        views = train.to_views(batch, train_args(flag))
    blurred = [{"blur": 1}, {"blur": 0.1, "solarize": 0.2}, {"blur": 0.5}]
    assert given == [{}, {"solarize": 0.2}, {}, *blurred]
    assert all(views[k].shape == batch[k].shape and views[k].dtype == torch.float32 for k in train.COLORS)


# ---------------------------------------------------------------------------- schedules, settings and figures


def test_schedules_and_seeds_reach_the_steps(tmp_path, monkeypatch):
    rates = [train.learning_rate(step, 100, 10, 0.5) for step in range(101)]
    assert [rates[i] for i in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.25, 0.5, 0.2525, 0.005])
    momenta = [train.teacher_momentum(step, 100, 0.996) for step in (0, 50, 100)]
    assert momenta == pytest.approx([0.996, 0.998, 1])
    momenta = spy(monkeypatch, loca, "update_teacher", lambda teacher, model, momentum: momentum)
    groups = spy(monkeypatch, torch.optim.AdamW, "step", lambda o: [len(momenta), *map(dict, o.param_groups)])
    clipped = spy(monkeypatch, nn.utils, "clip_grad_norm_", lambda parameters, most: most)
    seeds = spy(monkeypatch, train, "seed_all", lambda *parts: parts)
    flags = "--lr 0.01 --momentum 0.9 --clip 0.3 --accumulate 2 --seed 4 --weight-decay 0.2"
    run(train, f"{TINY_TRAIN} {flags} --out {tmp_path}")
    assert momenta == [train.teacher_momentum(step, 6, 0.9) for step in range(6)] and clipped == [0.3] * 6
    assert {(4, step, 0, micro) for step in range(6) for micro in (0, 1)} <= set(seeds)
    for step, (updates, decayed, free) in enumerate(groups):  # the teacher follows each step of the optimizer
        rate = train.learning_rate(step, 6, 3, 0.01 * 4 / 1024)  # warm-up is half of the run at most
        assert (updates, decayed["lr"], free["lr"]) == (step, rate, rate)
        assert (decayed["weight_decay"], free["weight_decay"]) == (0.2, 0)
        assert {p.ndim > 1 for p in decayed["params"]} == {True} and {p.ndim for p in free["params"]} == {1}


def test_settings_reach_the_model(monkeypatch):
    settings = {"masking": "first", "query_tokens": 3, "student_temperature": 0.3, "teacher_temperature": 0.2}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    model = train.build_model(train_args(*flags, "--masking-ratio 0.5 --position-std 3 --grad-checkpoint 1"))
    assert {name: getattr(model, name) for name in settings} == settings and model.visible_tokens == 8
    assert model.encoder.grad_checkpoint == 1 and 2 < model.encoder.pos_embed.std() < 4
    assert tiny(prototypes=0, single_image=True).masking == "unstructured"
    args = train_args()
    monkeypatch.setattr(loca, "ViT", lambda *_, **__: SimpleNamespace(patch_size=99))
    with pytest.raises(ValueError, match="patches of 99 pixels, not 8"):
        train.build_encoder(args, 32)


def test_presets_give_way_to_what_is_told(tmp_path):
    args = train.parse_args("--small --dim 96 --lr 7".split())
    assert vars(args) | {**train.SMALL_PRESET, "dim": 96, "lr": 7} == vars(args)
    args = train.parse_args("--small --data photos --epochs 100".split())
    assert args.epochs == 100 and args.steps is None
    args = finetune_seg.parse_args(f"--small --data camvid:{tmp_path} --optimizer sgd --model S/16".split())
    assert (args.lr, args.dim, args.base_size) == (0.01, 384, 192)


IMPOSSIBLE = [  # one or two of each kind
    (train, "--image-size 100", "the patch size 8 does not divide the image size 100x100"), (train, "--focal-size 20", "--focal-size 20: use multiples of the patch size, 8"),
    (train, "--batch 5 --accumulate 2", "--batch 5: use multiples"), (train, "--heads 5", "--heads"), (train, "--prototypes 0", "--prototypes: must be positive"), (train, "--init no/file", "no/file"),
    (train, "--val .", "--val needs --data"), (train, "--position-weight 0 --feature-weight 0", "no loss to train"), (finetune_seg, "--data nothing:.", "ade20k, voc2012"),
    (finetune_seg, "--data camvid:/nowhere", "cannot read /nowhere: No such file"), (finetune_seg, "--crop 100", "--crop 100: use multiples of the patch size, 8"), (finetune_seg, "--crop 8 8 8", "--crop 8 8 8"),
    (finetune_seg, "--stride 200", "--stride"), (finetune_seg, "--fraction 3/2", "--fraction"), (finetune_seg, "--init no/file.pt", "No such file"),
    (finetune_seg, "--heads 5", "--heads"), (finetune_seg, "--predict .", "--checkpoint FILE"), (finetune_seg, "--split test", "--split test"), (finetune_seg, "--eval-only --out my/run", "my/run/best.pt: no such file"), (finetune_seg, "--checkpoint best.pt", "--init"), (finetune_seg, "--pairs a/*.png b/*.png", "--data must be NAME:DIR"),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, said", IMPOSSIBLE)
def test_impossible_flags_end_with_one_line(script, flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(script, f"{flags} --device cpu")
    error = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
    assert "error: " in error.splitlines()[-1] and said in error.splitlines()[-1]
    assert not any(tmp_path.iterdir())


@both_scripts
def test_runs_that_cannot_begin_end_with_one_line(script, whole, tmp_path, monkeypatch):
    flags = f"{whole[script][0]} --out {tmp_path}/run"
    assert "--device cuda:99" in fails(script, f"{flags} --device cuda:99")
    for launcher in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        with monkeypatch.context() as environment:
            environment.setenv(launcher, "2")
            assert "srun --ntasks-per-node=1 torchrun" in fails(script, flags)
    if script is train:
        assert "use --batch 12 or less" in fails(script, f"{flags} --batch 13")
        with monkeypatch.context() as patch:
            patch.setattr(train, "gather", lambda value: [value, value or 5])  # another is at step 5
            assert "see different checkpoints" in fails(script, flags)
    stat, denied = os.stat, mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(os, "stat", lambda path, **k: (denied if "denied" in str(path) else stat)(path, **k))
    monkeypatch.setattr(os, "mkdir", denied)
    said = fails(script, f"{flags}/denied/run")
    assert "/denied/run/metrics.jsonl: " in said and "Permission denied" in said


def test_lines_are_printed_whatever_the_stream_is():
    ascii_only, (reader, writer) = io.TextIOWrapper(io.BytesIO(), "ascii"), os.pipe()
    train.show("ü \udcff", ascii_only)
    assert ascii_only.buffer.getvalue().split() == [rb"\xfc", rb"\udcff"]
    os.close(reader)
    with open(writer, "w") as left:
        train.show("one", left)
        train.show("two", left)
    mock.patch.object(sys, "stdout", None)(train.show)("a closed one")


def test_damaged_lines_of_the_log_are_dropped(tmp_path, capsys):
    lines = [b'{"step": 2}', b"\0\0\xff", b'{"step": 4}', b"[4]", b'{"step": 6}', b'{"ste']
    save(tmp_path / "metrics.jsonl", b"\n".join(lines))
    train.Log(tmp_path, 4)
    assert [*records(tmp_path, "step")] == [2, 4] and "damaged lines are dropped" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- runs of train.py


def test_run_folder(whole):
    out = whole[train][1]
    names = "encoder.pt last.pt metrics.jsonl predictions.png settings.json"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    content = saved(out)
    assert content["settings"] == saved(out, "settings.json") and content["step"] == 6
    model = train.build_model(SimpleNamespace(**content["settings"]))  # without flags
    model.load_state_dict(content["model"])
    encoder = under("encoder.", saved(out, "encoder.pt"))
    assert equal(encoder, {name: x for name, x in content["teacher"].items() if "encoder." in name})
    assert [*records(out)] == [2, 3, 4, 6] and [*records(out, "val_position_accuracy")] == [3, 6]
    assert len(np.unique(np.asarray(Image.open(out / "predictions.png")))) > 100


def test_every_option_runs(photos, tmp_path):
    options = f"""
        --accumulate 2 --compile --grad-checkpoint --blur --keep 2 --clip 0 --model Ti/16
        --warmup-epochs 1 --data {photos} --val {photos} --large-area 0.5 1 --focal-area 0.1 0.3 --val-every 2
        --position-weight 0.5 --feature-weight 2 --masking unstructured --decode-size 64 --precision bf16
    """
    with torch.compiler.set_stance("default", force_backend="eager"):
        run(train, f"{TINY_TRAIN} {options} --out {tmp_path}")
    names = " ".join(path.name for path in tmp_path.iterdir())
    assert "epoch_0002.pt" in names and "epoch_0001.pt" not in names
    assert [*records(tmp_path)] == [2, 4, 6] and [*records(tmp_path, "val_position_loss")] == [6]
    for option in ("--focal 0 --blur", "--feature-weight 0", "--single-image"):
        run(train, f"{TINY_TRAIN} {option} --out {tmp_path}/{option[2:4]}")
        assert ("teacher" in saved(tmp_path / option[2:4])) == (option == "--focal 0 --blur")


def test_compiled_processes_equal_eager_ones(tmp_path):
    """In the loss and the gradient of each step, though they recompute blocks in the backward pass. AdamW
    makes full steps of gradients that are only rounding."""
    prepare = functools.partial(torch.compiler.set_stance, "default", force_backend="eager")
    flags = f"{TINY_TRAIN} --accumulate 2 --val-images 0 --lr 1 --log-every 1 --out {tmp_path}"
    for more in ("/plain", "/compiled --compile --grad-checkpoint"):
        codes, said = start(train, flags + more, 2, prepare)
        assert codes == [0, 0], said
    for key in ("loss", "gradient_norm"):
        plain, compiled = (records(tmp_path / name, key) for name in ("plain", "compiled"))
        assert len(plain) == 6 and compiled == pytest.approx(plain, rel=1e-5)


def test_held_out_images_are_not_training_images(photos, tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.png").symlink_to(photos / "plain.png")

    def names(flags=""):
        return [[x.name(i) for i in range(len(x))] for x in train.open_images(train_args(flags))]

    flags = f"--data {tmp_path} --val-images 9"
    trained, held_out = names(flags)
    assert (len(trained), len(held_out), len({*trained, *held_out})) == (27, 3, 30)  # a tenth at most
    assert held_out != [f"{tmp_path}/{i:02}.png" for i in range(3)]  # folders can be sorted by class
    assert names(flags)[1] == held_out and [*map(len, names(f"{flags} --val {tmp_path}"))] == [30, 9]
    assert [*map(len, names())] == [12, 4] and not {*names()[0]} & {*names()[1]}


def test_unreadable_images_are_replaced_and_named_once(tmp_path, capfd):
    paths = [tmp_path / f"images/{i:02}.png" for i in range(24)]
    flags = f"{TINY_TRAIN} --data {tmp_path}/images --val-images 0 --out {tmp_path}"
    for i, path in enumerate(paths):
        save(path, b"" if i == 5 else gradient())
    run(train, f"{flags}/run")
    assert capfd.readouterr().err.count("warning: cannot read") == 1
    for path in paths:
        save(path, b"text")
    for workers in (0, 1):  # a worker process has no other words for it
        said = fails(train, f"{flags}/none --workers {workers}")
        assert "24 images in a row cannot be read; the first is" in said and ".png: " in said


def test_files_are_never_half_written(tmp_path):
    path, limits = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    train.save_checkpoint(path, train_args(), 1, {"model": nn.Linear(2, 2)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))  # stands for a disk with little room left
    said = fails_to(train.save_checkpoint, path, train_args(), 2, {"model": nn.Linear(200, 200)})
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search("cannot write .*last.pt: .*File too large.*earlier files are intact", said)
    assert saved(tmp_path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


NOT_LOADED = "starts from scratch: in the file it is incomplete, has other shapes, or is all but zero"
PREDICTOR, HEAD = ("loaded, {} of 22 tensors".format, "loaded, 7 of 7 tensors")
PARTS_LOADED = {  # what is said of the student's predictor, its head, the teacher's head; what is not loaded
    "own": (PREDICTOR(22), HEAD, HEAD, "nothing"),
    "released": (NOT_LOADED, HEAD, HEAD, "predictor."),  # another grid
    "offered": (PREDICTOR(20), HEAD, HEAD, "nothing"),
    "dead head": (PREDICTOR(22), NOT_LOADED, NOT_LOADED, "head."),
    "encoder": (NOT_LOADED, NOT_LOADED, NOT_LOADED, "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS_LOADED)
def test_start_from_weights(kind, whole, tmp_path, capsys):
    """Steps that change next to nothing show what was loaded."""
    path, sizes, (*parts, left) = tmp_path / "weights", "--image-size 32", PARTS_LOADED[kind]

    def decayed(flat):  # as the head of loca_vbase_imnet1k
        return {name: x * np.float32(1e-30 if "projection_head" in name else 1) for name, x in flat.items()}

    if kind == "own":
        shutil.copy(whole[train][1] / "last.pt", path)
    elif kind == "encoder":
        torch.save(loca.ViT(64, 8, 16, 2, 2, 16).state_dict(), path)
    else:
        change = {"released": dict, "offered": without("final_norm"), "dead head": decayed}[kind]
        write_flax(path, kind == "offered", change)
        sizes = f"--image-size {32 if kind == 'released' else 224} --patch-size 16 --dim 32 --heads 4"
        sizes += " --mlp-dim 64 --batch 2 --focal-size 32 --prototypes 48 --head-hidden 40 --bottleneck 16"
    flags = f"{TINY_TRAIN} {sizes} --steps 1 --lr 1e-20 --momentum 0.999999 --drop-path 0"
    run(train, f"{flags} --init {path} --out {tmp_path}/run")
    said = [line for line in capsys.readouterr().out.splitlines() if f"--init {path}" in line]
    assert "tensors loaded" in said[0] and "tensors loaded" in said[3]
    assert [re.sub(".*(student|teacher)'s (predictor|head) ", "", said[i]) for i in (1, 2, 4)] == parts
    for branch in ("student", "teacher"):
        given, found = (loca.load_weights(file, branch) for file in (path, tmp_path / "run/last.pt"))
        kept = {k: x for k, x in given.items() if found.get(k, FEW).shape == x.shape and left not in k}
        torch.testing.assert_close({k: found[k] for k in kept}, kept, atol=1e-5, rtol=1e-4)
        assert len(kept) > 25
    run(train, f"{flags} --init {path} --out {tmp_path}/run")  # what is resumed needs no other weights
    assert "tensors loaded" not in capsys.readouterr().out


def test_the_readmes_snippets_run(whole, photos, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    shutil.copytree(whole[train][1], tmp_path / "runs/scenes")
    shutil.copy(photos / "a/photo.JPG", tmp_path / "photo.jpg")
    (tmp_path / "runs/pretrain").mkdir()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    for block in blocks:
        if "timm" in block:
            pytest.importorskip("timm")
            torch.save(loca.vit("B/16").state_dict(), "runs/pretrain/encoder.pt")
        exec(block, {})
    assert len(blocks) == 2 and Image.open("features.png").size == (256, 192)


# ------------------------------------------------------------- both scripts: stop, kill, resume, NaN, devices


EVENTS = [  # what happens at which step; processes, and to which of them; exit code; what is said
    ("terminate", 3, 1, None, 75, "stopped: saved at step 3"), ("hang up", 5, 1, None, 75, "stopped: saved at step 5"), ("kill", 5, 1, None, -9, ""),
    ("spoil", 5, 1, None, 1, "^error: .*not finite in the steps up to 6.*--lr"), ("spoil", 5, 2, "1", 1, "^error: .*not finite in the steps up to 6.*--lr"),
    ("lose a worker", 4, 1, None, 1, "^error: cannot read the images: .*--workers"), ("exhaust", 5, 1, None, 1, "^error: out of memory; the last checkpoint is intact.*--accumulate"),
]  # fmt: skip


@both_scripts
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: f"{event[0]}-{event[2]}")
def test_a_run_that_was_cut_short_ends_like_one_that_never_was(script, event, whole, tmp_path):
    """At the end of an epoch, or in the middle of one and of a log window. No worker outlives it."""
    action, step, processes, rank, code, words = event
    workers = int(action in ("hang up", "lose a worker") or (action == "kill" and script is train))
    flags = f"{whole[script][0]} --save-minutes 0 --workers {workers} --out {tmp_path}"
    codes, said = start(script, flags, processes, functools.partial(at_step, step, action, rank))
    assert codes == [code] * processes and re.search(words, said, re.MULTILINE), said
    assert said.count("error: ") == (code == 1) and "Traceback" not in said, said
    assert saved(tmp_path)["step"] == (step if code == 75 else 4)
    if processes == 1:
        run(script, flags)
        assert equal(weights(tmp_path), weights(whole[script][1]))
        assert [*records(tmp_path)] == sorted({2, 3, 4, 6} | ({step} if code == 75 else set()))


def test_the_best_evaluation_outlives_a_kill(whole, tmp_path):
    flags = f"{whole[finetune_seg][0]} --out {tmp_path}"
    codes, _ = start(finetune_seg, flags, 1, functools.partial(at_step, 4, "kill"))
    assert codes == [-9] and saved(tmp_path)["best"] == saved(tmp_path, "best.pt")["best"] > 0


@pytest.fixture(scope="session")
def pair(whole, tmp_path_factory):
    """Per script: the folder of a finished run in two processes, whose parameters were the same at step 5."""
    root = tmp_path_factory.mktemp("pair")
    for script, (flags, _) in whole.items():
        flags = f"{flags} --out {root}/{script.__name__}"
        codes, said = start(script, flags, 2, functools.partial(at_step, 5, "compare"))
        assert codes == [0, 0] and "2 x cpu" in said, said
    return root


def stop_with_a_slow_disk(out):
    """Ask one process to stop while saving is slow; each one prints at its end whether last.pt is saved."""
    at_step(3, "terminate", rank="1")
    save_checkpoint, end_processes = train.save_checkpoint, train.end_processes
    train.save_checkpoint = lambda *given, **more: (time.sleep(1), save_checkpoint(*given, **more))
    train.end_processes = lambda: (end_processes(), print("saved:", Path(out, "last.pt").exists()))


@both_scripts
def test_two_processes_stop_together_and_resume(script, whole, pair, tmp_path):
    flags = f"{whole[script][0]} --out {tmp_path}"
    codes, said = start(script, flags, 2, functools.partial(stop_with_a_slow_disk, str(tmp_path)))
    assert codes == [75, 75] and saved(tmp_path)["step"] in (3, 4), said
    assert said.count("saved: True") == 2, said
    assert start(script, flags, 2)[0] == [0, 0]
    assert equal(weights(tmp_path), weights(pair / script.__name__))


def see_fewer():
    """The images of this process are those of the others but one."""
    if os.environ["RANK"] == "1":
        train.Scenes.__len__ = lambda self: self.count - 1
        finetune_seg.choose_subset = lambda count, *_: range(count - 1)


@both_scripts
def test_processes_that_see_different_images_end_at_once(script, whole, tmp_path):
    codes, said = start(script, f"{whole[script][0]} --out {tmp_path}/run", 2, see_fewer)
    counts = (11, 3, 12, 4) if script is train else (5, 5, 6, 5)
    different = "{} images.* {} images.*; {} images.* {} images".format(*counts)
    assert codes == [1, 1] and said.count("error: ") == 1 and re.search(different, said), said
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_killed_processes_again(pair, tmp_path):
    """The real launcher on two nodes. The process of one is killed at step 5 of its first life."""
    (tmp_path / "killed.py").write_text(
        f"import os, sys, train, {__name__} as tests\n"
        "if not os.path.exists(sys.argv[-1]):\n"
        "    tests.at_step(5, 'kill', rank='1')\n"
        "train.main(train.parse_args(sys.argv[1:]))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        command = f"{sys.executable} -m torch.distributed.run --nnodes=2 --max-restarts=1 --rdzv-backend=c10d"
        command += f" --rdzv-endpoint=localhost:{free.getsockname()[1]} {tmp_path}/killed.py {TINY_TRAIN}"
    command = f"{command} --save-minutes 0 --out {tmp_path}/run".split()
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both["env"] = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a new store for each start
    nodes = [subprocess.Popen(command, **both) for _ in range(2)]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0] and "last.pt at step 4" in "".join(said), said
    assert equal(weights(tmp_path / "run"), weights(pair / "train"))
    assert [*records(tmp_path / "run")] == [2, 3, 4, 6]


def even_shares():
    """All shares of a batch weigh the same: as many labeled pixels in each; train.py has one image only."""

    def crop(image, labels, size, *_):
        shade = int(labels.long().sum()) % 200
        return torch.full((3, *size), shade, dtype=torch.uint8), torch.ones(*size, dtype=torch.uint8)

    finetune_seg.augment, one = crop, tiny_views(1, focal=2)
    loca.MASKING.update(dict.fromkeys(loca.MASKING, lambda rows, columns, count, _: torch.arange(count)))
    train.to_views = lambda batch, *_, **__: {k: torch.cat([x] * len(batch["query"])) for k, x in one.items()}


@both_scripts
def test_processes_and_micro_batches_equal_the_whole_batch(script, whole, tmp_path):
    runs = []
    for processes, accumulate in ((1, 1), (2, 1), (1, 2), (2, 2)):
        out = tmp_path / f"{processes}x{accumulate}"
        flags = f"{whole[script][0]} --batch 4 --accumulate {accumulate} --drop-path 0 --out {out}"
        codes, said = start(script, flags, processes, even_shares)
        assert codes == [0] * processes, said
        # The keys' bias has no gradient but rounding errors, which AdamW makes steps of.
        state = {k: x for k, x in weights(out).items() if not k.endswith(("qkv.bias", ".k.bias"))}
        runs.append((records(out), records(out, "gradient_norm"), state))
    for losses, norms, state in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-3) and norms == pytest.approx(runs[0][1], rel=1e-3)
        torch.testing.assert_close(state, runs[0][2], rtol=1e-3, atol=1e-5)


@both_scripts
def test_a_damaged_checkpoint_is_refused_and_left(script, whole, tmp_path):
    path, content = tmp_path / "last.pt", (whole[script][1] / "last.pt").read_bytes()
    torch.save({"weight": torch.ones(3)}, other := io.BytesIO())
    for damaged in (b"", content[:-900], other.getvalue()):
        save(path, damaged)
        assert f"{path}: it is " in fails(script, f"{whole[script][0]} --out {tmp_path}")
        assert path.read_bytes() == damaged
    content = saved(whole[script][1])
    content["model"].popitem()  # as after a change of the model's code
    torch.save(content, path)
    assert "does not fit this model: Error(s)" in fails(script, f"{whole[script][0]} --out {tmp_path}")


@both_scripts
def test_settings_of_a_resumed_run(script, whole, tmp_path, capsys):
    flags, out, run_out = f"{whole[script][0]} --out {tmp_path}/run", whole[script][1], tmp_path / "run"
    shutil.copytree(out, run_out)
    content = saved(out)
    # A setting that the checkpoint does not know had its default, or is what earlier versions did without it.
    for setting in ("seed", "decode_size", "decoder"):
        content["settings"].pop(setting, None)
    torch.save(content, run_out / "last.pt")
    if script is train:
        assert "saved with --decode-size 0, not 512" in fails(script, flags)
        flags += " --decode-size 0"
    refused = f"--seed 1|--batch 6|--weight-decay 0.7|--dim 48|--init {out}/last.pt|"
    refused += "--momentum 0.5|--masking first" if script is train else "--crop 24|--fraction 1/2"
    for change in refused.split("|"):
        said = fails(script, f"{flags} {change}")
        assert f"saved with {change.split()[0]} " in said and "a new --out" in said
    run(script, f"{flags} --lr 0.0005 --clip 2.0 --log-every 3 --accumulate 2")
    said = capsys.readouterr().out
    assert said.count("resuming with --") == 5 and "this run is already finished" in said
    assert equal(weights(run_out), weights(out))
    for change, step in (("--steps 7", 7), ("--epochs 3", 9 if script is train else 7)):
        run(script, f"{flags} {change}")  # an extended run goes on
        assert f"resuming with {change} (was" in capsys.readouterr().out
        assert saved(run_out)["step"] == step == max(records(run_out))


@both_scripts
def test_the_folder_of_a_resumed_run_may_move_but_not_change(script, seg, tmp_path):
    for name in ("d1", "copy", "other"):
        shutil.copytree(seg / "data", tmp_path / name)
    for path in tmp_path.glob("other/*/train/0.png"):
        path.rename(path.with_name("new.png"))
    data = f"--data {tmp_path}/%s/images" if script is train else f"--data folder:{tmp_path}/%s"
    flags = f"{TINY_TRAIN if script is train else TINY_SEG} --steps 2 --out {tmp_path}/run {data}"
    for folder in ("d1", "copy"):
        run(script, flags % folder)
    assert "saved with " in fails(script, flags % "other")
    if script is train:  # nor may images of one's own, which their names identify
        args, own = train_args(f"--steps 2 --out {tmp_path}/own"), (train.Scenes(12), train.Scenes(4))
        train.main(args, own)
        own[0].first = 1
        assert "saved with " in fails_to(train.main, args, own)
    else:
        save(tmp_path / "copy/classes.txt", b"cat\ndog\nbird\n")
        assert "has other class names" in fails(script, flags % "copy")


ON_A_GPU = [
    (train, "--blur --clip 0"), (train, "--accumulate 2 --grad-checkpoint --masking unstructured"), (train, "--compile"),
    (train, "--feature-weight 0"), (train, "--single-image"), (finetune_seg, "--optimizer adamw --clip 1 --accumulate 2"),
]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script, flags", ON_A_GPU)
def test_steps_on_a_gpu_do_not_wait_for_it(script, flags, whole, tmp_path):
    """From the first step's end to the last one's, where the log line comes, a wait of the host fails."""
    steps = itertools.count(1)

    def watch(*_):
        last = next(steps) == 6
        torch.cuda.set_sync_debug_mode("default" if last else "error")
        with contextlib.nullcontext() if last else pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()

    hook = register_optimizer_step_post_hook(watch)
    flags += " --device cuda --precision bf16 --steps 6 --log-every 6 --workers 2"
    flags += " --val-every 9" if script is train else " --evaluations 1"
    try:
        run(script, f"{whole[script][0]} {flags} --out {tmp_path}")
    finally:
        hook.remove()
        torch.cuda.set_sync_debug_mode("default")
    assert next(steps) == 7 and (tmp_path / "last.pt").exists()


# ---------------------------------------------------------------------- segmentation: figures, augmentation


def test_scores_and_average_precision():
    """Classes in neither truth nor prediction are left out, equal confidences count together."""
    result = finetune_seg.scores([[6, 2, 1, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert result["miou"] == pytest.approx((6 / 10 + 3 / 6 + 0) / 3)  # class 2 is predicted but never true,
    assert result["mean_accuracy"] == pytest.approx((6 / 9 + 3 / 4) / 2)  # and has no accuracy
    assert result["pixel_accuracy"] == pytest.approx(9 / 13) and np.isnan(result["iou"][3])
    confidence, present = np.array([0.8, 0.1, 0.9, 0.8, 0.5]), np.array([True, True, True, False, False])
    assert finetune_seg.average_precision(confidence, present) == pytest.approx((2 / 3 + 3 / 5 + 1) / 3)
    assert finetune_seg.average_precision(confidence, ~present) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_classes_that_are_never_predicted_are_named(capsys):
    matrices = {"C 30.0%, B 20.0%": [[5, 0, 0], [2, 0, 0], [3, 0, 0]], "": [[8, 1], [0, 3]]}
    matrices["B 12.5%, C 12.5%, D 12.5%, E 12.5%, F 12.5%, ..."] = np.eye(8)[[0] * 8]
    for named, matrix in matrices.items():
        columns = ("ABCDEFGH", np.diagonal(matrix) / np.sum(matrix, 1), np.sum(matrix, 1))
        rows = [dict(zip(("name", "accuracy", "pixels", "iou"), (*row, None))) for row in zip(*columns)]
        result = {"protocol": "", "classes": rows, **dict.fromkeys(finetune_seg.METRICS, 0.5)}
        finetune_seg.report(result)
        line = f"note: never predicted correctly (share of the evaluated pixels): {named}"
        assert capsys.readouterr().out.splitlines()[len(rows) + 2 :] == [line] * bool(named)
        finetune_seg.report(result, training=np.array([60, 10, 30] + [0] * 253))
        assert ("(share of the training pixels): " in capsys.readouterr().out) == bool(named)


def place(x):
    """A model whose logits depend on a pixel and on its place in the window."""
    where = torch.linspace(0, 1, x.shape[-2] * x.shape[-1]).view(x.shape[-2:])
    return torch.stack([x.sum(1) * where, x[:, 0] - where, x[:, 1] ** 2], dim=1)


LARGER = {(23, 31): None, (16, 10): None, (8, 10): None, (5, 40): (8, 64), (3, 2): (15, 10), (7, 23): (8, 26)}
USUAL = {"base_size": 16, "precision": "float32", "workers": 0, "name": "own"}
USUAL |= {"crop": [8, 10], "window": [8, 10], "stride": [5, 4]}
SIX_SIZES = [(8, 12), (12, 18), (16, 24), (20, 30), (24, 36), (28, 42)]


@pytest.mark.parametrize("size, enlarged", LARGER.items())  # to cover the window of 8 x 10
def test_sliding_window_averages_pixel_by_pixel(size, enlarged):
    image, layers = torch.randn(3, *size), []
    large = F.interpolate(image[None], enlarged, mode="bilinear")[0] if enlarged else image
    height, width = large.shape[1:]
    for top in {min(y, height - 8) for y in range(0, height, 5)}:
        for left in {min(x, width - 10) for x in range(0, width, 4)}:
            layers.append(torch.full(large.shape, math.nan))  # no logits outside the window
            inside = (..., slice(top, top + 8), slice(left, left + 10))
            layers[-1][inside] = place(large[None][inside])[0]
    for batch in (1, 3, 100):
        got = finetune_seg.sliding_window(place, image, (8, 10), (5, 4), batch)
        torch.testing.assert_close(got, torch.stack(layers).nanmean(0))


@pytest.mark.parametrize("base_size, sizes", [(16, SIX_SIZES), (16, [(16, 24)]), (0, [(40, 60)])])
def test_probabilities_are_the_mean_over_scales_and_flips(base_size, sizes):
    image, views = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8), []
    for size, flip in itertools.product(sizes, [False, True] if len(sizes) == 6 else [False]):
        view = F.interpolate(train.normalize(image)[None], size, mode="bilinear", antialias=True)[0]
        view = view.flip(-1) if flip else view
        logits = finetune_seg.sliding_window(place, view, (8, 10), (5, 4), 9)
        logits = F.interpolate(logits[None], (40, 60), mode="bilinear")[0]
        views.append((logits.flip(-1) if flip else logits).softmax(0))
    args = SimpleNamespace(**USUAL | {"multi_scale": len(sizes) == 6, "base_size": base_size})
    got = finetune_seg.class_probabilities(place, image, args)
    torch.testing.assert_close(got, torch.stack(views).mean(0))


def test_localization_and_classification():
    """A model whose logits are the image's own channels."""
    r, classes = np.random.RandomState(0), np.array([1, 2, 1, 2]).reshape(4, 1, 1)
    images = torch.from_numpy(r.randint(0, 256, (4, 3, 16, 24)).astype(np.uint8))
    truths = torch.from_numpy((r.randint(0, 2, (4, 16, 24)) * classes).astype(np.uint8))
    truths[:, :2] = 255
    source = mock.MagicMock(read=lambda i: (images[i], truths[i]), __len__=lambda _: 4)
    args = SimpleNamespace(**USUAL | {"multi_scale": False, "window": [16, 24], "stride": [16, 24]})
    got = finetune_seg.evaluate(nn.Identity(), source, args, "val", "abc", 0, 1, torch.device("cpu"))
    logits, present = train.normalize(images), torch.stack([(truths == k).any(2).any(1) for k in range(3)], 1)
    given = logits.masked_fill(~present[:, :, None, None], -99)  # the classes in the image are known
    pairs = [torch.stack([truths, x.argmax(1)]).flatten(1).T.tolist() for x in (logits, given)]
    plain, limited = ([[part.count([t, p]) for p in range(3)] for t in range(3)] for part in pairs)
    assert got["confusion"] == plain
    assert got["localization_miou"] == pytest.approx(finetune_seg.scores(limited)["miou"])
    confidence = logits.softmax(1).amax((2, 3))
    precision = map(finetune_seg.average_precision, confidence.T.numpy(), present.T.numpy())
    assert got["classification_map"] == pytest.approx(np.mean([*precision]))


def test_crops_of_one_class_are_drawn_again():
    """Up to ten times, until no class fills over 75% of the labeled pixels."""
    labels = np.zeros((40, 60), np.uint8)
    labels[10:25, 20:38], labels[30:36, 3:20] = 1, 255
    filled = []
    for seed in range(60):
        top, left, *size = finetune_seg.choose_crop(labels, (16, 16), np.random.default_rng(seed))
        part = labels[top : top + 16, left : left + 16]
        filled.append(max(np.mean(part[part != 255] == k) for k in (0, 1)))
        assert size == [16, 16] == [*part.shape]
    assert np.mean(np.array(filled) <= 0.75) > 0.95
    rng, replay = np.random.default_rng(0), np.random.default_rng(0)
    finetune_seg.choose_crop(np.full_like(labels, 255), (16, 16), rng)  # eleven crops without a label
    for most in [25, 45] * 11:
        replay.integers(most)
    assert rng.random() == replay.random()
    assert finetune_seg.choose_crop(labels[:8, :5], (16, 16), rng) == (0, 0, 8, 5)


def test_augmentation_keeps_pixels_and_labels_together(monkeypatch):
    """The crop is cut before it is scaled, so nothing larger than it is ever made."""
    monkeypatch.setattr(finetune_seg, "distort", lambda image, rng: image)
    sizes = spy(monkeypatch, F, "interpolate", lambda x, size, **more: tuple(size))
    labels = torch.zeros(40, 56, dtype=torch.uint8)
    labels[:, 28:], labels[20:] = 4, labels[20:] + 8
    image, padded = (labels * 15).expand(3, -1, -1).contiguous(), 0
    for seed in range(40):
        view, target = finetune_seg.augment(image, labels, (48, 32), 40, np.random.default_rng(seed))
        assert view.shape == (3, 48, 32) and target.shape == (48, 32) and view.dtype == torch.uint8
        assert set(target.unique().tolist()) <= {0, 4, 8, 12, 255}  # a scaled mask has no class in between
        inside = target != 255
        padded += int((~inside).any())
        assert ((view[0].float() - 15.0 * target).abs() < 1)[inside].float().mean() > 0.8  # edges are blurred
        assert (train.normalize(view)[:, ~inside].abs() < 0.02).all()  # padding is 0 after normalization
    assert 5 < padded < 40 and len(set(sizes)) > 10 and all(h <= 48 and w <= 32 for h, w in sizes)


def plain_distort(color, brightness, contrast, saturation, degrees, late):
    color = np.clip(color + brightness, 0, 255) // 1
    color = color if late else np.clip(color * contrast, 0, 255) // 1
    if saturation != 1 or degrees:
        hue, s, v = rgb_to_hsv(*color / 255)
        color = 255 * np.array(hsv_to_rgb((hue + degrees / 360) % 1, min(s * saturation, 1), v))
    return np.clip(color * contrast, 0, 255) // 1 if late else color


def test_distortion_equals_a_plain_one():
    """The same draws, pixel by pixel: exact without HSV, and close to the standard library's HSV."""
    for seed in range(150):
        rng, image = np.random.default_rng(seed), np.random.RandomState(seed).randint(0, 256, (3, 5, 3))
        brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0
        late = rng.random() < 0.5
        contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1
        saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1
        degrees = 2 * rng.integers(-18, 18) if rng.random() < 0.5 else 0
        got = finetune_seg.distort(image.astype(np.uint8), np.random.default_rng(seed))
        changes = brightness, contrast, saturation, degrees, late
        off = np.abs(got - np.apply_along_axis(plain_distort, -1, image, *changes)).max()
        assert got.dtype == np.uint8 and off <= (12 if saturation != 1 or degrees else 0), seed  # 8-bit hue


def test_subsets_and_sizes():
    nested = [set(finetune_seg.choose_subset(400, 1 / n, 3).tolist()) for n in (1, 2, 8, 32, 1000)]
    assert [len(part) for part in nested] == [400, 200, 50, 12, 1]
    assert all(small < large for large, small in itertools.pairwise(nested))
    assert nested[2] != set(finetune_seg.choose_subset(400, 1 / 8, 4).tolist())
    assert finetune_seg.scaled_size(600, 400, 200) == (300, 200)
    assert finetune_seg.scaled_size(3, 20000, 512)[1] == 4 * 512


def test_loss_is_a_plain_mean_over_labeled_pixels():
    logits, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5), dtype=torch.uint8)
    labels[0, 1], labels[1, 2, 3] = 255, 255
    losses = -F.one_hot(labels.long() % 255, 4) * logits.log_softmax(1).movedim(1, -1)
    expected = losses.sum(-1)[labels != 255].mean()
    torch.testing.assert_close(finetune_seg.segmentation_loss(logits, labels), expected)
    assert finetune_seg.segmentation_loss(logits, torch.full((2, 3, 5), 255)) == 0


# ------------------------------------------------------------------------------------------ data set layouts


def columns(values, height=4, width=6):
    """A mask with one column a value (an integer or a hexadecimal color), the last one repeated."""
    pixels = [tuple(bytes.fromhex(value)) if isinstance(value, str) else value for value in values]
    return np.array([pixels + pixels[-1:] * (width - len(pixels))] * height, np.uint8)


def save_pair(image, mask, values=(0, 1), height=4, width=6):
    save(image, gradient(height, width))
    save(mask, columns(values, height, width))


def open_part(name, folder, splits="train", base_size=0, pairs=None):
    """The first split of a data set, its class names and palette, and what was said about it."""
    args = {"name": name, "folder": str(folder), "base_size": base_size, "pairs": pairs, "data": name}
    args = SimpleNamespace(**args, classes=None)
    with pytest.MonkeyPatch.context() as patch:
        said = spy(patch, finetune_seg, "say", str)
        (part, *_), names, palette = finetune_seg.open_data(args, splits.split(), 0, 1)
    assert len(names) == len(palette) == len(set(names))
    return part, names, palette, "\n".join(said)


# fmt: off
PARTS = {"ade20k": ("training", "validation"), "sunrgbd": ("train", "test"), "suim": ("train_val", "TEST")}
CAMVID = {"808080": "sky", "400040": "building", "000040": "pole", "8000c0": "road", "c000c0": "bicyclist", "000000": None}
ISPRS = {"ffffff": "impervious surface", "0000ff": "building", "00ff00": "tree", "ff0000": "clutter", "000000": None}
INDICES = {255: None, 0: "class 0", 1: "class 1"}
LAYOUTS = [  # data set, image, mask, a text file and its content, classes of the mask's values; {0}: part, {1}: split, {2}: 5051 or 1
    ("ade20k", "ADEChallengeData2016/images/{0}/ADE_{1}_00000001.jpg", "ADEChallengeData2016/annotations/{0}/ADE_{1}_00000001.png", "", "", {0: None, 1: "wall", 2: "building", 150: "flag"}),
    ("voc2012", "VOCdevkit/VOC2012/JPEGImages/2007_{1}.jpg", "VOCdevkit/VOC2012/SegmentationClass/2007_{1}.png", "VOCdevkit/VOC2012/ImageSets/Segmentation/{1}.txt", "2007_{1}\n", {0: "background", 1: "aeroplane", 20: "tv monitor", 255: None}),
    ("context59", "JPEGImages/2008_{1}.jpg", "SegmentationClassContext/2008_{1}.png", "ImageSets/SegmentationContext/{1}.txt", "2008_{1}", {0: None, 1: "aeroplane", 4: "bedclothes", 59: "wood"}),
    ("cityscapes", "leftImg8bit/{1}/ulm/ulm_000000_000019_leftImg8bit.png", "gtFine/{1}/ulm/ulm_000000_000019_gtFine_labelIds.png", "", "", {0: None, 6: None, 7: "road", 8: "sidewalk", 23: "sky", 33: "bicycle"}),
    ("bdd100k", "bdd100k/images/10k/{1}/0004a4c0-d4dff0ad.jpg", "bdd100k/labels/sem_seg/masks/{1}/0004a4c0-d4dff0ad.png", "", "", {0: "road", 18: "bicycle", 255: None}),
    ("bdd100k", "bdd100k/seg/images/{1}/0004a4c0-d4dff0ad.jpg", "bdd100k/seg/labels/{1}/0004a4c0-d4dff0ad_train_id.png", "", "", {0: "road", 18: "bicycle", 255: None}),
    ("camvid", "CamVid/{1}/0001TP_006690.png", "CamVid/{1}annot/0001TP_006690.png", "", "", {0: "sky", 10: "bicyclist", 11: None}),
    ("camvid", "701_StillsRaw_full/{1}_1.png", "LabeledApproved_full/{1}_1_L.png", "{1}.txt", "any/{1}_1.png any/annot.png\n", CAMVID),
    ("camvid", "{1}/0001TP_006690.png", "{1}_labels/0001TP_006690_L.png", "", "", CAMVID),
    ("idd", "IDD_Segmentation/leftImg8bit/{1}/201/frame0029_leftImg8bit.jpg", "IDD_Segmentation/gtFine/{1}/201/frame0029_gtFine_labellevel3Ids.png", "", "", {0: "road", 25: "sky or background", 255: None}),
    ("sunrgbd", "image/{0}/img-000001.jpg", "label37/{0}/00000001.png", "", "", {0: None, 1: "wall", 37: "bag"}),
    ("sunrgbd", "SUNRGBD-{0}_images/img-000001.jpg", "sunrgbd_train_test_labels/img-{2:06d}.png", "", "", {1: "wall", 37: "bag"}),
    ("isprs", "images/{1}/top_potsdam_2_10_RGB.tif", "masks/{1}/top_potsdam_2_10_label.tif", "", "", ISPRS),
    ("isprs", "img_dir/{1}/2_10_0_0_512_512.png", "ann_dir/{1}/2_10_0_0_512_512.png", "", "", {0: None, 1: ISPRS["ffffff"], 6: "clutter"}),
    ("suim", "SUIM/{0}/images/d_r_1_.jpg", "SUIM/{0}/masks/d_r_1_.bmp", "", "", {"0300fa": "diver", "00ff00": "plants", "ffffff": "sea floor", "ff0000": "robot", "000000": "water"}),
    ("folder", "images/{1}/a.b.webp", "masks/{1}/a.b.png", "", "", INDICES),
    ("folder", "images/{1}/a.jpg", "masks/{1}/a_mask.png", "", "", INDICES),
    ("folder", "JPEGImages/b c.v{1}.jpg", "SegmentationClass/b c.v{1}.png", "ImageSets/Segmentation/{1}.txt", "b c.v{1}", INDICES),
    ("folder", "images/{1}/a.jpg", "masks/{1}/a.png", "classes.txt", "\ufeffIgnore\n# not a class\ncat\ndog\n", {0: None, 1: "cat", 2: "dog"}),
    ("folder", "JPEGImages/{1} 1.jpg", "SegmentationClass/{1} 1.png", "ImageSets/Segmentation/{1}.txt", "JPEGImages/{1} 1.jpg", INDICES),
    ("folder", "images/{1}/a.jpg", "masks/{1}/a.gif", "classes.txt", "cat 1\nbig dog 2\ncat 2", {0: "cat 1", 1: "big dog 2", 2: "cat 2"}),
    ("folder", "images/{1}/a.jpg", "masks/{1}/a.bmp", "class_names.txt", "__ignore__\n_background_\ntv/monitor", {0: "_background_", 1: "tv/monitor", 255: None}),
    ("folder", "images/{1}/a.jpg", "masks/{1}/a.png", "classes.txt", "cat 255 0 0\nbig dog 0 0 255\nignore 0 0 0", {"ff0000": "cat", "0000ff": "big dog", "000000": None}),
    ("folder", "images/{1}/painted.jpg", "masks/{1}/painted.png", "classes.txt", "cat 255 0 0\nbig dog 0 0 255", {0: "big dog", 1: "cat"}),
    ("folder", "images/{1}/a.png", "masks/{1}/a.jpg", "classes.txt", "rest 0\nobject 255", {0: "rest", 255: "object"}),
    ("folder", "data/{1}/images/a.jpg", "data/{1}/masks/a_mask.tif", "data/classes.txt", "rest 0\ncell 1", {0: "rest", 1: "cell", 255: None}),
    ("folder", "images/{1}/a.jpg", "masks/{1}/a.png", "classes.txt", "car 200 0 0\nrest 0 0 0", {0: "car", 1: "rest"}),
    ("folder", "images/{1}/a.jpg", "masks/{1}/a.png", "labelmap.txt", "# label:color_rgb:parts:actions\nrest:0,0,0::\ncat:128,0,0::\n", {"800000": "cat", "000000": "rest"}),
]
WITHOUT_VAL = """
kitti training/image_2/0000{}_10.png training/semantic/0000{}_10.png
isprs 2_Ortho_RGB/top_potsdam_2_{}_RGB.tif 5_Labels_all/top_potsdam_2_{}_label.tif
folder images/train/{}.jpg masks/train/{}.png
folder images/{}.jpg masks/{}_mask.png
folder JPEGImages/{}.jpg SegmentationClass/{}.png
"""  # the last one is CVAT's
FAULTS = [  # files that are written or removed, what is said about them; names in classes.txt
    ("masks/train/2.png", columns([9], 20, 28), "masks/train/2.png: 560 pixels .*, such as 9", b"a\nb\nc"), ("masks/train/1.png", columns([0], 24, 32), "1.png: it is 32x24 .* but its image is 28x20", None),
    ("masks/train/0.png", columns(["ff0000"], 20, 28), "0.png: no class indices in a PNG file of mode RGB; .*classes.txt", None), ("classes.txt", b"B\xe4r\ndog\n", "classes.txt: .* UTF-8", None),
    ("masks/train/4.png", b"no picture", "4.png: cannot identify", None), ("images/train/4.png", b"no picture", "4.png: cannot identify image file .*images/train/4.png", None),
    ("masks/train/[0-4].png", None, r"lacks 5 files: \S+images/train/0.png has no mask; looked for masks/{split}/\S+; ((?!--pairs).)*$", None),
    ("masks/train/*.jpg", columns([0], 20, 28), "5.jpg: no class indices in a JPEG file of mode L; .*classes.txt", None), ("images/train/0.jpg", columns([0], 20, 28), "0.(jpg|png).*0.(jpg|png) have the same name", None),
    ("masks/train/*.png", columns([0, 255], 20, 28), "0, 1, 2, 255: train has fewer than two classes .*object 255", None),
    ("masks/val/*.png", columns([0, 255], 20, 28), "0, 1, 2, 255: val has fewer than two classes .255 means ignored", b"a\nb\nc"),
    ("masks/*/*.png", columns([0, 128], 20, 28), "0, 128: .* without gaps", None), ("masks/*/*.png", columns([0, 1, 1, 1] + [255] * 9, 20, 28), "0, 1, 255: .*255 .ignored. rare", None),
    ("masks/*/*.png", np.arange(560, dtype=np.uint8).reshape(20, 28) % 65, "18, 19, ...: .* up to 63", None), ("masks/*/*.png", None, "no images with masks; looked for .*; images/train/ holds 6 files such as 0.png; ", None),
    ("classes.txt", b"cat\nignore\n", "classes.txt: 1 classes; list 2 to 253", None), ("classes.txt", b"cat 300 0 0\ndog 0 0 0\n", "classes.txt: cannot read 'cat 300 0 0'", None),
    ("classes.txt", b"cat 0 0 0\ndog 0 0 0\n", "no name or color twice", None), ("classes.txt", b"a 0\nb 2\nc", "cannot read 'c'; write NAME R G B or", None),
]
COLORS = [  # data set, class list, colors and their labels
    ("folder", "rest 0\nobject 255", {"000000": 0, "282828": 0, "292929": 255, "d6d6d6": 255, "d7d7d7": 1}),
    ("folder", "rest 0 0 0\nred 255 0 0\nrust 235 0 0\nignore 9 9 9", {"000000": 0, "040404": 0, "090909": 255, "f60000": 1, "f50000": 255, "f4001f": 255, "f40900": 2}),
    ("camvid", "", {"808080": 0, "800000": 1, "900f00": 1, "808060": 255, "010203": 255, "000000": 255}),
    ("suim", "", {"000000": 0, "7f0000": 0, "800000": 4, "7f80ff": 3, "8080ff": 7}),
]
UNKNOWN = [  # images, masks; the --pairs that would fit
    ("image/{}.png", "label/{}.png", "'image/*.png' 'label/*.png'"),
    ("images/00{}_image.png", "masks/00{}_annotation.png", "'images/*_image.png' 'masks/*_annotation.png'"),
    ("photos/2{}_test.tif", "1st_manual/2{}_manual1.gif", "'photos/*_test.tif' '1st_manual/*_manual1.gif'"),
    ("all/a{}.jpg", "all/a{}.png", "'all/a*.jpg' 'all/a*.png'"),
    ("x/image/Train/img_{}.jpg", "x/label/Train/mask_{}.bmp", "'x/image/{split}/img_*.jpg' 'x/label/{split}/mask_*.bmp'"),
]
# fmt: on


@pytest.mark.parametrize("name, image, mask, text, content, meaning", LAYOUTS)
def test_layouts(name, image, mask, text, content, meaning, tmp_path):
    pairs, pixels = {}, Image.fromarray(columns(meaning))
    if "paint" in mask or name == "voc2012":  # class indices, which a palette paints
        pixels.putpalette([0, 0, 255, 255, 0, 0] + 254 * [1, 2, 3])
    for split, part, number in zip(("train", "val"), PARTS.get(name, ("train", "val")), (5051, 1)):
        pairs[split] = files = [tmp_path / path.format(part, split, number) for path in (image, mask)]
        save(files[0], gradient(4, 6))
        save(files[1], pixels)
        if "{1}" in text:  # a list of names
            save(files[0].with_stem("unlisted"), gradient(4, 6))
        if text:
            save(tmp_path / text.format(part, split), content.format(part, split).encode())
    for split, files in pairs.items():
        data, classes, palette, _ = open_part(name, tmp_path, split)
        assert data.pairs == [tuple(map(str, files))]
        image, labels = data.read(0)
        assert image.shape == (3, 4, 6) and image.dtype == labels.dtype == torch.uint8
        expected = [255 if label is None else classes.index(label) for label in meaning.values()]
        assert labels[0, : len(expected)].tolist() == expected
        red_and_blue = palette == [(255, 0, 0), (0, 0, 255)]
        assert red_and_blue if "cat 255" in content else any(len({*color}) > 1 for color in palette)


@pytest.mark.parametrize("names", ["train val test", "Training valid TEST", "TRAIN Validation testing"])
@pytest.mark.parametrize("layout", ["images/{} masks/{}", "wrap/{}/images wrap/{}/masks"])
def test_splits_by_any_of_their_names(names, layout, tmp_path):
    for split, name in zip(("train", "val", "test"), names.split()):
        image, mask = (tmp_path / folder.format(name) / f"{name}.png" for folder in layout.split())
        save_pair(image, mask)
        assert finetune_seg.find_pairs("folder", tmp_path, split) == [(str(image), str(mask))]


@pytest.mark.parametrize("image, mask, pairs", UNKNOWN)
def test_the_pairs_that_would_fit_are_named_and_work(image, mask, pairs, tmp_path):
    files = [(tmp_path / image.format(i), tmp_path / mask.format(i)) for i in range(5)]
    for pair in files:
        save_pair(*pair)
    said = fails_to(open_part, "folder", tmp_path)
    example = min(Path(image.format(0)).name, Path(mask.format(0)).name)
    assert f"try --pairs {pairs}" in said and re.search(rf"/ holds \d+ files such as {example}", said)
    part = open_part("folder", tmp_path, pairs=shlex.split(pairs))[0]
    assert part.pairs == [tuple(map(str, pair)) for pair in files[:4]]
    files[4][1].unlink()  # every image must have its mask
    assert "--pairs" not in fails_to(open_part, "folder", tmp_path)


def test_several_candidates_are_never_searched(tmp_path):
    """Each patient's folder would be a data set; taking one of them would be a guess."""
    for name in ("patient1", "patient2"):
        small_folder(tmp_path / name)
    said = fails_to(open_part, "folder", tmp_path)
    assert re.search("no images with masks; .*; patient1/images/train/ holds 6 files such as 0.png; ", said)


def test_lists_of_names(tmp_path):
    """As in Pascal VOC: trainaug.txt names more images, and SegmentationClassAug has their masks."""
    for file in ("ClassAug/a", "Class/a", "ClassAug/b", "Class/c"):
        save_pair(tmp_path / f"JPEGImages/{file[-1]}.jpg", tmp_path / f"Segmentation{file}.png")

    def masks(name, split, **lists):
        for part, names in lists.items():
            save(tmp_path / f"ImageSets/Segmentation/{part}.txt", "\n".join(names).encode())
        pairs = finetune_seg.find_pairs(name, str(tmp_path), split)
        return [Path(mask).relative_to(tmp_path).as_posix() for _, mask in pairs]

    found = masks("voc2012", "train", trainaug="ab", train="a", val="c")
    assert found == ["SegmentationClass/a.png", "SegmentationClassAug/b.png"]
    assert "'gone' has no image" in fails_to(masks, "folder", "train", train=["a", "gone"])
    for name in "abcde":
        save_pair(tmp_path / f"JPEGImages/{name}.jpg", tmp_path / f"SegmentationClass/{name}.png")
    held_out = masks("folder", "val", train="abcde", val="")  # if there is one list only, it is split
    assert held_out == ["SegmentationClass/e.png"]


@pytest.mark.parametrize("layout", WITHOUT_VAL.strip().splitlines())
def test_every_fifth_image_is_held_out_without_a_validation_part(layout, tmp_path, capsys):
    name, *kinds = layout.replace(" ", f" {tmp_path}/").split()
    pairs = [tuple(kind.format(i) for kind in kinds) for i in range(10, 21)]
    for i, pair in enumerate(pairs):
        save_pair(*map(Path, pair), {"kitti": (7, 8), "isprs": ISPRS}.get(name, (0, 1)))
        if i == 3:
            assert "no images for the val split" in fails_to(finetune_seg.find_pairs, name, tmp_path, "val")
    kept, held_out = (open_part(name, tmp_path, split)[0].pairs for split in ("train", "val"))
    assert held_out == [pairs[4], pairs[9]] and sorted(kept + held_out) == pairs
    assert capsys.readouterr().err.count("every fifth image is held out") == 1


@pytest.mark.parametrize("name, listed, meaning", COLORS)
def test_a_pixel_belongs_to_the_color_that_it_is_close_to(name, listed, meaning, tmp_path):
    layouts = {"camvid": "train trainannot", "suim": "train_val/images train_val/masks"}
    image, mask = (tmp_path / x / "a.png" for x in layouts.get(name, "images/train masks/train").split())
    pixels = columns([*meaning][:1], 10, 100)
    pixels[0, : len(meaning)] = columns(meaning, 1, len(meaning))[0]
    save(image, gradient(10, 100))
    save(mask, pixels)
    if listed:
        save(tmp_path / "classes.txt", listed.encode())
    data = open_part(name, tmp_path)[0]
    assert data.read(0)[1][0, : len(meaning)].tolist() == [*meaning.values()]
    assert (data.pixels == np.bincount(data.read(0)[1].flatten(), minlength=256))[:254].all()


def test_few_pixels_may_have_colors_that_are_not_listed(tmp_path):
    """Up to 5% of a mask, as compression and imprecise painting leave them."""
    mask = columns(["808080"], 10, 100)
    mask[:5, :10] = 1, 2, 250
    save_pair(tmp_path / "train/a.png", tmp_path / "trainannot/a.png", (0,), 10, 100)
    save(tmp_path / "trainannot/a.png", mask)
    assert "note: 50 pixels (5.00%) belong to no class" in open_part("camvid", tmp_path)[3]
    mask[5, 0] = 1, 2, 250
    save(tmp_path / "trainannot/a.png", mask)
    assert "51 pixels (5.1%, at most 5% are ignored) belong to no" in fails_to(open_part, "camvid", tmp_path)


def test_palettes_that_differ_are_refused_unless_colors_are_listed(tmp_path, monkeypatch):
    """An index of two colors is two classes."""
    small_folder(tmp_path)
    mask = Image.fromarray(columns([0] * 14 + [1], 20, 28), "P")
    # An entry that is not used may differ.
    for names, palette in (("01234", "000000 ff0000 090909"), ("5", "000000 ff0000 000909")):
        mask.putpalette(bytes.fromhex(palette))
        for name in names:
            mask.save(tmp_path / f"masks/train/{name}.png")
    assert open_part("folder", tmp_path)[0].pixels[:2].tolist() == [6 * 280, 6 * 280]
    with monkeypatch.context() as patch:  # another process has seen another color
        patch.setattr(train, "gather", lambda x: [x, {1: [9, 9, 9]}] if isinstance(x, dict) else [x])
        assert "the palettes of the masks differ" in fails_to(open_part, "folder", tmp_path)
    mask.putpalette(bytes.fromhex("000000 00ff00"))
    mask.save(tmp_path / "masks/train/5.png")
    assert "the color of value 1 differs between palettes" in fails_to(open_part, "folder", tmp_path)
    save(tmp_path / "classes.txt", b"rest 0 0 0\ncat 255 0 0\ndog 0 255 0\n")
    assert open_part("folder", tmp_path)[0].pixels[:3].tolist() == [6 * 280, 5 * 280, 280]


def test_masks_of_suim_are_cropped(tmp_path):
    for i, size in enumerate([(8, 6), (7, 6), (8, 5)]):
        save(tmp_path / f"train_val/images/{i}.jpg", gradient(*size))
        save(tmp_path / f"train_val/masks/{i}.bmp", columns(["ff0000", "0000ff", "00ff00"], 8))
    data, _, _, said = open_part("suim", tmp_path, base_size=3)
    assert "downscaled" not in said
    assert data.read(2)[1].shape == (8, 5) and data.read(2)[1][0, :3].tolist() == [4, 1, 2]
    assert "downscaled (short side 6 -> 2)" in open_part("suim", tmp_path, base_size=2)[3]  # over twice


@pytest.mark.parametrize("pattern, content, said, names", FAULTS)
def test_faulty_masks_are_named(pattern, content, said, names, tmp_path):
    small_folder(tmp_path)
    if "*.jpg" in pattern:
        (tmp_path / "masks/train/5.png").rename(tmp_path / "masks/train/5.jpg")
    for path in list(tmp_path.glob(pattern)) or [tmp_path / pattern]:
        path.unlink() if content is None else save(path, content)
    if names:
        save(tmp_path / "classes.txt", names)
    assert re.search(said, fails_to(open_part, "folder", tmp_path, "train val"))


# ---------------------------------------------------------------------------------- segmentation: whole runs


def test_seg_run_folder(seg, tmp_path, monkeypatch):
    figures, miou = finetune_seg.evaluate, [0.3, 0.5, 0.4, 0.4]
    monkeypatch.setattr(finetune_seg, "evaluate", lambda *given: {**figures(*given), "miou": miou.pop(0)})
    flags = "--crop 16 24 --window 24 --stride 8 12 --optimizer adamw --lr 0.003 --evaluations 3"
    run(finetune_seg, f"{TINY_SEG} {flags} --data folder:{seg}/data --out {tmp_path}")
    names = "last.pt best.pt results.json predictions.png metrics.jsonl settings.json"
    assert set(names.split()) == {path.name for path in tmp_path.iterdir()}
    last, best, result = (saved(tmp_path, name) for name in ("last.pt", "best.pt", "results.json"))
    assert best.keys() == last.keys() - {"optimizer"} and "betas" in last["optimizer"]["param_groups"][0]
    assert last["classes"] == [c["name"] for c in result["classes"]] == ["class 0", "class 1", "class 2"]
    assert (best["step"], last["step"], last["best"], result["best"], result["miou"]) == (4, 6, 0.5, 0.5, 0.4)
    assert np.sum(result["confusion"]) == 5 * (20 * 28 - 1)  # one pixel of each mask is ignored
    said = "folder val, 5 images, 3 classes, base size 20, crop 16x24, window 24x24, stride 8x12"
    assert result["protocol"] == f"{said}, single scale"
    assert [*records(tmp_path, "val_miou")] == [2, 4, 6] and records(tmp_path)[6] < records(tmp_path)[2]
    run(finetune_seg, f"{EVALUATE} {tmp_path}/last.pt --out {tmp_path}/again")
    assert saved(tmp_path / "again", "results.json")["protocol"] == result["protocol"]


def test_decoder_and_frozen_encoder():
    encoder, images = loca.ViT((16, 24), 8, 16, 3, 2, 32, class_token=True), torch.randn(2, 3, 32, 16)
    model = finetune_seg.Segmenter(encoder, 5, frozen=True).train()
    grid = encoder(images) @ model.decoder.weight.T + model.decoder.bias
    grid = grid.view(2, 4, 2, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(images), F.interpolate(grid, (32, 16), mode="bilinear"))
    assert 0.014 < model.decoder.weight.std() < 0.026 and not model.decoder.bias.any()
    model(images).sum().backward()
    assert not encoder.training and model.decoder.training and encoder.pos_embed.grad is None
    assert sum(len(g["params"]) for g in train.weight_decay_groups(model, 0.3)) == 2
    encoder = loca.ViT(16, 8, 16, 2, 2, 32)
    encoder.blocks[0].requires_grad_(False)  # frozen in part by its owner: it stays so
    finetune_seg.Segmenter(encoder, 5)
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad != name.startswith("blocks.0.")


def test_steps_are_nesterovs_with_polynomial_decay(seg, tmp_path, monkeypatch):
    """The weights after each step of a run, from the formulas and the gradients that the run had."""
    clip, steps = nn.utils.clip_grad_norm_, []

    def noted(parameters, most):
        norm = clip(parameters := list(parameters), most)
        assert most == 0.05 < norm
        steps.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", noted)
    flags = "--steps 4 --lr 0.5 --weight-decay 0.3 --clip 0.05"
    run(finetune_seg, f"{TINY_SEG} {flags} --data folder:{seg}/data --out {tmp_path}")
    for i, (name, end) in enumerate(saved(tmp_path)["model"].items()):
        decay = 0.3 if steps[0][i][0].ndim > 1 and name != "encoder.pos_embed" else 0
        weight, velocity = steps[0][i][0], 0
        for step, after in enumerate([*(values[i][0] for values in steps[1:]), end]):
            gradient = steps[step][i][1] + decay * weight
            velocity = 0.9 * velocity + gradient
            rate = (0.5 - 1e-5) * (1 - step / 4) ** 0.9 + 1e-5
            weight = weight - rate * (gradient + 0.9 * velocity)
            torch.testing.assert_close(after, weight, rtol=1e-4, atol=1e-6)
    assert finetune_seg.learning_rate(10, 10, 0.2) == 1e-5


def test_an_evaluation_depends_on_neither_processes_nor_windows(seg, pair, tmp_path, capsys, monkeypatch):
    shutil.copytree(seg / "data", tmp_path / "data")
    for path in tmp_path.glob("data/*/val"):
        path.rename(path.with_name("test"))
    flags = f"{EVALUATE} {pair}/finetune_seg/last.pt --data folder:{tmp_path}/data --split test"
    two = saved(pair / "finetune_seg", "results.json")
    for batch in (1, 7):
        monkeypatch.setattr(finetune_seg, "WINDOWS", batch)
        run(finetune_seg, f"{flags} --out {tmp_path}")
        one = saved(tmp_path, "results.json")
        assert one["protocol"] == two["protocol"].replace("val", "test") and one["images"] == 5
        assert all(one[key] == two[key] for key in one.keys() - {"checkpoint", "protocol"})
    run(finetune_seg, f"{flags} --multi-scale --window 24 --stride 12 --out {tmp_path}")
    assert "window 24x24, stride 12x12, scales 0.5-1.75 with flips: mIoU" in capsys.readouterr().out


def test_predict_needs_the_checkpoint_alone(seg, tmp_path, capsys, monkeypatch):
    for name, size in {"odd.jpg": (37, 53), "sub/thin.png": (3, 90), "a.b.png": (17, 8)}.items():
        save(tmp_path / "in" / name, gradient(*size))
    save(tmp_path / "in/side.png", gradient(30, 20), exif=SIDEWAYS)
    save(tmp_path / "in/deep.png", np.zeros((20, 30), np.uint16))
    content = saved(seg / "run", "best.pt")
    content["settings"] |= {"data": "folder:/nowhere", "folder": "/nowhere"}
    torch.save(content, tmp_path / "best.pt")
    flags = f"--checkpoint {tmp_path}/best.pt --device cpu --precision float32 --predict {tmp_path}"
    run(finetune_seg, f"{flags}/in --out {tmp_path}/in/out")  # inside the folder
    assert "in/deep.png: more than 8 bits" in capsys.readouterr().err

    def made(name, out="in/out"):
        return np.asarray(Image.open(tmp_path / out / name))

    labels, sizes = made("odd_labels.png"), {"sub/thin": (3, 90), "side": (20, 30), "a.b": (17, 8)}
    assert {name: made(f"{name}_labels.png").shape for name in sizes} == sizes
    assert labels.shape == (37, 53) and labels.max() <= 2 and made("odd_overlay.png").shape[1] > 53
    assert (made("odd_mask.png") == np.array(content["palette"])[labels]).all()
    # With classes.txt, the labels and the colors are masks of a folder.
    for photo, kind in (("odd.jpg", "labels"), ("odd.jpg", "mask"), ("side.png", "labels")):
        pairs = [f"in/{photo[0]}*{photo[-4:]}", f"in/out/{photo[0]}*_{kind}.png"]
        part, names, *_ = open_part("folder", tmp_path, pairs=pairs)
        right = made(f"{photo[:-4]}_labels.png")
        assert names == content["classes"] and (part.read(0)[1].numpy() == right).all()
    monkeypatch.setattr(finetune_seg, "LARGEST", 3 * 37 * 53 // 2)  # a photo that is too large
    run(finetune_seg, f"{flags}/in/sub {tmp_path}/in/odd.jpg --multi-scale --out {tmp_path}/two")
    assert made("odd_labels.png", "two").shape == (37, 53) and (tmp_path / "two/thin_overlay.png").exists()
    assert "odd_mask.png already exists" in fails(finetune_seg, f"{flags}/in/odd.jpg --out {tmp_path}/two")
    save(tmp_path / "in/odd.png", b"nothing")
    assert "none of the images" in fails(finetune_seg, f"{flags}/in/odd.png --out {tmp_path}/none")
    said = fails(finetune_seg, f"{flags}/in/odd.png {tmp_path}/in/odd.jpg --out {tmp_path}/same")
    assert "have the same name" in said


INIT = [  # kind of weights, flags, what is said; heads of the model
    ("ours", "", "teacher (teacher)", 3), ("ours", "--branch student", "student (model)", 3),
    ("timm", "", "the only branch); 30 tensors loaded; heads assumed: 2", 2), ("timm", "--heads 4", "heads assumed: 4", 4),
]  # fmt: skip


@pytest.mark.parametrize("kind, flags, said, heads", INIT)
def test_init_from_every_kind_of_weights(kind, flags, said, heads, seg, tmp_path, capsys):
    sizes = {"dim": 128, "heads": 2} if kind == "timm" else {"class_token": False}
    vits = [foreign_vit(seed, **sizes).state_dict() for seed in (0, 1)]
    torch.save(WEIGHT_FILES[kind](*vits), tmp_path / "weights")
    flags = f"{SEG_FLAGS} --freeze --steps 1 --evaluations 1 --init {tmp_path}/weights {flags}"
    run(finetune_seg, f"{flags} --data folder:{seg}/data --out {tmp_path}")
    content, vit = saved(tmp_path), vits["teacher" in said]
    assert said in capsys.readouterr().out and content["settings"]["heads"] == heads
    assert torch.equal(content["model"]["encoder.norm.bias"], vit["norm.bias"])
    assert ("encoder.cls_token" in content["model"]) == (kind == "timm")


def test_drawn_scenes(tmp_path, monkeypatch, capsys):
    """Without --data scenes are drawn, and what train.py left in its own run folder is the start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune_seg, "VAL_SCENES", 2)
    flags = "--steps 1 --scenes 6 --batch 2 --evaluations 1 --device cpu --workers 0"
    run(finetune_seg, flags)
    said = capsys.readouterr().out
    assert "start: none" in said and "runs/finetune_scenes" in said and "mIoU" in said and "lamp" in said
    own = [foreign_vit(class_token=False).state_dict()] * 2
    save(tmp_path / "runs/scenes/last.pt", b"")
    torch.save(WEIGHT_FILES["ours"](*own), "runs/scenes/last.pt")
    run(finetune_seg, f"{flags} --out again")
    assert "start: runs/scenes/last.pt" in capsys.readouterr().out


def test_an_unreadable_image_ends_the_process(tmp_path):
    small_folder(tmp_path)
    save(tmp_path / "images/val/1.png", (tmp_path / "images/val/1.png").read_bytes()[:60])
    codes, said = start(finetune_seg, f"{TINY_SEG} --workers 1 --data folder:{tmp_path} --out {tmp_path}/run")
    assert codes == [1] and re.search("\nerror: cannot evaluate: .*val/1.png: .*\n$", said)
    assert saved(tmp_path / "run")["step"] == 3  # the step is saved before its evaluation


REFUSED = [  # flags; {0}: folder with files, {1}: flags of an evaluation, {2}: flags of training; what is said
    ("{1} --data camvid:{0}", "3 classes, class 0, class 1, class 2; camvid:"), ("{1} --data folder:{0}/other", "use the same names in the same order"),
    ("{1} --depth 1", "--depth (or --model): the checkpoint decides the model"), ("{2} --dim 48", "do not fit this encoder"),
    ("--predict {0} --checkpoint {0}/w.pt", "w.pt: it is not a checkpoint of this script"), ("{2} --heads 4", "the weights have 3 heads, the encoder 4"),
]  # fmt: skip


@pytest.mark.parametrize("flags, said", REFUSED)
def test_checkpoints_that_do_not_fit_are_refused(flags, said, seg, tmp_path, capsys):
    small_folder(tmp_path / "other")
    save(tmp_path / "other/classes.txt", b"class 1\nclass 0\nclass 2\n")
    state = foreign_vit(class_token=False).state_dict()
    torch.save(WEIGHT_FILES["ours"](state, state), tmp_path / "w.pt")
    evaluation = f"{EVALUATE} {seg}/run/last.pt --out {tmp_path}/o"
    training = f"{SEG_FLAGS} --init {tmp_path}/w.pt --data folder:{seg}/data --out {tmp_path}/o"
    with pytest.raises(SystemExit) as stop:
        run(finetune_seg, flags.format(tmp_path, evaluation, training))
    assert said in f"{stop.value.code} {capsys.readouterr().err}"
