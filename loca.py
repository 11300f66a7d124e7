"""LOCA: Location-Aware Self-Supervised Transformers for Semantic Segmentation (arXiv 2212.02400), in PyTorch.

LOCA takes a reference view and several query views from one image. For every query patch it predicts which
reference patch shows the same content (position loss) and which cluster a slowly moving teacher assigns to
that patch (feature loss). This file is the whole method. It needs only torch; read it from top to bottom.

Shape letters: B images, F focal queries per image, N reference tokens, K kept or visible tokens, T query
tokens per image, D width, E bottleneck width, P prototypes. A target is the index of a reference token in
raster order; -1 means that the query patch has no counterpart.
"""

import argparse
import copy
import importlib
import math
import re
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


# ------------------------------------------------------------------------------------ transformer blocks


def gather_tokens(tokens, index):
    """Select tokens [B, N, ...] by index [K] or [B, K] -> [B, K, ...]."""
    image = torch.arange(len(tokens), device=tokens.device)[:, None]  # B,1
    return tokens[image, index]  # B,K,...


def lecun_normal_(weight):
    """Truncated normal with variance 1 / fan-in, as in JAX."""
    # Truncation at 2 sigma reduces the standard deviation to 0.8796 of its value.
    std = weight[0].numel() ** -0.5 / 0.87962566103423978
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
    """Multi-head self-attention over tokens [B, N, D].

    attend: indices [K] or [B, K] of the tokens that serve as keys and values; all tokens if None.
    """

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
    """Pre-norm transformer block over [B, N, D].

    branch_scale: stochastic depth, [2, B, 1, 1] from ViT.draw_branch_scale; None keeps both residual
    branches. The rate is not an attribute of the block, so torch.compile reuses one graph for all blocks.
    """

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


# ---------------------------------------------------------------------------------------------------- ViT


class ViT(nn.Module):
    """Vision transformer with timm's parameter names (paper section 3, released code).

    image_size: size in pixels, one number or (height, width), of the position embedding; forward takes any
    size divisible by `patch_size`. drop_path: stochastic depth rate of the last block; it rises linearly from
    0 at the first. class_token: add a class token, as in DINO, MAE and most timm models; LOCA has none.
    Raises ValueError if the patch size does not divide the image size, or the number of heads does not divide
    the width.
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

    def position_embedding(self, grid):
        """Position embedding of the patches, resized to `grid` = (rows, columns): [1, rows * columns, D]."""
        patches = self.pos_embed[:, -self.grid[0] * self.grid[1] :]  # skip the class token's entry
        return resize_position_embedding(patches, self.grid, grid)

    def draw_branch_scale(self, batch, device):
        """Stochastic depth (Huang et al. 2016) for all blocks at once: [depth, 2, B, 1, 1], where 0 drops a
        residual branch of a sample and 1 / keep rescales a kept one. None if nothing is dropped."""
        if not self.training or self.drop_path == 0:
            return None
        depth = len(self.blocks)
        # The rate rises linearly with depth, because early blocks affect all later ones.
        keep = torch.linspace(1, 1 - self.drop_path, depth, device=device).view(-1, 1, 1, 1, 1)
        return (torch.rand(depth, 2, batch, 1, 1, device=device) < keep) / keep

    def forward(self, images, keep=None, position=True, attend=None):
        """Encode images [B, 3, H, W] -> patch tokens after the last norm, [B, N, D], or [B, K, D] with
        `keep`.

        keep: indices [K] or [B, K] of the tokens that enter the blocks. position: add the position embedding.
        attend: indices [K'] or [B, K'] of the tokens that all tokens attend to (the single-image mechanism).
        """
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            size = tuple(images.shape[-2:])
            raise ValueError(f"the patch size {self.patch_size} does not divide the image size {size}")
        # Patches become tokens. A random query keeps some of them, after the position embedding is added.
        x = self.patch_embed(images)  # B,D,rows,columns
        grid = tuple(x.shape[-2:])
        # Make x contiguous and float32. Otherwise all blocks inherit the convolution's layout and bf16.
        x = x.flatten(2).transpose(1, 2).contiguous().to(self.pos_embed.dtype)  # B,N,D
        if position:
            x = x + self.position_embedding(grid)
        if keep is not None:
            x = gather_tokens(x, keep)  # B,K,D
        if self.cls_token is not None:
            token = self.cls_token + self.pos_embed[:, :1] if position else self.cls_token
            x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)  # B,1+K,D

        scale = self.draw_branch_scale(len(x), x.device)
        for i, block in enumerate(self.blocks):
            arguments = (x, attend, None if scale is None else scale[i])
            if i < self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
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
    """Query tokens [B, T, D], visible reference tokens [B, K, D] -> logits over positions [B, T, N].

    One cross-attention block is the only place where queries see the reference (paper section 3.1).
    """

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


# --------------------------------------------------------------------------------------------- correspondence


def patch_targets(reference_box, query_box, flip, view, grid, reference_grid):
    """Find the reference patch that shows the same content as each query patch.

    Exact: reproduces the three nearest-neighbor samplings of the released pipeline in integer arithmetic.
    reference_box, query_box: long [..., 4] = top, left, height, width in image pixels. flip: bool [...],
    whether the query was mirrored left-right. view: side of the query in pixels. grid, reference_grid:
    patches per side of the query and of the reference. Returns long [..., grid * grid], the position
    row * reference_grid + column, or -1 where the query patch lies outside the reference.
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


