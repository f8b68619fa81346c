"""The ResNet-50 backbones and the pyramids over them; a config changes the model's name."""

from detbackbones import TimmBackbone, TorchvisionBackbone, build_pyramid
from detbackbones.backbones.timm_backbone import pixel_mean, pixel_std
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

timm_r50 = L(TimmBackbone)(
    model_name="resnet50", pretrained=True, norm="FrozenBN", freeze_at=2, model_kwargs={}
)
torchvision_r50 = L(TorchvisionBackbone)(
    model_name="resnet50", weights="DEFAULT", norm="FrozenBN", freeze_at=2, model_kwargs={}
)

vit_s_pyramid = L(build_pyramid)(  # for detectors of levels from stride 8
    bottom_up=L(TimmBackbone)(
        model_name="vit_small_patch16_224",
        pretrained=True,
        norm="",
        freeze_at=0,
        drop_path_rate=0.1,
        model_kwargs={},
    ),
    out_channels=256,
    min_level=3,
)
fpn = L(build_pyramid)(bottom_up=timm_r50, out_channels=256, top_block=L(LastLevelMaxPool)())
retinanet_fpn = L(build_pyramid)(
    bottom_up=timm_r50,
    out_channels=256,
    min_level=3,
    top_block=L(LastLevelP6P7)(
        in_channels="${..out_channels}", out_channels="${..out_channels}", in_feature="p5"
    ),
)

# RGB images, with the mean and deviation that the weights were trained with
timm_pixels = dict(
    pixel_mean=L(pixel_mean)(model_name="${..backbone.bottom_up.model_name}"),
    pixel_std=L(pixel_std)(model_name="${..backbone.bottom_up.model_name}"),
)
torchvision_pixels = dict(
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
)
