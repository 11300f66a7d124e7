"""LOCA: Location-Aware Self-Supervised Transformers for Semantic Segmentation (arXiv 2212.02400), in PyTorch.

From one image come a reference view and several query views. Every query patch says which reference patch
shows the same content (position loss) and which cluster a slowly moving teacher puts that patch in (feature
loss). This file is the whole method and needs torch alone; read it from top to bottom.

Shape letters: B images, F focal queries, N reference tokens, K kept or visible tokens, T query tokens of an
image, D width, E bottleneck, P prototypes. A target is the index of a reference token in raster order; -1
means none.
"""

import copy
import math
import re
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


# ---------------------------------------------------------------------------------------------- blocks


def take(tokens, index):
    """Pick tokens: [B, N, ...] at index [K] or [B, K] -> [B, K, ...]."""
    index = index.expand(len(tokens), -1)  # B,K
    return tokens.gather(
        1, index.reshape(*index.shape, *[1] * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
    )


def _init_linear(layer, scheme):
    """Initialise one linear or convolution layer, bias zero: 'xavier' uniform or 'lecun' truncated normal."""
    weight = layer.weight.flatten(1)
    if scheme == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    else:  # a normal cut at 2 standard deviations has 0.8796 of the uncut one's
        std = weight.shape[1] ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, D]; `attend` [K] or [B, K]: the tokens of keys and values."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        _init_linear(self.qkv, "xavier")
        for part in self.qkv.weight.chunk(3):  # query, key and value are three matrices to the initialiser
            nn.init.xavier_uniform_(part)
        _init_linear(self.proj, "xavier")

    def forward(self, x, attend=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if attend is not None:
            k, v = take(k, attend), take(v, attend)
        return self.proj(multi_head(q, k, v, self.heads))


class CrossAttention(nn.Module):
    """Multi-head attention of queries [B, T, D] to a context [B, K, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        for layer in (self.q, self.k, self.v, self.proj):
            _init_linear(layer, "xavier")

    def forward(self, x, context):
        return self.proj(multi_head(self.q(x), self.k(context), self.v(context), self.heads))


def multi_head(q, k, v, heads):
    """Scaled dot-product attention per head: q [B, T, D], k and v [B, K, D] -> [B, T, D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # B,heads,T or K,D/heads
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # torch's own is slow there, backwards above all
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(2)  # B,T,D


class Mlp(nn.Module):
    """Linear, GELU in its tanh form, linear, over [..., D]."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            _init_linear(layer, "xavier")
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth per sample and per residual branch."""

    def __init__(self, dim, heads, mlp_dim, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_dim)
        self.drop_path = drop_path

    def add(self, x, branch):
        """x + branch, in training with the branch left out for some samples."""
        if not self.training or self.drop_path == 0:
            return x + branch
        keep = 1 - self.drop_path
        kept = (torch.rand(len(x), 1, 1, device=x.device) < keep) / keep  # B,1,1
        return torch.addcmul(x, branch, kept)

    def forward(self, x, attend=None):
        x = self.add(x, self.attn(self.norm1(x), attend))
        return self.add(x, self.mlp(self.norm2(x)))


# ------------------------------------------------------------------------------------------------- ViT


class ViT(nn.Module):
    """Vision transformer with timm's parameter names (paper section 3, released code).

    image_size: pixels, one number or (height, width), for which the position embedding is made; any size that
    `patch_size` divides can be passed to forward. drop_path: rate of the last block, rising linearly from 0.
    class_token: add one, as DINO, MAE and most timm models have; LOCA has none.
    Raises ValueError where a patch does not divide the image or the heads do not divide the width.
    """

    def __init__(self, image_size, patch_size, dim, depth, heads, mlp_dim, drop_path=0.1, class_token=False):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"the patch size {patch_size} does not divide the image size {height}x{width}")
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.patch_size, self.dim, self.heads = patch_size, dim, heads
        self.grid = (height // patch_size, width // patch_size)
        self.grad_checkpoint = 0  # so many blocks are recomputed in the backward pass: slower, less memory
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        tokens = self.grid[0] * self.grid[1] + int(class_token)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, dim) * dim**-0.5)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        _init_linear(self.patch_embed.proj, "lecun")

    def position_embedding(self, grid):
        """The patches' position embedding resized to `grid` = (rows, columns): [1, rows * columns, D]."""
        return resize_position_embedding(self.pos_embed[:, -self.grid[0] * self.grid[1] :], self.grid, grid)

    def forward(self, images, keep=None, position=True, attend=None):
        """Encode images [B, 3, H, W] -> patch tokens [B, K, D], K = N without `keep`.

        keep: indices [K] or [B, K] of the tokens that enter the blocks. position: add the position embedding.
        attend: indices [K'] or [B, K'] of the tokens that all others attend to (the single-image mechanism).
        """
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise ValueError(
                f"the patch size {self.patch_size} does not divide the image {tuple(images.shape[-2:])}"
            )
        x = self.patch_embed(images)  # B,D,rows,columns
        grid = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)  # B,N,D
        if position:
            x = x + self.position_embedding(grid)
        if keep is not None:
            x = take(x, keep)
        if self.cls_token is not None:
            token = self.cls_token + self.pos_embed[:, :1] if position else self.cls_token
            x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)
        for i, block in enumerate(self.blocks):
            if i < self.grad_checkpoint and self.training:
                x = checkpoint(block, x, attend, use_reentrant=False)
            else:
                x = block(x, attend)
        return self.norm(x)[:, 0 if self.cls_token is None else 1 :]