# ------------------------------------------------------------------------------------------------ masking

# Which tokens stay visible: (total, count, device) -> `count` different indices, drawn once for all images of
# a micro-batch. --masking offers every entry. The host never waits for the device.
MASKING = {
    "consecutive": lambda total, count, device: (
        torch.randint(total - count + 1, (1,), device=device) + torch.arange(count, device=device)
    ),  # a random run in raster order
    "first": lambda total, count, device: torch.arange(count, device=device),
    "unstructured": lambda total, count, device: torch.randperm(total, device=device)[:count],
}


def visible_count(total, masking_ratio):
    """Number of visible tokens out of `total`, at least one. ValueError unless 0 <= masking_ratio < 1."""
    if not 0 <= masking_ratio < 1:
        raise ValueError(f"the masking ratio is {masking_ratio}; it must be at least 0 and below 1")
    return max(1, int((1 - masking_ratio) * total + 1e-6))  # without 1e-6, (1 - 0.9) * 100 would give 9


def choose_tokens(total, count, kind="consecutive", device=None):
    """Indices [count] of tokens out of `total`; `kind` is a key of MASKING. Raises ValueError for an unknown
    kind, or a count outside 1..total."""
    if kind not in MASKING:
        raise ValueError(f"unknown masking {kind!r}; choose from {', '.join(MASKING)}")
    if not 0 < count <= total:
        raise ValueError(f"cannot choose {count} tokens out of {total}")
    return MASKING[kind](total, count, device)


# ------------------------------------------------------------------------------------------------- losses


