"""Tests: against recordings of the released code, slow plain versions, and invariants. They need no network and no
GPU; where there is one, the last of them run on it."""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
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
from torchvision.transforms import v2

import finetune_seg
import loca
import train

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "finetune_seg.py"
torch.set_num_threads(2)
os.environ["OMP_NUM_THREADS"] = "2"  # in started processes too: over other numbers sums round otherwise


def spy(monkeypatch, owner, name, note):
    """Keep what `note` says of the arguments of every call of owner.name from now on -> the list of it."""
    notes, function = [], getattr(owner, name)

    def noted(*args, **kwargs):
        notes.append(note(*args, **kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)
    return notes


# ---------------------------------------------------------------- recordings of the released training step
# Inputs are drawn with numpy's frozen RandomState in the recordings' order; losses per device, and the norm of the
# gradient by published parameter name in alphabetical order, are what the released JAX code gave (float32, CPU).

CONFIG = {
    "patch": 16,
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "mlp": 64,
    "hidden": 40,
    "bottleneck": 16,
    "prototypes": 48,
}
RECORDED = {
    "step_one_device": {
        "seed": 0,
        "devices": 1,
        "offset": 127,
        "feature": True,
        "total_loss": [8.915199279785156],
        "position_loss": [5.464575290679932],
        "feature_loss": [3.4506239891052246],
        "norms": """ 0.1126106 0.722592 0.02060816 0.001178743 0.001057541 0.01257036 0.002702377 0.00705852
        0.009599642 0.01584734 0.1023715 0.03120304 0.09968709 2.910383e-11 0.008705309 0.03318184 0.04206111
        0.001932066 0.009521264 0.02216563 0.03463564 0.322526 0.09128129 0.02608675 0.002615261 0.0271597
        0.007050298 0.0482941 0.1081474 0.1159254 0.1659668 0 0.008256184 0.1147338 0.08798734 0.002385122
        0.006344648 0.05553747 0.03600951 0.044275 0.004412268 0.02698855 0.01212887 0.044462 0.1028559
        0.1146161 0.1610968 0 0.008822303 0.113884 0.07329991 0.005366008 0.008373127 0.06747343 0.04518812
        0.03803554 0.06883801 0.06347913 0.3875204 0.6229861 1.053 2.077449 1.991797 5.915124 2.410846
        8.471792 """,
    },
    "step_position_loss_only": {
        "seed": 2,
        "devices": 1,
        "offset": 137,
        "feature": False,
        "total_loss": [5.414161205291748],
        "position_loss": [5.414161205291748],
        "feature_loss": [0.0],
        "norms": """ 0.01329274 0.3771335 0.0007871042 0.0008031751 0.0008260102 0.01161299 0.002118438
        0.011003 0.009734577 0.0206896 0.1055806 0.03760267 0.1049229 0 0.009720241 0.04047766 0.03406001
        0.001615338 0.01040591 0.02291944 0.02585212 0.03912493 0.04022973 0.005042489 0.00116612 0.003761828
        0.004869209 0.007641301 0.04200009 0.0131182 0.03834061 0 0.0037485 0.01296783 0.01081868 0.0008414068
        0.00357884 0.009299033 0.009089172 0.003681197 0.001029739 0.004086591 0.004425441 0.006759731
        0.03803454 0.0130326 0.03756107 0 0.003658507 0.01303661 0.01359146 0.0004834662 0.004168021
        0.006241683 0.008688392 0.03764748 0.06114061 0.06990879 0.3851556 """,
    },
    "step_two_devices": {
        "seed": 1,
        "devices": 2,
        "offset": 9,
        "feature": True,
        "total_loss": [8.513956069946289, 8.479812622070312],
        "position_loss": [5.4372711181640625, 5.417121887207031],
        "feature_loss": [3.0766849517822266, 3.0626907348632812],
        "norms": """ 0.1829769 0.7284705 0.02418057 0.001278736 0.0006977153 0.009735345 0.002481511
        0.006968615 0.007392151 0.01230498 0.07078618 0.02760637 0.07145962 0 0.007385783 0.02825717
        0.03112917 0.001935922 0.007514467 0.01632319 0.02223339 0.4689004 0.2352483 0.06351299 0.005135493
        0.04176383 0.01644539 0.0726141 0.124053 0.1861286 0.2227526 0 0.0148117 0.1876804 0.1420536
        0.006829302 0.01029833 0.1226906 0.08242554 0.04428702 0.004193098 0.04984434 0.01562499 0.07754994
        0.1322521 0.176012 0.1975339 4.365575e-11 0.009989929 0.1808444 0.1102537 0.00531972 0.007864108
        0.08027887 0.05380079 0.02808323 0.05817091 0.04779044 0.2750058 0.9240172 1.371302 2.70674 2.353845
        9.337287 3.431612 6.526767 """,
    },
}


def published_shapes(c, feature):
    """Shapes of the published parameters by name."""
    d, heads, shapes = c["dim"], c["heads"], {}

    def norm(name):
        shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (d,)

    def dense(name, i, o):
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = (i, o), (o,)

    def block(name, norms):
        for i in range(norms):
            norm(f"{name}/LayerNorm_{i}")
        attention = f"{name}/MultiHeadDotProductAttention_0"
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = (d, heads, d // heads)
            shapes[f"{attention}/{part}/bias"] = (heads, d // heads)
        shapes[f"{attention}/out/kernel"], shapes[f"{attention}/out/bias"] = (heads, d // heads, d), (d,)
        dense(f"{name}/MlpBlock_0/Dense_0", d, c["mlp"])
        dense(f"{name}/MlpBlock_0/Dense_1", c["mlp"], d)

    grid = 224 // c["patch"]
    shapes["ToTokenSequence_0/embedding/kernel"] = (c["patch"], c["patch"], 3, d)
    shapes["ToTokenSequence_0/embedding/bias"] = (d,)
    shapes["ToTokenSequence_0/posembed_input"] = (1, grid, grid, d)
    for i in range(c["depth"]):
        block(f"encoderblock_{i}", 2)
    block("cross_attention_block", 3)
    norm("encoder_norm")
    norm("final_norm")
    dense("position_predictor", d, grid**2)
    if feature:
        head = "projection_head_for_clustering_prediction"
        for i, (a, b) in enumerate([(d, c["hidden"]), (c["hidden"],) * 2, (c["hidden"], c["bottleneck"])]):
            dense(f"{head}/Dense_{i}", a, b)
        shapes[f"{head}/prototypes/kernel"] = (c["bottleneck"], c["prototypes"])
    return shapes


def draw_published(r, shapes):
    scale = np.float32(0.1)
    return {
        name: r.standard_normal(shapes[name]).astype(np.float32) * scale + np.float32(name.endswith("scale"))
        for name in sorted(shapes)
    }


def draw_recorded(record, batch=2, focal=2):
    """What went into a recording -> student and teacher parameters, views per device, offset, kept tokens."""
    r = np.random.RandomState(record["seed"])
    shapes = published_shapes(CONFIG, record["feature"])
    student, teacher = draw_published(r, shapes), draw_published(r, shapes)
    sides, devices = [224, 224] + [96] * focal, record["devices"]
    images = [r.standard_normal((devices, batch, s, s, 3)).astype(np.float32) for s in sides]
    maps = [r.randint(-60, 196, (devices, batch, s // 16, s // 16, 1)).clip(-1) for s in sides[1:]]
    offset, kept = r.randint(0, 196 - 39 + 1), torch.from_numpy(r.permutation(196)[:70])
    views = []
    for device in range(devices):
        image = [torch.from_numpy(x[device]).permute(0, 3, 1, 2) for x in images]
        target = [torch.from_numpy(x[device]).flatten(1) for x in maps]
        views.append(
            {
                "reference": image[0],
                "query": image[1],
                "query_targets": target[0],
                "focal": torch.stack(image[2:], 1),
                "focal_targets": torch.stack(target[1:], 1),
            }
        )
    return student, teacher, views, offset, kept


def recorded_model(parameters, feature=True):
    c = CONFIG
    encoder = loca.ViT(224, c["patch"], c["dim"], c["depth"], c["heads"], c["mlp"], drop_path=0.0)
    model = loca.LOCA(encoder, c["prototypes"] if feature else 0, c["hidden"], c["bottleneck"])
    model.load_state_dict(loca.published_to_state_dict(parameters))
    return model


def gradient_norms(model, parameters):
    """Gradient norms by published name: every published entry's number is sent the way its value goes."""
    numbers = {
        name: np.full(value.shape, i, np.float32) for i, (name, value) in enumerate(parameters.items())
    }
    own = loca.published_to_state_dict(numbers)
    squares = torch.zeros(len(numbers), dtype=torch.float64)
    for name, p in model.named_parameters():
        squares.index_add_(0, own[name].flatten().long(), p.grad.cpu().double().flatten() ** 2)
    return squares.sqrt()


def check_recorded(name, rank=0, device="cpu"):
    record = RECORDED[name]
    student, teacher_parameters, views, offset, kept = draw_recorded(record)
    assert offset == record["offset"]
    model = recorded_model(student, record["feature"]).to(device)
    teacher = loca.make_teacher(recorded_model(teacher_parameters).to(device)) if record["feature"] else None
    net = torch.nn.parallel.DistributedDataParallel(model) if record["devices"] > 1 else model
    views = {name: view.to(device) for name, view in views[rank].items()}
    visible = torch.arange(offset, offset + 39, device=device)
    losses = net(views, teacher, visible=visible, keep=kept.to(device))
    losses["loss"].backward()
    for ours, theirs in (("loss", "total_loss"), ("position_loss",) * 2, ("feature_loss",) * 2):
        assert losses[ours].item() == pytest.approx(record[theirs][rank], rel=2e-6)
    expected = torch.tensor([float(x) for x in record["norms"].split()], dtype=torch.float64)
    # a key's bias moves all logits of a query alike: its gradient is nothing but rounding
    torch.testing.assert_close(gradient_norms(model, student), expected, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["step_one_device", "step_position_loss_only"])
def test_recorded_step(name):
    check_recorded(name)


def recorded_worker(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    check_recorded("step_two_devices", rank)
    dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_recorded_step_of_two_devices():
    torch.multiprocessing.spawn(recorded_worker, (free_port(),), nprocs=2)


def test_recorded_correspondences():
    """Four maps of the released pipeline (reference and query boxes, mirrored), the first row and column of
    each."""
    cases = [
        ([39, 0, 536, 669], [70, 88, 299, 300], [21, 20, 19, 18, 17, 16], [21, 35, 63, 77, 91, 119]),
        ([6, 2, 178, 228], [140, 62, 60, 71], [147, 146, 146, 145, 144, 144], [147, 161, 175, 189, -1, -1]),
        ([1, 344, 242, 317], [37, 263, 133, 175], [31, 30, 28, -1, -1, -1], [31, 59, 73, 87, 101, 129]),
        ([57, 0, 85, 74], [50, 20, 56, 49], [-1] * 6, [-1, 26, 40, 68, 82, 110]),
    ]
    reference, query = torch.tensor([c[0] for c in cases]), torch.tensor([c[1] for c in cases])
    maps = loca.patch_targets(reference, query, torch.ones(4, dtype=torch.bool), 96, 6, 14).view(4, 6, 6)
    assert maps[:, 0].tolist() == [c[2] for c in cases]
    assert maps[:, :, 0].tolist() == [c[3] for c in cases]


# ------------------------------------------------------------------------------------------ the method


def tiny(**changes):
    """A LOCA with 16 positions, seeded."""
    torch.manual_seed(0)
    encoder = loca.ViT(32, 8, 24, 2, 3, 48, drop_path=changes.pop("drop_path", 0.1))
    return loca.LOCA(encoder, changes.pop("prototypes", 20), 32, 8, **changes)


def tiny_views(batch=2, focal=3):
    g = torch.Generator().manual_seed(1)
    return {
        "reference": torch.randn(batch, 3, 32, 32, generator=g),
        "query": torch.randn(batch, 3, 32, 32, generator=g),
        "query_targets": torch.randint(-5, 16, (batch, 16), generator=g).clamp(min=-1),
        "focal": torch.randn(batch, focal, 3, 16, 16, generator=g),
        "focal_targets": torch.randint(-5, 16, (batch, focal, 4), generator=g).clamp(min=-1),
    }


def plain_attention(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def plain_step(model, teacher, views, visible, keep):
    """The published step, slowly and one view at a time: the reference for values and for speed."""
    with torch.no_grad():
        reference = teacher.encoder(views["reference"])
        targets = (
            teacher.head(reference) @ teacher.head.normalised_prototypes().T / model.teacher_temperature
        ).softmax(-1)
        shape, targets = targets.shape, targets.flatten(0, 1)
        for _ in range(3):
            targets = targets / targets.sum(0, keepdim=True)
            targets = targets / targets.sum(1, keepdim=True)
        targets = targets.view(shape)
    position = feature = correct = count = 0
    predictions = []
    context = reference[:, visible]
    queries = [(views["query"], views["query_targets"][:, keep], keep)]
    queries += [
        (views["focal"][:, i], views["focal_targets"][:, i], None) for i in range(views["focal"].shape[1])
    ]
    for images, target, kept in queries:
        tokens = model.encoder(images, keep=kept)
        matched = (target >= 0).float()
        logits = model.predictor(tokens, context)
        log_probability = logits.float().log_softmax(-1)
        chosen = F.one_hot(target.clamp(min=0), logits.shape[-1])
        position = position - ((log_probability * chosen).sum(-1) * matched).sum()
        correct = correct + ((logits.argmax(-1) == target) * matched).sum()
        codes = (
            model.head(tokens) @ model.head.normalised_prototypes().T
        ).float() / model.student_temperature
        gathered = targets.gather(1, target.clamp(min=0)[..., None].expand(-1, -1, targets.shape[-1]))
        feature = feature - ((gathered * codes.log_softmax(-1)).sum(-1) * matched).sum()
        predictions.append(codes.softmax(-1).flatten(0, 1))
        count = count + matched.sum()
    mean = torch.cat(predictions).mean(0)
    position, feature = position / (count + 1e-8), feature / (count + 1e-8) + (mean * mean.log()).sum()
    return {
        "loss": position + feature,
        "position_loss": position,
        "feature_loss": feature,
        "position_accuracy": correct / count,
        "target_entropy": -(targets * targets.log())[:, ::5].sum(-1).mean(),
    }


def test_bf16_attention_equals_torchs_in_float32():
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, 24, dtype=torch.bfloat16) for n in (5, 7, 7)]
    outputs = []
    for attention, dtype in ((loca.multi_head, torch.bfloat16), (plain_attention, torch.float32)):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        mixed = attention(q, k, v, heads=3)
        outputs.append([mixed, *torch.autograd.grad((mixed * mixed.detach()).sum(), (q, k, v))])
        assert mixed.dtype == dtype
    for ours, theirs in zip(*outputs):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.02)


def test_step_equals_the_plain_one():
    model = tiny(drop_path=0.0, student_temperature=0.2, teacher_temperature=0.08)
    views = tiny_views()
    teacher = loca.make_teacher(tiny(drop_path=0.0))
    visible, keep = torch.tensor([3, 4, 5]), torch.tensor([9, 2, 14, 7, 0])
    gradients = []
    results = []
    for step in (model, lambda *a, **k: plain_step(model, *a, **k)):
        losses = step(teacher=teacher, views=views, visible=visible, keep=keep)
        model.zero_grad()
        losses["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        names = ("loss", "position_loss", "feature_loss", "position_accuracy", "target_entropy")
        results.append({k: losses[k].detach() for k in names})
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_vit_on_rectangles_and_kept_tokens():
    torch.manual_seed(0)
    vit = loca.ViT((32, 48), 8, 24, 2, 3, 48).eval()
    assert vit.grid == (4, 6) and vit.pos_embed.shape == (1, 24, 24)
    images = torch.randn(2, 3, 64, 40)
    tokens = vit(images)
    assert tokens.shape == (2, 40, 24)
    grid = vit.pos_embed.view(1, 4, 6, 24).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (8, 5), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit.position_embedding((8, 5)), resized)
    torch.testing.assert_close(vit(images, keep=torch.arange(40)), tokens)
    # dropping before the blocks: the same as masking by hand
    x = vit.patch_embed(images).flatten(2).transpose(1, 2) + vit.position_embedding((8, 5))
    kept = torch.tensor([[3, 39, 7], [1, 2, 0]])
    x = torch.stack([x[i, kept[i]] for i in range(2)])
    for block in vit.blocks:
        x = block(x)
    torch.testing.assert_close(vit(images, keep=kept), vit.norm(x))
    assert not torch.allclose(vit(images, position=False), tokens)
    with pytest.raises(ValueError, match="does not divide"):
        vit(torch.randn(1, 3, 36, 40))
    with pytest.raises(ValueError, match="heads do not divide"):
        loca.ViT(32, 8, 24, 2, 5, 48)
    with pytest.raises(ValueError, match="no ViT size"):
        loca.vit("XL/16")
    assert loca.vit("Ti/16", image_size=32, depth=1).blocks[0].mlp.fc1.out_features == 768


def test_attending_to_some_tokens_only():
    torch.manual_seed(0)
    attention, x = loca.Attention(24, 3), torch.randn(2, 10, 24)
    q, k, v = attention.qkv(x).chunk(3, -1)

    def split(t):
        return t.view(2, 10, 3, 8).transpose(1, 2)

    scores = split(q) @ split(k).transpose(-1, -2) / math.sqrt(8)
    hidden = torch.ones(10, dtype=torch.bool)
    hidden[[1, 4, 6]] = False
    plain = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ split(v)
    expected = attention.proj(plain.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, attend=torch.tensor([6, 1, 4])), expected)


def test_stochastic_depth_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block = loca.Block(8, 2, 16, drop_path=0.25)
    x = torch.ones(4000, 1, 1)
    dropped = block.add(torch.zeros_like(x), x)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.04)
    assert torch.equal(block.eval().add(x, x), 2 * x)
    block, x = loca.Block(8, 2, 16, drop_path=0.999), torch.randn(500, 3, 8)
    assert (block(x) == x).all(-1).all(-1).float().mean() > 0.98  # both branches are dropped
    assert [b.drop_path for b in loca.ViT(32, 8, 24, 3, 3, 48, drop_path=0.1).blocks] == pytest.approx(
        [0, 0.05, 0.1]
    )


def test_initialisation():
    torch.manual_seed(0)
    vit = loca.vit("Ti/16", depth=1)
    model = loca.LOCA(vit, 512, 64, 32)
    bound = math.sqrt(6 / (192 + 192))  # query, key and value each Xavier-uniform
    qkv = vit.blocks[0].attn.qkv
    assert bound * 0.98 < float(qkv.weight.abs().max()) <= bound and not qkv.bias.any()
    assert 0 < float(vit.blocks[0].mlp.fc1.bias.abs().max()) < 1e-5
    assert float(vit.pos_embed.std()) == pytest.approx(192**-0.5, rel=0.05)
    assert float(vit.patch_embed.proj.weight.std()) == pytest.approx(768**-0.5, rel=0.05)
    assert float(model.predictor.logits.weight.std()) == pytest.approx(192**-0.5, rel=0.05)
    torch.testing.assert_close(model.head.prototypes.weight.norm(dim=1), torch.ones(512))


@pytest.mark.parametrize("kind", ["consecutive", "first", "unstructured"])
def test_choose_tokens(kind):
    torch.manual_seed(0)
    draws = torch.stack([loca.choose_tokens(10, 4, kind) for _ in range(300)])
    assert draws.min() == 0 and draws.max() == (3 if kind == "first" else 9)
    assert all(len(set(row)) == 4 for row in draws.tolist())
    if kind != "unstructured":
        assert (draws.diff(dim=1) == 1).all()
    assert len({tuple(row) for row in draws.tolist()}) == {"consecutive": 7, "first": 1}.get(
        kind, len(set(map(tuple, draws.tolist())))
    )
    assert (len(draws.unique(dim=0)) > 100) == (kind == "unstructured")
    with pytest.raises(ValueError, match="out of 10"):
        loca.choose_tokens(10, 11, kind)


def test_visible_count():
    assert loca.visible_count(196, 0.8) == 39  # as published
    assert [loca.visible_count(100, eta) for eta in (0, 0.1, 0.5, 0.9, 0.95, 0.999)] == [
        100,
        90,
        50,
        10,
        5,
        1,
    ]
    for eta in (-0.1, 1.0):
        with pytest.raises(ValueError, match="masking ratio"):
            loca.visible_count(196, eta)
    with pytest.raises(ValueError, match="no masking"):
        loca.choose_tokens(10, 4, "diagonal")


def slow_target(reference, query, flip, view, grid, reference_grid):
    """One query patch at a time, the three nearest-neighbour samplings in exact fractions."""
    from fractions import Fraction as Q

    def axis(i, begin, size, reference_begin, reference_size):
        pixel = math.floor((i + Q(1, 2)) * view / grid)
        y = begin + min(math.floor((pixel + Q(1, 2)) * size / view), size - 1)
        if not reference_begin <= y < reference_begin + reference_size:
            return -1
        return math.floor((y - reference_begin + Q(1, 2)) * reference_grid / reference_size)

    rows = [axis(i, query[0], query[2], reference[0], reference[2]) for i in range(grid)]
    columns = [axis(i, query[1], query[3], reference[1], reference[3]) for i in range(grid)]
    if flip:
        columns.reverse()
    return [-1 if r < 0 or c < 0 else r * reference_grid + c for r in rows for c in columns]


def random_boxes(r, count, size=200):
    corner, extent = r.randint(0, size, (count, 2)), r.randint(1, size, (count, 2))
    return torch.from_numpy(np.concatenate([corner, extent], 1))


def test_correspondence_properties():
    r = np.random.RandomState(0)
    reference, query = random_boxes(r, 2000), random_boxes(r, 2000)
    flip = torch.from_numpy(r.rand(2000) < 0.5)
    for view, grid, reference_grid in ((96, 6, 14), (48, 6, 12), (33, 5, 7)):
        maps = loca.patch_targets(reference, query, flip, view, grid, reference_grid)
        assert maps.dtype == torch.long and maps.min() >= -1 and maps.max() < reference_grid**2
        for i in range(0, 2000, 1 if grid == 5 else 7):
            boxes = reference[i].tolist(), query[i].tolist()
            assert maps[i].tolist() == slow_target(*boxes, bool(flip[i]), view, grid, reference_grid)
        mirrored = loca.patch_targets(reference, query, ~flip, view, grid, reference_grid).unflatten(
            1, (grid, grid)
        )
        assert torch.equal(mirrored.flip(-1).flatten(1), maps)
        upright = loca.patch_targets(reference, query, flip & False, view, grid, reference_grid).unflatten(
            1, (grid, grid)
        )
        for along, index in ((1, upright // reference_grid), (2, upright % reference_grid)):
            steps = index.diff(dim=along)
            both = (upright.narrow(along, 1, grid - 1) >= 0) & (upright.narrow(along, 0, grid - 1) >= 0)
            assert (steps[both] >= 0).all()
    same = torch.tensor([[10, 20, 140, 140]])
    identity = loca.patch_targets(same, same, torch.tensor([False]), 224, 14, 14)
    assert identity[0].tolist() == list(range(196))


def test_sinkhorn_and_losses_against_plain_versions():
    torch.manual_seed(0)
    codes = torch.randn(12, 7, dtype=torch.float64) / 5
    plain = (codes / 0.05).softmax(-1)
    for _ in range(3):
        plain = plain / plain.sum(0)
        plain = plain / plain.sum(1, keepdim=True)
    torch.testing.assert_close(loca.sinkhorn(codes), plain)
    many = loca.sinkhorn(codes, rounds=300)
    torch.testing.assert_close(many.sum(0), torch.full((7,), 12 / 7, dtype=torch.float64))  # evenly used

    logits, targets = torch.randn(2, 5, 9), torch.tensor([[3, -1, 0, 8, -1], [-1, 2, 2, 1, 5]])
    chosen = [(b, t, int(k)) for b in range(2) for t, k in enumerate(targets[b]) if k >= 0]
    expected = sum(-logits[b, t].log_softmax(-1)[k] for b, t, k in chosen) / len(chosen)
    loss, accuracy = loca.position_loss(logits, targets)
    torch.testing.assert_close(loss, expected)
    assert float(accuracy) == pytest.approx(
        sum(int(logits[b, t].argmax()) == k for b, t, k in chosen) / len(chosen)
    )


def test_feature_loss_does_not_depend_on_the_rows_at_a_time():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(2, 9, 8), dim=-1).requires_grad_()
    prototypes = F.normalize(torch.randn(12, 8), dim=-1).requires_grad_()
    clusters, targets = torch.rand(2, 4, 12).softmax(-1), torch.randint(-1, 4, (2, 9))
    found = []
    for rows in (None, 1, 4, 100):
        loss, *_ = loca.feature_loss(features, prototypes, clusters, targets, rows=rows)
        found.append([loss, *torch.autograd.grad(loss, (features, prototypes))])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, -1e4])
@pytest.mark.parametrize("matched", [True, False])
def test_losses_stay_finite(scale, matched):
    """Codes that are all equal, one-hot or far apart, and batches without any intersection."""
    features = (scale * torch.eye(8)[torch.arange(10) % 8]).view(2, 5, 8).requires_grad_()
    prototypes = torch.eye(8).repeat(2, 1).requires_grad_()
    targets = torch.randint(0, 4, (2, 5)) if matched else torch.full((2, 5), -1)
    clusters = loca.sinkhorn(scale * torch.eye(16)[:8])
    assert clusters.isfinite().all() and loca.sinkhorn(torch.full((8, 16), scale)).isfinite().all()
    feature, *_ = loca.feature_loss(features, prototypes, clusters.view(2, 4, 16), targets)
    position, accuracy = loca.position_loss(features, targets)
    (feature + position).backward()
    assert feature.isfinite() and features.grad.isfinite().all() and prototypes.grad.isfinite().all()
    if not matched:
        assert float(position) == 0 and float(accuracy) == 0


def test_position_loss_only_and_single_image(monkeypatch):
    views = tiny_views()
    model = tiny(prototypes=0)
    model(views)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    # the queries carry no position embedding: its gradient comes from the visible reference tokens alone
    losses = model(views, visible=torch.tensor([2, 5]))
    losses["loss"].backward()
    assert model.encoder.pos_embed.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [2, 5]
    assert float(losses["feature_loss"]) == 0

    single = tiny(prototypes=0, single_image=True, masking_ratio=0.5, drop_path=0.0)
    losses = single(views, visible=torch.tensor([0, 3, 9]))
    losses["loss"].backward()
    assert not single.encoder.pos_embed.requires_grad  # unused: DDP would wait for its gradient
    # shuffling an image's patches shuffles its tokens: without positions only the content can tell
    tokens = single.encoder(views["reference"], position=False, attend=torch.arange(16))
    logits = single.predictor(tokens, tokens)
    loss, _ = loca.position_loss(logits, torch.arange(16).expand(2, 16))
    torch.testing.assert_close(loss, single(views, visible=torch.arange(16))["position_loss"])
    kinds = spy(monkeypatch, loca, "choose_tokens", lambda total, count, kind, device: (count, kind))
    single(views)  # its mask is always random
    tiny(prototypes=0, query_tokens=7)(views)
    assert kinds == [(8, "unstructured"), (3, "consecutive"), (7, "unstructured")]
    assert loca.LOCA(loca.vit("Ti/16", depth=1), 0).query_tokens == 70  # as published


def test_loss_weights():
    views, teacher = tiny_views(), loca.make_teacher(tiny(drop_path=0.0)).eval()
    chosen = {"visible": torch.arange(3), "keep": torch.arange(5)}
    base = tiny(drop_path=0.0)(views, teacher, **chosen)
    for a, b in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        losses = tiny(drop_path=0.0, position_weight=a, feature_weight=b)(views, teacher, **chosen)
        torch.testing.assert_close(losses["loss"], a * base["position_loss"] + b * base["feature_loss"])


def test_teacher_follows_the_student():
    model = tiny()
    teacher = loca.make_teacher(model)
    assert teacher.training and teacher.encoder.blocks[1].drop_path == 0.1  # as released
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    loca.update_teacher(teacher, model, 0.9)
    own = dict(model.named_parameters())
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * own[name])
        assert not p.requires_grad and own[name].requires_grad


def test_step_has_no_data_dependent_shape():
    """torch.compile without graph breaks fails on .item(), boolean indexing and shapes that depend on
    values."""
    torch._dynamo.reset()
    model, teacher = tiny(), loca.make_teacher(tiny())
    settings = {"image_size": 32, "patch_size": 8, "focal_size": 16, "focal": 3, "blur": True}
    batch = {
        "reference": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "query": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "focal": torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8),
        "boxes": torch.tensor([[0, 0, 30, 30]] * 5).expand(2, 5, 4),
        "flips": torch.zeros(2, 5, dtype=torch.bool),
    }
    step = torch.compile(
        lambda b: model(train.to_views(b, settings), teacher)["loss"], fullgraph=True, backend="aot_eager"
    )
    loss = step(batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())


# --------------------------------------------------------------------------------------------- weights


def write_published(path, trees):
    """A train state in the published file format: msgpack, arrays as extension 1 of (shape, dtype name,
    bytes)."""
    msgpack = pytest.importorskip("msgpack")

    def nest(flat):
        tree = {}
        for name, value in flat.items():
            *parents, leaf = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            payload = msgpack.packb((list(value.shape), str(value.dtype), value.tobytes()))
            node[leaf] = msgpack.ExtType(1, payload)
            if name == "position_predictor/kernel":  # arrays over 1 GiB are cut in chunks
                cut = [
                    msgpack.ExtType(1, msgpack.packb(([part.size], str(part.dtype), part.tobytes())))
                    for part in np.array_split(value.ravel(), 12)
                ]
                node[leaf] = {
                    "__msgpack_chunked_array__": True,
                    "shape": {str(i): n for i, n in enumerate(value.shape)},
                    "chunks": {str(i): part for i, part in enumerate(cut)},
                }
        return tree

    step = msgpack.ExtType(3, msgpack.packb(([], "int32", np.int32(7).tobytes())))
    path.write_bytes(
        msgpack.packb({**{k: nest(v) for k, v in trees.items()}, "global_step": step, "rng": None})
    )


def test_published_checkpoint(tmp_path):
    r = np.random.RandomState(0)
    student, ema = (draw_published(r, published_shapes(CONFIG, True)) for _ in range(2))
    path = tmp_path / "checkpoint"
    write_published(path, {"params": student, "ema_params": ema})
    model = recorded_model(student)
    state = loca.load_weights(path)
    model.load_state_dict(state)
    torch.testing.assert_close(state, loca.published_to_state_dict(student))
    torch.testing.assert_close(loca.load_weights(path, "teacher"), loca.published_to_state_dict(ema))
    # q/k/v kernels (in, heads, width): one output checked by hand
    name = "encoderblock_1/MultiHeadDotProductAttention_0/key/kernel"
    assert float(state["encoder.blocks.1.attn.qkv.weight"][32 + 2 * 8 + 3, 5]) == student[name][5, 2, 3]

    for damage in (
        lambda b: b[: len(b) // 2],
        lambda b: b[:2] + b"\xc1" + b[3:],
        lambda b: b"\x81\xa6params" + b"\x81\xa1a" * 4000,
    ):
        (tmp_path / "bad").write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match="bad"):
            loca.load_weights(tmp_path / "bad")
    some = dict(student)
    del some["encoder_norm/scale"]
    with pytest.raises(ValueError, match="encoder_norm/scale is missing"):
        loca.published_to_state_dict(some)
    with pytest.raises(ValueError, match="surprise left over"):
        loca.published_to_state_dict({**student, "surprise": np.zeros(3)})


def foreign_vit(grid=4, class_token=True):
    """Random weights under the names that timm, DINO and MAE share."""
    torch.manual_seed(3)
    state = loca.ViT(8 * grid, 8, 24, 2, 3, 48, class_token=class_token).state_dict()
    return {name: torch.randn_like(value) for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,  # timm
        lambda s: {
            "teacher": {f"backbone.{k}": v for k, v in s.items()} | {"head.mlp.0.weight": torch.ones(2)}
        },  # DINO
        lambda s: {"model": s | {"decoder_embed.weight": torch.ones(2), "mask_token": torch.ones(1)}},  # MAE
        lambda s: {"state_dict": {f"module.base_encoder.{k}": v for k, v in s.items()}},  # MoCo v3
    ],
)
def test_foreign_weights(tmp_path, wrap):
    state = foreign_vit()
    torch.save(wrap(state), tmp_path / "vit.pth")
    loaded = loca.load_weights(tmp_path / "vit.pth", "teacher")
    own = loca.ViT(32, 8, 24, 2, 3, 48)
    report = loca.load_encoder(own, loaded)
    assert "class token dropped" in report
    torch.testing.assert_close(own.pos_embed.data, state["pos_embed"][:, 1:])
    torch.testing.assert_close(own.blocks[1].attn.qkv.weight.data, state["blocks.1.attn.qkv.weight"])
    kept = loca.ViT((32, 48), 8, 24, 2, 3, 48, class_token=True)
    report = loca.load_encoder(kept, loaded)
    assert "class token kept" in report and "resized from 4x4 to 4x6" in report
    assert kept(torch.randn(1, 3, 32, 48)).shape == (1, 24, 24)
    torch.testing.assert_close(kept.pos_embed.data[:, :1], state["pos_embed"][:, :1])
    images, kept = torch.randn(1, 3, 32, 48), kept.eval()
    before = kept(images)
    kept.pos_embed.data[:, 0] += torch.randn(24)  # the class token's own position counts
    assert not torch.allclose(kept(images), before)
    torch.save(wrap(state), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(loca.load_weights(tmp_path / "old.pth", "teacher"), loaded)


def test_weights_that_do_not_fit(tmp_path):
    state, own = foreign_vit(class_token=False), loca.ViT(32, 8, 24, 3, 3, 48)
    before = {k: v.clone() for k, v in own.state_dict().items()}

    def prefixed(s):
        return {f"encoder.{k}": v for k, v in s.items()}

    with pytest.raises(ValueError, match="missing: blocks.2"):
        loca.load_encoder(own, prefixed(state))
    with pytest.raises(ValueError, match="left over: blocks.1"):
        loca.load_encoder(loca.ViT(32, 8, 24, 1, 3, 48), prefixed(state))
    with pytest.raises(ValueError, match="of another shape"):
        loca.load_encoder(loca.ViT(32, 8, 48, 2, 3, 96), prefixed(state))
    torch.testing.assert_close(dict(own.state_dict()), before)

    class Evil:
        def __reduce__(self):
            return (os.system, ("echo never",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pth")
    torch.save(state, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:2000])
    for name in ("evil.pth", "other.pth", "cut.pth"):
        with pytest.raises(ValueError, match=name):
            loca.load_weights(tmp_path / name)


# -------------------------------------------------------------------------------------- images, scenes


def gradient(height=40, width=60):
    """An image that says where each pixel is: red its row, green its column, blue flat."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 4, columns * 4, np.full_like(rows, 90)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with every kind of image that users have, at several depths."""
    root = tmp_path_factory.mktemp("photos")
    plain = Image.fromarray(gradient())
    (root / "a" / "deep er").mkdir(parents=True)
    plain.save(root / "plain.png")
    plain.save(root / "a" / "photo.JPG", quality=95)
    plain.convert("L").save(root / "a" / "grey.jpeg", quality=95)
    plain.convert("CMYK").save(root / "a" / "cmyk.jpg", quality=95)
    plain.save(root / "a" / "deep er" / "new\nline ü.bmp")
    plain.quantize(64).save(root / "palette.png")
    clear = plain.quantize(64)
    clear.save(root / "palette_clear.png", transparency=0)
    Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257).save(root / "sixteen.png")
    Image.fromarray(gradient()[..., 0].astype(np.float32) / 160).save(root / "float.tif")
    plain.convert("RGBA").save(root / "alpha.webp", lossless=True)
    plain.save(
        root / "moving.webp", save_all=True, append_images=[plain.transpose(Image.ROTATE_180)], lossless=True
    )
    turned = plain.transpose(Image.ROTATE_90)  # the camera held sideways, and says so
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "exif.jpg", quality=95, exif=exif)
    turned.save(root / "exif.png", exif=exif)
    Image.fromarray(gradient()[:1, :1]).save(root / "one.png")
    Image.fromarray(np.tile(gradient(3, 60), (1, 34, 1))).save(root / "thin.png")
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.mark.parametrize("decoder", ["torchvision", "Pillow alone"])
def test_every_kind_of_image_comes_out_upright_and_rgb(decoder, photos, monkeypatch):
    if decoder == "Pillow alone":
        monkeypatch.setattr(train, "decode_image", None)
    files = train.find_images(photos)
    assert len(files) == 15 and "notes.txt" not in [files[i] for i in range(15)]
    for i in range(len(files)):
        image = train.read_image(photos / files[i])
        assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
        name = os.path.basename(files[i])
        if name in ("one.png", "thin.png"):
            continue
        assert image.shape == (3, 40, 60), name
        expected = torch.from_numpy(gradient()).permute(2, 0, 1).float()
        if name in ("sixteen.png", "float.tif"):
            expected = expected[:1].expand(3, -1, -1) * (1 if name == "sixteen.png" else 255 / 156)
        if name == "grey.jpeg":
            expected = (0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]).expand(3, -1, -1)
        error = (image.float() - expected).abs().mean()
        assert error < (
            6 if "cmyk" in name or "palette" in name or "exif.jpg" == name or "photo" in name else 2.5
        ), (name, error)


