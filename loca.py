"""LOCA: Location-Aware Self-Supervised Transformers for Semantic Segmentation (arXiv 2212.02400), in PyTorch.

LOCA takes a reference view and several query views from one image. For every query patch it predicts which
reference patch shows the same content (position loss) and which cluster a slowly moving teacher assigns to
that patch (feature loss). This file is the whole method. It needs only torch; read it from top to bottom.

Shape letters: B images, F focal queries per image, N reference tokens, K kept or visible tokens, T query
tokens per image, D width, E bottleneck width, P prototypes. A target is a reference token's index, or -1.
"""

import argparse
import copy
import functools
import math
import os
import re
import sys
import warnings
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SIZES = {
    "Ti/16": {"patch_size": 16, "dim": 192, "depth": 12, "heads": 3, "mlp_dim": 768},
    "S/16": {"patch_size": 16, "dim": 384, "depth": 12, "heads": 6, "mlp_dim": 1536},
    "B/16": {"patch_size": 16, "dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
    "L/16": {"patch_size": 16, "dim": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096},
    "H/16": {"patch_size": 16, "dim": 1280, "depth": 32, "heads": 16, "mlp_dim": 5120},
}


# ----------------------------------------------------------------------------------- vision transformer


def gather_tokens(tokens, index):
    """Select tokens [B, N, ...] by index [K] or [B, K] -> [B, K, ...]."""
    image = torch.arange(len(tokens), device=tokens.device)[:, None]  # B,1
    return tokens[image, index]  # B,K,...


def lecun_normal_(weight):
    """Truncated normal with variance 1 / fan-in, as in JAX."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # truncation at 2 sigma reduces it by this factor
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def linear(inputs, outputs, init_=nn.init.xavier_uniform_, bias=True):
    """A linear layer with weights initialized by `init_` and zero bias."""
    layer = nn.Linear(inputs, outputs, bias)
    init_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def multi_head(q, k, v, heads):
    """Scaled dot-product attention in every head: q [B, T, D], k and v [B, K, D] -> [B, T, D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # B,heads,T or K,D/heads
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # PyTorch's kernel is several times slower there
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)  # B,T,D


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D]. attend: indices [K] or [B, K] of the tokens that serve
    as keys and values; all tokens if None."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = linear(dim, 3 * dim)
        self.proj = linear(dim, dim)
        for part in self.qkv.weight.chunk(3):  # query, key and value are initialized as three matrices
            nn.init.xavier_uniform_(part)

    def forward(self, x, attend=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # B,N,D each
        if attend is not None:
            k, v = gather_tokens(k, attend), gather_tokens(v, attend)
        return self.proj(multi_head(q, k, v, self.heads))


class CrossAttention(nn.Module):
    """Multi-head attention from queries [B, T, D] to a context [B, K, D] -> [B, T, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (linear(dim, dim) for _ in range(4))

    def forward(self, x, context):
        return self.proj(multi_head(self.q(x), self.k(context), self.v(context), self.heads))


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear over [..., D]."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = linear(dim, hidden)
        self.fc2 = linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block over [B, N, D]. branch_scale: [2, B, 1, 1] from ViT.draw_branch_scale. It is
    not an attribute of the block, so torch.compile reuses one graph for all blocks."""

    def __init__(self, dim, heads, mlp_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_dim)

    def forward(self, x, attend=None, branch_scale=None):
        if branch_scale is None:
            x = x + self.attn(self.norm1(x), attend)
            return x + self.mlp(self.norm2(x))
        x = torch.addcmul(x, self.attn(self.norm1(x), attend), branch_scale[0])
        return torch.addcmul(x, self.mlp(self.norm2(x)), branch_scale[1])


class ViT(nn.Module):
    """Vision transformer with timm's parameter names (paper section 3, released code).

    image_size: size in pixels, one number or (height, width), of the position embedding; forward takes any
    size divisible by `patch_size`. drop_path: stochastic depth rate of the last block; it rises linearly from
    0. class_token: add one, as DINO, MAE and most timm models do; LOCA has none. Raises ValueError unless the
    patch size divides the image size and the number of heads divides the width.
    """

    def __init__(self, image_size, patch_size, dim, depth, heads, mlp_dim, drop_path=0.1, class_token=False):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"the patch size {patch_size} does not divide the image size {height}x{width}")
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.patch_size, self.dim, self.heads, self.mlp_dim = patch_size, dim, heads, mlp_dim
        self.grid = (height // patch_size, width // patch_size)
        self.drop_path = drop_path
        self.grad_checkpoint = 0  # number of blocks recomputed in the backward pass: less memory, slower
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        tokens = self.grid[0] * self.grid[1] + int(class_token)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, dim) * dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def draw_branch_scale(self, batch, device):
        """Stochastic depth (Huang et al. 2016) for all blocks at once: [depth, 2, B, 1, 1], where 0 drops a
        residual branch of a sample and 1 / survive rescales a kept one. None if nothing is dropped."""
        if not self.training or self.drop_path == 0:
            return None
        # The rate rises linearly with depth, because early blocks affect all later ones.
        survive = torch.linspace(1, 1 - self.drop_path, len(self.blocks), device=device).view(-1, 1, 1, 1, 1)
        return (torch.rand(len(survive), 2, batch, 1, 1, device=device) < survive) / survive

    def forward(self, images, keep=None, position=True, attend=None):
        """Encode images [B, 3, H, W] -> patch tokens [B, N, D], or [B, K, D] with `keep`, after the norm.

        keep: indices [K] or [B, K] of the tokens that enter the blocks. position: add the position embedding.
        attend: indices [K'] or [B, K'] of the tokens that all tokens attend to (the single-image mechanism),
            besides the class token, if there is one.
        """
        size = tuple(images.shape[-2:])
        if any(side % self.patch_size for side in size):
            raise ValueError(f"the patch size {self.patch_size} does not divide the image size {size}")
        # Patches become tokens. A random query keeps some of them, after the position embedding is added.
        x = self.patch_embed(images)  # B,D,rows,columns
        grid = tuple(x.shape[-2:])
        # Make x contiguous and float32. Otherwise all blocks inherit the convolution's layout and bf16.
        x = x.flatten(2).transpose(1, 2).contiguous().to(self.pos_embed.dtype)  # B,N,D
        if position:
            patches = self.pos_embed[:, -self.grid[0] * self.grid[1] :]  # without the class token's entry
            x = x + resize_position_embedding(patches, self.grid, grid)
        if keep is not None:
            x = gather_tokens(x, keep)  # B,K,D
        if self.cls_token is not None:
            token = self.cls_token + self.pos_embed[:, :1] if position else self.cls_token
            x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)  # B,1+K,D
            attend = None if attend is None else F.pad(attend + 1, (1, 0))  # the class token's index is 0

        scale = self.draw_branch_scale(len(x), x.device)
        for i, block in enumerate(self.blocks):
            if i < self.grad_checkpoint:
                block = functools.partial(checkpoint, block, use_reentrant=False)
            x = block(x, attend, None if scale is None else scale[i])
        return self.norm(x)[:, 0 if self.cls_token is None else 1 :]


