"""Settings of `detbackbones train`."""

from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train
train.update(
    device="auto",  # a GPU if there is one
    seed=0,  # of weights, order, augmentation and sampling; not negative
    amp=dict(enabled=False, dtype="bfloat16"),  # or float16, with a gradient scaler
    clip_grad=dict(enabled=False, params=dict(max_norm=1.0, norm_type=2.0)),
    accumulation_steps=1,  # parts that a batch goes through the model in, to need less memory
    model_ema=dict(enabled=False, decay=0.9998),  # what is evaluated: an average of the weights
    fsdp=False,  # divide weights, gradients and moments among the processes, to need less memory
    feature_cache=0,  # GiB of the device for maps of a frozen backbone, each computed once
    best_metric=None,  # of model_best.pth, such as "bbox/AP50"; by default the evaluator's first
    patience=None,  # evaluations without a better one, after which the training ends
    trackers=[],  # "wandb", "mlflow"
    pictures=8,  # images drawn with their predictions after the last evaluation
    score_threshold=0.5,  # of the objects that are drawn
    allow_partial=False,  # init_checkpoint may have less than half of the backbone
    allow_pickle=False,  # init_checkpoint may be one of detectron2's .pkl files
)