def test_a_torchvision_of_another_torch(photos, tmp_path):
    """It fails to import, and not with an ImportError: Pillow stands in, in worker processes too."""
    save = tmp_path / "torchvision/__init__.py"
    save.parent.mkdir()
    save.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    command = [sys.executable, HERE / "train.py", *SMALL, "--data", photos, "--workers", "1", "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([*command, "--out", tmp_path / "run"], env=environment, check=True, timeout=90)


def test_list_of_images(photos, tmp_path):
    names = [os.path.relpath(p, photos) for p in photos.rglob("*") if p.suffix.lower() in train.EXTENSIONS]
    files = train.find_images(photos, tmp_path / "list.npz")
    assert sorted(files[i] for i in range(len(files))) == sorted(names)
    again = train.find_images(photos / "not asked", tmp_path / "list.npz")  # the kept list is enough
    assert [again[i] for i in range(len(again))] == [files[i] for i in range(len(files))]
    assert [files.select([3, 1])[i] for i in range(2)] == [files[3], files[1]]
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "list.npz").read_bytes()[:-30])
    with pytest.raises(train.Problem, match="--cache-list .*damaged.npz: not a list of ours"):
        train.find_images(photos, tmp_path / "damaged.npz")
    odd = tmp_path / "odd"
    (odd / "loop").mkdir(parents=True)
    os.symlink(odd, odd / "loop" / "back")
    os.symlink(odd / "nowhere.png", odd / "broken.png")
    with open(os.fsencode(odd) + b"/\xff\xfe.png", "wb") as file:
        Image.fromarray(gradient()).save(file, "png")
    found = train.find_images(odd)
    assert len(found) == 2
    folder = train.Folder(str(odd), found)
    sizes = [train.read_or_next(folder, i, folder.image)[0].shape for i in range(2)]
    assert sizes == [(3, 40, 60)] * 2
    for folder, said in ((tmp_path / "none", "no such folder"), (tmp_path / "odd" / "loop", "no images")):
        if folder.name == "loop":
            (odd / "loop" / "back").unlink()
        with pytest.raises(train.Problem, match=said):
            train.find_images(folder)