def resize_position_embedding(embedding, old, new):
    """Resize [1, N, D] from grid `old` to grid `new`, both (rows, columns): bilinear, antialiased."""
    if tuple(old) == tuple(new):
        return embedding
    grid = embedding.unflatten(1, tuple(old)).permute(0, 3, 1, 2)  # 1,D,rows,columns
    return F.interpolate(grid, size=new, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)  # 1,N,D


def vit(size="B/16", image_size=224, **changes):
    """A ViT of a size named in SIZES; `changes` override its settings. ValueError for an unknown size."""
    if size not in SIZES:
        raise ValueError(f"unknown ViT size {size!r}; choose from {', '.join(SIZES)}")
    return ViT(image_size, **{**SIZES[size], **changes})


# -------------------------------------------------------------------------------------------------- heads


class ProjectionHead(nn.Module):
    """Tokens [..., D] -> unit vectors float32 [..., E], to be compared with the prototypes [P, E]."""

    def __init__(self, dim, hidden, bottleneck, prototypes):
        super().__init__()
        self.fc1 = linear(dim, hidden, lecun_normal_)
        self.fc2 = linear(hidden, hidden, lecun_normal_)
        self.fc3 = linear(hidden, bottleneck, lecun_normal_)
        self.prototypes = linear(bottleneck, prototypes, lecun_normal_, bias=False)
        with torch.no_grad():
            self.prototypes.weight.copy_(self.normalized_prototypes())

    def normalized_prototypes(self):
        """The prototypes as unit vectors [P, E]; they are normalized at every use."""
        weight = self.prototypes.weight
        return weight / (weight.norm(dim=1, keepdim=True) + 1e-10)

    def forward(self, x):
        x = F.gelu(self.fc1(x), approximate="tanh")
        x = F.gelu(self.fc2(x), approximate="tanh")
        return F.normalize(self.fc3(x).float(), dim=-1)


class PositionPredictor(nn.Module):
    """Query tokens [B, T, D], visible reference tokens [B, K, D] -> logits over positions [B, T, N]. One
    cross-attention block is the only place where queries see the reference (paper section 3.1)."""

    def __init__(self, dim, heads, mlp_dim, positions):
        super().__init__()
        self.norm_query = nn.LayerNorm(dim, eps=1e-6)
        self.norm_context = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.logits = linear(dim, positions, lecun_normal_)

    def forward(self, x, context):
        x = x + self.attn(self.norm_query(x), self.norm_context(context))
        x = x + self.mlp(self.norm_mlp(x))
        return self.logits(self.norm(x))


# ---------------------------------------------------------------------------- correspondence and masking


