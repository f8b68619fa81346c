"""One's own data, and a schedule for a small data set on one GPU or a CPU."""

from detbackbones.data.augmentation import build_augmentations
from detbackbones.data.coco import register_coco
from detbackbones.data.mixing import Mixing
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from .coco import dataloader
from .optim import AdamW as optimizer
from .train import train

dataset = dict(
    train_json="",
    train_images="",
    val_json="",
    val_images="",
    classes=None,  # names of those to take; by default all that the training data have
    channels=3,  # of the images; others than 1 and 3 are in TIFF or .npy files
    max_value=None,  # what becomes 255, of images of more than 8 bits
    verify=False,  # read all images before the training, to find those that are wrong
    train_sizes=[256, 288, 320],  # length of an image's shorter side in pixels, drawn from these
    val_size=288,
    max_size=640,  # of the longer side
    augmentation=dict(  # besides resizing and flipping; see build_augmentations
        scale_jitter=None,  # such as [0.5, 2.0], in squares of the largest of train_sizes
        crop=0.0,  # probability
        zoom_out=0.0,  # probability
        color=0.0,  # strength, such as 0.4
        upright=True,  # False for pictures without an up, such as micrographs
    ),
    mixing=dict(  # images made of several; probabilities
        mosaic=0.0,
        mixup=0.0,
        copy_paste=0.0,  # needs masks
        until=0.8,  # fraction of train.max_iter
    ),
)

dataloader.train.dataset.names = L(register_coco)(
    json_file="${dataset.train_json}",
    image_root="${dataset.train_images}",
    classes="${dataset.classes}",
)
dataloader.test.dataset.names = L(register_coco)(
    json_file="${dataset.val_json}",
    image_root="${dataset.val_images}",
    classes="${dataset.classes}",
    like="${dataloader.train.dataset.names}",
)
for loader in (dataloader.train, dataloader.test):
    loader.mapper.update(channels="${dataset.channels}", max_value="${dataset.max_value}")
del loader  # or it would be a part of the config
dataloader.train.mapper.augmentations = L(build_augmentations)(
    sizes="${dataset.train_sizes}",
    max_size="${dataset.max_size}",
    **{key: f"${{dataset.augmentation.{key}}}" for key in dataset["augmentation"]},
)
dataloader.test.mapper.augmentations[0].update(
    short_edge_length="${dataset.val_size}", max_size="${dataset.max_size}"
)
dataloader.train.update(total_batch_size=4, num_workers=2)
dataloader.train.mixing = L(Mixing)(
    **{key: f"${{dataset.mixing.{key}}}" for key in dataset["mixing"]},
    max_iter="${train.max_iter}",
)
dataloader.test.num_workers = 2

optimizer.lr = 5e-4
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=0.05,  # fraction of train.max_iter
    warmup_factor=0.01,
)
train.update(max_iter=1000, eval_period=500)
train.checkpointer.update(period=250, max_to_keep=2)
train.clip_grad.enabled = True