def test_scenes_are_the_same_everywhere():
    images, labels = zip(*(train.draw_scene(i) for i in range(40)))
    assert images[0].shape == (192, 256, 3) and labels[0].shape == (192, 256)
    seen = np.bincount(np.stack(labels).ravel(), minlength=len(train.SCENE_CLASSES))
    assert len(seen) == 10 and (seen > 0).all()
    assert len({hashlib.sha256(x.tobytes()).hexdigest() for x in images}) == 40
    again = train.draw_scene(7)
    assert np.array_equal(again[0], images[7]) and np.array_equal(again[1], labels[7])
    digest = hashlib.sha256(np.stack(labels).tobytes()).hexdigest()
    assert digest == "136ef67cc1c819aaca01ce715184299177399a968dd84227f1c252c8296b3ee5"


# ------------------------------------------------------------------------------------- views, colours


def view_settings(**changes):
    settings = {"image_size": 32, "focal_size": 16, "patch_size": 8, "focal": 3, "seed": 0, "blur": False}
    return {**settings, "large_area": (0.32, 1.0), "focal_area": (0.05, 0.32), **changes}


def test_views_show_what_their_boxes_say(photos):
    files = train.find_images(photos)
    dataset = train.Views(train.Folder(str(photos), files), view_settings())
    for i in range(len(files)):
        item = dataset[0, i]
        image, _ = train.read_or_next(dataset.source, i, dataset.source.image)
        assert item["reference"].shape == (3, 32, 32) and item["focal"].shape == (3, 3, 16, 16)
        views = [item["reference"], item["query"], *item["focal"]]
        assert not item["flips"][0]
        for view, box, flip in zip(views, item["boxes"].tolist(), item["flips"]):
            top, left, height, width = box
            assert (
                0 <= top and top + height <= image.shape[1] and 0 <= left and left + width <= image.shape[2]
            )
            low, high = (0.05, 0.32) if view.shape[-1] == 16 else (0.32, 1)
            if min(image.shape[1:]) >= 40:  # a box is of whole pixels
                assert low - 0.02 < height * width / image[0].numel() < high + 0.02
            size = list(view.shape[-2:])
            expected = v2.functional.resized_crop(
                image, *box, size, v2.InterpolationMode.BILINEAR, antialias=True
            )
            expected = expected.flip(-1) if flip else expected
            assert (view.int() - expected.int()).abs().max() <= 1
    one, other = dataset[0, 3], dataset[1, 3]
    assert all(torch.equal(one[k], dataset[0, 3][k]) for k in ("reference", "focal", "boxes", "flips"))
    assert not torch.equal(one["boxes"], other["boxes"])  # another epoch, other crops
    seeded = train.Views(dataset.source, view_settings(seed=1))
    assert not torch.equal(one["boxes"], seeded[0, 3]["boxes"])
    flips = torch.stack([seeded[epoch, 3]["flips"][1:] for epoch in range(50)])
    assert 0.4 < flips.float().mean() < 0.6
    assert (
        dataset[0, 0]["focal"].shape
        == train.Views(dataset.source, view_settings(focal=3))[0, 0]["focal"].shape
    )
    assert train.Views(dataset.source, view_settings(focal=0))[0, 0]["focal"].shape == (0, 3, 16, 16)


def test_boxes_have_the_area_and_aspect_they_should():
    rng = np.random.default_rng(0)
    boxes = np.array([train.random_box(300, 500, (0.05, 0.32), rng) for _ in range(2000)])
    areas, aspects = boxes[:, 2] * boxes[:, 3] / 150000, boxes[:, 3] / boxes[:, 2]
    assert 0.049 < areas.min() < 0.06 and 0.31 < areas.max() < 0.325
    assert 0.74 < aspects.min() < 0.77 and 1.31 < aspects.max() < 1.35
    assert train.random_box(3, 20000, (0.9, 1.0), rng) == (0, 0, 3, 20000)


def test_order_covers_each_epoch_once_and_is_shared_out():
    whole = list(train.order(50, 12, seed=3, first=0, last=8))
    assert whole != list(train.order(50, 12, seed=4, first=0, last=8))
    assert all(len(batch) == 12 for batch in whole) and len(whole) == 8
    for epoch in range(2):
        keys = [key for batch in whole[4 * epoch : 4 * epoch + 4] for key in batch]
        assert {e for e, _ in keys} == {epoch} and len({n for _, n in keys}) == 48
    assert [n for _, n in whole[0]] != [n for _, n in whole[4]]
    assert list(train.order(50, 12, 3, 5, 8)) == whole[5:]  # resumed in the middle of an epoch
    shares = [list(train.order(50, 12, 3, 0, 8, rank, 2, accumulate=3)) for rank in range(2)]
    assert len(shares[0]) == 24
    for step in range(8):
        parts = [key for share in shares for micro in share[3 * step : 3 * step + 3] for key in micro]
        assert sorted(parts) == sorted(whole[step])


def test_jitter_is_four_operations_in_an_order_of_each_views_own(monkeypatch):
    """Undo the drawing: find each operation among the matrices, apply them one by one to single views."""
    torch.manual_seed(0)
    matrix, shift, of_mean = train.draw_jitter(400, torch.device("cpu"))
    eye = torch.eye(3)
    still = (matrix == eye).all(-1).all(-1).all(-1) & (shift == 0).flatten(1).all(1)
    assert 0.1 < still.float().mean() < 0.3  # one view in five
    kinds = []
    for v in (~still).nonzero().flatten().tolist():
        order = []
        for k in range(4):
            m, b, c = matrix[v, k], float(shift[v, k, 0]), float(of_mean[v, k])
            if b != 0:
                assert torch.equal(m, eye) and abs(b) <= 0.4 and c == 0
                order.append("brightness")
            elif c != 0:
                factor = float(m[0, 0])
                assert 0.6 <= factor <= 1.4 and c == pytest.approx(1 - factor)
                order.append("contrast")
            else:
                torch.testing.assert_close(m.sum(1), torch.ones(3), atol=2e-3, rtol=0)  # grey stays grey
                luma = torch.tensor([0.299, 0.587, 0.114])
                torch.testing.assert_close(luma @ m, luma, atol=5e-3, rtol=0)  # brightness stays
                order.append("saturation" if torch.linalg.eigvals(m).imag.abs().max() < 1e-4 else "hue")
        kinds.append(tuple(order))
    assert all(sorted(k) == ["brightness", "contrast", "hue", "saturation"] for k in kinds)
    assert len(set(kinds)) == 24


def test_colours_of_a_batch_equal_those_of_single_views(monkeypatch):
    torch.manual_seed(0)
    views = torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8)
    drawn = train.draw_jitter(6, torch.device("cpu"))
    monkeypatch.setattr(train, "draw_jitter", lambda count, device: drawn)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.full(size, 0.9))  # no greyscale
    result = train.colours(views)
    for v in range(6):
        x = views[v] / 255
        for k in range(4):
            m, b, c = (p[v, k] for p in drawn)
            mean = x.mean((1, 2))
            x = (torch.einsum("ij,jhw->ihw", m, x) + b[:, :, None] + (c[0, 0] * mean)[:, None, None]).clamp(
                0, 1
            )
        expected = v2.functional.normalize(x, train.MEAN, train.STD)
        torch.testing.assert_close(result[v], expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(train, "draw_jitter", lambda n, device: train_still(n))
    plain = train.plain_colours(views)
    torch.testing.assert_close(train.colours(views), plain, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(
        torch, "rand", lambda *size, device=None: torch.zeros(size)
    )  # all greyscale, all solarised
    grey = 0.2989 * views[:, 0] / 255 + 0.587 * views[:, 1] / 255 + 0.114 * views[:, 2] / 255
    solar = torch.where(grey >= 0.5, 1 - grey, grey)[:, None].expand(-1, 3, -1, -1)
    expected = v2.functional.normalize(solar, train.MEAN, train.STD)
    torch.testing.assert_close(train.colours(views, solarize=0.2), expected, atol=1e-5, rtol=1e-5)


def train_still(count):
    """Jitter that changes nothing."""
    return torch.eye(3).expand(count, 4, 3, 3), torch.zeros(count, 4, 3, 1), torch.zeros(count, 4, 1, 1)


def test_colours_in_parts(monkeypatch):
    """Views that exceed the cache are coloured in parts, with the parameters that they have at once."""
    sizes, results = spy(monkeypatch, train, "blur", lambda x, kernels: len(x)), []
    for side in (128, 16):
        torch.manual_seed(0)
        views = torch.full((40, 3, side, side), 128, dtype=torch.uint8)
        results.append(train.colours(views, 0.2, 0.5)[:, :, side // 2, side // 2])
    assert sizes == [4] * 10 + [40] and len(results[0].unique(dim=0)) > 25
    torch.testing.assert_close(*results)


def test_blur_is_gaussian():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 60, 60)
    torch.manual_seed(1)
    cpu = torch.device("cpu")
    blurred = train.blur(x, train.draw_blur(8, 60, 1.0, cpu))
    torch.manual_seed(1)
    sigmas = torch.empty(8, 1).uniform_(0.1, 2.0)
    for v in range(8):
        torch.testing.assert_close(
            blurred[v],
            v2.functional.gaussian_blur(x[v], [7, 7], [float(sigmas[v])] * 2),
            atol=1e-5,
            rtol=1e-5,
        )
    assert torch.equal(train.blur(x, train.draw_blur(8, 60, 0.0, cpu)), x)


def test_solarisation_and_blur_are_of_the_views_that_they_belong_to(monkeypatch):
    """Only the random query is solarised; blur, where asked for, is always the reference's (released code,
    paper)."""
    given = []

    def colours(views, solarize=0.0, blur_probability=0.0):
        given.append((solarize, blur_probability))
        return views.float()

    monkeypatch.setattr(train, "colours", colours)
    batch = torch.utils.data.default_collate([train.Views(train.Scenes(1), view_settings())[0, 0]])
    for blur in (False, True):
        train.to_views(batch, view_settings(blur=blur))
    assert given == [(0, 0), (0.2, 0), (0, 0), (0, 1), (0.2, 0.1), (0, 0.5)]


def test_targets_follow_the_pixels():
    """Views of an image that says where each pixel is: matched patches show the same place."""
    image = torch.from_numpy(gradient(60, 60)).permute(2, 0, 1)

    class Source:
        def __len__(self):
            return 1

        def image(self, i):
            return image

    s = view_settings(image_size=64, focal_size=32, focal=4)
    dataset = train.Views(Source(), s)
    batch = torch.utils.data.default_collate([dataset[e, 0] for e in range(16)])
    views = train.to_views(batch, s, augment=False)

    def patches(x):
        return F.avg_pool2d(x[..., :2, :, :].flatten(0, -4).float(), 8)

    places = patches(views["reference"]).flatten(2)  # B,2,N
    for name in ("query", "focal"):
        images, targets = views[name], views[f"{name}_targets"]
        if name == "query":
            images, targets = images[:, None], targets[:, None]
        shown = patches(images).flatten(2).unflatten(0, images.shape[:2])  # B,F,2,n
        matched = places.gather(2, targets.clamp(min=0).flatten(1)[:, None].expand(-1, 2, -1))
        distance = (shown.transpose(1, 2).flatten(2) - matched).norm(dim=1)[targets.flatten(1) >= 0]
        size = 1 / 0.229 * 4 * 60 / 8 / 255  # a reference patch, in the picture's values
        assert (
            len(distance) > 50
            and float(distance.median()) < 0.6 * size
            and float(distance.max()) < 1.6 * size
        )


# ----------------------------------------------------------------------------------------- schedules


def test_schedules_and_groups():
    rates = [train.learning_rate(i, 100, 10, 0.5) for i in range(100)]
    assert (
        rates[0] == 0
        and rates[5] == pytest.approx(0.25)
        and rates[10] == 0.5
        and rates[-1] == pytest.approx(0.005)
    )
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert train.teacher_momentum(0, 100, 0.996) == pytest.approx(0.996)
    assert train.teacher_momentum(50, 100, 0.996) == pytest.approx(0.998)
    assert train.teacher_momentum(100, 100, 0.996) == 1
    decayed, free = train.parameter_groups(tiny(), 0.1)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])


# ---------------------------------------------------------------------------------------------- runs

SMALL = """
    --scenes 12 --val-images 4 --batch 4 --epochs 2 --image-size 32 --focal-size 16 --focal 2
    --patch-size 8 --dim 16 --depth 2 --heads 2 --mlp-dim 16 --prototypes 8 --head-hidden 8 --bottleneck 4
    --precision float32 --device cpu --workers 0 --log-every 2
""".split()
TIMES = ("images_per_second", "waiting", "memory_gib")


def launcher(processes, *torchrun_flags):
    """The command that starts a script in this many processes."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--master_port",
        str(free_port()),
        *torchrun_flags,
    ]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def run_train(out, *flags, processes=1, script=HERE / "train.py", torchrun_flags=(), **options):
    """Run train.py, or a script around it, as users do -> the finished process."""
    start = [*launcher(processes, *torchrun_flags), str(script)]
    command = [*start, *SMALL, "--out", str(out), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def metrics(out):
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(out, name="last.pt"):
    saved = torch.load(Path(out) / name, weights_only=True)
    return {**saved["model"], **{f"teacher.{k}": v for k, v in saved.get("teacher", {}).items()}}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*SMALL, "--out", str(out)]) == 0
    return out


def test_run_folder(whole_run):
    names = {p.name for p in whole_run.iterdir()}
    assert names == {
        "settings.json",
        "metrics.jsonl",
        "last.pt",
        "encoder.pt",
        "predictions.png",
        "curves.png",
    }
    settings = json.loads((whole_run / "settings.json").read_text())
    assert settings["mean"] == list(train.MEAN) and settings["dim"] == 16
    saved = torch.load(whole_run / "last.pt", weights_only=True)
    assert saved["settings"] == settings and saved["step"] == 6
    model = train.build(saved["settings"])  # without flags
    model.load_state_dict(saved["model"])
    encoder = torch.load(whole_run / "encoder.pt", weights_only=True)
    assert equal(encoder, {k[8:]: v for k, v in saved["teacher"].items() if k.startswith("encoder.")})
    assert "tensors loaded" in loca.load_encoder(model.encoder, loca.load_weights(whole_run / "encoder.pt"))
    assert "tensors loaded" in loca.load_encoder(
        model.encoder, loca.load_weights(whole_run / "last.pt", "teacher")
    )
    records = metrics(whole_run)
    assert [r["step"] for r in records if "loss" in r] == [2, 3, 4, 6]
    assert [r["step"] for r in records if "val_position_accuracy" in r] == [3, 6]
    with Image.open(whole_run / "predictions.png") as picture:
        small = np.asarray(picture.convert("RGB").resize((60, 30)))
        assert picture.size[0] > 800 and len(np.unique(small.reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_equals_one_that_was_never_stopped(whole_run, tmp_path, stop, monkeypatch):
    """Stopped by a signal in the middle of an epoch and of a log window; goes on with the same command."""
    after_step = train.Run.after_step

    def interrupt(self, done):
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(self, done)

    monkeypatch.setattr(train.Run, "after_step", interrupt)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert train.main([*SMALL, "--out", str(tmp_path)]) == train.REQUEUE
    monkeypatch.undo()
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
        signal.signal(number, handler)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == stop
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert metrics(tmp_path) == metrics(whole_run)
    assert equal(weights(tmp_path), weights(whole_run))


def test_killed_while_it_runs(whole_run, tmp_path):
    """SIGKILL at any moment: the next start goes on from the last whole checkpoint and ends with the same
    weights."""
    command = [sys.executable, str(HERE / "train.py"), *SMALL, "--save-minutes", "0", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.kill()
            break
    process.wait()
    done = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert done in (2, 3, 4)
    result = run_train(tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"at step {done}" in result.stdout and metrics(tmp_path) == metrics(whole_run)
    assert equal(weights(tmp_path), weights(whole_run))


def test_a_signal_passed_on_twice_is_one_and_a_later_one_ends_the_process(monkeypatch):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    processes, ended = train.Processes("cpu"), []
    try:
        processes.listen()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert processes.stop == signal.SIGTERM and not ended
        processes.asked -= 2  # as if two seconds had passed
        monkeypatch.setattr(signal, "raise_signal", ended.append)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_processes_that_see_different_checkpoints_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Processes, "sum", lambda self, values: [5.0])  # another one is at step 5
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "not all processes see the same checkpoint" in capsys.readouterr().err


def test_the_learning_rate_may_change_on_resume(tmp_path, capsys):
    assert train.main([*SMALL, "--epochs", "2", "--keep", "1", "--out", str(tmp_path)]) == 0
    os.replace(tmp_path / "epoch_0001.pt", tmp_path / "last.pt")
    assert train.main([*SMALL, "--epochs", "2", "--keep", "1", "--lr", "0.0005", "--out", str(tmp_path)]) == 0
    assert "resuming with --lr 0.0005, before it was" in capsys.readouterr().out


def test_a_signal_to_the_whole_process_group(whole_run, tmp_path):
    """As terminals and schedulers send it: the workers ignore it, the run saves and says that it can go on."""
    command = [sys.executable, str(HERE / "train.py"), *SMALL, "--workers", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == train.REQUEUE and "asked to stop: saved" in rest
    assert run_train(tmp_path).returncode == 0
    assert metrics(tmp_path) == metrics(whole_run)
    assert equal(weights(tmp_path), weights(whole_run))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds processes in Linux's /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_worker_is_named_and_none_outlives_its_parent(victim, tmp_path):
    command = [sys.executable, str(HERE / "train.py"), *SMALL, "--workers", "1", "--epochs", "500"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--out", str(tmp_path)], text=True, **pipes)
    for line in process.stdout:
        if line.startswith("step 10/"):
            break

    def children(pid):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    workers = [worker for child in children(process.pid) for worker in children(child)]
    assert workers  # the training loader's, perhaps the held-out images' too
    os.kill(process.pid if victim == "parent" else workers[0], signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    if victim == "worker":
        assert process.returncode == 2 and f"loader worker {workers[0]} died" in error, error
        assert len(error.splitlines()) == 1 and "fewer --workers" in error
    until = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("kept", [False, True])
def test_workers_end_with_the_reading(kept, monkeypatch):
    """Also where something, as the traceback of an error, still holds their loader's iterator."""
    start, held = train.DataLoader.__iter__, []
    if kept:
        monkeypatch.setattr(train.DataLoader, "__iter__", lambda self: held.append(start(self)) or held[-1])
    before, views = multiprocessing.active_children(), train.Views(train.Scenes(4), view_settings())
    batches = train.feed(views, 1, torch.device("cpu"), batch_sampler=[[(0, 0)]] * 100)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    others = train.feed(views, 1, torch.device("cpu"), batch_sampler=[[(0, 1)]])
    assert len(list(others)) == 1 and worker.is_alive()  # theirs alone
    batches.close()
    worker.join(10)
    assert not worker.is_alive() and worker.exitcode == (-signal.SIGKILL if kept else 0)


def test_reading_for_the_cpu_leaves_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("starts CUDA"))
    views = train.Views(train.Scenes(1), view_settings())
    assert len(list(train.feed(views, 0, torch.device("cpu"), batch_sampler=[[(0, 0)]]))) == 1