def patch_targets(reference_box, query_box, flip, view, grid, reference_grid):
    """For each query patch, find the reference patch that shows the same content. Reproduces the released
    pipeline's three nearest-neighbor samplings exactly, in integer arithmetic.

    reference_box, query_box: long [..., 4] = top, left, height, width in image pixels. flip: bool [...], True
    for mirrored queries. view: side of the query in pixels. grid, reference_grid: patches per side. Returns
    long [..., grid * grid]: row * reference_grid + column, or -1 for a query patch outside the reference.
    """
    # The pixel at the center of each patch of the query, along one axis.
    pixel = (2 * torch.arange(grid, device=query_box.device) + 1) * view // (2 * grid)

    # Rows and columns are independent: each axis is sampled separately, and the two are combined at the end.
    def along(axis):  # 0: rows, 1: columns -> index in the reference grid or -1, [..., grid]
        begin, size = query_box[..., axis, None], query_box[..., axis + 2, None]
        reference_begin, reference_size = reference_box[..., axis, None], reference_box[..., axis + 2, None]
        inside = begin + torch.minimum((2 * pixel + 1) * size // (2 * view), size - 1) - reference_begin
        index = (2 * inside + 1) * reference_grid // (2 * reference_size)
        return index.masked_fill((inside < 0) | (inside >= reference_size), -1)

    rows, columns = along(0), along(1)
    columns = torch.where(flip[..., None], columns.flip(-1), columns)
    rows, columns = rows[..., :, None], columns[..., None, :]  # ...,grid,1 and ...,1,grid
    targets = rows * reference_grid + columns  # ...,grid,grid
    return targets.masked_fill((rows < 0) | (columns < 0), -1).flatten(-2)  # ...,grid*grid


# Which tokens stay visible: (rows, columns, count, device) -> `count` different indices into the grid, drawn
# once for all images of a micro-batch. --masking offers every entry. The host never waits for the device.
MASKING = {
    # A random run in raster order.
    "consecutive": lambda h, w, k, device: (
        torch.randint(h * w - k + 1, (1,), device=device) + torch.arange(k, device=device)
    ),
    "first": lambda h, w, k, device: torch.arange(k, device=device),
    "unstructured": lambda h, w, k, device: torch.randperm(h * w, device=device)[:k],  # a random subset
}


def visible_count(total, masking_ratio):
    """Number of visible tokens out of `total`, at least one. ValueError unless 0 <= masking_ratio < 1."""
    if not 0 <= masking_ratio < 1:
        raise ValueError(f"the masking ratio is {masking_ratio}; it must be at least 0 and below 1")
    return max(1, int((1 - masking_ratio) * total + 1e-6))  # without 1e-6, (1 - 0.9) * 100 would give 9


# ------------------------------------------------------------------------------------------------- losses


def world_size():
    """Number of processes of torch.distributed; 1 if it is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(x):
    """Sum of x over all processes, in place and without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def position_loss(logits, targets):
    """Cross-entropy over the query patches that have a target: logits [B, T, N], targets [B, T] -> loss and
    accuracy, both 0 for a batch without targets."""
    logits, targets = logits.float().flatten(0, 1), targets.flatten()  # BT,N and BT; losses are float32
    count = (targets >= 0).sum() + 1e-8
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / count
    return loss, (logits.detach().argmax(-1) == targets).sum() / count


@torch.no_grad()
def position_distance(logits, targets, columns):
    """Mean distance between predicted and true reference positions, in patches, over the query patches that
    have a target: logits [B, T, N], targets [B, T]; `columns` of the reference grid. It shows near misses."""
    predicted, matched = logits.argmax(-1), targets >= 0  # B,T
    down, right = predicted // columns - targets // columns, predicted % columns - targets % columns
    return ((down**2 + right**2).sqrt() * matched).sum() / (matched.sum() + 1e-8)


@torch.no_grad()
def sinkhorn(scores, temperature=0.05, rounds=3):
    """Soft cluster assignments that use all prototypes equally: scores [M, P] -> float32 [M, P]. Each round
    normalizes every prototype over all samples on all devices, then every sample over all prototypes, so rows
    sum to 1 (Caron et al. 2020; here after a softmax, as released)."""
    kernel = (scores.float() / temperature).softmax(-1)  # M,P
    tiny = torch.finfo(kernel.dtype).tiny  # a prototype without nearby samples stays 0 instead of 0 / 0
    rows = kernel.new_ones(len(kernel))  # M
    # Rounds only change the scale of rows and columns: the matrix is read twice a round, and written once.
    # Autocast would compute these products in bf16. The meta device has no autocast.
    has_autocast = torch.amp.is_autocast_available(scores.device.type)
    with torch.autocast(scores.device.type if has_autocast else "cpu", enabled=False):
        for _ in range(rounds):
            columns = 1 / sum_over_processes(rows @ kernel).clamp_min(tiny)  # P
            rows = 1 / (kernel @ columns).clamp_min(tiny)  # M
    return kernel.mul_(columns).mul_(rows[:, None])


def feature_loss(features, prototypes, assignments, targets, temperature=0.1):
    """Cross-entropy with the teacher's assignments plus the mean-entropy term (paper section 3.2). features
    [B, T, E] and prototypes [P, E] are unit vectors, assignments [B, N, P] are from sinkhorn, targets [B, T].
    Returns loss, cross-entropy alone, and perplexity of the mean prediction (1..P)."""
    scores = features @ (prototypes / temperature).T  # B,T,P
    log_p = scores.log_softmax(-1, dtype=torch.float32)

    # Only patches with a counterpart have a target; the others gather position 0 and get weight 0.
    matched = targets >= 0  # B,T
    assigned = gather_tokens(assignments, targets.clamp(min=0))  # B,T,P
    cross_entropy = -((assigned * log_p).sum(-1) * matched).sum() / (matched.sum() + 1e-8)

    # The mean prediction over all query patches on all devices. DDP averages gradients over devices, so each
    # device backpropagates the gradient of the mean to its own patches only.
    mean = log_p.exp().sum((0, 1)) / targets.numel()  # P
    mean = mean + (sum_over_processes(mean.detach().clone()) / world_size() - mean).detach()
    negative_entropy = (mean * (mean + 1e-30).log()).sum()
    return cross_entropy + negative_entropy, cross_entropy.detach(), (-negative_entropy.detach()).exp()


# ----------------------------------------------------------------------------------- LOCA and its teacher


class LOCA(nn.Module):
    """Encoder, projection head and position predictor with their training loss (paper section 3).

    encoder: a ViT whose image size is that of the reference. prototypes: P; 0, like a feature_weight of 0,
    trains with the position loss alone. masking_ratio: eta, the share of hidden reference tokens.
    masking: a key of MASKING. query_tokens: encoded tokens of the random query; 0 means 5/14, as published.
    reference_encoder: 'teacher', which encodes the whole reference, or 'student', which encodes and learns
    from its visible tokens alone. query_position: whether queries get the position embedding. 'published':
    'teacher' and True with the feature loss, 'student' and False without. single_image: no reference; a view
    without position embedding attends to a random share 1 - eta of its own tokens and predicts its own
    positions (Zhai et al. 2022, the comparison in the paper's figures 2 and 3).
    """

    def __init__(
        self,
        encoder,
        prototypes=4096,
        head_hidden=2048,
        bottleneck=256,
        *,
        masking_ratio=0.8,
        masking="consecutive",
        query_tokens=0,
        student_temperature=0.1,
        teacher_temperature=0.05,
        position_weight=1.0,
        feature_weight=1.0,
        reference_encoder="published",
        query_position="published",
        single_image=False,
    ):
        super().__init__()
        self.encoder = encoder
        self.positions = encoder.grid[0] * encoder.grid[1]
        self.visible_tokens = visible_count(self.positions, masking_ratio)
        self.query_tokens = query_tokens or self.positions * 5 // 14
        if not 1 <= self.query_tokens <= self.positions:
            raise ValueError(f"cannot draw {self.query_tokens} query tokens from {self.positions}")
        # As published, the teacher encodes the reference. The position loss alone needs no teacher: the
        # student encodes the reference, and queries get no position embedding.
        with_features = bool(prototypes and feature_weight) and not single_image
        published = "teacher" if with_features else "student"
        self.reference_encoder = published if reference_encoder == "published" else reference_encoder
        self.query_position = with_features if query_position == "published" else query_position
        self.needs_teacher = with_features or self.reference_encoder == "teacher"
        self.masking, self.single_image = "unstructured" if single_image else masking, single_image
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.position_weight, self.feature_weight = position_weight, feature_weight if with_features else 0.0
        self.predictor = PositionPredictor(encoder.dim, encoder.heads, encoder.mlp_dim, self.positions)
        sizes = (encoder.dim, head_hidden, bottleneck, prototypes)
        self.head = ProjectionHead(*sizes) if with_features else None
        if single_image:
            encoder.pos_embed.requires_grad_(False)  # it is never used

    def forward(self, views, teacher=None, visible=None, keep=None):
        """The loss of one training step.

        views: reference [B, 3, S, S], query [B, 3, S, S], query_targets [B, N], focal [B, F, 3, s, s],
        focal_targets [B, F, n]; targets are reference positions, -1 = none. teacher: from make_teacher, if
        `needs_teacher`. visible [K] or [B, K]: reference tokens that the queries see. keep: tokens of the
        random query that are encoded. If None, visible and keep are drawn at random.

        Returns a dict of scalars, all of which train.py logs: loss (with gradient), position_loss (ln N at
        chance), position_accuracy (0..1), position_distance (in patches) and feature_loss; with the feature
        loss, also its part cross_entropy (ln P at chance), and prototype_perplexity (1..P) and target_entropy
        (0..ln P), which reveal collapse.
        """
        reference = views["reference"]
        if visible is None:
            visible = MASKING[self.masking](*self.encoder.grid, self.visible_tokens, reference.device)
        if self.needs_teacher and teacher is None:
            raise ValueError("this LOCA needs a teacher: pass loca.make_teacher(model)")
        with torch.no_grad():  # the teacher is updated only by averaging, see update_teacher
            tokens = teacher.encoder(reference) if self.needs_teacher else None  # B,N,D
        if self.single_image:  # without the position embedding, which would be the answer
            queries = self.encoder(reference, position=False, attend=visible)  # B,N,D
            context = gather_tokens(queries, visible)  # B,K,D
            targets = torch.arange(self.positions, device=reference.device).expand(len(reference), -1)  # B,N
        else:
            context = self.encode_context(reference, tokens, visible)  # B,K,D
            queries, targets = self.encode_queries(views, keep)  # B,T,D and B,T

        # Where in the reference does each query patch lie?
        logits = self.predictor(queries, context)  # B,T,N
        position, accuracy = position_loss(logits, targets)
        losses = {
            "position_loss": position.detach(),
            "position_accuracy": accuracy,
            "position_distance": position_distance(logits, targets, self.encoder.grid[1]),
        }

        # Which cluster does the teacher assign to its counterpart?
        feature = torch.zeros_like(position)
        if self.head is not None:
            assignments = self.assign_clusters(tokens, teacher)  # B,N,P
            feature, cross_entropy, perplexity = self.compare_clusters(queries, assignments, targets)
            losses |= {
                "cross_entropy": cross_entropy,
                "prototype_perplexity": perplexity,
                # Every fifth position is enough for a metric of an array of this size.
                "target_entropy": torch.special.entr(assignments[:, ::5]).sum(-1).mean(),
            }
        loss = self.position_weight * position + self.feature_weight * feature
        return {"loss": loss, "feature_loss": feature.detach(), **losses}

    def encode_context(self, reference, tokens, visible):
        """The reference tokens that the queries see [B, K, D]: the teacher's [B, N, D] or the student's."""
        if self.reference_encoder == "teacher":
            return gather_tokens(tokens, visible)
        return self.encoder(reference, keep=visible)

    def encode_queries(self, views, keep=None):
        """Tokens of all queries of each image, the random query first [B, T, D], and their targets [B, T]."""
        focal, targets, position = views["focal"], views["query_targets"], self.query_position
        if keep is None:
            keep = MASKING["unstructured"](*self.encoder.grid, self.query_tokens, targets.device)
        tokens = self.encoder(views["query"], keep=keep, position=position)  # B,K,D
        targets = gather_tokens(targets, keep)  # B,K
        if focal.shape[1] == 0:
            return tokens, targets
        # Focal queries are small, so all of their tokens are encoded, as one batch of B times F images.
        focal_tokens = self.encoder(focal.flatten(0, 1), position=position)  # BF,n,D
        focal_tokens = focal_tokens.unflatten(0, focal.shape[:2]).flatten(1, 2)  # B,Fn,D
        tokens = torch.cat([tokens, focal_tokens], dim=1)  # B,T,D
        return tokens, torch.cat([targets, views["focal_targets"].flatten(1)], dim=1)  # B,T

    @torch.no_grad()
    def assign_clusters(self, tokens, teacher):
        """Targets of the feature loss: the teacher's reference tokens [B, N, D] -> assignments [B, N, P]."""
        scores = teacher.head(tokens) @ teacher.head.normalized_prototypes().T  # B,N,P
        return sinkhorn(scores.flatten(0, 1), self.teacher_temperature).unflatten(0, tokens.shape[:2])

    def compare_clusters(self, queries, assignments, targets):
        """feature_loss of the student's query tokens [B, T, D]."""
        features, prototypes = self.head(queries), self.head.normalized_prototypes()
        return feature_loss(features, prototypes, assignments, targets, self.student_temperature)


def make_teacher(model):
    """Frozen copy of the encoder and projection head of a LOCA, with the same parameter names. Stochastic
    depth stays active in training mode, as released."""
    parts = {name: part for name, part in model.named_children() if name in ("encoder", "head")}
    return nn.ModuleDict(copy.deepcopy(parts)).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher, model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * model, in place."""
    # Both lists have the same order, because the teacher starts as a copy; one call updates all tensors.
    student = [p for name in teacher for p in getattr(model, name).parameters()]
    torch._foreach_lerp_(list(teacher.parameters()), student, 1 - momentum)


# ------------------------------------------------------------------------------------- weights in and out
# A file is read as one flat dict of tensors by name. One table of renames turns this into the complete ViT
# of the wanted branch. A table is read from the top to rename tensors, and from the bottom to report missing
# ones by the file's names. "query, key, value" is only for reports: the three are joined after renaming.

RELEASED_NAMES = (  # in the authors' flax files -> here
    (".kernel", ".weight"), ("norm.scale", "norm.weight"), ("LayerNorm_0.scale", "LayerNorm_0.weight"),
    ("LayerNorm_1.scale", "LayerNorm_1.weight"), ("LayerNorm_2.scale", "LayerNorm_2.weight"),
    ("ToTokenSequence_0.embedding", "encoder.patch_embed.proj"),
    ("ToTokenSequence_0.posembed_input", "encoder.pos_embed"), ("encoder_norm", "encoder.norm"),
    ("encoderblock_", "encoder.blocks."), ("MultiHeadDotProductAttention_0", "attn"), ("attn.out", "attn.proj"),
    ("MlpBlock_0", "mlp"), ("Dense_0", "fc1"), ("Dense_1", "fc2"), ("Dense_2", "fc3"),
    ("cross_attention_block", "predictor"), ("position_predictor", "predictor.logits"),
    ("final_norm", "predictor.norm"), ("predictor.LayerNorm_0", "predictor.norm_query"),
    ("predictor.LayerNorm_1", "predictor.norm_context"), ("predictor.LayerNorm_2", "predictor.norm_mlp"),
    ("LayerNorm_0", "norm1"), ("LayerNorm_1", "norm2"), ("predictor.attn.query", "predictor.attn.q"),
    ("predictor.attn.key", "predictor.attn.k"), ("predictor.attn.value", "predictor.attn.v"),
    ("attn.query, key, value", "attn.qkv"), ("projection_head_for_clustering_prediction", "head"),
)  # fmt: skip
OFFERED_NAMES = (  # in the files offered for download, which older code wrote -> in the released code
    ("final_encoder_norm", "encoder_norm"), ("localizer_block_0", "cross_attention_block"),
    ("pos_predictor", "position_predictor"), ("output_projection", "projection_head_for_clustering_prediction"),
)  # fmt: skip
HUGGING_FACE_NAMES = (  # in transformers' ViT -> here
    ("embeddings.patch_embeddings.projection", "encoder.patch_embed.proj"), ("embeddings.cls_token", "encoder.cls_token"),
    ("embeddings.position_embeddings", "encoder.pos_embed"), ("encoder.layer.", "encoder.blocks."),
    ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("layernorm.", "encoder.norm."), ("attention.attention", "attn"),
    ("attention.output.dense", "attn.proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"), ("attn.query, key, value", "attn.qkv"),
)  # fmt: skip
NAMINGS = {  # the name of the patch embedding tells how a file names a ViT's other parameters
    "ToTokenSequence_0.embedding.kernel": RELEASED_NAMES,
    "embeddings.patch_embeddings.projection.weight": HUGGING_FACE_NAMES,
    "encoder.patch_embed.proj.weight": (),  # this project; the heads stand beside the encoder
    "patch_embed.proj.weight": (("", "encoder."),),  # timm, DINO, iBOT, MAE, MoCo v3, I-JEPA
}
# Names of the branch that is not trained by gradients, in LOCA, DINO, timm, MoCo v3, I-JEPA and lightly.
TEACHER_NAME = re.compile(r"(^|[._])(teacher|ema|momentum|target)([._]|$)")


def load_weights(path, branch="teacher"):
    """Read a LOCA or a plain ViT from a file -> its state dict, with a complete 'encoder...' and any entries
    of 'predictor...' and 'head...'. Raises OSError, ImportError, or a one-line ValueError.

    Reads this project's checkpoints, the authors' flax files (needs msgpack), and PyTorch or safetensors
    files with the names of timm, DINO, iBOT, MAE, MoCo v3, I-JEPA or Hugging Face. branch: 'teacher' or
    'student', for files that hold both. Attributes of the state dict: sizes, the arguments of the matching
    ViT; heads_assumed, whether the number of heads is a guess; prefix of the ViT's names in the file.
    """
    try:
        return _find_vit(read_entries(path), branch)
    except OSError:
        raise
    except ImportError as error:
        raise ImportError(f"this needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # a damaged file can make a reader raise anything
        reason = error if type(error) is ValueError else f"damaged or not weights ({type(error).__name__})"
        raise ValueError(f"cannot read weights from {path}: {reason}") from error


def load_vit(path, branch="teacher", **changes):
    """The ViT stored in a file, in evaluation mode. path, branch and errors as in load_weights; `changes`
    override arguments of ViT, such as drop_path. Warns if it has to assume the number of heads."""
    weights = load_weights(path, branch)
    encoder = ViT(**{**weights.sizes, **changes})
    if weights.heads_assumed and "heads" not in changes:
        warnings.warn(f"{path} does not state the number of heads; assuming {encoder.heads} (set heads=N)")
    load_encoder(encoder, weights)
    return encoder.eval()


@torch.no_grad()
def load_encoder(encoder, state):
    """Load the 'encoder.' entries of a state dict, such as load_weights returns, into a ViT. Resizes the
    position embedding to the ViT's grid, and drops a class token if the ViT has none. Raises ValueError, and
    changes nothing, if weights and ViT do not fit together."""
    sizes = getattr(state, "sizes", None) or _vit_sizes(state)
    if not getattr(state, "heads_assumed", True) and sizes["heads"] != encoder.heads:
        raise ValueError(f"the weights have {sizes['heads']} heads, the encoder {encoder.heads}")
    grid = tuple(side // sizes["patch_size"] for side in sizes["image_size"])
    state = {key[len("encoder.") :]: value for key, value in state.items() if key.startswith("encoder.")}
    # The entry of the class token [1, 0 or 1, D] and those of the patches [1, N, D].
    token, patches = state["pos_embed"].tensor_split([int("cls_token" in state)], dim=1)
    if grid != encoder.grid:
        patches = resize_position_embedding(patches.float(), grid, encoder.grid)
    if getattr(encoder, "cls_token", None) is None:
        state.pop("cls_token", None)
        token = token[:, :0]
    state["pos_embed"] = torch.cat([token, patches], dim=1)
    own = encoder.state_dict()
    _check_fit(own, state, f"the weights do not fit this encoder of {len(own)} tensors")
    encoder.load_state_dict({key: state[key] for key in own})


def published_to_state_dict(flat):
    """State dict of a LOCA from the authors' parameters, {'encoderblock_0/LayerNorm_0/scale': array, ...}."""
    flat = {name.replace("/", "."): torch.as_tensor(value) for name, value in flat.items()}
    return _to_our_names(flat, OFFERED_NAMES + RELEASED_NAMES)


def read_entries(path):
    """All entries of a weights file by name, {'teacher.encoder.norm.weight': tensor, 'step': 3, ...}: names
    in nested dicts are joined by dots. In a folder, reads its only weights file. May raise any exception."""
    if os.path.isdir(path):
        files = [file for file in os.listdir(path) if file in ("model.safetensors", "pytorch_model.bin")]
        if len(files) != 1:
            raise ValueError("it is a folder; give the weights file inside it")
        path = os.path.join(path, files[0])
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:2] in (b"PK", b"\x80\x02"):  # the two formats of torch.save
        tree = read_torch_file(path)
    elif start[8:9] == b"{":
        import safetensors.torch

        tree = safetensors.torch.load_file(path)
    else:
        tree = read_flax_file(path)
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a dict of weights")
    return dict(_leaves(tree))


