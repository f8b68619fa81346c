"""mask rcnn, timm ViT-B/16 with SimpleFeaturePyramid, COCO 1x with AdamW, layer-wise lr decay."""

from .timm_convnext_t_fpn_1x import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.bottom_up.update(model_name="vit_base_patch16_224", drop_path_rate=0.1)
optimizer.weight_decay = 0.1
optimizer.params.layer_decay = 0.7