def test_two_processes_and_another_number_of_them(tmp_path):
    result = run_train(tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert (
        "2 processes on cpu" in result.stdout
        and "2 images per device x 2 x 1 accumulated = batch 4" in result.stdout
    )
    first = metrics(tmp_path)
    assert all(r["gradient_norm"] > 0 for r in first if "loss" in r)
    again = run_train(tmp_path)  # a finished run: says so and ends
    assert again.returncode == 0 and "resuming with processes: 1, before it was 2" in again.stdout
    assert metrics(tmp_path) == first


def test_accumulation_and_options_run(tmp_path, photos):
    """Every option that a run can have, in two runs; the teacher, schedule and clipping go once per step."""
    options = f"""
        --accumulate 2 --compile --grad-checkpoint --blur --keep 1 --clip 0 --tensorboard --masking unstructured
        --query-tokens 3 --masking-ratio 0.5 --student-temperature 0.2 --teacher-temperature 0.1 --seed 5
        --model Ti/16 --weight-decay 0.2 --momentum 0.9 --lr 0.01 --position-std 1 --warmup-epochs 1 --drop-path 0.2
        --data {photos} --val {photos} --cache-list {tmp_path / "list.npz"} --large-area 0.5 1
        --focal-area 0.1 0.3 --save-minutes 5 --position-weight 0.5 --feature-weight 2
    """
    flags = options.split()
    pytest.importorskip("tensorboard")
    with pytest.MonkeyPatch.context() as patch:
        compiled, eager = [], torch._dynamo.optimize("eager")
        patch.setattr(torch, "compile", lambda model: (compiled.append(model), eager(model))[1])
        assert train.main([*SMALL, "--out", str(tmp_path / "run"), *flags]) == 0
        assert len(compiled) == 1
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"epoch_0001.pt", "epoch_0002.pt", "last.pt"} <= names and any("tfevents" in n for n in names)
    assert [r["step"] for r in metrics(tmp_path / "run") if "loss" in r] == [2, 3, 4, 6]
    assert (tmp_path / "list.npz").exists()
    for flags in (
        ["--feature-weight", "0"],
        ["--single-image", "--masking", "first"],
        ["--steps", "1", "--focal", "0"],
    ):
        out = tmp_path / "".join(flags).replace("/", "")
        assert train.main([*SMALL, "--out", str(out), *flags]) == 0
        assert ("teacher" in torch.load(out / "last.pt", weights_only=True)) == (flags[0] == "--steps")


def test_checkpoints_that_are_kept(tmp_path):
    assert train.main([*SMALL, "--keep", "2", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("epoch*")} == {"epoch_0002.pt"}


def test_held_out_images_are_no_training_images(photos, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for i in range(30):
        (many / f"{i:02}.png").symlink_to(photos / "plain.png")
    s = train.read_settings([*SMALL, "--data", str(many), "--val-images", "9"], 1)
    trained, held_out = train.open_data(s, train.Processes("cpu"))
    names = [{images.name(i) for i in range(len(images))} for images in (trained, held_out)]
    assert [len(x) for x in names] == [27, 3] and len(names[0] | names[1]) == 30  # a tenth at most
    assert names[1] != {str(many / f"{i:02}.png") for i in range(3)}  # drawn, for a folder can be a class
    scenes = train.open_data(train.read_settings(SMALL, 1), train.Processes("cpu"))
    assert not {scenes[0].name(i) for i in range(12)} & {scenes[1].name(i) for i in range(4)}
    s = {**s, "val": str(many)}
    assert [len(images) for images in train.open_data(s, train.Processes("cpu"))] == [30, 9]


def test_processes_share_the_held_out_images(monkeypatch):
    """Two processes evaluate each held-out image once."""
    s = {**train.read_settings([*SMALL, "--val-images", "70"], 2), "precision": "float32", "workers": 0}
    model, numbers, feed = train.build(s), [], train.feed

    def record(*given, batch_sampler):
        numbers.extend(number for keys in batch_sampler for _, number in keys)
        return feed(*given, batch_sampler=batch_sampler)

    monkeypatch.setattr(train, "feed", record)
    teacher, images = loca.make_teacher(model), train.Scenes(70)
    place = SimpleNamespace(world=2, device=torch.device("cpu"), sum=torch.Tensor.tolist)
    for place.rank in (0, 1):
        figures = train.evaluate(model, teacher, images, s, place)
    assert sorted(numbers) == [*range(68)]  # whole batches: 2 processes x 2 batches x 17
    torch.manual_seed(99)
    assert train.evaluate(model, teacher, images, s, place) == figures  # the masks too are of the run's seed
    assert model.training


def test_the_time_of_an_evaluation_is_not_the_steps(tmp_path, monkeypatch):
    """The window of the next log line begins after it."""
    evaluate, ends = train.evaluate, []
    monkeypatch.setattr(
        train, "evaluate", lambda *given: (evaluate(*given), ends.append(time.perf_counter()))[0]
    )
    begins = spy(monkeypatch, train.Window, "read", lambda window, batch: window.begin)
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert len(begins) == 4  # read at steps 2, 3, 4 and 6, evaluated at 3 and 6
    assert begins[1] < ends[0] < begins[2]


def test_schedules_reach_the_steps(tmp_path, monkeypatch):
    momenta = spy(monkeypatch, loca, "update_teacher", lambda teacher, model, momentum: momentum)
    done = spy(monkeypatch, torch.optim.AdamW, "step", lambda *given: len(momenta))
    most = spy(monkeypatch, nn.utils, "clip_grad_norm_", lambda parameters, most: most)
    seeds = spy(monkeypatch, train, "set_seed", lambda *parts: parts)
    flags = "--log-every 1 --lr 0.01 --momentum 0.9 --clip 0.3 --accumulate 2 --seed 4".split()
    assert train.main([*SMALL, *flags, "--out", str(tmp_path)]) == 0
    assert momenta == [train.teacher_momentum(step, 6, 0.9) for step in range(6)]
    rates = [r["lr"] for r in metrics(tmp_path) if "loss" in r]  # batch 4; warm-up is half the run at most
    assert rates == [train.learning_rate(step, 6, 3, 0.01 * 4 / 1024) for step in range(6)]
    assert done == [*range(6)] and most == [0.3] * 6  # the teacher follows after each of AdamW's steps
    assert {(4, step, 0, micro) for step in range(6) for micro in (0, 1)} <= set(seeds)
    groups = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_settings_reach_the_model():
    s = train.read_settings([*SMALL, *"--grad-checkpoint 1 --position-std 3 --drop-path 0.4".split()], 1)
    model = train.build(s)
    assert model.encoder.grad_checkpoint == 1 and 2 < model.encoder.pos_embed.std() < 4
    assert [block.drop_path for block in model.encoder.blocks] == [0, 0.4]


def test_fixed_positions(tmp_path):
    """Sines and cosines, number by number; training leaves them as they are."""
    positions = loca.sine_positions((2, 3), 8)
    for row, column, k in itertools.product(range(2), range(3), range(2)):
        angles = (row * 0.01**k, column * 0.01**k)  # 10000 ** (-k / 2)
        expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
        assert positions[0, 3 * row + column, k::2].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="width 6"):
        loca.sine_positions((2, 3), 6)
    assert train.main([*SMALL, "--steps", "2", "--fixed-positions", "--out", str(tmp_path)]) == 0
    saved = weights(tmp_path)
    for name in ("encoder.pos_embed", "teacher.encoder.pos_embed"):
        torch.testing.assert_close(saved[name], loca.sine_positions((4, 4), 16), rtol=0, atol=1e-7)


def test_a_run_that_does_not_learn_is_warned_of_once(monkeypatch):
    """A loss at chance after a quarter of the steps, few prototypes in use, features that are all alike."""
    run, said = train.Pretraining.__new__(train.Pretraining), []
    run.s = {**train.read_settings(SMALL, 1), "prototypes": 100}
    run.processes = SimpleNamespace(say=said.append, main=False, world=1)
    run.steps, run.epoch_steps, run.epoch_images, run.warned, run.log = 1200, 3, 12, set(), None
    run.model, run.teacher, run.val_images = train.build(run.s), True, train.Scenes(4)
    run.chances = {"position_loss": math.log(16), "cross_entropy": math.log(100)}
    fine = {"position_loss": 1.0, "cross_entropy": 2.0, "prototype_perplexity": 50.0}
    chance = {**fine, "position_loss": math.log(16)}
    monkeypatch.setattr(train.Run, "report", lambda *given: None)
    run.report(400, fine)
    run.report(300, chance)  # too early to tell
    assert not said
    run.report(400, chance)
    run.report(500, chance)
    assert len(said) == 1 and "position_loss is still at chance" in said[0]
    run.report(500, {**fine, "prototype_perplexity": 1.5})
    assert len(said) == 2 and "use 2 of 100 prototypes" in said[1]
    figures = {"val_position_accuracy": 0.5, "val_position_loss": 1.0, "val_prototype_perplexity": 50.0}
    figures |= {"val_target_entropy": 1.0, "effective_rank": 9.0}
    run.warned.clear()
    for spread in (0.9, 0.01):
        monkeypatch.setattr(train, "evaluate", lambda *given: {**figures, "feature_std": spread})
        run.evaluate(3)
        assert any("nearly the same everywhere" in text for text in said) == (spread == 0.01)


def test_held_out_figures_every_so_many_epochs(whole_run, tmp_path):
    assert train.main([*SMALL, "--val-every", "2", "--out", str(tmp_path)]) == 0
    steps = [[r["step"] for r in metrics(out) if "val_position_loss" in r] for out in (whole_run, tmp_path)]
    assert steps == [[3, 6], [6]]


def test_bf16_follows_float32(tmp_path):
    """The same 100 steps in both precisions: losses 0.02 apart in the mean, 0.1 at most, as measured; here
    within twice that."""
    losses = {}
    for precision in ("bf16", "float32"):
        flags = (
            f"--precision {precision} --epochs 34 --steps 100 --log-every 1 --val-every 50 --lr 0.1".split()
        )
        assert train.main([*SMALL, *flags, "--out", str(tmp_path / precision)]) == 0
        losses[precision] = torch.tensor([r["loss"] for r in metrics(tmp_path / precision) if "loss" in r])
    difference = (losses["bf16"] - losses["float32"]).abs()
    assert len(difference) == 100 and 0 < difference.mean() < 0.04 and difference.max() < 0.2


def test_gradients_of_accumulated_micro_batches():
    """Half the loss of each of two micro-batches: their mean gradient (position loss, which does not couple
    images)."""
    model, views = tiny(prototypes=0, drop_path=0.0), tiny_views(4)
    views["query_targets"][:], views["focal_targets"][:] = 3, 5  # the same number of targets in each half
    chosen = {"visible": torch.arange(3), "keep": torch.arange(5)}
    model(views, **chosen)["loss"].backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (model({k: v[half] for k, v in views.items()}, **chosen)["loss"] / 2).backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, whole)


def test_micro_batches_that_are_alike_have_the_gradient_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "to_views", lambda batch, s: tiny_views())
    monkeypatch.setattr(loca, "choose_tokens", lambda total, count, kind, device: torch.arange(count))
    for n in (1, 2):
        flags = f"--steps 1 --val-images 0 --log-every 1 --feature-weight 0 --drop-path 0 --accumulate {n}".split()
        assert train.main([*SMALL, *flags, "--out", str(tmp_path / str(n))]) == 0
    one, two = (metrics(tmp_path / str(n))[0] for n in (1, 2))
    assert one["gradient_norm"] == pytest.approx(two["gradient_norm"]) and one["loss"] == pytest.approx(
        two["loss"]
    )


def test_window_means():
    """Over micro-batches, steps and processes; the speed is of the steps since the process started."""
    place = SimpleNamespace(
        world=2, rank=0, device=torch.device("cpu"), sum=lambda x: [2 * v for v in x.tolist()]
    )
    window = train.Window(("loss", "gradient_norm"), place, 10, torch.tensor([3.0, 12.0, 3.0]))
    window.begin = time.perf_counter() - 100
    window.add(3, [{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(7.0)}], torch.tensor(1.0))
    record = window.read(50)
    assert (record["loss"], record["gradient_norm"]) == (4, 1)
    assert record["images_per_second"] == pytest.approx(0.5, rel=0.1)  # one step of 50 images in 100 s