def _leaves(tree, prefix=""):
    """(name, value) of all entries of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_torch_file(path):
    """Read what torch.save wrote: tensors, containers and argparse.Namespace (in which DINO, iBOT and MAE
    keep their arguments), but no other class. Raises a one-line ValueError for anything else."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception of its own for a damaged or unsafe file
        reason = f"it is damaged, unreadable, or not written by torch.save ({type(error).__name__})"
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {unsafe[1]} object, which could run code; save only the state dict"
        elif "TorchScript" in str(error):
            reason = "it is a TorchScript program; save only the state dict of torch.jit.load(FILE)"
        elif str(path).endswith(".npz"):
            reason = "it is a NumPy archive; if timm has this model, save the state dict of timm's model"
        raise ValueError(reason) from error


def read_flax_file(path):
    """The nested dicts in a flax file (msgpack); entries of unknown types are None."""
    import msgpack

    def array(code, payload):  # code 1: an array, 3: a numpy scalar, both as (shape, dtype name, bytes)
        shape, dtype, buffer = msgpack.unpackb(payload) if code in (1, 3) else (None, "", b"")
        if buffer and hasattr(torch, dtype):
            return torch.frombuffer(bytearray(buffer), dtype=getattr(torch, dtype)).reshape(shape)

    with open(path, "rb") as file:
        return msgpack.unpackb(file.read(), ext_hook=array, strict_map_key=False)