def devices():
    """Number of processes of torch.distributed; 1 if it is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_devices(x):
    """Sum of x over all processes, in place and without gradient."""
    if devices() > 1:
        dist.all_reduce(x)
    return x


def position_loss(logits, targets):
    """Cross-entropy over the query patches that have a target: logits [B, T, N], targets [B, T] -> loss and
    accuracy, both 0 for a batch without targets."""
    # Losses are computed in float32, regardless of the network's precision.
    logits, targets = logits.float().flatten(0, 1), targets.flatten()  # BT,N and BT
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
    """Soft cluster assignments that use all prototypes equally: scores [M, P] -> float32 [M, P].

    Each round normalizes every prototype over all samples on all devices, then every sample over all
    prototypes, so rows sum to 1 (Caron et al. 2020; here after a softmax, as released).
    """
    kernel = (scores.float() / temperature).softmax(-1)  # M,P
    tiny = torch.finfo(kernel.dtype).tiny  # a prototype without nearby samples stays 0 instead of 0 / 0
    rows = kernel.new_ones(len(kernel))  # M
    # Rounds only change the scale of rows and columns: the matrix is read twice a round, and written once.
    with torch.autocast(scores.device.type, enabled=False):  # it would compute these products in bf16
        for _ in range(rounds):
            columns = 1 / sum_over_devices(rows @ kernel).clamp_min(tiny)  # P
            rows = 1 / (kernel @ columns).clamp_min(tiny)  # M
    return kernel.mul_(columns).mul_(rows[:, None])


def feature_loss(features, prototypes, assignments, targets, temperature=0.1):
    """Cross-entropy with the teacher's assignments plus the mean-entropy term (paper section 3.2).

    features [B, T, E] and prototypes [P, E] are unit vectors, assignments [B, N, P] come from sinkhorn,
    targets [B, T]. Returns loss, cross-entropy alone, and perplexity of the mean prediction (1..P).
    """
    scores = features @ (prototypes / temperature).T  # B,T,P
    log_p = scores.log_softmax(-1, dtype=torch.float32)

    # Only patches with a counterpart have a target; the others gather position 0 and get weight 0.
    matched = targets >= 0  # B,T
    assigned = gather_tokens(assignments, targets.clamp(min=0))  # B,T,P
    cross_entropy = -((assigned * log_p).sum(-1) * matched).sum() / (matched.sum() + 1e-8)

    # The mean prediction over all query patches on all devices. DDP averages gradients over devices, so each
    # device backpropagates the gradient of the mean to its own patches only.
    mean = log_p.exp().sum((0, 1)) / targets.numel()  # P
    mean = mean + (sum_over_devices(mean.detach().clone()) / devices() - mean).detach()
    negative_entropy = (mean * (mean + 1e-30).log()).sum()
    return cross_entropy + negative_entropy, cross_entropy.detach(), (-negative_entropy.detach()).exp()


# --------------------------------------------------------------------------------------------------- LOCA


class LOCA(nn.Module):
    """Encoder, projection head and position predictor with their training loss (paper section 3).

    encoder: a ViT whose image size is that of the reference. prototypes: P; 0 omits the projection head, for
    the position loss alone. masking_ratio: eta, the share of reference tokens hidden from the queries.
    masking: a key of MASKING. query_tokens: number of tokens of the random query that are encoded; None means
    5/14 of them, as published. single_image: no reference; a view without a position embedding attends to a
    random share 1 - eta of its own tokens and predicts its own positions (Zhai et al. 2022, the comparison in
    the paper's figures 2 and 3).
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
        query_tokens=None,
        student_temperature=0.1,
        teacher_temperature=0.05,
        position_weight=1.0,
        feature_weight=1.0,
        single_image=False,
    ):
        super().__init__()
        self.encoder = encoder
        self.positions = encoder.grid[0] * encoder.grid[1]
        self.predictor = PositionPredictor(encoder.dim, encoder.heads, encoder.mlp_dim, self.positions)
        self.head = ProjectionHead(encoder.dim, head_hidden, bottleneck, prototypes) if prototypes else None
        self.visible_tokens = visible_count(self.positions, masking_ratio)
        self.query_tokens = self.positions * 5 // 14 if query_tokens is None else query_tokens
        if not 1 <= self.query_tokens <= self.positions:
            raise ValueError(f"cannot draw {self.query_tokens} query tokens from a view of {self.positions}")
        self.masking = masking
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.position_weight, self.feature_weight = position_weight, feature_weight
        self.single_image = single_image
        if single_image:
            encoder.pos_embed.requires_grad_(False)  # it is never used

    def forward(self, views, teacher=None, visible=None, keep=None):
        """The loss of one training step.

        views: reference [B, 3, S, S], query [B, 3, S, S], query_targets [B, N], focal [B, F, 3, s, s],
        focal_targets [B, F, n]; targets are reference positions, -1 = none. teacher: from make_teacher; None
        trains with the position loss alone. visible [K] or [B, K]: reference tokens that the queries see.
        keep: tokens of the random query that are encoded. Both are drawn at random if None.

        Returns a dict of scalars: loss (with gradient), position_loss (ln N at chance), feature_loss and its
        part cross_entropy (ln P at chance), position_accuracy (0..1), position_distance (in patches), and two
        metrics that reveal collapse: prototype_perplexity (1..P) and target_entropy (0..ln P, mean over every
        fifth reference position).
        """
        # The reference tokens become the context that the queries attend to; a share eta of them is hidden.
        context, tokens = self.encode_reference(views, teacher, visible)
        if self.single_image:
            queries = tokens
            targets = torch.arange(self.positions, device=tokens.device).expand(len(tokens), -1)  # B,N
        else:
            queries, targets = self.encode_queries(views, keep, position=teacher is not None)

        # Where in the reference does each query patch lie?
        logits = self.predictor(queries, context)  # B,T,N
        position, accuracy = position_loss(logits, targets)

        # Which cluster does the teacher assign to its counterpart?
        feature = cross_entropy = perplexity = entropy = torch.zeros((), device=queries.device)
        if teacher is not None:
            assignments = self.assign_clusters(tokens, teacher)
            feature, cross_entropy, perplexity = self.compare_clusters(queries, assignments, targets)
            entropy = torch.special.entr(assignments[:, ::5]).sum(-1).mean()
        # train.py averages and logs every scalar in here.
        return {
            "loss": self.position_weight * position + self.feature_weight * feature,
            "position_loss": position.detach(),
            "feature_loss": feature.detach(),
            "position_accuracy": accuracy,
            "position_distance": position_distance(logits, targets, self.encoder.grid[1]),
            "cross_entropy": cross_entropy,
            "prototype_perplexity": perplexity,
            "target_entropy": entropy,
        }

    def encode_reference(self, views, teacher=None, visible=None):
        """Reference tokens that the queries see [B, K, D], and all reference tokens [B, N, D], or None if the
        hidden tokens are not encoded. Arguments as in forward."""
        reference = views["reference"]
        if visible is None:
            kind = "unstructured" if self.single_image else self.masking
            visible = choose_tokens(self.positions, self.visible_tokens, kind, reference.device)
        if self.single_image:  # no position embedding: it would give away the answer
            tokens = self.encoder(reference, position=False, attend=visible)  # B,N,D
        elif teacher is None:  # position loss alone: the student encodes only what the queries see
            return self.encoder(reference, keep=visible), None
        else:
            with torch.no_grad():  # the teacher is updated only by averaging, see update_teacher
                tokens = teacher.encoder(reference)  # B,N,D
        return gather_tokens(tokens, visible), tokens

    def encode_queries(self, views, keep=None, position=True):
        """Concatenated tokens of all queries of each image, the random query first [B, T, D], and their
        targets [B, T].

        keep as in forward. position: add the position embedding; the published runs with the position loss
        alone do not.
        """
        focal, targets = views["focal"], views["query_targets"]
        if keep is None:
            keep = choose_tokens(self.positions, self.query_tokens, "unstructured", targets.device)
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


