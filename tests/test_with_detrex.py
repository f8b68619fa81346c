"""Both configs in detrex/, where detrex itself can be imported.

PYTHONPATH=/path/to/detrex pytest tests/test_with_detrex.py
"""

import importlib.util
from contextlib import nullcontext

import pytest
import torch
from detbackbones import TimmBackbone, TransformersDetector
from detbackbones.config import get_config
from detbackbones.training.overrides import apply_overrides
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from torch.overrides import TorchFunctionMode

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("detrex") is None, reason="detrex is not installed"
)
SMALL = ["model.num_queries=20", "model.dn_number=4", "model.select_box_nums_for_evaluation=10"]
SMALL += ["model.transformer.encoder.num_layers=1", "model.transformer.decoder.num_layers=2"]
SMALL += ["model.transformer.two_stage_num_proposals=20", "train.device=cpu"]
TIMM, TORCHVISION = "detrex/dino_timm_4scale_12ep.py", "detrex/dino_torchvision_4scale_12ep.py"


class OnCPU(TorchFunctionMode):
    """detrex writes .cuda() and .to("cuda") in its denoising and its loss: they do nothing here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        args = ["cpu" if isinstance(arg, str) and arg == "cuda" else arg for arg in args]
        return function(*args, **(kwargs or {}))


def image(height: int, width: int) -> dict:
    instances = Instances((height, width))
    instances.gt_boxes = Boxes([[10.0, 12.0, 60.0, 70.0]])
    instances.gt_classes = torch.tensor([1])
    picture = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return dict(image=picture, height=height, width=width, instances=instances)


@pytest.mark.parametrize(
    "config, backbone",
    [
        (TIMM, ["model_name=resnet18", "pretrained=False"]),
        (TIMM, ["model_name=convnext_atto", "pretrained=False", "norm=''"]),
        (TIMM, ["model_name=test_vit", "pretrained=False", "norm=''", "out_features=null"]),
        (TIMM, ["model_name=swin_tiny_patch4_window7_224", "pretrained=False", "norm=''"]),
        (TORCHVISION, ["model_name=resnet18", "weights=null"]),
    ],
    ids=["resnet", "convnext", "vit", "swin", "torchvision"],
)
def test_a_step_and_an_answer_at_odd_sizes(config, backbone):
    """DINO pads to the largest image of the batch alone; the finest level has stride 8."""
    torch.manual_seed(0)
    cfg = get_config(config)
    apply_overrides(cfg, [*SMALL, *(f"model.backbone.{word}" for word in backbone)])
    model = instantiate(cfg.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = [image(131, 157), image(99, 140)]
    with nullcontext() if torch.cuda.is_available() else OnCPU():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    trained = [p for p in model.backbone.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    optimizer.step()
    with torch.no_grad():
        answers = model.eval()([{**image(131, 157), "height": 262, "width": 314}])
    strides = [shape.stride for shape in model.backbone.output_shape().values()]
    assert strides == ([16] if "vit" in backbone[0] else [8, 16, 32])
    (found,) = answers
    assert found["instances"].image_size == (262, 314) and len(found["instances"]) == 10


def test_our_dino_is_that_of_detrex():
    """With the weights of detrex's: the same answers, and the same losses but those of noise."""
    torch.manual_seed(0)
    cfg = get_config(TIMM)
    backbone = ["model_name=resnet18", "pretrained=False"]
    apply_overrides(cfg, [*SMALL, *(f"model.backbone.{word}" for word in backbone)])
    with nullcontext() if torch.cuda.is_available() else OnCPU():
        theirs = instantiate(cfg.model)
    for parameter in theirs.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    ours = TransformersDetector(
        architecture="dino",
        backbone=TimmBackbone("resnet18", norm="FrozenBN", out_features=["res3", "res4", "res5"]),
        num_classes=80,
        num_queries=20,
        test_topk_per_image=10,
        config_kwargs={
            "encoder_layers": 1,
            "decoder_layers": 2,
            "position_temperature": 10000,
            "position_offset": -0.5,
        },
    )
    state = ours.convert_weights(theirs.state_dict())
    assert ours.load_state_dict(state, strict=False).missing_keys == []
    batch = [image(256, 320), image(224, 288)]
    with nullcontext() if torch.cuda.is_available() else OnCPU():
        expected = theirs.train()(batch)
        with torch.no_grad():
            (answer,) = theirs.eval()(batch[:1])
    losses = ours.train()(batch)
    for key, loss in losses.items():
        if "dn" not in key:
            torch.testing.assert_close(
                loss, expected[key.replace("_ce", "_class")], rtol=1e-4, atol=0
            )
    with torch.no_grad():
        found, answer = ours.eval()(batch[:1])[0]["instances"], answer["instances"]
    torch.testing.assert_close(found.scores, answer.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pred_boxes.tensor, answer.pred_boxes.tensor, rtol=0, atol=0.01)
    assert found.pred_classes.tolist() == answer.pred_classes.tolist()