def _find_vit(entries, branch):
    """What load_weights returns, from the entries of a file."""
    # Patch embeddings tell where in the file there are ViTs: teacher, student, an optimizer's moments. Among
    # those of the wanted branch, take the one with the shortest prefix.
    found = {}
    for name in entries:
        for patch, renames in NAMINGS.items():
            if f".{name}".endswith(f".{patch}") and not name.startswith("opt"):
                found[name.removesuffix(patch)] = renames
    if not found:
        top = ", ".join(sorted({name.split(".")[0] for name in entries})[:20])
        raise ValueError(f"no ViT found: no entry ends in {' or '.join(NAMINGS)}; it holds {top}")
    wanted = [prefix for prefix in found if bool(TEACHER_NAME.search(prefix)) == (branch == "teacher")]
    prefix = min(wanted or found, key=len)
    renames = found[prefix]
    if any("final_encoder_norm" in name for name in entries):  # else the released name is the file's own
        renames = OFFERED_NAMES + renames
    tensors = {name: x for name, x in entries.items() if torch.is_tensor(x) and name.startswith(prefix)}
    tensors = {name[len(prefix) :]: x for name, x in tensors.items()}
    state = _to_our_names(tensors, renames)

    # Our checkpoints state heads and image size; flax files show heads in a shape; MoCo v3's ViT-S has 12.
    known = {key: entries.get(f"settings.{key}") for key in ("heads", "image_size")}
    query = tensors.get("encoderblock_0.MultiHeadDotProductAttention_0.query.kernel")
    if query is not None:
        known["heads"] = query.shape[1]  # in,heads,head width
        # Both branches have the same depth, so a block that only the other branch has counts as missing.
        known["depth"] = 1 + max(map(int, re.findall(r"encoderblock_(\d+)", " ".join(entries))))
    elif re.search("(momentum|base)_encoder", prefix) and state["encoder.pos_embed"].shape[-1] == 384:
        known["heads"] = 12
    state.sizes, state.heads_assumed, state.prefix = _vit_sizes(state, **known), not known["heads"], prefix
    with torch.device("meta"):
        own = {f"encoder.{name}": x for name, x in ViT(**state.sizes).state_dict().items()}
    _check_fit(own, state, "its encoder is not a complete plain ViT", renames, prefix)
    return state


