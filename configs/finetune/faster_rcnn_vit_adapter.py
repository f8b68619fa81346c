"""faster rcnn on a plain ViT with a spatial tuning adapter, on one's own data: set
dataset.train_json, train_images, val_json, val_images."""

from detbackbones import SpatialTuningAdapter, TimmBackbone
from detectron2.config import LazyCall as L

from .faster_rcnn import dataloader, dataset, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = L(SpatialTuningAdapter)(
    net=L(TimmBackbone)(
        model_name="vit_small_patch14_reg4_dinov2",
        pretrained=True,
        patch_size=16,
        out_depths=[0.5, 0.75, 1],
        in_channels="${dataset.channels}",
        model_kwargs={},
    ),
    in_channels="${dataset.channels}",
)
optimizer.update(lr=2e-4)
optimizer.params.layer_decay = 0.8
for key in ("pixel_mean", "pixel_std"):
    model[key].model_name = "${..backbone.bottom_up.net.model_name}"
del key  # or it would be a part of the config