# ------------------------------------------------------------------------------------------------- teacher


def make_teacher(model):
    """Frozen copy of the encoder and projection head of a LOCA, with the same parameter names. Stochastic
    depth stays active in training mode, as released."""
    teacher = nn.ModuleDict({"encoder": copy.deepcopy(model.encoder), "head": copy.deepcopy(model.head)})
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher, model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * model, in place."""
    # Both lists have the same order, because the teacher starts as a copy; one call updates all tensors.
    student = [p for part in (model.encoder, model.head) for p in part.parameters()]
    torch._foreach_lerp_(list(teacher.parameters()), student, 1 - momentum)


# ------------------------------------------------------------------------------------- weights in and out

PUBLISHED_NAMES = (  # of the released flax checkpoints -> this file's, applied in order
    (r"^ToTokenSequence_0/embedding/", "encoder.patch_embed.proj/"),
    (r"^ToTokenSequence_0/posembed_input$", "encoder.pos_embed"),
    (r"^encoderblock_(\d+)/LayerNorm_0", r"encoder.blocks.\1.norm1"),
    (r"^encoderblock_(\d+)/LayerNorm_1", r"encoder.blocks.\1.norm2"),
    (r"^encoderblock_(\d+)", r"encoder.blocks.\1"),
    (r"^encoder_norm", "encoder.norm"),
    (r"^cross_attention_block/LayerNorm_0", "predictor.norm_query"),
    (r"^cross_attention_block/LayerNorm_1", "predictor.norm_context"),
    (r"^cross_attention_block/LayerNorm_2", "predictor.norm_mlp"),
    (r"^cross_attention_block/MultiHeadDotProductAttention_0/(q|k|v)[a-z]+", r"predictor.attn.\1"),
    (r"^cross_attention_block", "predictor"),
    (r"^final_norm", "predictor.norm"),
    (r"^position_predictor", "predictor.logits"),
    (r"^projection_head_for_clustering_prediction/Dense_0", "head.fc1"),
    (r"^projection_head_for_clustering_prediction/Dense_1", "head.fc2"),
    (r"^projection_head_for_clustering_prediction/Dense_2", "head.fc3"),
    (r"^projection_head_for_clustering_prediction/prototypes", "head.prototypes"),
    (r"/MultiHeadDotProductAttention_0/out", ".attn.proj"),
    (r"/MultiHeadDotProductAttention_0/", ".attn."),
    (r"/MlpBlock_0/Dense_0", ".mlp.fc1"),
    (r"/MlpBlock_0/Dense_1", ".mlp.fc2"),
    (r"/(kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
)
HUGGING_FACE_NAMES = (  # of transformers' ViT -> timm's
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.", r"blocks.\1.attn."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^layernorm\.", "norm."),
)
PATCH_WEIGHT = re.compile(r"(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight$")
# Names of the branch that is not trained by gradients, in DINO, timm, MoCo v3, I-JEPA and lightly.
TEACHER_NAME = re.compile(r"(^|[._])(teacher|ema|momentum|target)([._]|$)")


class Weights(dict):
    """State dict of an encoder ('encoder.blocks.0...') or of a whole LOCA, as found in a file.

    sizes: the matching arguments of ViT. heads_assumed: whether the number of heads is assumed because the
    file does not state it. notes: what was found, one line each.
    """

    def __init__(self, state, sizes, notes, heads_assumed=False):
        super().__init__(state)
        self.sizes, self.notes, self.heads_assumed = sizes, notes, heads_assumed


def load_weights(path, branch="student"):
    """Read weights from a file -> Weights: a state dict with LOCA's parameter names, and the ViT's sizes.

    Reads this project's checkpoints, the published flax files (needs msgpack), and PyTorch or safetensors
    files of ViTs with the names of timm, DINO, iBOT, MAE, MoCo v3, I-JEPA or Hugging Face. branch: 'student'
    or 'teacher', for files that hold both. Raises OSError, ImportError, or ValueError if the file holds none
    of these.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        if start[:2] in (b"PK", b"\x80\x02"):  # the two formats of torch.save
            return _find_vit(read_torch_file(path), branch)
        if start[8:9] == b"{":
            return _find_vit(import_optional("safetensors.torch").load_file(path), branch)
        return _find_published(path, branch)
    except (OSError, ImportError):
        raise
    except Exception as error:  # a damaged file can make a reader raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read weights from {path}: {reason}") from error


