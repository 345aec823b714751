"""The published shapes: models behind the figures that planning is compared with.

All float32, random weights, no dropout unless asked for. `keep_all_mib` is the peak of one real
warm step (AdamW with foreach=False, gradients set to none) on the CPU, as published; each entry's
own peak agrees to the last digit unless its note says otherwise.
"""

from __future__ import annotations

from benchmarks import shapes
from benchmarks.shapes import Case, Entry

__all__ = ["ZOO", "Case", "Entry"]

ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="gpt2s",
            make=lambda dropout: shapes.gpt2(
                layers=4, width=256, heads=4, vocabulary=2000, batch=4, tokens=128, dropout=dropout
            ),
            keep_all_mib=111.18,
        ),
        Entry(
            name="gpt2",
            make=lambda dropout: shapes.gpt2(
                layers=12, width=768, heads=12, vocabulary=8000, batch=4, tokens=256,
                dropout=dropout,
            ),
            keep_all_mib=2154.47,
        ),
        Entry(
            name="gpt2v",
            make=lambda dropout: shapes.gpt2(
                layers=6, width=512, heads=8, vocabulary=50257, batch=4, tokens=256,
                dropout=dropout,
            ),
            keep_all_mib=1441.7,
        ),
        Entry(
            name="llama",
            make=lambda dropout: shapes.llama(
                layers=16, width=512, inner=1376, heads=8, key_value_heads=4, vocabulary=8000,
                batch=4, tokens=256, dropout=dropout,
            ),
            keep_all_mib=1357.46,
        ),
        Entry(
            name="llamav",
            make=lambda dropout: shapes.llama(
                layers=8, width=512, inner=1376, heads=8, key_value_heads=4, vocabulary=32000,
                batch=4, tokens=256, dropout=dropout,
            ),
            keep_all_mib=1338.0,
        ),
        Entry(
            name="t5",
            make=lambda dropout: shapes.t5(
                layers=6, width=512, inner=2048, heads=8, vocabulary=8000, batch=4, tokens=192,
                dropout=dropout,
            ),
            keep_all_mib=1001.53,
        ),
        Entry(
            name="vit",
            make=lambda dropout: shapes.vit(
                layers=12, width=384, inner=1536, heads=6, pixels=224, patch=16, labels=100,
                batch=8, dropout=dropout,
            ),
            keep_all_mib=710.89,
        ),
        Entry(
            name="resnet50",
            make=lambda _dropout: shapes.resnet(pixels=160, labels=100, batch=8),
            keep_all_mib=661.17,
            note="no dropout in the architecture; 655.34 MiB without the convolutions' workspace",
        ),
        Entry(
            name="convnext",
            make=lambda dropout: shapes.convnext(pixels=160, labels=100, batch=8, dropout=dropout),
            keep_all_mib=817.08,
            note="dropout drops paths; 788.11 MiB without the convolutions' workspace",
        ),
        Entry(
            name="unet",
            make=lambda dropout: shapes.unet(
                levels=4, width=32, pixels=128, batch=4, dropout=dropout
            ),
            keep_all_mib=199.60,
            note="194.08 MiB without the convolutions' workspace",
        ),
        Entry(
            name="chain200",
            make=lambda dropout: shapes.chain(blocks=200, width=128, rows=2048, dropout=dropout),
            keep_all_mib=882.60,
            note="the published head and loss are not known: 882.43 MiB with ours (-0.02 %)",
        ),
        Entry(
            name="chain32",
            make=lambda dropout: shapes.chain(blocks=32, width=128, rows=2048, dropout=dropout),
            note="short enough that the dynamic programme of chains is exact to a few KiB",
        ),
        Entry(
            name="chain6",
            make=lambda dropout: shapes.chain(blocks=6, width=16, rows=64, dropout=dropout),
            note="for tests",
        ),
        Entry(
            name="moe",
            make=lambda dropout: shapes.moe(
                layers=4, width=256, inner=512, heads=4, key_value_heads=2, experts=4, used=2,
                vocabulary=2000, batch=2, tokens=64, dropout=dropout,
            ),
            keep_all_mib=1774.44,
            note="the batch follows from the published peak",
        ),
        Entry(
            name="six_blocks",
            make=lambda dropout: shapes.prenorm_blocks(
                blocks=6, width=128, heads=4, batch=8, tokens=256, dropout=dropout
            ),
            note="published: 149.8 MiB above what is alive before one forward and backward, "
            "without an optimizer; 149.74 here",
        ),
        Entry(
            name="vgg19",
            make=lambda dropout: shapes.vgg19(pixels=224, labels=1000, batch=8, dropout=dropout),
        ),
        Entry(
            name="llama8b",
            make=lambda dropout: shapes.llama(
                layers=32, width=4096, inner=14336, heads=32, key_value_heads=8,
                vocabulary=128256, batch=4, tokens=2048, dropout=dropout,
            ),
            note='8 billion parameters: build it with device="meta"',
        ),
    )
}  # fmt: skip
