"""Mask2Former for one's own data: half as wide as that of the paper, and with fewer layers.

The paper's has 6 layers in its encoder and 9 in its decoder; transformers counts one more in
decoder_layers. The losses look at 12544 points of a mask as in the paper: of a nucleus that covers
a thousandth of the image that is a dozen, and with fewer the matching is a lottery.
"""

from .mask2former import model

model.config_kwargs.update(
    hidden_dim=128,
    feature_size=128,
    mask_feature_size=128,
    encoder_layers=2,
    encoder_feedforward_dim=512,
    decoder_layers=4,
    dim_feedforward=1024,
)
model.backbone.update(model_name="tf_efficientnet_lite0", in_channels="${dataset.channels}")
