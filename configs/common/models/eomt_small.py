"""EoMT for one's own data: on DINOv2-S, with queries in the last 3 of its 12 blocks."""

from .eomt import model

model.update(num_queries=100, config_kwargs=dict(num_blocks=3))
model.backbone.update(model_name="vit_small_patch14_reg4_dinov2", in_channels="${dataset.channels}")
