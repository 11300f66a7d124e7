"""python .github/mae.py PHOTOS OUT [STEPS]: masked autoencoding (He et al. 2022) with the encoder of --small.

PHOTOS: a folder of images. OUT: file for the encoder's weights, for finetune_seg.py's --init OUT.
STEPS: number of training steps, 2700 by default.
"""

import sys
import time
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import loca  # noqa: E402
import train  # noqa: E402

SIZE, PATCH, DIM, DECODER_DIM, BATCH = 96, 8, 192, 96, 64
SIDE = SIZE // PATCH  # patches per side
PATCHES, VISIBLE = SIDE**2, SIDE**2 // 4


def sine_positions(side, dim):
    """Fixed position embedding: sines and cosines of row and column -> [1, side * side, dim]."""
    index = torch.arange(side)
    positions = torch.cartesian_prod(index, index)  # N,2
    angles = positions[..., None] / 10000 ** (torch.arange(dim // 4) / (dim // 4))  # N,2,D/4
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)[None]


class MAE(nn.Module):
    """Encode a quarter of the patches, and predict the pixels of the others, normalized per patch."""

    def __init__(self):
        super().__init__()
        self.encoder = loca.ViT(SIZE, PATCH, DIM, depth=6, heads=3, mlp_dim=768, drop_path=0)
        self.encoder.pos_embed = nn.Parameter(sine_positions(SIDE, DIM), requires_grad=False)
        self.to_decoder = nn.Linear(DIM, DECODER_DIM)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, DECODER_DIM))
        self.register_buffer("positions", sine_positions(SIDE, DECODER_DIM))
        self.decoder = nn.Sequential(*(loca.Block(DECODER_DIM, 3, 4 * DECODER_DIM) for _ in range(2)))
        self.to_pixels = nn.Sequential(nn.LayerNorm(DECODER_DIM), nn.Linear(DECODER_DIM, 3 * PATCH**2))

    def forward(self, images):
        """Normalized images [B, 3, SIZE, SIZE] -> mean squared error over the hidden patches."""
        order = torch.rand(len(images), PATCHES).argsort(1)  # B,N: the first VISIBLE patches are encoded
        tokens = self.to_decoder(self.encoder(images, keep=order[:, :VISIBLE]))
        hidden = self.mask_token.expand(len(images), PATCHES - VISIBLE, -1)
        tokens = loca.gather_tokens(torch.cat([tokens, hidden], 1), order.argsort(1))  # back in image order
        predictions = self.to_pixels(self.decoder(tokens + self.positions))
        targets = nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)  # B,N,3*PATCH**2
        targets = nn.functional.layer_norm(targets, targets.shape[-1:])
        return loca.gather_tokens((predictions - targets).square(), order[:, VISIBLE:]).mean()


def main(folder, out, steps=2700):
    steps, device = int(steps), torch.device("cpu")
    precision = train.default_precision(device)
    torch.manual_seed(0)
    names = train.find_images(folder)
    photos = [train.Images(folder, names).image(i) for i in range(len(names))]
    photos = [v2.functional.resize(photo, 160) for photo in photos]
    crop = v2.Compose([v2.RandomResizedCrop(SIZE, (0.2, 1)), v2.RandomHorizontalFlip()])

    model, start = MAE(), time.time()
    groups = train.weight_decay_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, 0.001, (0.9, 0.95), fused=True)
    warmup = 0.05 if steps > 20 else 0.0  # OneCycleLR divides by zero if the warm-up is a single step
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.001, steps, pct_start=warmup, cycle_momentum=False
    )
    for step in range(steps):
        images = torch.stack([crop(photos[i]) for i in torch.randint(len(photos), (BATCH,))])
        with train.autocast(precision, device):
            loss = model(train.normalize(images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"{step}/{steps} loss {loss:.3f}, {(time.time() - start) / 60:.1f} minutes", flush=True)
    torch.save(model.encoder.state_dict(), out)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
