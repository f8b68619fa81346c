"""semantic FPN on one's own data: set dataset.train_images, train_labels, val_images, val_labels
and num_classes. The images may be a pattern: dataset.train_images='images/train_*.jpg', or a text
file of their paths. dataset.classes are the names of the classes."""

from detbackbones.data.semantic import register_semantic, sem_seg_evaluator
from detectron2.config import LazyCall as L

from ..common.finetune import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.semantic_fpn import model

for key in ("train_json", "val_json"):
    dataset.pop(key)
dataset.update(train_labels="", val_labels="", num_classes=0)

for split, loader in (("train", dataloader.train), ("val", dataloader.test)):
    loader.dataset.names = L(register_semantic)(
        image_root=f"${{dataset.{split}_images}}",
        label_root=f"${{dataset.{split}_labels}}",
        num_classes="${dataset.num_classes}",
        class_names="${dataset.classes}",
        partial=split == "val",
    )
    loader.dataset.filter_empty = False
del loader  # or it would be a part of the config
dataloader.train.mapper.use_instance_mask = False
dataloader.evaluator = L(sem_seg_evaluator)(dataset_name="${..test.dataset.names}")

model.sem_seg_head.num_classes = "${dataset.num_classes}"
model.backbone.out_channels = 128
model.backbone.bottom_up.update(
    model_name="tf_efficientnet_lite0", in_channels="${dataset.channels}"
)
model.pixel_mean.in_channels = model.pixel_std.in_channels = "${dataset.channels}"
