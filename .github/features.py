"""python .github/features.py FILE...: draw features.png, the features of encoders in false colors.

The first row shows held-out drawn scenes; each further row shows the features of one encoder, whose file may be of
any kind that loca.load_vit reads.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))
import loca
import train

SCENES, HEIGHT, WIDTH, GAP = (0, 1, 3, 9), 192, 240, 4

scenes = [torch.from_numpy(train.draw_scene(10**6 + i, WIDTH, HEIGHT)[0]) for i in SCENES]
images = train.normalize(torch.stack(scenes).permute(0, 3, 1, 2))
rows = [scenes]
for file in sys.argv[1:]:
    vit = loca.load_vit(file)
    with torch.no_grad():
        tokens = vit(images)  # B,N,D
    torch.manual_seed(0)
    colors = torch.pca_lowrank(tokens.flatten(0, 1), q=6)[0][:, :3]  # three principal components: BN,3
    low, high = colors.quantile(0.01, 0), colors.quantile(0.99, 0)
    colors = (255 * (colors - low) / (high - low)).clamp(0, 255).byte()
    colors = colors.unflatten(0, (len(scenes), HEIGHT // vit.patch_size, -1))  # B,rows,columns,3
    rows.append(list(colors))

sheet = Image.new("RGB", (len(scenes) * (WIDTH + GAP), len(rows) * (HEIGHT + GAP)), "white")
for y, row in enumerate(rows):
    for x, pixels in enumerate(row):
        picture = Image.fromarray(pixels.numpy()).resize((WIDTH, HEIGHT), Image.NEAREST)
        sheet.paste(picture, (x * (WIDTH + GAP), y * (HEIGHT + GAP)))
sheet.quantize(256).save(Path(__file__).with_name("features.png"), optimize=True)