def load_vit(path, branch="teacher", **changes):
    """The ViT stored in a file, with its own sizes, in evaluation mode. path, branch and errors as in
    load_weights; `changes` override arguments of ViT, such as heads=12 or drop_path. Warns if it has to assume
    the number of heads."""
    weights = load_weights(path, branch)
    encoder = ViT(**{**weights.sizes, **changes})
    if weights.heads_assumed and "heads" not in changes:
        warnings.warn(
            f"{path} does not state the number of heads; {encoder.heads} assumed; pass heads=N to change it"
        )
    load_encoder(encoder, weights)
    return encoder.eval()


@torch.no_grad()
def load_encoder(encoder, state):
    """Load the 'encoder.' entries of a state dict, such as load_weights returns, into a ViT -> a summary.

    The position embedding is resized to the ViT's grid. A class token is dropped if the ViT has none. Raises
    ValueError, and changes nothing, if weights for part of the ViT are missing or if the ViT lacks parts of
    the file's ViT.
    """
    sizes = getattr(state, "sizes", None) or _vit_sizes(state)
    grid = tuple(side // sizes["patch_size"] for side in sizes["image_size"])
    state = {key[len("encoder.") :]: value for key, value in state.items() if key.startswith("encoder.")}
    own, notes, has_token = encoder.state_dict(), [], "cls_token" in state
    token, patches = state["pos_embed"].tensor_split([int(has_token)], dim=1)  # 1,0 or 1,D and 1,N,D
    if grid != encoder.grid:
        patches = resize_position_embedding(patches.float(), grid, encoder.grid)
        notes.append("position embedding resized from {}x{} to {}x{}".format(*grid, *encoder.grid))
    if has_token and encoder.cls_token is None:
        del state["cls_token"]
        token = token[:, :0]
    if has_token:
        notes.append(f"class token {'dropped' if encoder.cls_token is None else 'kept'}")
    state["pos_embed"] = torch.cat([token, patches], dim=1)
    # The parts of a ViT must match exactly; other projects' heads, decoders and buffers are ignored.
    vit_parts = r"(blocks|patch_embed|norm|norm_pre|reg\w*_tokens?|cls_token|dist_token)\b"
    unused = [key for key in state if key not in own and not re.match(vit_parts, key)]
    problem = _differences(own, {key: value for key, value in state.items() if key not in unused})
    if problem:
        raise ValueError(f"the weights do not fit this encoder of {len(own)} tensors; {problem}")
    encoder.load_state_dict({key: state[key] for key in own})
    notes += [f"not used: {_some(unused)}"] if unused else []
    return "; ".join([f"{len(own)} tensors loaded", *notes])


def published_to_state_dict(flat):
    """State dict of a LOCA from published parameters, {'encoderblock_0/LayerNorm_0/scale': array, ...}.
    Raises a ValueError that names the missing or unknown parameters."""
    state = {}
    for name, value in flat.items():
        value, is_kernel = torch.as_tensor(value), name.endswith("/kernel")
        if name.startswith("ToTokenSequence_0/embedding") and is_kernel:
            value = value.permute(3, 2, 0, 1)  # height,width,in,out -> out,in,height,width
        elif name.endswith("posembed_input"):
            value = value.reshape(1, -1, value.shape[-1])  # 1,N,D
        elif is_kernel:  # in,out; in,heads,head width; for attention's output heads,head width,out
            value = value.flatten(0, -2).T if name.endswith("/out/kernel") else value.flatten(1).T
        elif name.endswith("/bias"):
            value = value.flatten()
        state[_rename(name, PUBLISHED_NAMES)] = value.contiguous()
    state = _merge_qkv(state)
    # A LOCA on the meta device gives the expected names: the state must have these and no others.
    with torch.device("meta"):
        encoder = ViT(**_vit_sizes(state, heads=1))
        own = LOCA(encoder, prototypes=int("head.fc1.weight" in state)).state_dict()
    problem = _differences(own, state, shapes=False)
    if problem:
        raise ValueError(f"these are not the parameters of a published LOCA; {problem}")
    return state


def read_torch_file(path):
    """Read what torch.save wrote: tensors, containers and argparse.Namespace (in which DINO, iBOT and MAE
    keep their arguments), but no other class. Raises a one-line ValueError for anything else."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception of its own for a damaged or unsafe file
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            raise ValueError(
                f"it holds an object of class {unsafe[1]}, which could run code when loaded; in the program "
                "that wrote it, save only the state dict: torch.save(model.state_dict(), FILE)"
            ) from error
        raise ValueError(f"it is damaged, or torch.save did not write it ({type(error).__name__})") from error


def import_optional(name):
    """Import an optional package. Raises an ImportError that gives the command to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f"this needs the package {package}: pip install {package}") from error