def _to_our_names(tensors, renames):
    """Convert tensors by name from a file's names and layouts to those of this module."""
    state = OrderedDict()  # unlike a dict, it can have attributes
    for name, value in tensors.items():
        if name.endswith("embedding.kernel"):
            value = value.permute(3, 2, 0, 1)  # height,width,in,out -> out,in,height,width
        elif name.endswith("out.kernel"):
            value = value.flatten(0, -2).T  # heads,head width,out -> out,in
        elif name.endswith(".kernel"):
            value = value.flatten(1).T  # in,out or in,heads,head width -> out,in
        elif name.endswith(("query.bias", "key.bias", "value.bias")):
            value = value.flatten()  # heads,head width -> out
        for theirs, ours in renames:
            name = name.replace(theirs, ours, 1)  # "" is found once, at the start
        if name == "encoder.pos_embed" and value.ndim == 4:
            value = value.flatten(1, 2)  # 1,rows,columns,D -> 1,N,D
        state[name] = value.contiguous()
    # Join query, key and value of the encoder, as timm does.
    for name in [name for name in state if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in state for part in parts):
            state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])
    return state


def _vit_sizes(state, heads=None, image_size=None, depth=None):
    """The arguments of ViT that match a state dict. Tensors do not determine `heads` and `image_size`: if
    None, these are the usual number for the width, and a square. depth: if None, the blocks are counted."""
    kernel, missing = state["encoder.patch_embed.proj.weight"], torch.empty(1, 1)
    hidden, class_token = state.get("encoder.blocks.0.mlp.fc1.weight", missing), "encoder.cls_token" in state
    dim, patch_size = len(kernel), kernel.shape[-1]
    tokens = state.get("encoder.pos_embed", missing).shape[1] - class_token
    if image_size is None and math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"its {tokens} patch positions are not a square grid (are there register tokens?)")
    image_size = image_size or math.isqrt(tokens) * patch_size
    image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    heads = heads or {size["dim"]: size["heads"] for size in SIZES.values()}.get(dim, max(1, dim // 64))
    blocks = re.findall(r"(?<!\S)encoder\.blocks\.(\d+)", " ".join(state))
    depth = depth or 1 + max(map(int, blocks), default=-1)
    sizes = {"patch_size": patch_size, "dim": dim, "depth": depth, "heads": heads, "mlp_dim": len(hidden)}
    return {"image_size": image_size, **sizes, "class_token": class_token}


def _check_fit(own, state, problem, renames=(), prefix=""):
    """Raise a ValueError, `problem` and names as in the file, unless a state dict has all tensors of a ViT
    (`own`), in their shapes and with finite floating-point values, and no other part of a ViT. Other
    projects' heads, decoders and buffers may stay."""
    part_of_vit = r"(encoder\.)?(blocks|patch_embed|norm|norm_pre|reg\w*_tokens?|cls_token|dist_token)\b"
    given = {key: state[key] for key in own if key in state}
    lists = {
        "missing": own.keys() - given.keys(),
        "with a different shape": [key for key, x in given.items() if x.shape != own[key].shape],
        "not finite numbers": [
            key for key, x in given.items() if not (x.is_floating_point() and x.isfinite().all())
        ],
        "unknown": [key for key in state if key not in own and re.match(part_of_vit, key)],
    }
    for kind, names in lists.items():
        for theirs, ours in reversed(renames):
            names = [name.replace(ours, theirs, 1) for name in names]
        shown = ", ".join(prefix + name for name in sorted(names)[:6])
        problem += f"; {kind}: {shown}{' ...' * (len(names) > 6)}" * bool(names)
    if any(lists.values()):
        raise ValueError(problem)


if __name__ == "__main__":  # python loca.py FILE prints what a weights file holds
    try:
        entries = read_entries(sys.argv[1])
    except Exception as error:  # a damaged file can make a reader raise anything
        sys.exit(f"error: cannot read {' '.join(sys.argv[1:]) or 'FILE'}: {error}")
    for entry, content in entries.items():
        print(entry, tuple(content.shape) if torch.is_tensor(content) else content)