def resize_position_embedding(embedding, old, new):
    """Resize [1, N, D] from grid `old` to grid `new`, both (rows, columns): bilinear, antialiased."""
    if tuple(old) == tuple(new):
        return embedding
    grid = embedding.unflatten(1, old).permute(0, 3, 1, 2)  # 1,D,rows,columns
    return F.interpolate(grid, size=new, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


def sine_positions(grid, dim):
    """A position embedding to be left as it is: sines and cosines of row and column (He et al. 2022). grid: (rows,
    columns) -> [1, N, D]. Raises ValueError where 4 does not divide the width."""
    if dim % 4:
        raise ValueError(f"4 does not divide the width {dim}, as sines and cosines of rows and columns need")
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))  # N,2
    angles = places[..., None] / 10000 ** (torch.arange(dim // 4) / (dim // 4))  # N,2,D/4
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)[None]


def vit(size="B/16", image_size=224, **changes):
    """A ViT of a size named in SIZES; `changes` replace settings. Raises ValueError for another name."""
    if size not in SIZES:
        raise ValueError(f"no ViT size {size!r}; there are {', '.join(SIZES)}")
    return ViT(image_size, **{**SIZES[size], **changes})


# ----------------------------------------------------------------------------------------------- heads


class ProjectionHead(nn.Module):
    """Tokens [..., D] -> unit vectors [..., E] in float32, to compare with normalised prototypes [P, E]."""

    def __init__(self, dim, hidden, bottleneck, prototypes):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in (self.fc1, self.fc2, self.fc3, self.prototypes):
            _init_linear(layer, "lecun")
        with torch.no_grad():
            self.prototypes.weight.copy_(self.normalised_prototypes())

    def normalised_prototypes(self):
        weight = self.prototypes.weight
        return weight / (weight.norm(dim=1, keepdim=True) + 1e-10)

    def forward(self, x):
        x = F.gelu(self.fc1(x), approximate="tanh")
        x = F.gelu(self.fc2(x), approximate="tanh")
        return F.normalize(self.fc3(x).float(), dim=-1)


class PositionPredictor(nn.Module):
    """Query tokens [B, T, D], visible reference tokens [B, K, D] -> logits over positions [B, T, N]."""

    def __init__(self, dim, heads, mlp_dim, positions):
        super().__init__()
        self.norm_query = nn.LayerNorm(dim, eps=1e-6)
        self.norm_context = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.logits = nn.Linear(dim, positions)
        _init_linear(self.logits, "lecun")

    def forward(self, x, context):
        x = x + self.attn(self.norm_query(x), self.norm_context(context))
        x = x + self.mlp(self.norm_mlp(x))
        return self.logits(self.norm(x))


# ------------------------------------------------------------------------------------------------ LOCA


class LOCA(nn.Module):
    """Encoder, projection head and position predictor, and the training loss of all three (paper section 3).

    encoder: a ViT whose image_size is the reference's. prototypes: P; 0 leaves the projection head out, for
    the position loss alone. masking_ratio: eta, the share of reference tokens hidden from the queries.
    masking: see choose_tokens. query_tokens: tokens of the random query that are encoded; None: 5 of 14, as
    published. single_image: no reference; a view without position embedding attends to a random share 1 - eta
    of its own tokens and predicts its own positions (Zhai et al. 2022, the comparison in the paper's figures
    2 and 3).
    """

    def __init__(
        self, encoder, prototypes=4096, head_hidden=2048, bottleneck=256, *, masking_ratio=0.8, masking="consecutive",
        query_tokens=None, student_temperature=0.1, teacher_temperature=0.05, position_weight=1.0, feature_weight=1.0,
        single_image=False,
    ):  # fmt: skip
        super().__init__()
        self.encoder = encoder
        positions = encoder.grid[0] * encoder.grid[1]
        mlp_dim = encoder.blocks[0].mlp.fc1.out_features
        self.predictor = PositionPredictor(encoder.dim, encoder.heads, mlp_dim, positions)
        self.head = ProjectionHead(encoder.dim, head_hidden, bottleneck, prototypes) if prototypes else None
        self.positions = positions
        self.visible_tokens = visible_count(positions, masking_ratio)
        self.query_tokens = positions * 5 // 14 if query_tokens is None else query_tokens
        if not 1 <= self.query_tokens <= positions:
            raise ValueError(f"{self.query_tokens} query tokens cannot be drawn from the view's {positions}")
        self.masking = masking
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.position_weight, self.feature_weight = position_weight, feature_weight
        self.single_image = single_image
        if single_image:
            encoder.pos_embed.requires_grad_(False)

    def forward(self, views, teacher=None, visible=None, keep=None):
        """One training step's loss.

        views: reference [B, 3, S, S], query [B, 3, S, S], query_targets [B, N], focal [B, F, 3, s, s],
        focal_targets [B, F, n]; targets are reference positions, -1 = none. teacher: from make_teacher. None
        trains with the position loss alone: the reference goes through the student, its hidden tokens dropped
        before the encoder, and the queries get no position embedding. visible [K] or [B, K]: reference tokens
        that the queries see; keep: tokens of the random query that are encoded; both drawn when None. Returns
        a dict of scalars: loss, position_loss (ln N at chance), feature_loss, position_accuracy (0..1), its
        part cross_entropy (ln P at chance), and prototype_perplexity (1..P) and target_entropy (0..ln P, of
        every fifth position), which show a collapse.
        """
        context, tokens = self.encode_reference(views, teacher, visible)
        clusters = None if teacher is None else self.assign_clusters(tokens, teacher)
        if self.single_image:
            queries = tokens
            targets = torch.arange(self.positions, device=tokens.device).expand(len(tokens), -1)  # B,N
        else:
            queries, targets = self.encode_queries(views, keep, position=teacher is not None)
        position, accuracy = position_loss(self.predictor(queries, context), targets)
        feature = cross_entropy = perplexity = entropy = torch.zeros((), device=queries.device)
        if clusters is not None:
            feature, cross_entropy, perplexity = feature_loss(
                self.head(queries),
                self.head.normalised_prototypes(),
                clusters,
                targets,
                self.student_temperature,
            )
            entropy = torch.special.entr(clusters[:, ::5]).sum(-1).mean()
        return {
            "loss": self.position_weight * position + self.feature_weight * feature,
            "position_loss": position.detach(),
            "feature_loss": feature.detach(),
            "position_accuracy": accuracy,
            "cross_entropy": cross_entropy,
            "prototype_perplexity": perplexity,
            "target_entropy": entropy,
        }

    def encode_reference(self, views, teacher=None, visible=None):
        """The reference tokens that queries see [B, K, D], and all of them [B, N, D], the teacher's if there
        is one; None where the hidden ones were never encoded. Arguments as in forward."""
        reference = views["reference"]
        if visible is None:
            kind = "unstructured" if self.single_image else self.masking
            visible = choose_tokens(self.positions, self.visible_tokens, kind, reference.device)
        if self.single_image:
            tokens = self.encoder(reference, position=False, attend=visible)  # B,N,D
        elif teacher is None:
            return self.encoder(reference, keep=visible), None
        else:
            with torch.no_grad():
                tokens = teacher.encoder(reference)  # B,N,D
        return take(tokens, visible), tokens

    @torch.no_grad()
    def assign_clusters(self, tokens, teacher):
        """The feature loss's targets: the teacher's reference tokens [B, N, D] -> clusters [B, N, P]."""
        codes = teacher.head(tokens) @ teacher.head.normalised_prototypes().T  # B,N,P
        return sinkhorn(codes.flatten(0, 1).float(), self.teacher_temperature).unflatten(0, tokens.shape[:2])

    def encode_queries(self, views, keep=None, position=True):
        """All query tokens of an image side by side, the random query's, then each focal query's [B, T, D],
        and their targets [B, T]. keep as in forward; position: add the position embedding."""
        focal, targets = views["focal"], views["query_targets"]
        if keep is None:
            keep = choose_tokens(self.positions, self.query_tokens, "unstructured", targets.device)
        tokens, targets = self.encoder(views["query"], keep=keep, position=position), take(targets, keep)
        if focal.shape[1] == 0:
            return tokens, targets
        focal_tokens = self.encoder(focal.flatten(0, 1), position=position)  # BF,n,D
        tokens = torch.cat([tokens, focal_tokens.unflatten(0, focal.shape[:2]).flatten(1, 2)], dim=1)  # B,T,D
        return tokens, torch.cat([targets, views["focal_targets"].flatten(1)], dim=1)


# -------------------------------------------------------------------------------------- correspondence


def patch_targets(reference_box, query_box, flip, view, grid, reference_grid):
    """Which reference patch shows what a query patch shows: the published three nearest-neighbour samplings,
    exact.

    reference_box, query_box: long [..., 4] = top, left, height, width in image pixels. flip: bool [...], the
    query was mirrored left-right. view: the query's side in pixels; grid, reference_grid: patches along a
    side. Returns long [..., grid * grid], the reference position row * reference_grid + column, or -1 where
    the query patch lies outside the reference. All steps in integers, as the released pipeline rounds.
    """
    pixel = (2 * torch.arange(grid, device=query_box.device) + 1) * view // (2 * grid)  # grid

    def along(axis):  # 0: rows, 1: columns -> index in the reference grid or -1, [..., grid]
        begin, size = query_box[..., axis, None], query_box[..., axis + 2, None]
        reference_begin, reference_size = reference_box[..., axis, None], reference_box[..., axis + 2, None]
        inside = begin + torch.minimum((2 * pixel + 1) * size // (2 * view), size - 1) - reference_begin
        index = (2 * inside + 1) * reference_grid // (2 * reference_size)
        return index.masked_fill((inside < 0) | (inside >= reference_size), -1)

    rows, columns = along(0), along(1)
    columns = torch.where(flip[..., None], columns.flip(-1), columns)
    rows, columns = rows[..., :, None], columns[..., None, :]
    target = rows * reference_grid + columns  # ...,grid,grid
    return target.masked_fill((rows < 0) | (columns < 0), -1).flatten(-2)


# --------------------------------------------------------------------------------------------- masking


def visible_count(total, masking_ratio):
    """Tokens left visible of `total`, at least one. Raises ValueError for a masking ratio outside 0..1."""
    if not 0 <= masking_ratio < 1:
        raise ValueError(f"the masking ratio is {masking_ratio}; it is to lie in 0..1, below 1")
    return max(1, int((1 - masking_ratio) * total + 1e-6))  # the 1e-6 undoes (1 - 0.9) * 100 = 9.99...


def choose_tokens(total, count, kind="consecutive", device=None):
    """Indices [count] of tokens out of `total`: one random 'consecutive' run in raster order, the 'first'
    ones, or an 'unstructured' random subset. Drawn on `device` without the host waiting for it. Raises
    ValueError."""
    if not 0 < count <= total:
        raise ValueError(f"{count} tokens cannot be chosen out of {total}")
    if kind == "consecutive":
        return torch.randint(total - count + 1, (1,), device=device) + torch.arange(count, device=device)
    if kind == "first":
        return torch.arange(count, device=device)
    if kind == "unstructured":
        return torch.randperm(total, device=device)[:count]
    raise ValueError(f"no masking {kind!r}; there are consecutive, first, unstructured")


# ---------------------------------------------------------------------------------------------- losses


def position_loss(logits, targets):
    """Cross-entropy over the query patches that have a target: logits [B, T, N], targets [B, T] -> loss and
    accuracy, both 0 for a batch without any target."""
    logits, targets = logits.float().flatten(0, 1), targets.flatten()  # BT,N and BT
    count = (targets >= 0).sum() + 1e-8
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / count
    return loss, (logits.detach().argmax(-1) == targets).sum() / count


@torch.no_grad()
def sinkhorn(codes, temperature=0.05, rounds=3):
    """Spread soft cluster assignments evenly over the prototypes: codes [M, P] float32 -> targets [M, P],
    rows sum to 1.

    Each round divides by the sum over all samples of all devices per prototype, then by the sum over
    prototypes per sample (Caron et al. 2020; here after a softmax, as released).
    """
    targets = (codes / temperature).softmax(-1)
    tiny = torch.finfo(targets.dtype).tiny  # a prototype that no sample comes near stays at 0, not at 0/0
    for _ in range(rounds):
        targets /= sum_over_devices(targets.sum(0)).clamp_min(tiny)
        targets /= targets.sum(1, keepdim=True).clamp_min(tiny)
    return targets


def feature_loss(features, prototypes, clusters, targets, temperature=0.1, rows=None):
    """Cross-entropy with the teacher's clusters, plus the mean-entropy term -> the loss, the cross-entropy
    alone, and the perplexity of the mean prediction.

    features [B, T, E] and prototypes [P, E] unit vectors, clusters [B, N, P] from sinkhorn, targets [B, T].
    The student's code is s = features @ prototypes.T / temperature. A row c of clusters sums to 1, so its
    cross-entropy is logsumexp(s) - c @ s, and c @ s = features @ (c @ prototypes) / temperature: E numbers
    are gathered per patch, not P. rows: tokens whose codes exist at a time; None: what a CPU's cache holds or
    fills a GPU.
    """
    matched = targets >= 0
    weights = matched / (matched.sum() + 1e-8)  # B,T
    centres = (clusters @ prototypes).float()  # B,N,E
    agreement = (features * take(centres, targets.clamp(min=0))).sum(-1) / temperature  # B,T
    if rows is None:
        rows = max(1, 2 ** (20 if features.device.type == "cpu" else 24) // len(prototypes))
    loss, mean = CodeLoss.apply(features.flatten(0, 1), prototypes, weights.flatten(), temperature, rows)
    loss, entropy = loss - (weights * agreement).sum(), torch.special.entr(mean).sum()
    return loss, loss.detach() + entropy, entropy.exp()


class CodeLoss(torch.autograd.Function):
    """What the codes s of features [M, E] and prototypes [P, E] add to the feature loss: the sum of weights [M] *
    logsumexp(s), plus sum(q log q) of q [P], the softmax of s averaged over all M and all devices. Returns both,
    the loss and q.

    Gradients are made along with the value, some rows at a time, so that no [M, P] array ever exists. A row with
    softmax p and weight w has p * (w + (log q - p @ log q) / M) as the gradient of its code.
    """

    @staticmethod
    def forward(ctx, features, prototypes, weights, temperature, rows):
        device = features.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
        matrix = prototypes.to(low)  # once, not for each part
        parts = list(zip((features / temperature).to(low).split(rows), weights[:, None].split(rows)))

        loss = mean = 0
        for part, weight in parts:
            codes = (part @ matrix.T).float()  # R,P
            prediction = codes.softmax(-1)
            logsum = codes.amax(-1, keepdim=True) - prediction.amax(-1, keepdim=True).log()  # R,1
            loss, mean = loss + (weight * logsum).sum(), mean + prediction.sum(0)
        mean = sum_over_devices(mean / len(features)) / devices()
        log_mean = mean.clamp_min(1e-30).log()

        if any(ctx.needs_input_grad):
            of_features, of_prototypes = [], torch.zeros_like(prototypes)
            for part, weight in parts:
                prediction = (part @ matrix.T).float().softmax(-1)  # R,P
                # The mean is the same on every device, and so is its gradient: averaging the parameters' gradients
                # over the devices, as DDP does, makes the 1/devices of the mean.
                gradient = prediction * (log_mean / len(features))
                gradient.addcmul_(prediction, weight - gradient.sum(-1, keepdim=True))  # R,P
                gradient = gradient.to(low)
                of_features.append((gradient @ matrix).float() / temperature)
                of_prototypes += gradient.T @ part
            ctx.save_for_backward(torch.cat(of_features), of_prototypes)
        ctx.mark_non_differentiable(mean)
        return loss + (mean * log_mean).sum(), mean

    @staticmethod
    def backward(ctx, gradient, _):
        of_features, of_prototypes = ctx.saved_tensors
        return gradient * of_features, gradient * of_prototypes, None, None, None


def devices():
    """Processes of torch.distributed; 1 where it is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_devices(x):
    """Sum of x over all processes, in place and without gradient."""
    if devices() > 1:
        dist.all_reduce(x)
    return x


# --------------------------------------------------------------------------------------------- teacher


def make_teacher(model):
    """Frozen copy of a LOCA's encoder and projection head, with their names. Stochastic depth stays active in
    training mode, as released."""
    teacher = nn.ModuleDict({"encoder": copy.deepcopy(model.encoder), "head": copy.deepcopy(model.head)})
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher, model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * model, in place."""
    student = [p for part in (model.encoder, model.head) for p in part.parameters()]
    torch._foreach_lerp_(list(teacher.parameters()), student, 1 - momentum)


# --------------------------------------------------------------------------------------------- weights


def published_to_state_dict(flat):
    """State dict of a LOCA from published parameters, {'encoderblock_0/LayerNorm_0/scale': array, ...}.
    Raises ValueError that names what is missing or left over."""
    left = {name: torch.as_tensor(value) for name, value in flat.items()}
    state = {}

    def get(name):
        if name not in left:
            raise ValueError(f"these are not the parameters of a published LOCA: {name} is missing")
        return left.pop(name)

    def norm(ours, theirs):
        state[f"{ours}.weight"], state[f"{ours}.bias"] = get(f"{theirs}/scale"), get(f"{theirs}/bias")

    def linear(ours, *theirs, inputs=1):
        # kernels are (in, out), in attention (in, heads, head width) or (heads, head width, out)
        kernels = [get(f"{name}/kernel") for name in theirs]
        state[f"{ours}.weight"] = torch.cat([k.flatten(inputs).flatten(0, inputs - 1).T for k in kernels])
        if f"{theirs[0]}/bias" in left:
            state[f"{ours}.bias"] = torch.cat([get(f"{name}/bias").flatten() for name in theirs])

    def mlp(ours, theirs):
        linear(f"{ours}.fc1", f"{theirs}/MlpBlock_0/Dense_0")
        linear(f"{ours}.fc2", f"{theirs}/MlpBlock_0/Dense_1")

    embedding = "ToTokenSequence_0/embedding"
    state["encoder.patch_embed.proj.weight"] = get(f"{embedding}/kernel").permute(3, 2, 0, 1)  # out,in,h,w
    state["encoder.patch_embed.proj.bias"] = get(f"{embedding}/bias")
    position = get("ToTokenSequence_0/posembed_input")
    state["encoder.pos_embed"] = position.reshape(1, -1, position.shape[-1])  # 1,N,D
    for i in range(len({name.split("/")[0] for name in flat if name.startswith("encoderblock_")})):
        ours, theirs = f"encoder.blocks.{i}", f"encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_0"
        norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        linear(f"{ours}.attn.qkv", *(f"{attention}/{part}" for part in ("query", "key", "value")))
        linear(f"{ours}.attn.proj", f"{attention}/out", inputs=2)
        norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1")
        mlp(f"{ours}.mlp", theirs)
    norm("encoder.norm", "encoder_norm")

    block = "cross_attention_block"
    norm("predictor.norm_query", f"{block}/LayerNorm_0")
    norm("predictor.norm_context", f"{block}/LayerNorm_1")
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        linear(f"predictor.attn.{ours}", f"{block}/MultiHeadDotProductAttention_0/{theirs}")
    linear("predictor.attn.proj", f"{block}/MultiHeadDotProductAttention_0/out", inputs=2)
    norm("predictor.norm_mlp", f"{block}/LayerNorm_2")
    mlp("predictor.mlp", block)
    norm("predictor.norm", "final_norm")
    linear("predictor.logits", "position_predictor")

    head = "projection_head_for_clustering_prediction"
    if f"{head}/Dense_0/kernel" in left:  # absent where the position loss was used alone
        for i in range(3):
            linear(f"head.fc{i + 1}", f"{head}/Dense_{i}")
        linear("head.prototypes", f"{head}/prototypes")
    if left:
        raise ValueError(f"these are not the parameters of a published LOCA: {_some(left)} left over")
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _some(names, most=6):
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_DTYPES = "float32 float64 float16 bfloat16 int32 int64 uint8 int8 uint32 bool".split()


def _read_published(data, branch):
    """Published parameters of a flax msgpack file: bytes -> {'a/b/c': tensor}. Raises ValueError."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("reading published checkpoints needs msgpack: pip install msgpack") from error

    def array(code, payload):
        if code not in (1, 3):  # 1: an array, 3: a numpy scalar, as (shape, dtype name, bytes)
            return None
        shape, dtype, buffer = msgpack.unpackb(payload)
        if dtype not in _DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"an array of type {dtype!r} and shape {shape!r}")
        kind = getattr(torch, dtype)
        if math.prod(shape) * kind.itemsize != len(buffer):
            raise ValueError(f"an array of shape {shape} and type {dtype} in {len(buffer)} bytes")
        return (
            torch.frombuffer(bytearray(buffer), dtype=kind).reshape(shape) if buffer else torch.empty(shape)
        )

    def leaves(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict) and "__msgpack_chunked_array__" in value:  # an array of over 1 GiB
                chunks = [value["chunks"][key] for key in sorted(value["chunks"], key=int)]
                shape = [value["shape"][key] for key in sorted(value["shape"], key=int)]
                yield f"{prefix}{name}", torch.cat([chunk.flatten() for chunk in chunks]).reshape(shape)
            elif isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}/")
            elif isinstance(value, torch.Tensor):
                yield f"{prefix}{name}", value

    try:
        state = msgpack.unpackb(data, ext_hook=array, strict_map_key=False)
        tree = state["ema_params" if branch == "teacher" else "params"]
        return dict(leaves(tree))
    except Exception as error:  # whatever a damaged file makes msgpack, the tree or an array say
        raise ValueError(f"it is not a published train state ({type(error).__name__}: {error})") from error


def load_weights(path, branch="student"):
    """State dict with LOCA's names ('encoder.blocks.0...') from a file of weights.

    Reads this project's checkpoints, published flax files (with msgpack), and PyTorch ViTs named as timm,
    DINO, iBOT or MAE name them, which give 'encoder.' entries alone. branch: 'student' or 'teacher', where a
    file holds both. Raises ValueError for a file that holds none of these; a pickle is read with
    weights_only=True.
    """
    with open(path, "rb") as file:
        of_torch = file.read(2) in (b"PK", b"\x80\x02")  # torch.save's formats
        file.seek(0)
        data = None if of_torch else file.read()
    try:
        if of_torch:
            return _find_vit(torch.load(path, map_location="cpu", weights_only=True), branch)
        return published_to_state_dict(_read_published(data, branch))
    except ImportError:
        raise
    except Exception as error:  # torch.load has no exception of its own for a damaged or unsafe file
        first_line = str(error).split("\n")[0]
        raise ValueError(f"cannot read weights from {path}: {first_line}") from error


def _find_vit(tree, branch):
    """The ViT in a nested state dict, whatever wraps it, with 'encoder.' before its timm names."""
    wanted = "patch_embed.proj.weight"
    names = (branch, "model", "state_dict", "teacher", "student")
    inner = [tree[name] for name in names if name in tree] if isinstance(tree, dict) else []
    for state in [*inner, tree]:
        ends = [key for key in state if str(key).endswith(wanted)] if isinstance(state, dict) else []
        if ends:
            prefix = ends[0][: -len(wanted)]
            if prefix == "encoder.":  # a LOCA of ours: its head and predictor belong to it
                return dict(state)
            return {f"encoder.{k[len(prefix) :]}": v for k, v in state.items() if k.startswith(prefix)}
    raise ValueError(f"no ViT in it: no entry ends in {wanted}")


@torch.no_grad()
def load_encoder(encoder, state):
    """Load 'encoder.' entries of a state dict (see load_weights) into a ViT and return what was done, in one
    line.

    The position embedding is resized to the ViT's grid (a stored one of another size is taken as square), a
    class token that the ViT does not have is dropped. Raises ValueError, and changes nothing, where the ViT
    would be filled only in part or the file's ViT has parts that this one has not; it lists both.
    """
    state = {key[len("encoder.") :]: value for key, value in state.items() if key.startswith("encoder.")}
    own, notes, (rows, columns) = encoder.state_dict(), [], encoder.grid
    prefix, kept = int("cls_token" in state), encoder.cls_token is not None
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        position = state["pos_embed"][:, prefix:]
        count, side = position.shape[1], math.isqrt(position.shape[1])
        if count != rows * columns:
            if side * side != count:
                raise ValueError(f"a position embedding of {count} tokens is not one of a square image")
            position = resize_position_embedding(position.float(), (side, side), encoder.grid)
            notes.append(f"position embedding resized from {side}x{side} to {rows}x{columns}")
        state["pos_embed"] = torch.cat([state["pos_embed"][:, : prefix * kept], position], dim=1)
    if prefix:
        notes.append(f"class token {'kept' if kept else 'dropped'}")
        if not kept:
            del state["cls_token"]
    missing = [key for key in own if key not in state]
    wrong = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    left = [key for key in state if key not in own]
    foreign = [key for key in left if re.match(r"(blocks|patch_embed|norm|pos_embed|reg_token)\b", key)]
    if missing or wrong or foreign:
        lists = (("missing", missing), ("of another shape", wrong), ("left over", left))
        said = "; ".join(f"{name}: {_some(keys)}" for name, keys in lists if keys)
        raise ValueError(f"the weights do not fit this encoder ({len(own)} entries): {said}")
    encoder.load_state_dict({key: state[key] for key in own})
    notes += [f"left over: {_some(left)}"] if left else []
    return "; ".join([f"{len(own)} tensors loaded", *notes])