def _leaves(tree, separator, prefix=""):
    """(path, tensor) of all tensors in nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            # flax splits arrays over 1 GiB into chunks named "0", "1", ...; the shape's entries are too.
            parts = (value["chunks"], value["shape"])
            chunks, shape = ([part[i] for i in sorted(part, key=int)] for part in parts)
            value = torch.cat([chunk.flatten() for chunk in chunks]).reshape(shape)
        if isinstance(value, dict):
            yield from _leaves(value, separator, f"{prefix}{name}{separator}")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def _rename(name, table):
    for theirs, ours in table:
        name = re.sub(theirs, ours, name)
    return name


def _merge_qkv(state):
    """Join separate query, key and value layers of the encoder into timm's qkv."""
    for name in [name for name in state if re.match(r"encoder\..*\.attn\.query\.", name)]:
        names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in state for part in names):
            state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(part) for part in names])
    return state


def _some(names, most=6):
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _differences(own, state, shapes=True):
    """How a state dict differs from a module's own: missing, misshapen and unknown names; '' if it fits."""
    shared = own.keys() & state.keys()
    lists = {
        "missing": own.keys() - state.keys(),
        "with a different shape": [key for key in shared if shapes and own[key].shape != state[key].shape],
        "unknown": state.keys() - own.keys(),
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in lists.items() if names)


