"""Tests: against recordings of the released code, slow plain versions, and invariants. No network, no GPU."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import loca
import train

HERE = Path(__file__).resolve().parent
torch.set_num_threads(2)

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
        "norms": """
            0.1126106 0.722592 0.02060816 0.001178743 0.001057541 0.01257036 0.002702377 0.00705852 0.009599642
            0.01584734 0.1023715 0.03120304 0.09968709 2.910383e-11 0.008705309 0.03318184 0.04206111
            0.001932066 0.009521264 0.02216563 0.03463564 0.322526 0.09128129 0.02608675 0.002615261 0.0271597
            0.007050298 0.0482941 0.1081474 0.1159254 0.1659668 0 0.008256184 0.1147338 0.08798734 0.002385122
            0.006344648 0.05553747 0.03600951 0.044275 0.004412268 0.02698855 0.01212887 0.044462 0.1028559
            0.1146161 0.1610968 0 0.008822303 0.113884 0.07329991 0.005366008 0.008373127 0.06747343 0.04518812
            0.03803554 0.06883801 0.06347913 0.3875204 0.6229861 1.053 2.077449 1.991797 5.915124 2.410846
            8.471792
        """,
    },
    "step_position_loss_only": {
        "seed": 2,
        "devices": 1,
        "offset": 137,
        "feature": False,
        "total_loss": [5.414161205291748],
        "position_loss": [5.414161205291748],
        "feature_loss": [0.0],
        "norms": """
            0.01329274 0.3771335 0.0007871042 0.0008031751 0.0008260102 0.01161299 0.002118438 0.011003
            0.009734577 0.0206896 0.1055806 0.03760267 0.1049229 0 0.009720241 0.04047766 0.03406001 0.001615338
            0.01040591 0.02291944 0.02585212 0.03912493 0.04022973 0.005042489 0.00116612 0.003761828
            0.004869209 0.007641301 0.04200009 0.0131182 0.03834061 0 0.0037485 0.01296783 0.01081868
            0.0008414068 0.00357884 0.009299033 0.009089172 0.003681197 0.001029739 0.004086591 0.004425441
            0.006759731 0.03803454 0.0130326 0.03756107 0 0.003658507 0.01303661 0.01359146 0.0004834662
            0.004168021 0.006241683 0.008688392 0.03764748 0.06114061 0.06990879 0.3851556
        """,
    },
    "step_two_devices": {
        "seed": 1,
        "devices": 2,
        "offset": 9,
        "feature": True,
        "total_loss": [8.513956069946289, 8.479812622070312],
        "position_loss": [5.4372711181640625, 5.417121887207031],
        "feature_loss": [3.0766849517822266, 3.0626907348632812],
        "norms": """
            0.1829769 0.7284705 0.02418057 0.001278736 0.0006977153 0.009735345 0.002481511 0.006968615
            0.007392151 0.01230498 0.07078618 0.02760637 0.07145962 0 0.007385783 0.02825717 0.03112917
            0.001935922 0.007514467 0.01632319 0.02223339 0.4689004 0.2352483 0.06351299 0.005135493 0.04176383
            0.01644539 0.0726141 0.124053 0.1861286 0.2227526 0 0.0148117 0.1876804 0.1420536 0.006829302
            0.01029833 0.1226906 0.08242554 0.04428702 0.004193098 0.04984434 0.01562499 0.07754994 0.1322521
            0.176012 0.1975339 4.365575e-11 0.009989929 0.1808444 0.1102537 0.00531972 0.007864108 0.08027887
            0.05380079 0.02808323 0.05817091 0.04779044 0.2750058 0.9240172 1.371302 2.70674 2.353845 9.337287
            3.431612 6.526767
        """,
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
        squares.index_add_(0, own[name].flatten().long(), p.grad.double().flatten() ** 2)
    return squares.sqrt()


def check_recorded(name, rank=0):
    record = RECORDED[name]
    student, teacher_parameters, views, offset, kept = draw_recorded(record)
    assert offset == record["offset"]
    model = recorded_model(student, record["feature"])
    teacher = loca.make_teacher(recorded_model(teacher_parameters)) if record["feature"] else None
    net = torch.nn.parallel.DistributedDataParallel(model) if record["devices"] > 1 else model
    losses = net(views[rank], teacher, visible=torch.arange(offset, offset + 39), keep=kept)
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
    """Four maps of the released pipeline (reference and query boxes, mirrored), the first row and column of each."""
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
    }


def test_step_equals_the_plain_one():
    model, views = tiny(drop_path=0.0), tiny_views()
    teacher = loca.make_teacher(tiny(drop_path=0.0))
    visible, keep = torch.tensor([3, 4, 5]), torch.tensor([9, 2, 14, 7, 0])
    gradients = []
    results = []
    for step in (model, lambda *a, **k: plain_step(model, *a, **k)):
        losses = step(teacher=teacher, views=views, visible=visible, keep=keep)
        model.zero_grad()
        losses["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        results.append(
            {k: losses[k].detach() for k in ("loss", "position_loss", "feature_loss", "position_accuracy")}
        )
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
    split = lambda t: t.view(2, 10, 3, 8).transpose(1, 2)
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
    dropped = block.drop(x)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.04)
    assert torch.equal(block.eval().drop(x), x)
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


def test_feature_loss_does_not_depend_on_the_chunk():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(2, 9, 8), dim=-1).requires_grad_()
    prototypes = F.normalize(torch.randn(12, 8), dim=-1).requires_grad_()
    clusters, targets = torch.rand(2, 4, 12).softmax(-1), torch.randint(-1, 4, (2, 9))
    found = []
    for chunk in (1, 4, 100):
        loss, *_ = loca.feature_loss(features, prototypes, clusters, targets, chunk=chunk)
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


def test_position_loss_only_and_single_image():
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
    assert single.encoder.pos_embed.grad is None
    # shuffling an image's patches shuffles its tokens: without positions only the content can tell
    tokens = single.encoder(views["reference"], position=False, attend=torch.arange(16))
    logits = single.predictor(tokens, tokens)
    loss, _ = loca.position_loss(logits, torch.arange(16).expand(2, 16))
    torch.testing.assert_close(loss, single(views, visible=torch.arange(16))["position_loss"])


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
    """torch.compile without graph breaks fails on .item(), boolean indexing and shapes that depend on values."""
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
    """A train state in the published file format: msgpack, arrays as extension 1 of (shape, dtype name, bytes)."""
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


def test_weights_that_do_not_fit(tmp_path):
    state, own = foreign_vit(class_token=False), loca.ViT(32, 8, 24, 3, 3, 48)
    before = {k: v.clone() for k, v in own.state_dict().items()}
    prefixed = lambda s: {f"encoder.{k}": v for k, v in s.items()}
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
