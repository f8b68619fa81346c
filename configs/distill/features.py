"""A backbone learns to give what another gives: set dataset.images, a folder, a pattern or a text
file of paths, and the names of both models. A tenth of the images is for validation."""

from detbackbones import TimmBackbone
from detbackbones.data.unlabelled import register_images
from detbackbones.training.distillation import FeatureDistiller, SimilarityEvaluator
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from ..common.finetune import dataloader, lr_multiplier, optimizer, train  # noqa: F401

dataset = dict(
    images="",
    channels=3,
    max_value=None,  # what becomes 255, of images of more than 8 bits
    verify=False,
    train_sizes=[224, 288, 352, 448],  # length of an image's shorter side in pixels
    size=224,  # of the crops that are learned from, in pixels
)
model = L(FeatureDistiller)(
    backbone=L(TimmBackbone)(model_name="", final_norm=False, in_channels="${dataset.channels}"),
    teacher=L(TimmBackbone)(
        model_name="",
        pretrained=True,
        norm="FrozenBN",
        freeze_at=5,
        in_channels="${dataset.channels}",
    ),
)
for part, loader in (("train", dataloader.train), ("val", dataloader.test)):
    loader.dataset.names = L(register_images)(image_root="${dataset.images}", part=part)
    loader.dataset.filter_empty = False
    loader.mapper.use_instance_mask = False
del part, loader  # or they would be parts of the config
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeShortestEdge)(
        short_edge_length="${dataset.train_sizes}", max_size=1000000, sample_style="choice"
    ),
    L(T.RandomCrop)(crop_type="absolute", crop_size=["${dataset.size}", "${dataset.size}"]),
]
dataloader.test.mapper.augmentations[0].update(
    short_edge_length="${dataset.size}", max_size=1000000
)
dataloader.train.mixing = None
dataloader.train.total_batch_size = 16
dataloader.evaluator = L(SimilarityEvaluator)()

optimizer.lr = 1e-3
train.update(max_iter=2000, eval_period=1000, pictures=0)