def _vit_sizes(state, heads=None, image_size=None):
    """The arguments of ViT that match a state dict. Its tensors do not determine `heads` and `image_size`. If
    None, `heads` is the usual number for the width, and the image is square."""
    try:
        kernel, hidden = state["encoder.patch_embed.proj.weight"], state["encoder.blocks.0.mlp.fc1.weight"]
        tokens = state["encoder.pos_embed"].shape[1] - int("encoder.cls_token" in state)
    except KeyError as error:
        raise ValueError(f"its entries are not those of a plain ViT: {error} is missing") from error
    dim, patch_size, side = len(kernel), kernel.shape[-1], math.isqrt(tokens)
    if heads is None:
        heads = {size["dim"]: size["heads"] for size in SIZES.values()}.get(dim, max(1, dim // 64))
    if image_size is None and side**2 != tokens:
        raise ValueError(
            f"its position embedding has {tokens} patch tokens, not a square number; a rectangular grid, or "
            "a ViT with register or distillation tokens, cannot be read from such a file"
        )
    image_size = image_size or side * patch_size
    return {
        "image_size": (image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        "patch_size": patch_size,
        "dim": dim,
        "depth": sum(bool(re.fullmatch(r"encoder\.blocks\.\d+\.norm1\.weight", name)) for name in state),
        "heads": heads,
        "mlp_dim": len(hidden),
        "class_token": "encoder.cls_token" in state,
    }


def _find_vit(tree, branch):
    """Find the ViT in the contents of a PyTorch or safetensors file, at any level of nesting -> Weights."""
    flat, notes = dict(_leaves(tree, ".")) if isinstance(tree, dict) else {}, []
    prefixes = [key[: match.start()] for key in flat if (match := PATCH_WEIGHT.search(key))]
    if not prefixes:
        raise ValueError("there is no ViT in it: no entry is named patch_embed.proj.weight")
    # A file may hold several ViTs, such as teacher and student: among those of the requested branch,
    # take the one with the shortest prefix.
    wanted = [prefix for prefix in prefixes if bool(TEACHER_NAME.search(prefix)) == (branch == "teacher")]
    prefix = min(wanted or prefixes, key=len)
    if prefix:
        found = "teacher" if TEACHER_NAME.search(prefix) else "student"
        notes.append(f"branch: {found} ({prefix.rstrip('.')})")
    state = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
    if "patch_embed.proj.weight" not in state:
        state = {_rename(name, HUGGING_FACE_NAMES): value for name, value in state.items()}
    state = _merge_qkv({f"encoder.{name}": value for name, value in state.items()})

    # This project's checkpoints carry their settings, which give the number of heads and the image size.
    settings = tree["settings"] if isinstance(tree.get("settings"), dict) else {}
    heads, image_size = settings.get("heads"), settings.get("crop") or settings.get("image_size")
    if re.search("(momentum|base)_encoder", prefix) and len(state["encoder.patch_embed.proj.weight"]) == 384:
        heads = 12  # MoCo v3's ViT-S
    sizes = _vit_sizes(state, heads, image_size)
    # The student of a LOCA also has a predictor, its teacher a head, which names its prototypes.
    root = prefix.removesuffix("encoder.")
    if f"{root}predictor.norm_query.weight" in flat or f"{root}head.prototypes.weight" in flat:
        parts = (f"{root}predictor.", f"{root}head.")
        state |= {key.removeprefix(root): value for key, value in flat.items() if key.startswith(parts)}
    return Weights(state, sizes, notes, heads_assumed=heads is None)


def _find_published(path, branch):
    """The parameters in a published file (flax's msgpack) -> Weights."""
    msgpack = import_optional("msgpack")

    def array(code, payload):
        if code not in (1, 3):  # 1: an array, 3: a numpy scalar, both as (shape, dtype name, bytes)
            return None
        shape, dtype, buffer = msgpack.unpackb(payload)
        dtype = getattr(torch, dtype)
        return (
            torch.frombuffer(bytearray(buffer), dtype=dtype).reshape(shape) if buffer else torch.empty(shape)
        )

    name = "ema_params" if branch == "teacher" else "params"
    try:
        with open(path, "rb") as file:
            tree = msgpack.unpackb(file.read(), ext_hook=array, strict_map_key=False)
        flat = dict(_leaves(tree[name], "/"))
    except Exception as error:  # a damaged file can make msgpack or torch raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"it is not a PyTorch, safetensors or published flax file ({reason})") from error
    state = published_to_state_dict(flat)
    heads = flat["encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"].shape[1]  # in,heads,head width
    return Weights(state, _vit_sizes(state, heads), [f"branch: {branch} ({name})"])