def test_the_log_is_cut_at_the_step_that_comes_next(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in (2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"st')
    train.Log(tmp_path, 4).write({"step": 4})
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2]) + '{"step": 4}\n'


def test_processes_stay_equal_and_stop_together(tmp_path):
    """Two micro-batches in two processes; the second process alone is told to stop."""
    fault = (
        "total = sum(p.detach().double().sum() for p in self.parameters())\n"
        "        both = [total.clone(), total.clone()]\n"
        "        loca.dist.all_gather(both, total)\n"
        "        assert both[0] == both[1], both\n"
        "        if step == 4 and rank == 1: os.kill(os.getpid(), 15)"
    )
    result = run_with_fault(tmp_path, fault, 2, flags=("--accumulate", "2"))
    assert "asked to stop: saved at step 3" in result.stdout, result.stderr


def test_the_first_bad_step_is_named():
    names = ("loss", "gradient_norm")
    window = train.Window(names, SimpleNamespace(world=1, rank=0, device=torch.device("cpu")), 10)
    for step, norm in enumerate((1.0, math.inf, math.nan, 2.0)):
        window.add(step, [{"loss": torch.tensor(float(step))}], torch.tensor(norm))
    with pytest.raises(train.Problem, match="step 1: .* loss 1, gradient_norm inf"):
        window.check()


def test_grad_checkpoint_changes_no_gradient(monkeypatch):
    views, gradients = tiny_views(), []
    calls = spy(monkeypatch, loca, "checkpoint", lambda block, *given, **options: block)
    for blocks in (0, 1, 1000):
        model = tiny(prototypes=0)
        model.encoder.grad_checkpoint = blocks
        torch.manual_seed(7)
        model(views)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        views_encoded = 3  # reference, random query, focal queries
        assert calls == [*model.encoder.blocks[:blocks]] * views_encoded
        calls.clear()
    torch.testing.assert_close(gradients[1:], gradients[:1] * 2)


def run_with_fault(folder, fault, processes, *torchrun_flags, flags=()):
    """Run train.py, saving at every step, with a fault: code for each training step, which sees `step` (from 0),
    `rank`, `restarts` and the step's `losses` -> the finished process."""
    script = folder / "fault.py"
    script.write_text(
        "import itertools, os, sys, loca, train\n"
        "rank, restarts = (int(os.environ.get(k, '0')) for k in ('RANK', 'TORCHELASTIC_RESTART_COUNT'))\n"
        "forward, steps = loca.LOCA.forward, itertools.count()\n"
        "def faulty(self, *args, **kwargs):\n"
        "    losses = forward(self, *args, **kwargs)\n"
        "    if self.training:\n"
        "        step = next(steps)\n"
        f"        {fault}\n"
        "    return losses\n"
        "loca.LOCA.forward = faulty\n"
        "sys.exit(train.main())\n"
    )
    how = {"script": script, "torchrun_flags": torchrun_flags, "env": {**os.environ, "PYTHONPATH": str(HERE)}}
    return run_train(folder / "run", "--save-minutes", "0", *flags, processes=processes, **how)


@pytest.mark.parametrize("processes", [1, 2])
def test_nan_stops_all_processes_at_its_step(tmp_path, processes):
    """NaN put into the last process's loss at step 3."""
    fault = f"if step == 3 and rank == {processes - 1}: losses['loss'] = losses['loss'] * float('nan')"
    result = run_with_fault(tmp_path, fault, processes)
    assert result.returncode != 0
    assert result.stderr.count("train.py: step 3: the loss or its gradient is not finite") == processes, (
        result.stderr
    )
    assert "position_loss" in result.stderr
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 3 and all(v.isfinite().all() for v in saved["model"].values())


def test_one_process_lists_a_folder_for_all(photos, tmp_path):
    flags = ["--data", photos, "--val", photos, "--cache-list", tmp_path / "list.npz", "--steps", "1"]
    result = run_train(tmp_path / "run", *flags, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("image names from") == 1  # the other process waited and read the list


@pytest.mark.parametrize("script", [train, finetune_seg])
def test_help_shows_defaults(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "minutes between checkpoints (10.0)" in said and "of everything random (0)" in said
    assert "(None)" not in said and "(False)" not in said


def test_a_process_that_dies_takes_the_others_down_and_torchrun_starts_them_again(tmp_path):
    fault = "if step == 3 and rank == 1 and restarts == 0: os._exit(7)"
    result = run_with_fault(tmp_path, fault, 2, "--max_restarts", "1")
    assert result.returncode == 0 and "(exitcode: 7)" in result.stderr, result.stderr
    assert "at step 3" in result.stdout
    steps = [r["step"] for r in metrics(tmp_path / "run") if "loss" in r]
    assert steps == sorted(set(steps)) and f"step {steps[-1]}/{steps[-1]} " in result.stdout


def short_life(rank, port, restarts):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(where | {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": restarts})
    train.Processes("cpu").sum([1.0])
    os._exit(0)  # as one that is killed: without a word to the store


def test_a_restart_meets_no_address_of_the_processes_before_it():
    """torchrun's store outlives the processes: in each life both leave their addresses in new entries."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    entries = []
    for restarts in ("0", "1"):
        torch.multiprocessing.spawn(short_life, (str(port), restarts), nprocs=2)
        entries.append(store.num_keys())
    assert entries[1] >= entries[0] + 2


def test_unreadable_images(photos, tmp_path, capfd):
    """One bad file is replaced and named once; many stop the run."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(24):
        Image.fromarray(gradient()).save(folder / f"{i:02d}.png")
    (folder / "05.png").write_bytes(b"")
    run = [*SMALL, "--data", str(folder), "--val-images", "0"]
    assert train.main([*run, "--out", str(tmp_path / "one")]) == 0
    assert capfd.readouterr().err.count("05.png") == 1
    for i in range(8, 12):
        (folder / f"{i:02d}.png").write_bytes((folder / "00.png").read_bytes()[:60])
    assert train.main([*run, "--out", str(tmp_path / "many")]) == 2
    assert "over 5 %" in capfd.readouterr().err
    for path in folder.iterdir():
        path.write_text("text")
    for workers in "01":  # a worker process has no other words for it
        assert train.main([*run, "--workers", workers, "--out", str(tmp_path / "all")]) == 2
        error = capfd.readouterr().err
        assert error.startswith("train.py: 24 images in a row cannot be read, ") and error.count("\n") == 1


def test_damaged_images_never_break_a_view(photos, tmp_path):
    """A thousand files with bytes flipped or cut: every view has its shape, whatever the decoders say."""
    r = np.random.RandomState(0)
    sources = [p.read_bytes() for p in sorted(photos.rglob("*")) if p.suffix.lower() in train.EXTENSIONS]
    Image.fromarray(gradient()).save(tmp_path / "0000.png")
    for i in range(1, 1001):
        data = bytearray(sources[i % len(sources)])
        if i % 3 == 0:
            del data[r.randint(len(data)) :]
        for _ in range(r.randint(1, 20)):
            if data:
                data[r.randint(len(data))] = r.randint(256)
        (tmp_path / f"{i:04d}.jpg").write_bytes(data)
    dataset = train.Views(train.Folder(str(tmp_path), train.find_images(tmp_path)), view_settings())
    broken = 0
    for i in range(len(dataset)):
        item = dataset[0, i]
        assert item["reference"].shape == (3, 32, 32) and item["focal"].shape == (3, 3, 16, 16)
        broken += item["unreadable"] != ""
    assert 300 < broken < 1000


def test_files_are_never_half_written(tmp_path):
    path = tmp_path / "last.pt"
    train.save_file(path, {"step": 1})

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))  # stands for a disk with little room left
    try:
        with pytest.raises(train.Problem, match="cannot write .*last.pt: .*File too large.*is untouched"):
            train.save_file(path, {"step": 2, "much": torch.randn(2**14)})
        with pytest.raises(train.Problem, match="cannot write .*text"):
            train.save_text(tmp_path / "text", "x" * 2**15)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(train.Problem, match="cannot write .*File exists"):
        train.save_text(path / "below a file", "")
    assert train.load_file(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(train.Problem, match="cannot read the checkpoint"):
        train.load_file(path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--image-size 100", "--image-size 100 is not a multiple of the patch, 8: try 96"),
        ("--focal-size 20", "--focal-size 20"),
        ("--heads 5", "5 heads do not divide the width 16"),
        ("--masking-ratio 1.2", "masking ratio is 1.2"),
        ("--query-tokens 17", "17 query tokens cannot be drawn from the view's 16"),
        ("--batch 5 --accumulate 2", "--batch 5 is not a multiple"),
        ("--batch 13", "12 images are fewer than one batch"),
        ("--data nowhere", "there is no such folder"),
        ("--prototypes 0", "--feature-weight 0"),
        ("--position-weight 0 --feature-weight 0", "nothing is left"),
        ("--position-weight 0 --single-image", "nothing is left"),
        ("--large-area 0.5 0.2", "--large-area 0.5 0.2"),
        ("--momentum 1.5", "--momentum 1.5"),
        ("--drop-path 1", "--drop-path 1"),
        ("--position-std 0", "--position-std 0"),
        ("--epochs 0", "--epochs 0"),
        ("--steps 0", "--steps 0"),
        ("--focal -1", "--focal -1"),
        ("--device cuda:99", "--device cuda:99"),
    ],
)
def test_impossible_arguments(flags, said, tmp_path, capsys):
    assert train.main([*SMALL, "--out", str(tmp_path), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and said in error and error.count("\n") == 1


def test_a_folder_of_another_run_is_refused(whole_run, capsys):
    assert train.main([*SMALL, "--out", str(whole_run), "--dim", "32"]) == 2
    error = capsys.readouterr().err
    assert "--dim 16, not 32" in error and error.count("\n") == 1
    for flags in (
        "--seed 1",
        "--batch 2",
        "--scenes 16",
        "--momentum 0.5",
        "--weight-decay 1",
        "--masking first",
    ):
        assert train.main([*SMALL, "--out", str(whole_run), *flags.split()]) == 2
        assert f", not {flags.split()[1]}" in capsys.readouterr().err


def test_collapse_figures():
    spread, rank = train.feature_spread(torch.ones(50, 8) + 1e-6 * torch.randn(50, 8))
    assert spread < 1e-4
    torch.manual_seed(0)
    spread, rank = train.feature_spread(torch.randn(4000, 8))
    assert spread == pytest.approx(1, abs=0.02) and rank == pytest.approx(8, abs=0.1)
    assert train.feature_spread(torch.randn(4000, 2) @ torch.randn(2, 8))[1] < 2.01


def test_presets_give_way_to_what_is_told(tmp_path):
    for preset, flags in ((train.SMALL_PRESET, ["--small"]), (train.SCENES_PRESET, [])):
        s = train.read_settings([*flags, "--dim", "96", "--seed", "3"], 1)
        assert {k: s[k] for k in preset} == {**preset, "dim": 96} and s["seed"] == 3
    s = train.read_settings(["--small", "--data", "photos", "--epochs", "100"], 1)
    assert s["epochs"] == 100 and s["steps"] is None
    assert train.read_settings(["--data", "photos"], 1)["batch"] == 1024
    flags = ["--small", "--data", f"camvid:{tmp_path}", "--init", "none", "--lr", "0.1"]
    s, _ = finetune_seg.read_settings(flags, 1)
    sides = {"crop": [128, 128], "stride": [64, 64]}
    assert {k: s[k] for k in finetune_seg.SMALL_PRESET} == {**finetune_seg.SMALL_PRESET, **sides, "lr": 0.1}
    flags = ["--small", "--data", f"camvid:{tmp_path}", "--init", "none", "--optimizer", "sgd"]
    assert finetune_seg.read_settings(flags, 1)[0]["lr"] == finetune_seg.DATASETS["camvid"].lr


def test_workers_are_shared_out_also_where_the_own_cores_are_not_known(monkeypatch):
    """As on macOS, which has no os.sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    settings = {"device": "cpu", "precision": "float32", "workers": None}
    assert train.launch("train.py", lambda *_: (settings,), lambda s, processes: s["workers"]) == 3


def test_bench(photos, capsys, monkeypatch):
    clock, threads = train.clock, torch.get_num_threads()
    monkeypatch.setattr(train, "clock", lambda function, device, *_: clock(function, device, 0.1))
    assert train.main([*SMALL, "--bench", "--data", str(photos)]) == 0
    assert torch.get_num_threads() == threads
    said = capsys.readouterr().out
    for words in ("decode and crops", "colours", "step, batch 4", "MFU", "peak memory", "limits"):
        assert words in said


def test_a_missing_folder_is_named_with_its_flag(photos, tmp_path, capsys):
    flags = [*SMALL, "--data", str(photos), "--val", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert train.main(flags) == 2
    assert f"train.py: --val {tmp_path}/none: there is no such folder" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_freed_memory_is_kept_for_the_next_step():
    code = (
        "import resource, train, torch\ntrain.Processes('cpu')\n"
        "for _ in range(4): torch.ones(2**25); print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=90)
    *_, earlier, last = map(int, said.stdout.split())
    assert last - earlier < 100  # an array has 32,768 pages


def test_bench_is_of_one_process():
    with pytest.raises(train.Problem, match="without torchrun"):
        train.bench({}, SimpleNamespace(world=2))


def test_the_command_line_names_every_flag_once():
    text = train.make_parser().format_help()
    settings = train.read_settings([*SMALL], 1)
    assert all(
        f"--{name.replace('_', '-')}" in text for name in settings if name not in ("world", "mean", "std")
    )
    assert train.read_settings(["--data", "x"], 1)["batch"] == 1024  # the released recipe


def test_colours_of_features_do_not_depend_on_the_sign_of_a_component(monkeypatch):
    encoder, image, svd = tiny().encoder, torch.from_numpy(gradient()).permute(2, 0, 1), torch.linalg.svd
    picture = np.asarray(train.feature_colours(encoder, image, 64, torch.device("cpu")))
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: SimpleNamespace(Vh=-svd(*a, **k).Vh))
    assert (np.asarray(train.feature_colours(encoder, image, 64, torch.device("cpu"))) == picture).all()
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_show_and_curves(whole_run, seg, photos, tmp_path, capsys):
    out = tmp_path / "picture.png"
    images = [str(photos / "plain.png"), str(photos / "exif.jpg")]
    assert train.main([*SMALL, "--show", str(whole_run / "last.pt"), *images, "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.height == 24 + 2 * 116 + 20 + 2 * 116
    assert train.main([*SMALL, "--curves", str(whole_run), str(whole_run), "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size == (760, 440 + 32)
        # the learning rate's line ends at the bottom right, where the schedule does
        assert np.asarray(picture.convert("RGB"))[220 + 22 + 160 :, 700:750].min() < 100
    half = tmp_path / "half"  # stopped while a line of the log was written
    half.mkdir()
    (half / "metrics.jsonl").write_text((whole_run / "metrics.jsonl").read_text() + '{"step": 7, "lo')
    shutil.copy(whole_run / "settings.json", half)
    assert train.main([*SMALL, "--curves", str(half), "--out", str(out)]) == 0
    (half / "settings.json").unlink()
    single = tmp_path / "single"  # has no reference to show positions in
    assert train.main([*SMALL, "--single-image", "--steps", "1", "--out", str(single)]) == 0
    assert train.main([*SMALL, "--show", str(single / "last.pt"), *images, "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.height == 20 + 2 * 116
    capsys.readouterr()
    for flags, said in (
        (["--show", "nowhere.pt"], "no such checkpoint"),
        (["--show", str(whole_run / "last.pt"), "nowhere.png"], "cannot read an image"),
        (["--show", str(whole_run / "encoder.pt")], "not a checkpoint of train.py"),
        (["--show", str(seg / "run/last.pt")], "not a checkpoint of train.py"),
        (["--curves", str(tmp_path)], "no metrics.jsonl"),
        (["--curves", str(half)], "no settings.json"),
    ):
        assert train.main([*SMALL, *flags, "--out", str(out)]) == 2
        assert said in capsys.readouterr().err
    assert train.main([*SMALL, "--curves", str(whole_run), "--out", str(tmp_path)]) == 2


# ------------------------------------------------------------------------------------------ segmentation


def slow_confusion(truth, predicted, classes):
    matrix = np.zeros((classes, classes), int)
    for row in range(truth.shape[0]):
        for column in range(truth.shape[1]):
            if truth[row, column] != 255:
                matrix[truth[row, column], predicted[row, column]] += 1
    return matrix


def test_confusion_matrix():
    r = np.random.RandomState(0)
    truth, predicted = r.randint(0, 5, (13, 9)).astype(np.uint8), r.randint(0, 5, (13, 9))
    truth[r.rand(13, 9) < 0.2] = 255
    got = finetune_seg.confusion(torch.from_numpy(truth), torch.from_numpy(predicted), 5)
    assert got.dtype == torch.long and (got.numpy() == slow_confusion(truth, predicted, 5)).all()


def test_scores_leave_out_classes_in_neither_truth_nor_prediction():
    matrix = np.array([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = finetune_seg.scores(matrix)
    assert result["miou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert result["pixel_accuracy"] == pytest.approx(9 / 12)
    assert result["mean_accuracy"] == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert np.isnan(result["iou"][2:]).all()
    matrix[0, 2] = 1  # predicted, never true: counts as 0 for mIoU, has no accuracy
    result = finetune_seg.scores(matrix)
    assert result["miou"] == pytest.approx((6 / 10 + 3 / 6 + 0) / 3)
    assert result["mean_accuracy"] == pytest.approx((6 / 9 + 3 / 4) / 2)


def slow_average_precision(confidence, present):
    """Recall steps times precision at every threshold, straight from the definition."""
    total, before = 0.0, 0
    for threshold in sorted(set(confidence), reverse=True):
        chosen = [p for c, p in zip(confidence, present) if c >= threshold]
        total += (sum(chosen) - before) / sum(present) * sum(chosen) / len(chosen)
        before = sum(chosen)
    return total


def test_average_precision():
    r = np.random.RandomState(1)
    for _ in range(50):
        confidence, present = r.randint(0, 8, 12) / 8, r.rand(12) < 0.4
        present[r.randint(12)] = True
        assert finetune_seg.average_precision(confidence, present) == pytest.approx(
            slow_average_precision(confidence.tolist(), present.tolist())
        )
    assert finetune_seg.average_precision(np.array([0.9, 0.8, 0.1]), np.array([True, True, False])) == 1


class Place(nn.Module):
    """Logits that depend on a pixel and on its place in the window."""

    def forward(self, x):
        place = torch.linspace(0, 1, x.shape[-2] * x.shape[-1]).view(x.shape[-2:])
        return torch.stack([x.sum(1) * place, x[:, 0] - place, x[:, 1] ** 2], dim=1)


@pytest.mark.parametrize("height, width", [(23, 31), (8, 8), (5, 40), (3, 2), (16, 8)])
def test_sliding_window_averages_pixel_by_pixel(height, width):
    torch.manual_seed(0)
    image, window, stride = torch.randn(3, height, width), (8, 10), (5, 4)
    padded = torch.zeros(3, max(height, 8), max(width, 10))
    padded[:, :height, :width] = image
    lists = {}
    for top in sorted({min(y, padded.shape[1] - 8) for y in range(0, padded.shape[1], 5)}):
        for left in sorted({min(x, padded.shape[2] - 10) for x in range(0, padded.shape[2], 4)}):
            logits = Place()(padded[None, :, top : top + 8, left : left + 10])[0]
            for y in range(8):
                for x in range(10):
                    lists.setdefault((top + y, left + x), []).append(logits[:, y, x])
    expected = torch.stack(
        [torch.stack([torch.stack(lists[y, x]).mean(0) for x in range(width)], 1) for y in range(height)], 1
    )
    for batch in (1, 3, 100):
        got = finetune_seg.sliding_window(Place(), image, window, stride, batch)
        assert got.shape == (3, height, width)
        torch.testing.assert_close(got, expected)


def test_multi_scale_is_the_mean_over_six_scales_and_flips(monkeypatch):
    image = torch.from_numpy(gradient()).permute(2, 0, 1)
    sizes = spy(monkeypatch, finetune_seg, "sliding_window", lambda model, view, *given: view.shape[1:])
    s = {
        "multi_scale": True,
        "base_size": 16,
        "precision": "float32",
        "window": [8, 8],
        "stride": [8, 8],
        "window_batch": 9,
    }
    straight, mirrored = (finetune_seg.class_probabilities(Place(), x, s) for x in (image, image.flip(-1)))
    torch.testing.assert_close(straight, mirrored.flip(-1))
    torch.testing.assert_close(straight.sum(0), torch.ones(40, 60))
    expected = [
        finetune_seg.scaled_size(40, 60, 16 * x) for x in (0.5, 0.75, 1, 1.25, 1.5, 1.75) for _ in "ab"
    ]
    assert sizes == expected * 2


def test_windows_end_at_the_border():
    assert finetune_seg.window_starts(512, 512, 512) == [0]
    assert finetune_seg.window_starts(1024, 512, 512) == [0, 512]
    assert finetune_seg.window_starts(700, 512, 512) == [0, 188]


def dominated(labels, box):
    """Whether one class fills over 75 % of a crop, counted in a plain loop."""
    top, left, height, width = box
    counts = {}
    for row in labels[top : top + height, left : left + width].tolist():
        for label in row:
            counts[label] = counts.get(label, 0) + (label != 255)
    return sum(counts.values()) == 0 or max(counts.values()) > 0.75 * sum(counts.values())


class Counting:
    """A random generator that counts the crops drawn from it."""

    def __init__(self, seed):
        self.rng, self.calls = np.random.default_rng(seed), 0

    def integers(self, n):
        self.calls += 1
        return self.rng.integers(n)


def test_crops_of_one_class_are_drawn_again():
    labels = np.zeros((40, 60), np.uint8)
    labels[10:25, 20:38] = 1
    labels[30:36, 3:20] = 255
    redrawn = 0
    for seed in range(60):
        rng = Counting(seed)
        box = finetune_seg.choose_crop(labels, (16, 16), rng)
        assert box[0] + box[2] <= 40 and box[1] + box[3] <= 60 and box[2:] == (16, 16)
        drawn = rng.calls // 2
        assert drawn == 11 or not dominated(labels, box)
        replay = np.random.default_rng(seed)  # all crops before the last were dominated
        for i in range(drawn):
            again = int(replay.integers(25)), int(replay.integers(45)), 16, 16
            assert dominated(labels, again) or i == drawn - 1
        assert again == box
        redrawn += drawn > 1
    assert redrawn > 10
    rng = Counting(0)
    finetune_seg.choose_crop(
        np.full((9, 9), 255, np.uint8), (4, 4), rng
    )  # nothing to count: the last is taken
    assert rng.calls == 22
    assert finetune_seg.choose_crop(labels[:8, :5], (16, 16), rng) == (0, 0, 8, 5)


def test_augmentation_keeps_pixels_and_labels_together(monkeypatch):
    monkeypatch.setattr(finetune_seg, "distort", lambda image, rng: image)
    labels = torch.zeros(40, 56, dtype=torch.uint8)
    labels[:, 28:], labels[20:] = 4, labels[20:] + 8
    image = (labels * 15).expand(3, -1, -1).contiguous()
    padded = 0
    for seed in range(40):
        view, target = finetune_seg.augment(image, labels, (48, 32), 40, np.random.default_rng(seed))
        assert view.shape == (3, 48, 32) and target.shape == (48, 32)
        assert view.dtype == target.dtype == torch.uint8
        assert set(target.unique().tolist()) <= {0, 4, 8, 12, 255}  # a scaled mask has no class in between
        inside = target != 255
        padded += int((~inside).any())
        assert ((view[0].float() - 15.0 * target).abs() < 1)[inside].float().mean() > 0.8  # edges are blurred
        outside = train.plain_colours(view)[:, ~inside]
        assert outside.numel() == 0 or outside.abs().max() < 0.02
    assert 5 < padded < 40


def test_distortion_stays_in_range_and_is_of_the_seed():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    views = [finetune_seg.distort(image, np.random.default_rng(seed)) for seed in range(30)]
    assert all(view.dtype == torch.uint8 and view.shape == image.shape for view in views)
    assert torch.equal(views[3], finetune_seg.distort(image, np.random.default_rng(3)))
    assert sum(not torch.equal(view, image) for view in views) > 20


def test_subsets_are_nested_and_seeded():
    whole = [set(finetune_seg.choose_subset(400, 1 / n, 3).tolist()) for n in (1, 2, 8, 32, 1000)]
    assert [len(part) for part in whole] == [400, 200, 50, 12, 1]
    assert all(small < large for large, small in zip(whole, whole[1:]))
    assert whole[2] != set(finetune_seg.choose_subset(400, 1 / 8, 4).tolist())


def test_scaled_sizes():
    assert finetune_seg.scaled_size(600, 400, 200) == (300, 200)
    assert finetune_seg.scaled_size(3, 20000, 512)[1] == 4 * 512


def test_loss_is_a_plain_mean_over_labelled_pixels():
    logits, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5), dtype=torch.uint8)
    labels[0, 1], labels[1, 2, 3] = 255, 255
    values = [
        -logits[b, :, y, x].log_softmax(0)[int(labels[b, y, x])]
        for b in range(2) for y in range(3) for x in range(5) if labels[b, y, x] != 255
    ]  # fmt: skip
    torch.testing.assert_close(finetune_seg.segmentation_loss(logits, labels), torch.stack(values).mean())
    assert finetune_seg.segmentation_loss(logits, torch.full((2, 3, 5), 255)) == 0


def test_bit_palette():
    assert finetune_seg.bit_palette(4, 0) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert finetune_seg.bit_palette(21, 0)[15] == (192, 128, 128) and finetune_seg.bit_palette(1) == (
        (128, 0, 0),
    )
    assert len(set(finetune_seg.bit_palette(253))) == 253


# -------------------------------------------------------------------------------------- data set layouts


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels), mode).save(path)


def picture(height=4, width=6):
    return np.random.RandomState(height * width).randint(0, 255, (height, width, 3)).astype(np.uint8)


def stripes(values):
    """A mask of 4x6 pixels, one column a value, the last one repeated."""
    values = list(values) + [list(values)[-1]] * (6 - len(values))
    return np.array([values] * 4).astype(np.uint8)


# name: image, mask and list files of the training and validation part, mask values, classes that they are
LAYOUTS = {
    "ade20k": (("images/{}/a.jpg", "annotations/{}/a.png", None), ("training", "validation"), (0, 1, 2, 150),
               (255, 0, 1, 149)),
    "voc2012": (("VOCdevkit/VOC2012/JPEGImages/{}_1.jpg", "VOCdevkit/VOC2012/SegmentationClass/{}_1.png",
                 "VOCdevkit/VOC2012/ImageSets/Segmentation/{}.txt"), ("train", "val"), (0, 20, 255), (0, 20, 255)),
    "context": (("JPEGImages/{}_1.jpg", "SegmentationClassContext/{}_1.png", "ImageSets/SegmentationContext/{}.txt"),
                ("train", "val"), (0, 1, 59), (255, 0, 58)),
    "cityscapes": (("leftImg8bit/{}/ulm/ulm_0_leftImg8bit.png", "gtFine/{}/ulm/ulm_0_gtFine_labelIds.png", None),
                   ("train", "val"), (0, 6, 7, 8, 23, 33), (255, 255, 0, 1, 10, 18)),
    "bdd100k": (("images/10k/{}/x-1.jpg", "labels/sem_seg/masks/{}/x-1.png", None), ("train", "val"), (0, 18, 255),
                (0, 18, 255)),
    "camvid": (("{}/f_1.png", "{}annot/f_1.png", None), ("train", "val"), (0, 10, 11), (0, 10, 255)),
    "idd": (("leftImg8bit/{}/12/9_leftImg8bit.jpg", "gtFine/{}/12/9_gtFine_labellevel3Ids.png", None), ("train", "val"),
            (0, 25, 255), (0, 25, 255)),
    "sunrgbd": (("image/{}/img-000007.jpg", "label37/{}/img37labels-000007.png", None), ("train", "test"), (0, 1, 37),
                (255, 0, 36)),
    "isprs": (("img_dir/{}/2_10_0_0_512_512.png", "ann_dir/{}/2_10_0_0_512_512.png", None), ("train", "val"), (0, 1, 6),
              (255, 0, 5)),
    "folder": (("images/{}/a.b.webp", "masks/{}/a.b.png", None), ("train", "val"), (0, 3, 255), (0, 3, 255)),
}  # fmt: skip
SPLIT_OF = {"training": "train", "validation": "val", "test": "val", "train_val": "train", "TEST": "val"}


def read_all(name, folder, split):
    parts, classes, palette = finetune_seg.open_data(
        {"name": name, "folder": str(folder), "classes": None}, train.Processes("cpu"), (split,)
    )
    assert len(classes) == len(palette) == len(set(classes))
    return parts[0], classes


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_with_integer_masks(name, tmp_path):
    (image, mask, listing), folders, values, expected = LAYOUTS[name]
    for part in folders:
        save(tmp_path / image.format(part), picture())
        save(tmp_path / mask.format(part), stripes(values))
        save(
            tmp_path / image.format(part).replace("_1", "_unlisted") if listing else tmp_path / "x.png",
            picture(),
        )
        if listing:
            (tmp_path / listing.format(part)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / listing.format(part)).write_text(f"{part}_1\n")
    for part in folders:
        data, classes = read_all(name, tmp_path, SPLIT_OF.get(part, part))
        assert len(data) == 1 and len(classes) == (len(finetune_seg.DATASETS[name].classes) or 4)
        pixels, labels = data.read(0)
        assert pixels.shape == (3, 4, 6) and labels[0, : len(expected)].tolist() == list(expected)


def test_class_counts_and_palettes():
    counts = {name: len(data.classes) for name, data in finetune_seg.DATASETS.items()}
    assert counts == {
        "ade20k": 150, "voc2012": 21, "context": 59, "cityscapes": 19, "bdd100k": 19, "camvid": 11, "idd": 26,
        "kitti": 19, "sunrgbd": 37, "isprs": 6, "suim": 8, "folder": 0,
    }  # fmt: skip
    for name, data in finetune_seg.DATASETS.items():
        assert not data.palette or len(set(data.palette)) >= len(data.classes) - (name == "idd"), name
        assert (data.values is None) or set(data.values.values()) - {255} == set(range(counts[name])), name
        assert (data.colours is None) or set(data.colours.values()) - {255} == set(range(counts[name])), name


def test_camvid_with_the_original_colours(tmp_path):
    colours = np.array(
        [[(128, 128, 128), (64, 0, 64), (0, 0, 64), (128, 0, 192), (192, 0, 192), (0, 0, 0)]] * 4, np.uint8
    )
    for part in ("train", "val", "test"):
        save(tmp_path / f"701_StillsRaw_full/{part}_7.png", picture())
        save(tmp_path / f"LabeledApproved_full/{part}_7_L.png", colours)
    with pytest.raises(train.Problem, match="701_StillsRaw_full/.* with .* with train.txt"):
        read_all("camvid", tmp_path, "train")
    for part in ("train", "val", "test"):
        (tmp_path / f"{part}.txt").write_text(f"any/where/{part}_7.png any/annot/{part}_7.png\n")
        data, _ = read_all("camvid", tmp_path, part)
        assert [Path(data.name(i)).name for i in range(len(data))] == [f"{part}_7.png"]
        assert data.read(0)[1][0].tolist() == [0, 1, 2, 3, 10, 255]
    assert len(finetune_seg.DATASETS["camvid"].colours) == 32
    save(tmp_path / "split/val/v_1.png", picture())  # the same masks, already shared out
    save(tmp_path / "split/val_labels/v_1_L.png", colours)
    assert read_all("camvid", tmp_path / "split", "val")[0].read(0)[1][0].tolist() == [0, 1, 2, 3, 10, 255]


def test_suim_and_isprs_colours(tmp_path):
    colours = np.array(
        [[(3, 0, 250), (0, 255, 0), (255, 255, 255), (255, 0, 0), (0, 0, 0), (0, 0, 0)]] * 4, np.uint8
    )
    for part in ("train_val", "TEST"):
        save(tmp_path / f"suim/{part}/images/d_1_.jpg", picture())
        save(tmp_path / f"suim/{part}/masks/d_1_.bmp", colours)
        data, _ = read_all("suim", tmp_path / "suim", SPLIT_OF[part])
        assert data.read(0)[1][0].tolist() == [1, 2, 7, 4, 0, 0]
    colours[:, 0] = 0, 0, 255
    for part in ("train", "val"):
        save(tmp_path / f"isprs/images/{part}/t.png", picture())
        save(tmp_path / f"isprs/masks/{part}/t.png", colours)
        data, _ = read_all("isprs", tmp_path / "isprs", part)
        assert data.read(0)[1][0].tolist() == [1, 3, 0, 5, 255, 255]


def test_masks_with_a_palette(tmp_path):
    """Pascal VOC's masks hold class indices that a palette colours."""
    mask = Image.fromarray(stripes((0, 20, 255)))
    mask.putpalette([k % 7 for k in range(768)])
    assert mask.mode == "P"
    save(tmp_path / "JPEGImages/one.jpg", picture())
    (tmp_path / "SegmentationClass").mkdir()
    mask.save(tmp_path / "SegmentationClass/one.png")
    listing = tmp_path / "ImageSets/Segmentation/val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("one\n")
    assert read_all("voc2012", tmp_path, "val")[0].read(0)[1][0, :3].tolist() == [0, 20, 255]
    listing.write_text("")
    with pytest.raises(train.Problem, match="none of its 1 images is of the val part .*val.txt"):
        finetune_seg.find_pairs("voc2012", str(tmp_path), "val")


def test_kitti_holds_out_every_fifth_image(tmp_path):
    for i in range(11):
        save(tmp_path / f"training/image_2/{i:06d}_10.png", picture())
        save(tmp_path / f"training/semantic/{i:06d}_10.png", stripes((7, 26, 0)))
    names = {
        split: [Path(a).stem[:6] for a, _ in finetune_seg.find_pairs("kitti", str(tmp_path), split)]
        for split in ("train", "val")
    }
    assert (
        names["val"] == ["000004", "000009"]
        and len(names["train"]) == 9
        and not set(names["val"]) & set(names["train"])
    )
    assert read_all("kitti", tmp_path, "val")[0].read(0)[1][0, :3].tolist() == [0, 13, 255]
    for i in range(4, 11):
        (tmp_path / f"training/image_2/{i:06d}_10.png").unlink()
    with pytest.raises(train.Problem, match="none of its 4 images is of the val part"):
        finetune_seg.find_pairs("kitti", str(tmp_path), "val")


def test_an_image_in_two_formats_is_named(tmp_path):
    small_folder(tmp_path)
    Image.open(tmp_path / "images/train/0.png").save(tmp_path / "images/train/0.jpg")
    with pytest.raises(train.Problem, match="one image twice"):
        finetune_seg.find_pairs("folder", str(tmp_path), "train")


def small_folder(root, count=6, classes=3, size=(20, 28)):
    """images/ and masks/ of tiny pictures whose colour tells the class."""
    r = np.random.RandomState(0)
    for split, number in (("train", count), ("val", 5), ("test", 2)):
        for i in range(number):
            labels = np.zeros(size, np.uint8)
            labels[r.randint(4, 16) :] = 1
            labels[:, r.randint(4, 24) :] += np.uint8(classes - 2)
            image = np.array([[200, 40, 30], [40, 180, 60], [30, 60, 220]], np.uint8)[labels]
            save(root / f"images/{split}/{i}.png", image)
            labels[0, 0] = 255
            save(root / f"masks/{split}/{i}.png", labels)
    return root


def test_wrong_masks_are_named(tmp_path):
    def wrong(change, match, name="folder"):
        root = tmp_path / match.split()[0].strip(".*").replace("/", "")
        change(small_folder(root))
        with pytest.raises(train.Problem, match=match):
            finetune_seg.open_data(
                {"name": name, "folder": str(root), "classes": 3}, train.Processes("cpu"), ("train",)
            )

    wrong(
        lambda root: save(root / "masks/train/2.png", np.full((20, 28), 9, np.uint8)),
        "masks/train/2.png: the value 9 ",
    )
    wrong(
        lambda root: save(root / "masks/train/3.png", np.full((20, 28), 700, np.uint16)),
        "train/3.png: the value 700 ",
    )
    wrong(
        lambda root: save(root / "masks/train/1.png", np.zeros((20, 20), np.uint8)),
        "1.png: it is 20x20 .*its image 28x20",
    )
    wrong(
        lambda root: save(root / "masks/train/0.png", np.zeros((20, 28, 3), np.uint8)), "0.png: it holds RGB"
    )
    wrong(lambda root: (root / "masks/train/4.png").write_bytes(b"no picture"), "4.png: cannot identify")
    wrong(
        lambda root: [(root / f"masks/train/{i}.png").unlink() for i in range(5)],
        "5 of 6 .*'0', '1', '2', '3' and 1 more",
    )
    suim = small_folder(tmp_path / "suim")
    (suim / "train_val").mkdir()
    for kind in ("images", "masks"):
        (suim / kind / "train").rename(suim / "train_val" / kind)
    with pytest.raises(train.Problem, match="of mode L, the data set's masks hold RGB"):
        finetune_seg.open_data(
            {"name": "suim", "folder": str(suim), "classes": None}, train.Processes("cpu"), ("train",)
        )


# ------------------------------------------------------------------------------------------ model


def test_masks_of_photos_on_their_side(tmp_path):
    """A mask is as upright as the photo is shown, whatever the size that the file stores."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(20, 30)).save(tmp_path / "side.jpg", exif=exif)
    for height, width in ((30, 20), (20, 30)):
        Image.fromarray(np.ones((height, width), np.uint8)).save(tmp_path / f"{height}.png")
    pairs = [(str(tmp_path / "side.jpg"), str(tmp_path / f"{height}.png")) for height in (30, 20)]
    labelled = finetune_seg.Labelled(finetune_seg.DATASETS["folder"], pairs, 3)
    assert labelled.check(0) == 1 and labelled.read(0)[0].shape == (3, 30, 20)
    with pytest.raises(ValueError, match="30x20 .* its image 20x30"):
        labelled.check(1)


def test_processes_share_the_masks():
    checked = []

    class Part(list):
        def check(self, i):
            checked.append(i)
            return i

    for rank, largest in ((0, 4), (1, 3)):
        place = SimpleNamespace(rank=rank, world=2, sum=lambda values: torch.as_tensor(values).tolist())
        assert finetune_seg.check_masks([Part(range(5))], place) == largest
    assert sorted(checked) == [0, 1, 2, 3, 4]


def test_decoder_and_layer_decay():
    s = {
        "crop": [16, 24],
        "patch_size": 8,
        "dim": 16,
        "depth": 3,
        "heads": 2,
        "mlp_dim": 32,
        "drop_path": 0.1,
    }
    model = finetune_seg.build({**s, "class_token": False, "freeze": False}, 5).eval()
    images = torch.randn(2, 3, 32, 16)
    tokens = model.encoder(images)
    grid = (tokens @ model.decoder.weight.T + model.decoder.bias).view(2, 4, 2, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(images), nn.functional.interpolate(grid, (32, 16), mode="bilinear"))
    assert 0.014 < model.decoder.weight.std() < 0.026 and not model.decoder.bias.any()
    rates = {"weight_decay": 0.3, "layer_decay": 0.5, "lr": 0.1}
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = finetune_seg.make_optimizer(model, {**rates, "optimizer": name}, torch.device("cpu"))
        assert type(optimizer) is kind
        assert name == "adamw" or {group["momentum"] for group in optimizer.param_groups} == {0.9}
    scale = {}
    for group in finetune_seg.parameter_groups(model, 0.3, 0.5):
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            assert name not in scale and group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0)
            scale[name] = group["scale"]
    assert len(scale) == len(list(model.parameters()))
    assert (
        scale["decoder.weight"] == scale["encoder.norm.bias"] == 1
        and scale["encoder.blocks.2.mlp.fc1.weight"] == 0.5
    )
    assert scale["encoder.blocks.0.norm1.bias"] == 0.125 and scale["encoder.pos_embed"] == 0.0625
    frozen = finetune_seg.build({**s, "class_token": True, "freeze": True}, 5).train()
    frozen(images).sum().backward()
    assert not frozen.encoder.training and frozen.decoder.training and frozen.encoder.pos_embed.grad is None
    assert [len(g["params"]) for g in finetune_seg.parameter_groups(frozen, 0.3, 0.5)] == [1, 1]


def test_polynomial_decay():
    assert finetune_seg.learning_rate(0, 10, 0.2) == 0.2
    assert finetune_seg.learning_rate(5, 10, 0.2) == pytest.approx(0.2 * 0.5**0.9)


# ------------------------------------------------------------------------------------------ whole runs

TINY = ("--patch-size 8 --dim 16 --depth 2 --heads 2 --mlp-dim 32 --crop 16 24 --base-size 16 --stride 8 12 --batch 4 "
        "--device cpu --precision float32 --workers 0 --log-every 2 --optimizer adamw --lr 0.003").split()  # fmt: skip


@pytest.fixture(scope="module")
def seg(tmp_path_factory):
    """A tiny data set and the folder of one whole run on it."""
    root = tmp_path_factory.mktemp("seg")
    small_folder(root / "data")
    assert finetune_seg.main(seg_flags(root, root / "run")) == 0
    return root


def seg_flags(seg, out, *flags):
    return [*TINY, *f"--data folder:{seg / 'data'} --out {out} --steps 6 --evaluations 2".split(), *flags]


def test_seg_run_folder(seg):
    out = seg / "run"
    names = "last.pt best.pt results.json predictions.png curves.png metrics.jsonl settings.json"
    assert set(names.split()) == {path.name for path in out.iterdir()}
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved.keys() == {"model", "optimizer", "settings", "classes", "palette", "step", "best", "window"}
    assert torch.load(out / "best.pt", weights_only=True).keys() == saved.keys() - {"optimizer"}
    assert saved["classes"] == ["class 0", "class 1", "class 2"] and saved["step"] == 6
    evaluations = [r for r in metrics(out) if "val_miou" in r]
    assert [r["step"] for r in evaluations] == [3, 6] and saved["best"] == max(
        r["val_miou"] for r in evaluations
    )
    result = json.loads((out / "results.json").read_text())
    assert result["miou"] == evaluations[-1]["val_miou"] and len(result["classes"]) == 3
    assert np.sum(result["confusion"]) == 5 * (20 * 28 - 1)
    losses = [r["loss"] for r in metrics(out) if "loss" in r]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_seg_resume_is_exact(seg, tmp_path, stop, monkeypatch, capsys):
    report = train.Run.after_step

    def stopped(self, done):
        if done == stop:
            self.processes.stop = signal.SIGTERM
        return report(self, done)

    monkeypatch.setattr(train.Run, "after_step", stopped)
    assert finetune_seg.main(seg_flags(seg, tmp_path)) == train.REQUEUE
    monkeypatch.undo()
    assert finetune_seg.main(seg_flags(seg, tmp_path, "--log-every", "2")) == 0
    assert f"resuming {tmp_path}/last.pt at step {stop}" in capsys.readouterr().out
    for name in ("last.pt", "best.pt"):
        assert equal(weights(tmp_path, name), weights(seg / "run", name))
    assert metrics(tmp_path) == metrics(seg / "run")
    assert (tmp_path / "results.json").read_text() == (seg / "run/results.json").read_text()
    assert finetune_seg.main(seg_flags(seg, tmp_path, "--weight-decay", "0.7")) == 2  # another run's folder
    assert "--weight-decay 0.05, not 0.7" in capsys.readouterr().err


def run_seg(flags, processes=1, cwd=None):
    command = [*launcher(processes), str(SCRIPT), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=cwd, env=environment)


def test_seg_two_processes_equal_one(seg, tmp_path):
    """Evaluation to the last bit; training to rounding."""
    common = [
        "--eval-only",
        "--checkpoint",
        str(seg / "run/last.pt"),
        "--device",
        "cpu",
        "--precision",
        "float32",
        "--workers",
        "1",
    ]
    for n in (1, 2):
        result = run_seg([*common, "--out", str(tmp_path / f"eval{n}")], n)
        assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"eval{n}/results.json").read_text()) for n in (1, 2))
    assert one == two and one["images"] == 5 and np.sum(one["confusion"]) == 5 * (20 * 28 - 1)
    flags = (
        "--drop-path 0 --evaluations 0 --optimizer sgd --lr 0.1 --crop 16 --base-size 40".split()
    )  # no padding
    result = run_seg(seg_flags(seg, tmp_path / "train2", *flags), 2)
    assert result.returncode == 0, result.stderr
    assert finetune_seg.main(seg_flags(seg, tmp_path / "train1", *flags)) == 0
    a, b = (torch.load(tmp_path / f"train{n}/last.pt", weights_only=True)["model"] for n in (1, 2))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_seg_nan_stops_all_processes(seg, tmp_path, monkeypatch, capsys):
    loss = finetune_seg.segmentation_loss
    calls = iter(range(100))
    monkeypatch.setattr(
        finetune_seg, "segmentation_loss", lambda *a: loss(*a) * (math.nan if next(calls) == 2 else 1)
    )
    assert finetune_seg.main(seg_flags(seg, tmp_path)) == 2
    assert "step 2: the loss or its gradient is not finite" in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists()


def test_seg_evaluation_does_not_depend_on_the_window_batch_and_has_other_splits(seg, tmp_path, capsys):
    results = {}
    for name, flags in {
        "a": ["--window-batch", "1"], "b": ["--window-batch", "7"], "test": ["--split", "test"], "ms": ["--multi-scale"],
    }.items():  # fmt: skip
        out = tmp_path / name
        assert finetune_seg.main(["--eval-only", "--checkpoint", str(seg / "run/last.pt"), "--out", str(out), "--workers", "0",
                                  "--device", "cpu", "--precision", "float32", *flags]) == 0  # fmt: skip
        results[name] = json.loads((out / "results.json").read_text())
    assert results["a"]["confusion"] == results["b"]["confusion"] and results["test"]["images"] == 2
    assert results["ms"]["multi_scale"] and results["ms"]["images"] == 5
    assert "localisation mIoU" in capsys.readouterr().out
    run = json.loads((seg / "run/results.json").read_text())
    assert results["a"]["confusion"] == run["confusion"]


def test_localisation_and_classification(seg, tmp_path):
    """A model whose logits are the image's own channels: figures from a plain loop over the images."""

    class Channels(nn.Module):
        def forward(self, x):
            return x * 3

    r = np.random.RandomState(0)

    class Source:
        def __init__(self):
            self.items = [
                (r.randint(0, 256, (3, 16, 24)).astype(np.uint8), r.randint(0, 2, (16, 24)) * (1 + i % 2))
                for i in range(4)
            ]

        def __len__(self):
            return len(self.items)

        def read(self, i):
            image, labels = self.items[i]
            return torch.from_numpy(image), torch.from_numpy(labels.astype(np.uint8))

    s = {"multi_scale": False, "base_size": 16, "precision": "float32", "window": [16, 24], "stride": [16, 24],
         "window_batch": 1, "workers": 0}  # fmt: skip
    source = Source()
    got = finetune_seg.evaluate(Channels(), source, s, train.Processes("cpu"), 3)
    plain, limited, confidence, present = np.zeros((3, 3), int), np.zeros((3, 3), int), [], []
    for image, labels in source.items:
        logits = train.plain_colours(torch.from_numpy(image)).numpy() * 3
        chance = np.exp(logits) / np.exp(logits).sum(0)
        there = np.array([(labels == k).any() for k in range(3)])
        plain += slow_confusion(labels, logits.argmax(0), 3)
        limited += slow_confusion(labels, np.where(there[:, None, None], logits, -1e9).argmax(0), 3)
        confidence.append(chance.reshape(3, -1).max(1))
        present.append(there)
    confidence, present = np.array(confidence), np.array(present)
    assert (got["confusion"] == plain).all()
    assert got["localisation_miou"] == pytest.approx(finetune_seg.scores(limited)["miou"])
    expected = [slow_average_precision(confidence[:, k].tolist(), present[:, k].tolist()) for k in range(3)]
    assert got["classification_map"] == pytest.approx(np.mean(expected))


def test_predict_needs_the_checkpoint_alone(seg, tmp_path, capsys, monkeypatch):
    for name, size in {"odd.jpg": (37, 53), "sub/thin.png": (3, 90), "odd.png": (17, 8)}.items():
        save(tmp_path / "in" / name, picture(*size))
    (tmp_path / "in/broken.png").write_bytes(b"nothing")
    checkpoint = tmp_path / "alone.pt"
    checkpoint.write_bytes((seg / "run/best.pt").read_bytes())
    flags = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert finetune_seg.main(["--predict", str(tmp_path / "in"), *flags]) == 0
    assert "broken.png" in capsys.readouterr().err
    labels = np.asarray(Image.open(tmp_path / "out/odd.jpg_labels.png"))
    mask, overlay = (Image.open(tmp_path / f"out/odd.jpg_{kind}.png") for kind in ("mask", "overlay"))
    assert labels.shape == (37, 53) and labels.max() <= 2 and mask.size == (53, 37) and overlay.width > 53
    palette = np.array(torch.load(checkpoint, weights_only=True)["palette"])
    assert (np.asarray(mask) == palette[labels]).all()
    assert Image.open(tmp_path / "out/sub/thin_mask.png").size == (90, 3)
    assert (
        finetune_seg.main(
            ["--predict", str(tmp_path / "in/sub/thin.png"), *flags, "--window", "24", "--multi-scale"]
        )
        == 0
    )
    assert (tmp_path / "out/thin_overlay.png").exists()
    most = 3 * 37 * 53 // 2
    monkeypatch.setattr(finetune_seg, "LARGEST", most)  # a photo that is too large
    sizes = spy(monkeypatch, finetune_seg, "class_probabilities", lambda model, image, s, size: size)
    assert finetune_seg.main(["--predict", str(tmp_path / "in/odd.jpg"), *flags]) == 0
    again = np.asarray(Image.open(tmp_path / "out/odd_labels.png"))
    assert again.shape == (37, 53) and (again == labels).mean() > 0.8
    assert 0.9 * most < 3 * math.prod(sizes[0]) < 1.1 * most


def test_init_from_every_kind_of_weights(seg, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = loca.ViT(32, 8, 16, 2, 2, 32, class_token=True)
    student, teacher = loca.ViT(32, 8, 16, 2, 2, 32), loca.ViT(32, 8, 16, 2, 2, 32)
    sizes = {"patch_size": 8, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
    ours = {"model": {f"encoder.{k}": v for k, v in student.state_dict().items()}, "settings": sizes, "step": 3,
            "teacher": {f"encoder.{k}": v for k, v in teacher.state_dict().items()}}  # fmt: skip
    torch.save(ours, tmp_path / "last.pt")
    torch.save(encoder.state_dict(), tmp_path / "foreign.pt")
    rest = seg_flags(seg, "x")[10:]  # sizes come from the file
    assert rest[0] == "--crop"
    rest[rest.index("--out") + 1] = str(tmp_path / "run")

    def start(name, *flags):
        s, weights = finetune_seg.read_settings([*rest, "--init", str(tmp_path / name), *flags], 1)
        model = finetune_seg.build(s, 3)
        return s, model, loca.load_encoder(model.encoder, weights)

    for branch, source in (("teacher", teacher), ("student", student)):
        s, model, _ = start("last.pt", "--branch", branch)
        assert {k: s[k] for k in sizes} == sizes
        assert torch.equal(model.encoder.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    s, model, said = start("foreign.pt", "--heads", "4")
    assert s["heads"] == 4 and s["depth"] == 2 and "class token dropped" in said and "from 4x4 to 2x3" in said
    for dim, heads in ((256, 4), (384, 6), (1280, 16)):  # 64 wide, but for H/16
        torch.save(loca.ViT(32, 8, dim, 1, 4, 8).state_dict(), tmp_path / "wide.pt")
        assert finetune_seg.read_weights(tmp_path / "wide.pt", "student")[1]["heads"] == heads
    _, model, said = start("foreign.pt", "--class-token")
    assert "class token kept" in said and torch.equal(model.encoder.cls_token, encoder.cls_token)
    assert (
        finetune_seg.main(
            [*rest, "--init", str(tmp_path / "last.pt"), "--freeze", "--steps", "2", "--evaluations", "1"]
        )
        == 0
    )
    after = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    assert torch.equal(after["encoder.blocks.0.mlp.fc1.weight"], teacher.blocks[0].mlp.fc1.weight)
    capsys.readouterr()
    assert (
        finetune_seg.main(
            [
                *rest[:-1],
                "1",
                "--out",
                str(tmp_path / "b"),
                "--init",
                str(tmp_path / "last.pt"),
                "--dim",
                "32",
            ]
        )
        == 2
    )
    assert "do not fit this encoder" in capsys.readouterr().err


def test_seg_options_run(seg, tmp_path, capsys):
    """Flags that no other test runs; a subset smaller than the batch; the schedule in steps and in epochs."""
    base = [*TINY, *f"--data folder:{seg / 'data'} --evaluations 2".split()]
    for name, flags, steps in (
        ("sgd", ["--optimizer", "sgd", "--accumulate", "2", "--layer-decay", "0.7", "--clip", "1", "--epochs", "2"], 3),
        ("few", ["--fraction", "1/3", "--epochs", "4", "--save-minutes", "0", "--weight-decay", "0.1", "--seed", "5"], 2),
        ("kept", ["--fraction", "1/3", "--epochs", "2", "--schedule-in", "steps", "--classes", "4", "--workers", "1"], 3),
        ("model", ["--model", "Ti/16", "--patch-size", "8", "--depth", "1", "--steps", "1", "--init", "none"], 1),
    ):  # fmt: skip
        assert finetune_seg.main([*base, "--out", str(tmp_path / name), *flags]) == 0
        saved = torch.load(tmp_path / name / "last.pt", weights_only=True)
        assert saved["step"] == steps and len(saved["classes"]) == (4 if name == "kept" else 3)
    assert "2 of 6 images" in capsys.readouterr().out


def test_seg_rates_and_clipping_reach_the_step(seg, tmp_path, monkeypatch):
    make, made = finetune_seg.make_optimizer, []
    monkeypatch.setattr(
        finetune_seg, "make_optimizer", lambda *given: (made.append(make(*given)), made[-1])[1]
    )
    clipped = spy(monkeypatch, nn.utils, "clip_grad_norm_", lambda parameters, most: most)
    for flags in (["--layer-decay", "0.5", "--clip", "0.25"], []):
        assert finetune_seg.main(seg_flags(seg, tmp_path / str(len(flags)), *flags)) == 0
    assert clipped == [0.25] * 6 + [math.inf] * 6
    groups, last = made[0].param_groups, 0.003 * (1 - 5 / 6) ** 0.9
    assert sorted({g["lr"] / last for g in groups}) == pytest.approx([0.125, 0.25, 0.5, 1])


def test_seg_the_best_checkpoint_is_kept(seg, tmp_path, monkeypatch):
    evaluate, given = finetune_seg.evaluate, [0.3, 0.5, 0.4]
    monkeypatch.setattr(finetune_seg, "evaluate", lambda *a: {**evaluate(*a), "miou": given.pop(0)})
    assert finetune_seg.main(seg_flags(seg, tmp_path, "--evaluations", "3")) == 0
    steps = [torch.load(tmp_path / name, weights_only=True)["step"] for name in ("best.pt", "last.pt")]
    assert steps == [4, 6] and json.loads((tmp_path / "results.json").read_text())["best"] == 0.5


def test_seg_accumulated_step_equals_the_whole_batch(seg, tmp_path, monkeypatch):
    """With the same labelled pixels in every crop, the mean over micro-batches is the batch's."""

    def plain(image, labels, crop, base_size, rng):
        grey = int(labels.long().sum()) % 200
        return torch.full((3, *crop), grey, dtype=torch.uint8), torch.ones(*crop, dtype=torch.uint8)

    monkeypatch.setattr(finetune_seg, "augment", plain)
    for n in (1, 2):
        flags = f"--accumulate {n} --drop-path 0 --optimizer sgd --steps 1 --evaluations 0".split()
        assert finetune_seg.main(seg_flags(seg, tmp_path / str(n), *flags)) == 0
    torch.testing.assert_close(weights(tmp_path / "1"), weights(tmp_path / "2"), rtol=1e-4, atol=1e-6)


def test_seg_an_error_ends_the_process(seg, tmp_path):
    """Loader workers ignore the signal that would end them: they are closed with the loop."""
    script = tmp_path / "fail.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport finetune_seg\n"
        "if __name__ == '__main__':\n    finetune_seg.segmentation_loss = lambda *a: 1 / 0\n"
        "    finetune_seg.main(sys.argv[1:])\n"
    )
    flags = seg_flags(seg, tmp_path / "run", "--workers", "1")
    result = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=90)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr


def test_seg_unreadable_image_is_replaced_or_stops(seg, tmp_path, capfd):
    small_folder(tmp_path / "data", count=30)
    broken = tmp_path / "data/images/train/7.png"
    broken.write_bytes(broken.read_bytes()[:60])
    flags = [*TINY, "--data", f"folder:{tmp_path / 'data'}", "--evaluations", "0", "--epochs", "1"]
    assert finetune_seg.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert "7.png" in capfd.readouterr().err
    broken = tmp_path / "data/images/val/1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert finetune_seg.main([*flags, "--out", str(tmp_path / "run2")]) == 2
    assert "cannot evaluate" in capfd.readouterr().err


def test_seg_on_drawn_scenes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune_seg, "VAL_SCENES", 2)
    flags = [
        "--steps",
        "2",
        "--scenes",
        "6",
        "--batch",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--evaluations",
        "1",
    ]
    assert finetune_seg.main(flags) == 0
    said = capsys.readouterr().out
    assert "start: none" in said and "mIoU" in said and "lamp" in said
    sizes = {k: finetune_seg.SCENES_PRESET[k] for k in finetune_seg.SIZES}
    encoder = loca.ViT(96, *sizes.values())
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    Path("runs/scenes").mkdir(parents=True)
    torch.save({"model": state, "settings": sizes}, "runs/scenes/last.pt")
    assert finetune_seg.main([*flags, "--out", "again"]) == 0
    said = capsys.readouterr().out
    assert "start: runs/scenes/last.pt" in said
    assert "the same from scratch: python finetune_seg.py --init none --out again_scratch" in said


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--data nothing:.", "ade20k, voc2012"),
        ("--data camvid", "NAME:DIR"),
        ("--data camvid:/nowhere", "no folder /nowhere"),
        ("--crop 100", "--crop 100 100 is not a multiple of the patch, 8: try --crop 96 96"),
        ("--crop 8 8 8", "height and width"),
        ("--window 20", "--window 20 20"),
        ("--stride 200", "--stride 200"),
        ("--batch 7 --accumulate 2", "--batch 7 is not a multiple"),
        ("--fraction 3/2", "--fraction 1.5"),
        ("--fraction x", "--fraction x"),
        ("--heads 3", "3 heads do not divide"),
        ("--init no/file.pt", "no such file"),
        ("--predict . ", "--checkpoint FILE is missing"),
        ("--eval-only --checkpoint no/file.pt", "no such file"),
        ("--eval-only", "runs/finetune_scenes/best.pt: there is no such file"),
        ("--eval-only --out my/run", "my/run/best.pt: there is no such file"),
        ("--split test", "--split test: scenes has train, val"),
        ("--drop-path 1", "--drop-path"),
        ("--lr 0", "--lr"),
        ("--classes 900", "253"),
    ],
)  # fmt: skip
def test_seg_impossible_arguments(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert finetune_seg.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("finetune_seg.py: ")
    assert not any(tmp_path.iterdir())


def test_seg_looking_at_a_checkpoint_asks_no_more_than_it_needs(seg, tmp_path, capsys):
    """The batch of training plays no part; sizes that the weights do not have are named in one line."""
    flags = ["--eval-only", "--checkpoint", str(seg / "run/best.pt"), "--out", str(tmp_path)]
    s, _ = finetune_seg.read_settings(flags, 5)
    assert s["batch"] % 5
    assert finetune_seg.main([*flags, "--depth", "1", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "best.pt: its weights do not fit" in error and error.count("\n") == 1


def test_seg_checkpoint_of_other_classes_is_refused(seg, tmp_path, capsys):
    save(tmp_path / "d/train/a.png", picture())
    for part in ("train", "val"):
        save(tmp_path / f"d/{part}/a.png", picture())
        save(tmp_path / f"d/{part}annot/a.png", stripes((0, 1)))
    flags = [
        "--eval-only",
        "--checkpoint",
        str(seg / "run/last.pt"),
        "--data",
        f"camvid:{tmp_path / 'd'}",
        "--device",
        "cpu",
    ]
    assert finetune_seg.main([*flags, "--out", str(tmp_path / "o")]) == 2
    assert "knows 3 classes, camvid has 11" in capsys.readouterr().err
    torch.save({"model": {}}, tmp_path / "x.pt")
    assert finetune_seg.main(["--predict", str(tmp_path), "--checkpoint", str(tmp_path / "x.pt")]) == 2
    assert "not a checkpoint of this script" in capsys.readouterr().err


def test_the_readmes_masked_autoencoder(tmp_path):
    """It runs, for two steps, and what it writes is an encoder that fine-tuning takes."""
    script = re.search(r'```python\n("""python mae.py.*?)```', (HERE / "README.md").read_text(), re.S)[1]
    short = script.replace("narrow = 2700, 64", "narrow = 2, 4")
    assert short != script
    (tmp_path / "mae.py").write_text(short)
    Image.fromarray(train.draw_scene(0)[0]).save(tmp_path / "photo.png")
    command = [sys.executable, "mae.py", ".", "mae.pt"]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=90)
    encoder = loca.ViT(192, 8, 192, 6, 3, 768)
    said = loca.load_encoder(encoder, loca.load_weights(tmp_path / "mae.pt"))
    assert said.startswith("77 tensors loaded; position embedding resized from 12x12 to 24x24")


# ------------------------------------------------------- speed and memory of the step, beside the plain one


def whole_step(plain, precision, device, flags):
    """A training step, as a function: ours, or the plain one with torch's own attention and no block recomputed."""
    s = train.read_settings(["--data", "photos", *flags], 1)
    torch.manual_seed(0)
    model = train.build(s).to(device)
    teacher, optimizer = loca.make_teacher(model), torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    batch, focal, large, small, n = s["batch"], s["focal"], s["image_size"], s["focal_size"], model.positions
    views = {
        "reference": torch.randn(batch, 3, large, large),
        "query": torch.randn(batch, 3, large, large),
        "query_targets": torch.randint(-60, n, (batch, n)).clamp(min=-1),
        "focal": torch.randn(batch, focal, 3, small, small),
        "focal_targets": torch.randint(-60, n, (batch, focal, (small // s["patch_size"]) ** 2)).clamp(min=-1),
    }
    views = {name: view.to(device) for name, view in views.items()}
    forward, attention = model, loca.multi_head
    if plain:
        forward, attention = functools.partial(plain_step, model), plain_attention
        model.encoder.grad_checkpoint = 0

    def step():
        visible = loca.choose_tokens(n, model.visible_tokens, device=device)
        keep = loca.choose_tokens(n, model.query_tokens, "unstructured", device)
        with train.autocast(precision, device), mock.patch.object(loca, "multi_head", attention):
            loss = forward(views=views, teacher=teacher, visible=visible, keep=keep)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loca.update_teacher(teacher, model, 0.99)
        return loss

    return step


def prepare(plain, precision, device, flags):
    """What a process of `compare` does first: ours is set up as in train.py, the plain step has torch's defaults."""
    global measured
    where = torch.device(device) if plain else train.Processes(device).device
    measured = whole_step(plain, precision, where, flags)


def measure():
    """Seconds of a step, and the peak memory of its process so far."""
    start = time.perf_counter()
    loss = measured()
    loss.item()  # a GPU has then done the step
    return time.perf_counter() - start, train.peak_memory(loss.device)


def compare(device, rounds=9, flags=()):
    """`python test_loca.py`: time and peak memory of both steps, in turns, in float32 and, where it is fast, in bf16,
    or in the one that is asked for; flags are train.py's. Each step has a process of its own, as what ran before has
    its say in how the allocator then fares."""
    asked = train.read_settings(["--data", "photos", *flags], 1)["precision"]
    fastest = train.choose_precision(torch.device(device), asked)
    spawn = multiprocessing.get_context("spawn")
    for precision in [fastest] if asked or fastest == "float32" else [fastest, "float32"]:
        workers = [
            concurrent.futures.ProcessPoolExecutor(1, spawn, prepare, (plain, precision, device, flags))
            for plain in (True, False)
        ]
        turns = [[worker.submit(measure).result() for worker in workers] for _ in range(rounds + 2)]
        for worker in workers:
            worker.shutdown()
        seconds, peaks = np.array(turns[2:]).transpose(2, 0, 1)  # the first two are not counted
        ratios = seconds[:, 0] / seconds[:, 1]
        (plain, ours), (plain_peak, peak) = np.median(seconds, axis=0), peaks[-1]
        print(
            f"{precision}: plain step {plain:.3g} s, {plain_peak:.2f} GiB; ours {ours:.3g} s, {peak:.2f} GiB; "
            f"{np.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def test_comparison_with_the_plain_step(capsys):
    tiny = (
        "--patch-size 8 --dim 24 --depth 1 --heads 3 --mlp-dim 48 --image-size 32 --focal-size 16 --batch 2"
    )
    compare("cpu", 1, [*tiny.split(), "--prototypes", "20", "--precision", "float32"])
    said = capsys.readouterr().out
    assert said.startswith("float32: plain step ") and said.count("GiB") == 2 and "times as fast" in said


# -------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def gpu():
    """The first GPU, its float32 products in full precision."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda:0")
    torch.cuda.set_sync_debug_mode("default")
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["step_one_device", "step_position_loss_only"])
def test_recorded_step_on_a_gpu(name, gpu):
    check_recorded(name, device=gpu)


def test_colours_on_a_gpu_equal_those_on_the_cpu(gpu, monkeypatch):
    views = torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8)
    jitter, kernels = (
        train.draw_jitter(6, torch.device("cpu")),
        train.draw_blur(6, 40, 0.5, torch.device("cpu")),
    )
    monkeypatch.setattr(train, "draw_jitter", lambda count, device: [x.to(device) for x in jitter])
    monkeypatch.setattr(train, "draw_blur", lambda count, side, chance, device: kernels.to(device))
    for number in (0.15, 0.9):  # all views grey and solarised, or none
        monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.full(size, number, device=device))
        ours, theirs = train.colours(views.to(gpu), 0.2, 0.5).cpu(), train.colours(views, 0.2, 0.5)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_batches_reach_a_gpu_whole(gpu):
    """While the GPU is behind, what is copied in the meantime neither changes nor comes too late."""
    dataset = train.Views(train.Scenes(16), view_settings())
    keys = [[(epoch, 4 * i + k) for k in range(4)] for epoch in range(4) for i in range(4)]
    expected = train.feed(dataset, 0, torch.device("cpu"), batch_sampler=keys)
    matrix, kept = torch.randn(8192, 8192, device=gpu), []
    for batch in train.feed(dataset, 2, gpu, batch_sampler=keys):
        _ = matrix @ matrix
        kept.append({name: value.clone() for name, value in batch.items() if torch.is_tensor(value)})
    for ours, theirs in zip(kept, expected, strict=True):
        assert ours and all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "script, flags",
    [
        (train, "--blur --clip 0"),
        (train, "--accumulate 2 --grad-checkpoint --masking unstructured"),
        (train, "--feature-weight 0"),
        (train, "--single-image"),
        (train, "--compile"),
        (finetune_seg, "--optimizer adamw --clip 1 --drop-path 0.2"),
        (finetune_seg, "--optimizer sgd --accumulate 2"),
    ],
)
def test_steps_on_a_gpu_do_not_wait_for_it(script, flags, gpu, seg, tmp_path, monkeypatch):
    """From the second step to the log line it is an error if the host waits for the device."""
    after_step = train.Run.after_step

    def watched(self, done):
        if done == self.steps:
            torch.cuda.set_sync_debug_mode("default")
        stopped = after_step(self, done)
        if 0 < done < self.steps:
            torch.cuda.set_sync_debug_mode("error")
            with pytest.raises(RuntimeError, match="synchroniz"):
                torch.ones(1, device=gpu).item()
        return stopped

    monkeypatch.setattr(train.Run, "after_step", watched)
    start = SMALL if script is train else seg_flags(seg, tmp_path, "--evaluations", "1")
    more = f"--steps 6 --log-every 6 --device cuda --precision bf16 --workers 2 --out {tmp_path} {flags}"
    more += " --val-every 9" if script is train else ""
    assert script.main([*start, *more.split()]) == 0


def test_both_scripts_on_a_gpu(gpu, seg, photos, tmp_path, capsys):
    """Pretraining, stopped and resumed; fine-tuning from it, evaluation, prediction; pictures; bench."""
    pretrained, tuned = tmp_path / "pretrained", tmp_path / "tuned"
    run = [*SMALL, *f"--device cuda --precision bf16 --lr 0.05 --out {pretrained}".split()]
    before = train.Processes.listen
    with mock.patch.object(train.Processes, "listen", lambda self: (before(self), setattr(self, "stop", 15))):
        assert train.main([*run, "--steps", "40"]) == train.REQUEUE
    assert train.main([*run, "--steps", "40"]) == 0
    assert f"resuming {pretrained}/last.pt at step" in capsys.readouterr().out
    assert all(math.isfinite(r["loss"]) for r in metrics(pretrained) if "loss" in r)
    show = f"--show {pretrained}/last.pt --out {tmp_path}/show.png --device cuda"
    assert train.main(show.split()) == 0
    assert train.main([*run, "--bench", "--data", str(photos)]) == 0
    flags = f"--init {pretrained}/last.pt --mlp-dim 16 --device cuda --precision bf16 --out {tuned}"
    assert finetune_seg.main([*seg_flags(seg, tuned), *flags.split()]) == 0
    checkpoint = f"--checkpoint {tuned}/best.pt --device cuda"
    for what in (
        f"--eval-only --multi-scale --data folder:{seg}/data --out {tmp_path}/eval",
        f"--predict {photos} --out {tmp_path}/said",
    ):
        assert finetune_seg.main([*checkpoint.split(), *what.split()]) == 0
    assert "mIoU" in capsys.readouterr().out and list((tmp_path / "said").iterdir())


if __name__ == "__main__":
    compare(
        "cuda" if torch.cuda.is_available() else "cpu",
        flags=["--model", "S/16", "--batch", "8", *sys.argv[1:]],
    )
